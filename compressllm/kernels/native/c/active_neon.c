/* Products with some rows of a dense weight: NEON. */
#define LANES 4
#define ACTIVE(name) name##_neon
#include "active.h"
