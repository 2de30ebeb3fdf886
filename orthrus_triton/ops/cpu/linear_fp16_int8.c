/* x @ weight.T of x in fp16 and a weight in int8. */

#include "vectors.h"

#define DTYPE FP16
typedef uint16_t out_number;
#include "linear_int8.h"

/* As `linear_int8`. */
void orthrus_linear_fp16_int8_wide(
    const uint16_t *x, const int8_t *values, const float *scale, const uint16_t *bias, uint16_t *out, float *wide,
    int64_t M, int64_t N, int64_t K, int64_t columns, int num_threads) {
    linear_int8(x, values, scale, bias, out, wide, M, N, K, columns, num_threads);
}
