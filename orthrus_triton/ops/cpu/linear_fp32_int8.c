/* x @ weight.T of x in fp32 and a weight in int8. */

#include "vectors.h"

#define DTYPE FP32
typedef float out_number;
#include "linear_int8.h"

/* As `linear_int8`. */
void orthrus_linear_fp32_int8_wide(
    const float *x, const int8_t *values, const float *scale, const float *bias, float *out, float *wide,
    int64_t M, int64_t N, int64_t K, int64_t columns, int num_threads) {
    linear_int8(x, values, scale, bias, out, wide, M, N, K, columns, num_threads);
}
