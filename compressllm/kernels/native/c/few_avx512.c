/* Products of a few tokens with a dense weight: AVX-512. */
#define LANES 16
#define FEW(name) name##_avx512
#include "few.h"
