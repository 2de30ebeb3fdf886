/* x @ weight.T in bf16 on CPUs that multiply bf16 in vectors. Lanes run along K, and every result is summed in one
 * order: along K, lane by lane, then over the lanes by halves. So no row depends on others, or on their number. */

#include "vectors.h"

/* where CPUs multiply tiles (AMX), oneDNN's product is better */
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(__AMX_BF16__)

#define DEPTH 32  /* numbers of a vector */
#define SIDE 4    /* a square of products has SIDE rows and SIDE columns, */
#define LINE 16   /* a line of them one row and LINE columns */
#define PANEL 128 /* rows that stay in the cache while the columns go by */

typedef uint16_t half;

/* The sums of 16 vectors: of vector 4 * a + b at 4 * b + a. */
static inline __m512 sums(__m512 *of) {
#define BOTH(shuffle, low, high, i) shuffle(of[2 * i], of[2 * i + 1], low) + shuffle(of[2 * i], of[2 * i + 1], high)
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) of[i] = BOTH(_mm512_shuffle_f32x4, 0x44, 0xee, i);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) of[i] = BOTH(_mm512_shuffle_f32x4, 0x88, 0xdd, i);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) of[i] = BOTH(_mm512_shuffle_ps, 0x44, 0xee, i);
    return BOTH(_mm512_shuffle_ps, 0x88, 0xdd, 0);
#undef BOTH
}

/* Numbers of `height` rows times those of column n, each to its sum. */
static inline __attribute__((always_inline)) void add_products(
    __m512 *sum, const __m512i *numbers, __m512i column, const int n, const int height, const int width) {
#pragma GCC unroll 4
    for (int m = 0; m < height; m++) {
        const int place = m * width + n, i = place % SIDE * SIDE + place / SIDE;
        sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)numbers[m], (__m512bh)column);
    }
}

/* 16 products of `height` rows of x and `width` rows of the weight, the result at row * width + column; what lies
 * beyond `rows` or `columns` repeats the last one. Each DEPTH numbers it asks for `lines` cache lines of `next`. */
static inline __attribute__((always_inline)) __m512 products(
    const half *x, int64_t rows, const half *weight, int64_t columns, int64_t K, const int height, const int width,
    const int lines, const half *next) {
    const half *row[SIDE], *column[LINE];
    __m512 sum[LINE];
    for (int m = 0; m < height; m++) row[m] = x + least(m, rows - 1) * K;
    for (int n = 0; n < width; n++) column[n] = weight + least(n, columns - 1) * K;
#pragma GCC unroll 16
    for (int i = 0; i < LINE; i++) sum[i] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + DEPTH <= K; k += DEPTH) {
        __m512i numbers[SIDE];
#pragma GCC unroll 16
        for (int line = 0; line < lines; line++) _mm_prefetch(next + (k * lines + DEPTH * line), _MM_HINT_T0);
#pragma GCC unroll 4
        for (int m = 0; m < height; m++) numbers[m] = _mm512_loadu_si512(row[m] + k);
#pragma GCC unroll 16
        for (int n = 0; n < width; n++) add_products(sum, numbers, _mm512_loadu_si512(column[n] + k), n, height, width);
    }
    if (k < K) {
        __mmask32 rest = (1u << (K - k)) - 1;
        __m512i numbers[SIDE];
        for (int m = 0; m < height; m++) numbers[m] = _mm512_maskz_loadu_epi16(rest, row[m] + k);
#pragma GCC unroll 16
        for (int n = 0; n < width; n++)
            add_products(sum, numbers, _mm512_maskz_loadu_epi16(rest, column[n] + k), n, height, width);
    }
    return sums(sum);
}

/* `products`, plus bias, to `out` of rows that are N apart. */
static inline __attribute__((always_inline)) void store_products(
    const half *x, int64_t rows, const half *weight, int64_t columns, int64_t K, const half *bias, half *out,
    int64_t N, const int height, const int width, const int lines, const half *next) {
    __m512 result = products(x, rows, weight, columns, K, height, width, lines, next);
    if (bias) {
        float numbers[LINE] = {0};
        to_floats(numbers, bias, least(width, columns), 1);
        for (int i = width; i < LINE; i++) numbers[i] = numbers[i - width];
        result += load(numbers);
    }
    half rounded[LINE];
    _mm256_storeu_si256((__m256i *)rounded, (__m256i)_mm512_cvtneps_pbh(result));
    if (height <= rows && width <= columns)
        for (int row = 0; row < height; row++) memcpy(out + row * N, rounded + row * width, width * sizeof *out);
    else
        for (int64_t row = 0; row < least(height, rows); row++)
            memcpy(out + row * N, rounded + row * width, least(width, columns) * sizeof *out);
}

/* A panel of M rows times the weight's rows first..last-1, in groups of LINE. The next group is asked for by the first
 * squares of this one, by the more of them the more rows there are: it should be there by then. */
static void multiply_panel(
    const half *x, const half *weight, const half *bias, half *out, int64_t M, int64_t N, int64_t K, int64_t first,
    int64_t last) {
    for (int64_t group = first; group < last; group += LINE) {
        const half *next = weight + (group + LINE) * K;
        int64_t asked = 0;
        for (int64_t m = 0; m < M; m += SIDE)
            for (int64_t n = group; n < least(last, group + LINE); n += SIDE) {
                const half *more = next + asked * K;
#define STORE(height, width, lines) \
    store_products(x + m * K, M - m, weight + n * K, last - n, K, bias ? bias + n : 0, out + m * N + n, N, height, \
                   width, lines, more)
                if (M == 1) {
                    STORE(1, LINE, LINE);
                    break;
                }
                if (asked >= LINE) STORE(SIDE, SIDE, 0);
                else if (M > 3 * SIDE) STORE(SIDE, SIDE, 1), asked += 1;
                else if (M > SIDE) STORE(SIDE, SIDE, 2), asked += 2;
                else STORE(SIDE, SIDE, 4), asked += 4;
#undef STORE
            }
    }
}

/* x [M, K], weight [N, K], bias [N] or null -> out [M, N], all bf16. A task takes `columns`, a multiple of 16. */
void orthrus_linear(
    const half *x, const half *weight, const half *bias, half *out, int64_t M, int64_t N, int64_t K, int64_t columns,
    int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
    for (int64_t first = 0; first < N; first += columns)
        for (int64_t m = 0; m < M; m += PANEL) {
            int64_t rows = least(PANEL, M - m), last = least(first + columns, N);
            multiply_panel(x + m * K, weight, bias, out + m * N, rows, N, K, first, last);
        }
}

#endif
