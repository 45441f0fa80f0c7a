/* Products of a few tokens with a dense weight: NEON. */
#define LANES 4
#define FEW(name) name##_neon
#include "few.h"
