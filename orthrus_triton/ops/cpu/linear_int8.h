/* x @ (values * scale).T of values in int8, one scale for each row of them, multiplied in fp32: for a file that says
 * before of which DTYPE, and so which `out_number`, all else is. */

#define DEPTH (4 * LANES)
#define PARTS 4
typedef int8_t weight_number;
#include "wide_rows.h"

#define load_weights(from, part) held(int8_as_floats((from) + part * LANES))
static inline floats load_last_weights(const int8_t *from, int64_t n, int part) {
    int8_t padded[DEPTH] = {0};
    memcpy(padded, from, n);
    return load_weights(padded, part);
}

#include "product.h"

/* x [M, K], values [N, K], scale [N], bias [N] or null -> out [M, N]; `wide` [M, K rounded up to 64] is for x in fp32.
 * A task takes `columns`, a multiple of 16. */
static void linear_int8(
    const out_number *x, const int8_t *values, const float *scale, const out_number *bias, out_number *out, float *wide,
    int64_t M, int64_t N, int64_t K, int64_t columns, int num_threads) {
    const int64_t stride = (K + DEPTH - 1) / DEPTH * DEPTH;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < M; m++) {
            to_floats(wide + m * stride, x + m * K, K, DTYPE);
            memset(wide + m * stride + K, 0, (stride - K) * sizeof *wide);
        }
        multiply(wide, stride, values, scale, bias, out, M, N, K, columns);
    }
}
