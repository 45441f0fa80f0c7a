/* The layout of unstructured bf16 again, for many tokens. */
#include "bitmask.h"
#include "wide.h"

_Static_assert((int)MASK_COLUMNS <= (int)PANEL_COLUMNS, "a panel holds a block");

const struct format bitmaskwide_format = WIDE_FORMAT(MASK_COLUMNS, 0);
