/* x @ (values * scale).T of values in int8, and of rows rounded to int8 as well, for CPUs with instructions that add up
 * four products of integers at a time: for a file that says before of which DTYPE, and so which `out_number`, all else
 * is. A lane's four numbers of each vector of a span have one scale. Sums over a span are exact, and added up in fp32.
 */

#define DEPTH (4 * LANES)
#define PARTS 1
#define SPAN (16 * DEPTH)  /* numbers of a row that are rounded together, up to 64 with each lane's scale */
#define HEADER (8 * LANES) /* bytes before them: of each lane, what it starts its sum with, and its scale */
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

static inline ints load_rows(const int8_t *from) {
    ints x = load_ints((const int32_t *)from);
    hold(x);
    return x;
}
#define load_last_rows(from, n) load_rows(from)
#define load_weights(from, part) shifted(load_ints((const int32_t *)(from)))
static inline ints load_last_weights(const int8_t *from, int64_t n, int part) {
    int8_t padded[DEPTH] = {0};
    memcpy(padded, from, n);
    return load_weights(padded, part);
}

static inline ints add_product(ints sum, ints rows, ints values) { return (ints)dot_int8(sum, values, rows); }
#define INTEGERS

#include "product.h"

typedef int8_t bytes __attribute__((vector_size(LANES)));

/* Round the n <= SPAN numbers of a span to the nearest multiples of a LARGEST'th of the largest of their lane, behind a
 * header; zeros fill the last vector. A lane next to nothing is nothing; one with a number that is not finite has the
 * scale NaN. */
static void round_span(int8_t *to, const out_number *x, int64_t n) {
    floats largest[4] = {0}, nothing[4] = {0};
    float numbers[DEPTH] = {0}, size[DEPTH], wrong[DEPTH], factor[DEPTH], scale[LANES];
    ints excess = {0};
    int8_t *values = to + HEADER;
    for (int64_t k = 0; k < n; k += DEPTH) {
        if (n - k < DEPTH) memset(numbers, 0, sizeof numbers);
        to_floats(numbers, x + k, least(DEPTH, n - k), DTYPE);
        for (int part = 0; part < 4; part++) {
            const floats some = load(numbers + part * LANES), positive = (floats)((ints)some & all_ints(0x7fffffff));
            largest[part] = choose(positive > largest[part], positive, largest[part]);
            nothing[part] += positive * 0;
        }
    }
    memcpy(size, largest, sizeof size);
    memcpy(wrong, nothing, sizeof wrong);
    for (int lane = 0; lane < LANES; lane++) {
        float top = 0, sum = 0; /* of what is wrong: 0 or NaN */
        for (int i = 4 * lane; i < 4 * lane + 4; i++) top = size[i] > top ? size[i] : top, sum += wrong[i];
        const int is_something = top >= 0x1p-100f && sum == 0;
        scale[lane] = is_something ? top / LARGEST : sum;
        for (int i = 4 * lane; i < 4 * lane + 4; i++) factor[i] = is_something ? LARGEST / top : 0;
    }
    const floats shift = all(12582912.0f);
    for (int64_t k = 0; k < n; k += DEPTH) {
        if (n - k < DEPTH) memset(numbers, 0, sizeof numbers);
        to_floats(numbers, x + k, least(DEPTH, n - k), DTYPE);
        for (int part = 0; part < 4; part++) {
            floats product = load(numbers + part * LANES) * load(factor + part * LANES);
            product = choose(product == product, product, all(0));
            /* the last bits of the sum with 1.5 * 2^23 are the nearest integer */
            const ints rounded = (ints)(product + shift) - (ints)shift;
            const bytes low = __builtin_convertvector(rounded, bytes);
            memcpy(values + k + part * LANES, &low, sizeof low);
        }
        excess = add_product(excess, load_rows(values + k), all_ints((int32_t)(ZERO * 0x01010101u)));
    }
    excess = -excess;
    memcpy(to, &excess, sizeof excess);
    memcpy(to + sizeof excess, scale, sizeof scale);
}

/* x [M, K], values [N, K], scale [N], bias [N] or null -> out [M, N]; `room` [M, K rounded up to 64] is for the rounded
 * rows and their headers. A task takes `columns`, a multiple of 16. */
static void linear_integers(
    const out_number *x, const int8_t *values, const float *scale, const out_number *bias, out_number *out, float *room,
    int64_t M, int64_t N, int64_t K, int64_t columns, int num_threads) {
    const int64_t spans = (K + SPAN - 1) / SPAN, stride = (K + DEPTH - 1) / DEPTH * DEPTH + spans * HEADER;
    int8_t *rows = (int8_t *)room;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t span = 0; span < M * spans; span++) {
            const int64_t m = span / spans, first = span % spans * SPAN;
            round_span(rows + m * stride + span % spans * (SPAN + HEADER), x + m * K + first, least(SPAN, K - first));
        }
        multiply(rows, stride, values, scale, bias, out, M, N, K, columns);
    }
}
