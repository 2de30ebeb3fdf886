/* x @ weight.T in integers, of x in bf16 and a weight in int8. */

#include "vectors.h"

#ifdef dot_int8
#define DTYPE BF16
typedef uint16_t out_number;
#include "linear_integers.h"

/* As `linear_integers`. */
void orthrus_linear_bf16_int8_integers(
    const uint16_t *x, const int8_t *values, const float *scale, const uint16_t *bias, uint16_t *out, float *room,
    int64_t M, int64_t N, int64_t K, int64_t columns, int num_threads) {
    linear_integers(x, values, scale, bias, out, room, M, N, K, columns, num_threads);
}
#endif
