/* The bf16 2:4 layout again, for many tokens. */
#include "wide.h"

const struct format bf16wide_format = WIDE_FORMAT(TILE_COLUMNS, 9 * BLOCK_ROWS * 4);
