#define BA_ISA ba_avx512
#define BA_LANES 16
#define BA_WIDE 4
#include "kernels.hpp"
