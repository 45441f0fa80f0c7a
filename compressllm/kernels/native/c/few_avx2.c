/* Products of a few tokens with a dense weight: AVX2. */
#define LANES 8
#define FEW(name) name##_avx2
#include "few.h"
