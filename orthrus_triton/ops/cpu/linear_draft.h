/* x @ (values * scale).T of values in int8, for drafts: of rows rounded to int8 as well, one scale for each, so that
 * CPUs with instructions for it add up four products at a time. For a file that says before of which DTYPE, and so which
 * `out_number`, all else is. */

#define DEPTH (4 * LANES)
#define PARTS 1
#define LARGEST 127
#ifdef __aarch64__
#define ZERO 0
#define shifted(values) (values)
#else
#define ZERO 128 /* the instructions want one factor without a sign: values are shifted by this much */
#define shifted(values) ((values) ^ all_ints(0x80808080))
#endif
typedef int8_t row_number, weight_number;
typedef ints factors;

#define load_rows(from) load_ints((const int32_t *)(from))
#define load_last_rows(from, n) load_rows(from)
#define load_weights(from, part) shifted(load_rows(from))
static inline ints load_last_weights(const int8_t *from, int64_t n, int part) {
    int8_t padded[DEPTH] = {0};
    memcpy(padded, from, n);
    return load_weights(padded, part);
}

static inline ints add_product(ints sum, ints rows, ints values) { return (ints)dot_int8(sum, values, rows); }
#define INTEGERS

#include "product.h"

/* Round K numbers to the nearest multiples of a LARGEST'th of the largest one, to as many integers, their scale and
 * sum; zeros fill the last vector. Numbers next to nothing are nothing; any that is not finite makes the scale NaN. */
static void round_row(int8_t *to, float *scale, int32_t *sum, const out_number *x, int64_t K) {
    typedef int8_t bytes __attribute__((vector_size(LANES)));
    float numbers[LANES] = {0};
    floats largest = all(0), nothing = all(0);
    for (int64_t k = 0; k < K; k += LANES) {
        to_floats(numbers, x + k, least(LANES, K - k), DTYPE); /* the last ones may be there twice */
        floats size = (floats)((ints)load(numbers) & all_ints(0x7fffffff));
        largest = choose(size > largest, size, largest);
        nothing += size * 0;
    }
    float top = 0;
    for (int i = 0; i < LANES; i++) top = largest[i] > top ? largest[i] : top;
    const float wrong = sum_of_lanes(nothing); /* 0 or NaN */
    *sum = 0;
    if (!(top >= 0x1p-100f && wrong == 0)) {
        memset(to, 0, (K + LANES - 1) / LANES * LANES);
        *scale = wrong;
        return;
    }
    const floats factor = all(LARGEST / top), shift = all(12582912.0f);
    ints total = all_ints(0);
    for (int64_t k = 0; k < K; k += LANES) {
        if (K - k < LANES) memset(numbers, 0, sizeof numbers);
        to_floats(numbers, x + k, least(LANES, K - k), DTYPE);
        /* the last bits of the sum with 1.5 * 2^23 are the nearest integer */
        ints rounded = (ints)(load(numbers) * factor + shift) - (ints)shift;
        bytes low = __builtin_convertvector(rounded, bytes);
        memcpy(to + k, &low, sizeof low);
        total += rounded;
    }
    *scale = top / LARGEST;
    for (int i = 0; i < LANES; i++) *sum += total[i];
}

/* x [M, K], values [N, K], scale [N], bias [N] or null -> out [M, N]; `room` [M, K rounded up to 64] is for the rounded
 * rows and what is known about them. A task takes `columns`, a multiple of 16. */
static void linear_draft(
    const out_number *x, const int8_t *values, const float *scale, const out_number *bias, out_number *out, float *room,
    int64_t M, int64_t N, int64_t K, int64_t columns, int num_threads) {
    const int64_t stride = (K + 63) / 64 * 64;
    about_rows *about = (about_rows *)room;
    int8_t *rows = (int8_t *)(about + (M + TALL - 1) / TALL);
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < M; m++) {
            float factor;
            int32_t sum;
            memset(rows + m * stride + K / LANES * LANES, 0, stride - K / LANES * LANES);
            round_row(rows + m * stride, &factor, &sum, x + m * K, K);
            about_rows *of = about + m / TALL;
            /* the last row may be one alone, with a line of results */
            const int64_t first = m % TALL * WIDE, end = m == M - 1 ? GROUP : first + WIDE;
            for (int64_t i = first; i < end; i++) of->excess[i] = ZERO * sum, of->scale[i] = factor;
        }
        multiply(rows, stride, about, values, scale, bias, out, M, N, K, columns);
    }
}
