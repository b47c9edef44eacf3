#define BA_ISA ba_neon
#define BA_LANES 4
#define BA_WIDE 4
#include "kernels.hpp"
