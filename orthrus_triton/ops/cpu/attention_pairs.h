/* Pairs of bf16 numbers, each in the place of one fp32: for CPUs that add up two products at a time (avx512_bf16).
 * Elsewhere, nothing of this is called. */

#include "vectors.h"

#if defined(__AVX512BF16__) && LANES == 16
#define HAS_PAIRS 1
#define add_pairs(a, b, c) ((floats)_mm512_dpbf16_ps((__m512)(c), (__m512bh)(a), (__m512bh)(b)))
#define rounded_to_bf16(x) ((halves)_mm512_cvtneps_pbh((__m512)(x)))
#else
#define HAS_PAIRS 0
#define add_pairs(a, b, c) (c)
#define rounded_to_bf16(x) to_halves(x, BF16)
#endif

/* What lies there in all lanes, whatever it is. */
static inline floats all_as_is(const float *from) {
    int32_t bits;
    memcpy(&bits, from, sizeof bits);
    return (floats)all_ints(bits);
}

static inline words paired(halves first, halves second) {
    return __builtin_convertvector(first, words) | __builtin_convertvector(second, words) << 16;
}

/* D numbers of `first` and D of `second`, zeros if that is null, to pairs; lanes in which one is not finite. */
static inline ints pair_up(float *to, const uint16_t *first, const uint16_t *second, int64_t D) {
    const words low_exponent = (words)all_ints(0x7f80), high_exponent = (words)all_ints(0x7f800000);
    ints bad = {0};
    for (int64_t d = 0; d < D; d += LANES) {
        halves some[2] = {0};
        for (int i = 0; i < (second ? 2 : 1); i++) {
            const uint16_t *from = (i ? second : first) + d;
            if (D - d >= LANES) memcpy(some + i, from, sizeof *some);
            else memcpy(some + i, from, (D - d) * sizeof *from);
        }
        const words pairs = paired(some[0], some[1]);
        bad |= ((pairs & low_exponent) == low_exponent) | ((pairs & high_exponent) == high_exponent);
        store(to + d, (floats)pairs);
    }
    return bad;
}

/* Weights [n][WIDTH] of a panel's rows, rounded, to pairs of neighbours [n / 2][WIDTH]. */
static inline void pair_weights(float *to, const float *weights, int n) {
    for (int j = 0; j < n; j += 2)
        for (int i = 0; i < WIDTH; i += LANES) {
            const floats first = load(weights + j * WIDTH + i), second = load(weights + (j + 1) * WIDTH + i);
            store(to + j / 2 * WIDTH + i, (floats)paired(rounded_to_bf16(first), rounded_to_bf16(second)));
        }
}

/* The first (0) or second (1) number of each of n pairs becomes 0. */
static inline void drop_half(float *pairs, int which, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        const words kept = (words)load(pairs + i) & (words)all_ints(which ? 0xffff : (int32_t)0xffff0000);
        store(pairs + i, (floats)kept);
    }
}
