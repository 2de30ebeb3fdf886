/* x @ weight.T in fp16, multiplied as fp32. */

#include "vectors.h"

#define DTYPE FP16

static inline floats widened(const uint16_t *from, int part) {
    halves numbers;
    memcpy(&numbers, from + part * LANES, sizeof numbers);
    return of_halves(numbers, FP16);
}
#include "linear_wide.h"

/* As `linear_wide`. */
void orthrus_linear_fp16_wide(
    const uint16_t *x, const uint16_t *weight, const uint16_t *bias, uint16_t *out, float *wide, int64_t M, int64_t N,
    int64_t K, int64_t columns, int num_threads) {
    linear_wide(x, weight, bias, out, wide, M, N, K, columns, num_threads);
}
