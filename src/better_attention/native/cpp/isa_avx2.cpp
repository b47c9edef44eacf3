#define BA_ISA ba_avx2
#define BA_LANES 8
#define BA_WIDE 2
#include "kernels.hpp"
