/* Products of a few tokens with a dense weight: Any machine. */
#define LANES 4
#define FEW(name) name##_scalar
#include "few.h"
