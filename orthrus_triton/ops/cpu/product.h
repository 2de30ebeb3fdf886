/* x @ weight.T, for a file that says before how its numbers are multiplied: `row_number`, `weight_number`, how DEPTH of
 * them are loaded as `factors`, in PARTS vectors, `add_product`; and of which DTYPE, and so which `out_number`, bias
 * and results are, perhaps how they are rounded. Lanes run along K, and every result is summed in one order: along K,
 * lane by lane, then over the lanes. So no row depends on others, or on their number. Sums are of floats
 * or, where a file says so, of INTEGERS. */

#define TALL 4 /* a square of products has TALL rows and WIDE columns, */
#if LANES == 8
#define WIDE 2 /* AVX2 has 16 registers */
#else
#define WIDE 4
#endif
#define LINE 8              /* a line of them one row and LINE columns */
#define GROUP (TALL * WIDE) /* as many products, and as many columns go by together, */
#define PANEL 128           /* while as many rows stay in the cache */

#ifndef round_line
#define round_line(to, from) from_floats(to, from, GROUP, DTYPE)
#endif
#ifndef INTEGERS
typedef floats sums;
#else
typedef ints sums;
#endif

/* Of each result of TALL rows, where rows are integers: what is too much of it, and its factor. */
typedef struct {
    int32_t excess[GROUP];
    float scale[GROUP];
} about_rows;

/* Sums over the lanes of each of GROUP vectors, of which number PLACE(i) is product i's: pairs are added, half to half,
 * to one vector each, until one is left. */
#if LANES == 4
#define PLACE(i) (i)
#ifndef INTEGERS
#define PAIRS(a, b) ((sums)vpaddq_f32((float32x4_t)(a), (float32x4_t)(b)))
#else
#define PAIRS(a, b) ((sums)vpaddq_s32((int32x4_t)(a), (int32x4_t)(b)))
#endif
static inline void sum_up(void *result, const sums *of) {
#pragma GCC unroll 4
    for (int i = 0; i < GROUP; i += 4) {
        const sums four = PAIRS(PAIRS(of[i], of[i + 1]), PAIRS(of[i + 2], of[i + 3]));
        memcpy((int32_t *)result + i, &four, sizeof four);
    }
}
#else
#define PLACE(i) ((i) % 4 * (GROUP / 4) + (i) / 4)
#if LANES == 16
typedef __m512 lanes;
#define SHUFFLE _mm512_shuffle_ps
#else
typedef __m256 lanes;
#define SHUFFLE _mm256_shuffle_ps
#endif
#define BOTH(shuffle, low, high, i) \
    (lanes)((sums)shuffle(of[2 * i], of[2 * i + 1], low) + (sums)shuffle(of[2 * i], of[2 * i + 1], high))
static inline void sum_up(void *result, const sums *vectors) {
    lanes of[GROUP];
    memcpy(of, vectors, sizeof of);
#if LANES == 16
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) of[i] = BOTH(_mm512_shuffle_f32x4, 0x44, 0xee, i);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) of[i] = BOTH(_mm512_shuffle_f32x4, 0x88, 0xdd, i);
#else
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) of[i] = BOTH(_mm256_permute2f128_ps, 0x20, 0x31, i);
#endif
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) of[i] = BOTH(SHUFFLE, 0x44, 0xee, i);
    of[0] = BOTH(SHUFFLE, 0x88, 0xdd, 0);
    memcpy(result, of, sizeof *of);
}
#endif

/* Numbers of `height` rows times those of column n, each to its sum. */
static inline __attribute__((always_inline)) void add_products(
    sums *sum, const factors *rows, factors column, const int n, const int height, const int width) {
#pragma GCC unroll 4
    for (int m = 0; m < height; m++) {
        sums *of = sum + PLACE(m * width + n);
        *of = add_product(*of, rows[m], column);
    }
}

/* The products of `height` rows of x and `width` rows of the weight, the result at row * width + column; what lies
 * beyond `rows` or `columns` repeats the last one. Each DEPTH numbers it asks for `lines` times as many of `next`. */
static inline __attribute__((always_inline)) void products(
    void *result, const row_number *x, int64_t rows, int64_t x_stride, const weight_number *weight, int64_t columns,
    int64_t K, const int height, const int width, const int lines, const weight_number *next) {
    const row_number *row[TALL];
    const weight_number *column[LINE];
    sums sum[GROUP];
    for (int m = 0; m < height; m++) row[m] = x + least(m, rows - 1) * x_stride;
    for (int n = 0; n < width; n++) column[n] = weight + least(n, columns - 1) * K;
#pragma GCC unroll 16
    for (int i = 0; i < GROUP; i++) sum[i] = (sums){0};
    int64_t k = 0;
    for (; k + DEPTH <= K; k += DEPTH) {
#pragma GCC unroll 16
        for (int line = 0; line < lines; line++) __builtin_prefetch(next + (k * lines + DEPTH * line));
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) {
            factors numbers[TALL];
#pragma GCC unroll 4
            for (int m = 0; m < height; m++) numbers[m] = load_rows(row[m] + k + part * LANES);
#pragma GCC unroll 16
            for (int n = 0; n < width; n++)
                add_products(sum, numbers, load_weights(column[n] + k, part), n, height, width);
        }
    }
    if (k < K) {
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) {
            factors numbers[TALL];
            for (int m = 0; m < height; m++) numbers[m] = load_last_rows(row[m] + k + part * LANES, K - k);
#pragma GCC unroll 16
            for (int n = 0; n < width; n++)
                add_products(sum, numbers, load_last_weights(column[n] + k, K - k, part), n, height, width);
        }
    }
    sum_up(result, sum);
}

/* `products`, times scale, plus bias, where there is one, to `out` of rows that are N apart. */
static inline __attribute__((always_inline)) void store_products(
    const row_number *x, int64_t rows, int64_t x_stride, const about_rows *about, const weight_number *weight,
    int64_t columns, int64_t K, const float *scale, const out_number *bias, out_number *out, int64_t N,
    const int height, const int width, const int lines, const weight_number *next) {
    float result[GROUP], factor[GROUP] = {0}, constant[GROUP] = {0};
    out_number rounded[GROUP];
    products(result, x, rows, x_stride, weight, columns, K, height, width, lines, next);
    if (about) {
        int32_t sum[GROUP];
        memcpy(sum, result, sizeof sum);
        for (int i = 0; i < GROUP; i++) result[i] = (float)(sum[i] - about->excess[i]) * about->scale[i];
    }
    if (scale) {
        if (width <= columns) memcpy(factor, scale, width * sizeof *scale);
        else memcpy(factor, scale, columns * sizeof *scale);
        for (int i = 0; i < GROUP; i++) result[i] *= factor[i % width];
    }
    if (bias) {
        to_floats(constant, bias, least(width, columns), DTYPE);
        for (int i = 0; i < GROUP; i++) result[i] += constant[i % width];
    }
    round_line(rounded, result);
    if (height <= rows && width <= columns)
        for (int row = 0; row < height; row++) memcpy(out + row * N, rounded + row * width, width * sizeof *out);
    else
        for (int64_t row = 0; row < least(height, rows); row++)
            memcpy(out + row * N, rounded + row * width, least(width, columns) * sizeof *out);
}

/* A panel of M rows times the weight's rows first..last-1, in groups. The next group is asked for by the first squares
 * of this one, by the more of them the more rows there are: it should be there by then. Every line of one row alone
 * asks for the next one. */
static void multiply_panel(
    const row_number *x, int64_t x_stride, const about_rows *about, const weight_number *weight, const float *scale,
    const out_number *bias, out_number *out, int64_t M, int64_t N, int64_t K, int64_t first, int64_t last) {
#define STORE(m, n, height, width, lines, next) \
    store_products(x + (m) * x_stride, M - (m), x_stride, about ? about + (m) / TALL : 0, weight + (n) * K, \
                   last - (n), K, scale ? scale + (n) : 0, bias ? bias + (n) : 0, out + (m) * N + (n), N, height, \
                   width, lines, next)
    if (M == 1) {
        for (int64_t n = first; n < last; n += LINE) STORE(0, n, 1, LINE, LINE, weight + (n + LINE) * K);
        return;
    }
    for (int64_t group = first; group < last; group += GROUP) {
        const weight_number *next = weight + (group + GROUP) * K;
        int64_t asked = 0;
        for (int64_t m = 0; m < M; m += TALL)
            for (int64_t n = group; n < least(last, group + GROUP); n += WIDE) {
                if (asked >= GROUP) STORE(m, n, TALL, WIDE, 0, 0);
                else if (M > (WIDE - 1) * TALL) STORE(m, n, TALL, WIDE, 1, next + asked * K), asked += 1;
                else if (2 * M > (WIDE - 2) * TALL) STORE(m, n, TALL, WIDE, 2, next + asked * K), asked += 2;
                else STORE(m, n, TALL, WIDE, 4, next + asked * K), asked += 4;
            }
    }
#undef STORE
}

/* All rows, in tasks of `columns`, a multiple of GROUP. Inside a parallel region. */
static void multiply(
    const row_number *x, int64_t x_stride, const about_rows *about, const weight_number *weight, const float *scale,
    const out_number *bias, out_number *out, int64_t M, int64_t N, int64_t K, int64_t columns) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < N; first += columns)
        for (int64_t m = 0; m < M; m += PANEL)
            multiply_panel(
                x + m * x_stride, x_stride, about ? about + m / TALL : 0, weight, scale, bias, out + m * N,
                least(PANEL, M - m), N, K, first, least(first + columns, N));
}
