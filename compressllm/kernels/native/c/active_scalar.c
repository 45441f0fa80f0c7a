/* Products with some rows of a dense weight: Any machine. */
#define LANES 4
#define ACTIVE(name) name##_scalar
#include "active.h"
