/* Products with some rows of a dense weight: AVX2. */
#define LANES 8
#define ACTIVE(name) name##_avx2
#include "active.h"
