#define BA_ISA ba_portable
#define BA_LANES 4
#define BA_WIDE 2
#include "kernels.hpp"
