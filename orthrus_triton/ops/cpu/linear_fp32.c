/* x @ weight.T in fp32. */

#include "vectors.h"

#define DTYPE FP32
#define DEPTH LANES
#define PARTS 1
typedef float row_number, weight_number, out_number;
typedef floats factors;

#define load_rows(from) held(load(from))
static inline floats load_last_rows(const float *from, int64_t n) {
    float padded[DEPTH] = {0};
    memcpy(padded, from, n * sizeof *from);
    return load(padded);
}
#define load_weights(from, part) load_rows(from)
#define load_last_weights(from, n, part) load_last_rows(from, n)
static inline floats add_product(floats sum, floats rows, floats weights) { return fused(rows, weights, sum); }
#include "product.h"

/* x [M, K], weight [N, K], bias [N] or null -> out [M, N]. A task takes `columns`, a multiple of 16. */
void orthrus_linear_fp32(
    const float *x, const float *weight, const float *bias, float *out, int64_t M, int64_t N, int64_t K,
    int64_t columns, int num_threads) {
#pragma omp parallel num_threads(num_threads)
    multiply(x, K, weight, 0, bias, out, M, N, K, columns);
}
