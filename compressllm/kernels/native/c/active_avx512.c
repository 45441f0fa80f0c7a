/* Products with some rows of a dense weight: AVX-512. */
#define LANES 16
#define ACTIVE(name) name##_avx512
#include "active.h"
