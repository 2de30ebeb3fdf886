/* x @ weight.T, for a file that says before how its numbers are multiplied: `row_number`, `weight_number`, how DEPTH of
 * them are loaded as `factors`, in PARTS vectors, `add_product`; and of which DTYPE, and so which `out_number`, bias
 * and results are, perhaps how they are rounded. Lanes run along K, and every result is summed in one order: along K,
 * lane by lane, then over the lanes. So no row depends on others, or on their number. Where a file says that factors
 * are INTEGERS, so are sums over a SPAN of a row, which lies behind a HEADER. */

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
#ifdef INTEGERS
typedef ints sums;
#else
typedef floats sums;
#endif

/* Sums over the lanes of each of GROUP vectors, of which number PLACE(i) is product i's: pairs are added, half to half,
 * to one vector each, until one is left. */
#if LANES == 4
#define PLACE(i) (i)
#define PAIRS(a, b) vpaddq_f32((float32x4_t)(a), (float32x4_t)(b))
static inline void sum_up(float *result, const floats *of) {
#pragma GCC unroll 4
    for (int i = 0; i < GROUP; i += 4)
        store(result + i, (floats)PAIRS(PAIRS(of[i], of[i + 1]), PAIRS(of[i + 2], of[i + 3])));
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
    (lanes)((floats)shuffle(of[2 * i], of[2 * i + 1], low) + (floats)shuffle(of[2 * i], of[2 * i + 1], high))
static inline void sum_up(float *result, const floats *vectors) {
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

/* K products of each of `height` rows and each of `width` columns, to their sums. Each DEPTH numbers it asks for
 * `lines` times as many of `next`. */
static inline __attribute__((always_inline)) void add_all_products(
    sums *sum, const row_number *const *row, const weight_number *const *column, int64_t K, const int height,
    const int width, const int lines, const weight_number *next) {
    int64_t k = 0;
    for (; k + DEPTH <= K; k += DEPTH) {
#pragma GCC unroll 16
        for (int line = 0; line < lines; line++) __builtin_prefetch(next + (k * lines + DEPTH * line), 0, 2);
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
}

/* The products of `height` rows of x and `width` rows of the weight, the result at row * width + column; what lies
 * beyond `rows` or `columns` repeats the last one. */
static inline __attribute__((always_inline)) void products(
    float *result, const row_number *x, int64_t rows, int64_t x_stride, const weight_number *weight, int64_t columns,
    int64_t K, const int height, const int width, const int lines, const weight_number *next) {
    const row_number *row[TALL];
    const weight_number *column[LINE];
    floats total[GROUP];
    for (int m = 0; m < height; m++) row[m] = x + least(m, rows - 1) * x_stride;
    for (int n = 0; n < width; n++) column[n] = weight + least(n, columns - 1) * K;
#pragma GCC unroll 16
    for (int i = 0; i < GROUP; i++) total[i] = (floats){0};
#ifndef INTEGERS
    add_all_products(total, row, column, K, height, width, lines, next);
#else
    for (int64_t k = 0; k < K; k += SPAN) {
        sums sum[GROUP];
        floats scale[TALL];
#pragma GCC unroll 4
        for (int m = 0; m < height; m++) {
            scale[m] = load((const float *)(row[m] + sizeof(ints)));
            for (int n = 0; n < width; n++) sum[PLACE(m * width + n)] = load_rows(row[m]);
            row[m] += HEADER;
        }
        add_all_products(sum, row, column, least(SPAN, K - k), height, width, lines, next + k * lines);
#pragma GCC unroll 16
        for (int i = 0; i < height * width; i++) {
            floats *of = total + PLACE(i);
            *of = fused(__builtin_convertvector(sum[PLACE(i)], floats), scale[i / width], *of);
        }
        for (int m = 0; m < height; m++) row[m] += SPAN;
        for (int n = 0; n < width; n++) column[n] += SPAN;
    }
#endif
    sum_up(result, total);
}

/* `products`, times scale, plus bias, where there is one, to `out` of rows that are N apart. */
static inline __attribute__((always_inline)) void store_products(
    const row_number *x, int64_t rows, int64_t x_stride, const weight_number *weight, int64_t columns, int64_t K,
    const float *scale, const out_number *bias, out_number *out, int64_t N, const int height, const int width,
    const int lines, const weight_number *next) {
    float result[GROUP], factor[GROUP] = {0}, constant[GROUP] = {0};
    out_number rounded[GROUP];
    products(result, x, rows, x_stride, weight, columns, K, height, width, lines, next);
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
 * of this one, by the more of them the more rows there are: it should be there by then, in the second cache, for the
 * first one may hold no two groups. Every line of one row alone asks for the next one. */
static void multiply_panel(
    const row_number *x, int64_t x_stride, const weight_number *weight, const float *scale, const out_number *bias,
    out_number *out, int64_t M, int64_t N, int64_t K, int64_t first, int64_t last) {
#define STORE(m, n, height, width, lines, next) \
    store_products(x + (m) * x_stride, M - (m), x_stride, weight + (n) * K, last - (n), K, scale ? scale + (n) : 0, \
                   bias ? bias + (n) : 0, out + (m) * N + (n), N, height, width, lines, next)
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
    const row_number *x, int64_t x_stride, const weight_number *weight, const float *scale, const out_number *bias,
    out_number *out, int64_t M, int64_t N, int64_t K, int64_t columns) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < N; first += columns)
        for (int64_t m = 0; m < M; m += PANEL)
            multiply_panel(
                x + m * x_stride, x_stride, weight, scale, bias, out + m * N, least(PANEL, M - m), N, K, first,
                least(first + columns, N));
}
