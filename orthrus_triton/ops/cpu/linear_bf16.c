/* x @ weight.T in bf16: multiplied as it is by CPUs that can (avx512_bf16), elsewhere in fp32. Where CPUs multiply bf16
 * in tiles (AMX), oneDNN's product is better. */

#include "vectors.h"

#ifndef __AMX_BF16__
#define DTYPE BF16

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define DEPTH 32
#define PARTS 1
typedef uint16_t row_number, weight_number, out_number;
typedef __m512i factors;

#define load_rows(from) _mm512_loadu_si512(from)
#define load_last_rows(from, n) _mm512_maskz_loadu_epi16((1u << (n)) - 1, from)
#define load_weights(from, part) load_rows(from)
#define load_last_weights(from, n, part) load_last_rows(from, n)
static inline floats add_product(floats sum, factors rows, factors weights) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)rows, (__m512bh)weights);
}
#define round_line(to, from) _mm256_storeu_si256((__m256i *)(to), (__m256i)_mm512_cvtneps_pbh((__m512)load(from)))
#include "product.h"

/* x [M, K], weight [N, K], bias [N] or null -> out [M, N], all bf16. A task takes `columns`, a multiple of 16. */
void orthrus_linear_bf16(
    const uint16_t *x, const uint16_t *weight, const uint16_t *bias, uint16_t *out, int64_t M, int64_t N, int64_t K,
    int64_t columns, int num_threads) {
#pragma omp parallel num_threads(num_threads)
    multiply(x, K, weight, 0, bias, out, M, N, K, columns);
}

#else
/* The numbers at even places, then those at odd ones: a shift and a mask are all it takes. */
static inline floats widened(const uint16_t *from, int part) {
    ints pairs = load_ints((const int32_t *)from);
    return (floats)(part ? pairs & all_ints(0xffff0000) : pairs << 16);
}
#include "linear_wide.h"

/* As `linear_wide`. */
void orthrus_linear_bf16_wide(
    const uint16_t *x, const uint16_t *weight, const uint16_t *bias, uint16_t *out, float *wide, int64_t M, int64_t N,
    int64_t K, int64_t columns, int num_threads) {
    linear_wide(x, weight, bias, out, wide, M, N, K, columns, num_threads);
}
#endif
#endif
