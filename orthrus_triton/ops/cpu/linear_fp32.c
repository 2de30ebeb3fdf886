/* x @ weight.T in fp32. */

#include "vectors.h"

#define DTYPE FP32
#define DEPTH LANES
typedef float row_number, weight_number;
typedef floats row_vector, weight_vector;

static inline floats load_rows(const float *from) { return held(load(from)); }
#define load_weights load_rows
static inline floats load_last_rows(const float *from, int64_t n) {
    float padded[DEPTH] = {0};
    memcpy(padded, from, n * sizeof *from);
    return load(padded);
}
#define load_last_weights load_last_rows
static inline floats add_product(floats sum, floats rows, floats weights) { return fused(rows, weights, sum); }
#include "product.h"

/* x [M, K], weight [N, K], bias [N] or null -> out [M, N]. A task takes `columns`, a multiple of 16. */
void orthrus_linear_fp32(
    const float *x, const float *weight, const float *bias, float *out, int64_t M, int64_t N, int64_t K,
    int64_t columns, int num_threads) {
#pragma omp parallel num_threads(num_threads)
    multiply(x, K, weight, bias, out, M, N, K, columns);
}
