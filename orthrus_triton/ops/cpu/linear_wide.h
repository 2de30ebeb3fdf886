/* x @ weight.T of numbers in two bytes, multiplied as fp32: for a file that says before of which DTYPE, and how
 * 2 * LANES of them become vectors of fp32 (`widened`). x is turned into fp32 once, the weights as they are read. */

#define DEPTH (2 * LANES)
typedef float row_number;
typedef uint16_t weight_number;
typedef vectors row_vector, weight_vector;

static inline row_vector load_rows(const float *from) {
#if LANES == 8 /* not enough registers to hold them */
    return (row_vector){load(from), load(from + LANES)};
#else
    return (row_vector){held(load(from)), held(load(from + LANES))};
#endif
}
static inline row_vector load_last_rows(const float *from, int64_t n) { return (void)n, load_rows(from); }

static inline weight_vector load_weights(const uint16_t *from) {
    vectors wide = widened(from);
    return (weight_vector){held(wide.first), held(wide.second)};
}
static inline weight_vector load_last_weights(const uint16_t *from, int64_t n) {
    uint16_t padded[DEPTH] = {0};
    memcpy(padded, from, n * sizeof *from);
    return load_weights(padded);
}

static inline floats add_product(floats sum, row_vector rows, weight_vector weights) {
    return fused(rows.second, weights.second, fused(rows.first, weights.first, sum));
}
#include "product.h"

/* x [M, K], weight [N, K], bias [N] or null -> out [M, N], all in two bytes; `wide` [M, K rounded up to 32] is for x in
 * fp32. A task takes `columns`, a multiple of 16. */
static void linear_wide(
    const uint16_t *x, const uint16_t *weight, const uint16_t *bias, uint16_t *out, float *wide, int64_t M, int64_t N,
    int64_t K, int64_t columns, int num_threads) {
    const int64_t stride = (K + DEPTH - 1) / DEPTH * DEPTH;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < M; m++)
            for (int64_t k = 0; k < K; k += DEPTH) {
                weight_vector numbers = load_last_weights(x + m * K + k, least(DEPTH, K - k));
                store(wide + m * stride + k, numbers.first);
                store(wide + m * stride + k + LANES, numbers.second);
            }
        multiply(wide, stride, weight, bias, out, M, N, K, columns);
    }
}
