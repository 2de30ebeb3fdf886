/* x @ weight.T in integers, of x in fp32 and a weight in int8. */

#include "vectors.h"

#ifdef dot_int8
#define DTYPE FP32
typedef float out_number;
#include "linear_integers.h"

/* As `linear_integers`. */
void orthrus_linear_fp32_int8_integers(
    const float *x, const int8_t *values, const float *scale, const float *bias, float *out, float *room,
    int64_t M, int64_t N, int64_t K, int64_t columns, int num_threads) {
    linear_integers(x, values, scale, bias, out, room, M, N, K, columns, num_threads);
}
#endif
