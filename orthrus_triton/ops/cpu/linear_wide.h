/* x @ weight.T of numbers in two bytes, multiplied as fp32: for a file that says before of which DTYPE, and how
 * 2 * LANES of them become two vectors of fp32 (`widened`). x becomes fp32 once, the weights as they are read. */

#define DEPTH (2 * LANES)
#define PARTS 2
typedef uint16_t weight_number, out_number;
#include "wide_rows.h"

static inline floats load_weights(const uint16_t *from, int part) { return held(widened(from, part)); }
static inline floats load_last_weights(const uint16_t *from, int64_t n, int part) {
    uint16_t padded[DEPTH] = {0};
    memcpy(padded, from, n * sizeof *from);
    return load_weights(padded, part);
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
                const uint16_t *from = x + m * K + k;
                float *to = wide + m * stride + k;
                for (int part = 0; part < PARTS; part++)
                    store(
                        to + part * LANES,
                        k + DEPTH <= K ? load_weights(from, part) : load_last_weights(from, K - k, part));
            }
        multiply(wide, stride, weight, 0, bias, out, M, N, K, columns);
    }
}
