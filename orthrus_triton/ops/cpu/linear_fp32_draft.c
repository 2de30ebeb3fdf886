/* x @ weight.T for drafts, of x in fp32 and a weight in int8. */

#include "vectors.h"

#ifdef dot_int8
#define DTYPE FP32
typedef float out_number;
#include "linear_draft.h"

/* As `linear_draft`. */
void orthrus_linear_fp32_draft(
    const float *x, const int8_t *values, const float *scale, const float *bias, float *out, float *room,
    int64_t M, int64_t N, int64_t K, int64_t columns, int num_threads) {
    linear_draft(x, values, scale, bias, out, room, M, N, K, columns, num_threads);
}
#endif
