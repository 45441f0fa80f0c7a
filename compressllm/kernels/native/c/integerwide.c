/* The layouts of quantised 2:4 weights again, for many tokens: weights are code times scale, rounded to bf16. */
#include "integer.h"
#include "wide.h"

#define FORMAT(bits, group) \
    const struct format int##bits##_g##group##wide_format = \
        WIDE_FORMAT(group, SCALES_BYTES + group / SPAN * SPAN_BYTES(bits));

EACH_LAYOUT(FORMAT)
