/* x @ weight.T in bf16: multiplied as it is by CPUs that can (avx512_bf16), elsewhere in fp32. Where CPUs multiply bf16
 * in tiles (AMX), oneDNN's product is better. */

#include "vectors.h"

#ifndef __AMX_BF16__
typedef uint16_t weight_number;

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define DEPTH 32
typedef uint16_t row_number;
typedef __m512i row_vector, weight_vector;

static inline row_vector load_rows(const uint16_t *from) { return _mm512_loadu_si512(from); }
static inline row_vector load_last_rows(const uint16_t *from, int64_t n) {
    return _mm512_maskz_loadu_epi16((1u << n) - 1, from);
}
#define load_weights load_rows
#define load_last_weights load_last_rows
static inline floats add_product(floats sum, row_vector rows, weight_vector weights) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)rows, (__m512bh)weights);
}
#define round_line(to, from) _mm256_storeu_si256((__m256i *)(to), (__m256i)_mm512_cvtneps_pbh((__m512)load(from)))
#include "product.h"

/* x [M, K], weight [N, K], bias [N] or null -> out [M, N], all bf16. A task takes `columns`, a multiple of 16. */
void orthrus_linear_bf16(
    const uint16_t *x, const uint16_t *weight, const uint16_t *bias, uint16_t *out, int64_t M, int64_t N, int64_t K,
    int64_t columns, int num_threads) {
#pragma omp parallel num_threads(num_threads)
    multiply(x, K, weight, bias, out, M, N, K, columns);
}

#else
/* The numbers at even places of a vector of 2 * LANES, then those at odd ones: as a shift and a mask give them. */
#define DEPTH (2 * LANES)
typedef float row_number;
typedef struct {
    floats even, odd;
} row_vector, weight_vector;

static inline row_vector load_rows(const float *from) {
#if LANES == 8 /* not enough registers to hold them */
    return (row_vector){load(from), load(from + LANES)};
#else
    return (row_vector){held(load(from)), held(load(from + LANES))};
#endif
}
static inline row_vector load_last_rows(const float *from, int64_t n) { return (void)n, load_rows(from); }
static inline weight_vector load_weights(const uint16_t *from) {
    ints pairs = load_ints((const int32_t *)from);
    return (weight_vector){held((floats)(pairs << 16)), held((floats)(pairs & all_ints(0xffff0000)))};
}
static inline weight_vector load_last_weights(const uint16_t *from, int64_t n) {
    uint16_t padded[DEPTH] = {0};
    memcpy(padded, from, n * sizeof *from);
    return load_weights(padded);
}
static inline floats add_product(floats sum, row_vector rows, weight_vector weights) {
    return fused(rows.odd, weights.odd, fused(rows.even, weights.even, sum));
}
#include "product.h"

/* As above; `wide` [M, K rounded up to 32] is for x in fp32. */
void orthrus_linear_bf16_wide(
    const uint16_t *x, const uint16_t *weight, const uint16_t *bias, uint16_t *out, float *wide, int64_t M, int64_t N,
    int64_t K, int64_t columns, int num_threads) {
    const int64_t stride = (K + DEPTH - 1) / DEPTH * DEPTH;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < M; m++)
            for (int64_t k = 0; k < K; k += DEPTH) {
                weight_vector numbers = load_last_weights(x + m * K + k, least(DEPTH, K - k));
                store(wide + m * stride + k, numbers.even);
                store(wide + m * stride + k + LANES, numbers.odd);
            }
        multiply(wide, stride, weight, bias, out, M, N, K, columns);
    }
}
#endif
#endif
