/* Spreads pairs of bf16 values out to the four columns of their groups, 16 rows at a time. */
#include <immintrin.h>
#include <stdint.h>

/* Bytes of a pair that make two columns, by the pair's code: 0x80 is a zero. F for the first value, S for the second;
 * the lower code wins where both have the same position, which they have only if the second is missing. */
#define NEITHER 0x80808080
static const _Alignas(64) uint32_t COLUMNS_0_1[16] = {
    0x80800100, 0x01000302, 0x80800302, 0x80800302, /* second at 0; first at 0, 1, 2, 3 */
    0x03020100, 0x01008080, 0x03028080, 0x03028080, /* second at 1 */
    0x80800100, 0x01008080, NEITHER,    NEITHER,    /* second at 2 */
    0x80800100, 0x01008080, NEITHER,    NEITHER,    /* second at 3 */
};
static const _Alignas(64) uint32_t COLUMNS_2_3[16] = {
    NEITHER,    NEITHER,    0x80800100, 0x01008080, /* second at 0 */
    NEITHER,    NEITHER,    0x80800100, 0x01008080, /* second at 1 */
    0x80800302, 0x80800302, 0x80800100, 0x01000302, /* second at 2 */
    0x03028080, 0x03028080, 0x03020100, 0x01008080, /* second at 3 */
};

struct place {
    __m512i columns_0_1, columns_2_3, lanes;
};

static inline __attribute__((always_inline)) struct place make_place(void) {
    return (struct place){_mm512_load_si512(COLUMNS_0_1), _mm512_load_si512(COLUMNS_2_3),
                          _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C))};
}

/* pairs: of 16 rows; codes: the low four bits are positions of the first and the second value. Writes two rows. */
static inline __attribute__((always_inline)) void place(uint32_t (*to)[16], __m512i pairs, __m512i codes,
                                                        const struct place *by) {
    __m512i low = _mm512_or_si512(_mm512_permutexvar_epi32(codes, by->columns_0_1), by->lanes);
    __m512i high = _mm512_or_si512(_mm512_permutexvar_epi32(codes, by->columns_2_3), by->lanes);
    _mm512_store_si512(to[0], _mm512_shuffle_epi8(pairs, low));
    _mm512_store_si512(to[1], _mm512_shuffle_epi8(pairs, high));
}
