/* Attention of query rows over the KV cache and over their own block: online softmax in fp32 over tiles of keys at
 * absolute positions. A tile of which a row sees nothing leaves the row as it was. Numbers are multiplied as fp32 or,
 * by CPUs that can (avx512_bf16), in pairs of bf16, which take the place of one. */

#include "attention_pairs.h"

#define TILE 64      /* keys */
#define MAX_ROWS 128 /* of a task: tokens times the heads of a group */

/* What a thread works with: query rows of one KV head, in panels of WIDTH. */
typedef struct {
    int64_t num_rows, D, head; /* head: D filled up to whole WIDTHs */
    int dtype, numbers;        /* how many are multiplied at a time: 2 of pairs */
    float scale;
    _Alignas(64) int32_t from[MAX_ROWS], to[MAX_ROWS]; /* the keys that a row sees; no vector is on two cache lines */
    float q[MAX_ROWS * MAX_HEAD];                 /* [panel][D / numbers][WIDTH] */
    float highest[MAX_ROWS], total[MAX_ROWS];     /* of a row's scores, and of its weights */
    float sum[MAX_ROWS * MAX_HEAD];               /* [row][head]: weights times values */
    const float *keys;                            /* of a tile, `apart` from each other: `k`, or where they were */
    int64_t apart;
    float k[TILE * MAX_HEAD], v[TILE * MAX_HEAD]; /* [key][D / numbers], [key / numbers][head] */
    float weights[TILE * WIDTH];                  /* [key][row of a panel] */
    float pairs[TILE / 2 * WIDTH];                /* of weights: [key / 2][row of a panel] */
    float seen_v[TILE * MAX_HEAD], sums[HEIGHT * MAX_HEAD];
} Rows;

static _Thread_local Rows workspace;

/* c[u] = c[u] * scale[u] (0 without scale) + sum over k of a[k][u] * b[k]: WIDTH numbers for each u < HEIGHT, with k
 * ascending. What lies in a and b may be pairs. */
static inline __attribute__((always_inline)) void multiply_numbers(
    int64_t K, const float *a, int64_t a_stride_k, int64_t a_stride_u, const float *b, int64_t b_stride, float *c,
    int64_t c_stride, const float *scale, const int numbers) {
    floats left[HEIGHT], right[HEIGHT];
    for (int u = 0; u < HEIGHT; u++) {
        left[u] = scale ? load(c + u * c_stride) * scale[u] : (floats){};
        right[u] = scale ? load(c + u * c_stride + LANES) * scale[u] : (floats){};
    }
    for (int64_t k = 0; k < K; k++) {
        floats b_left = load(b + k * b_stride), b_right = load(b + k * b_stride + LANES);
#pragma GCC unroll 8
        for (int u = 0; u < HEIGHT; u++) {
            floats factor = all_as_is(a + k * a_stride_k + u * a_stride_u);
            left[u] = numbers == 1 ? fused(factor, b_left, left[u]) : add_pairs(factor, b_left, left[u]);
            right[u] = numbers == 1 ? fused(factor, b_right, right[u]) : add_pairs(factor, b_right, right[u]);
        }
    }
    for (int u = 0; u < HEIGHT; u++) {
        store(c + u * c_stride, left[u]);
        store(c + u * c_stride + LANES, right[u]);
    }
}

/* K and every stride of a and b in numbers as `rows` has them. */
static inline __attribute__((always_inline)) void multiply(
    const Rows *rows, int64_t K, const float *a, int64_t a_stride_k, int64_t a_stride_u, const float *b,
    int64_t b_stride, float *c, int64_t c_stride, const float *scale) {
    if (rows->numbers == 1) multiply_numbers(K, a, a_stride_k, a_stride_u, b, b_stride, c, c_stride, scale, 1);
    else multiply_numbers(K / 2, a, a_stride_k, a_stride_u, b, b_stride, c, c_stride, scale, 2);
}

/* `n` keys and values; the other values of the tile are 0, its other keys nobody sees. Returns whether a value is not
 * finite. */
static int load_tile(Rows *rows, const void *k, const void *v, int64_t k_stride, int64_t v_stride, int64_t n) {
    int64_t D = rows->D, head = rows->head;
    ints bad = {0};
    rows->keys = rows->k, rows->apart = D / rows->numbers;
    if (n < TILE || head > D) memset(rows->v, 0, TILE / rows->numbers * head * sizeof(float));
    if (rows->numbers == 2) {
        const uint16_t *keys = k, *values = v;
        if (n == TILE && k_stride % 2 == 0) rows->keys = k, rows->apart = k_stride / 2;
        else
            for (int64_t j = 0; j < n; j++) memcpy(rows->k + j * D / 2, keys + j * k_stride, D * sizeof *keys);
        for (int64_t j = 0; j < n; j += 2) {
            const uint16_t *first = values + j * v_stride;
            bad |= pair_up(rows->v + j / 2 * head, first, j + 1 < n ? first + v_stride : 0, D);
        }
        return any(bad);
    }
    for (int64_t j = 0; j < n; j++) {
        float *value = rows->v + j * head;
        to_floats(rows->k + j * D, at(k, j * k_stride, rows->dtype), D, rows->dtype);
        to_floats(value, at(v, j * v_stride, rows->dtype), D, rows->dtype);
        for (int64_t d = 0; d < head; d += LANES) bad |= load(value + d) - load(value + d) != all(0);
    }
    return any(bad);
}

/* The scores of LANES rows become weights; `shrink` is what the sums so far are to be multiplied by. */
static void weigh(Rows *rows, int64_t row, float *weights, int32_t start, float *shrink) {
    ints from = load_ints(rows->from + row) - all_ints(start), to = load_ints(rows->to + row) - all_ints(start);
    floats before = load(rows->highest + row), highest = before;
    for (int j = 0; j < TILE; j++) {
        floats score = load(weights + j * WIDTH) * rows->scale;
        score = choose((from <= all_ints(j)) & (to > all_ints(j)), score, all(-INFINITY));
        highest = choose(score > highest, score, highest);
        store(weights + j * WIDTH, score);
    }
    floats zero = choose(highest == all(-INFINITY), all(0.0f), highest), total = {};
    for (int j = 0; j < TILE; j++) {
        floats weight = exp2_of(load(weights + j * WIDTH) - zero);
        store(weights + j * WIDTH, weight);
        total += weight;
    }
    floats factor = exp2_of(before - zero);
    store(shrink, factor);
    store(rows->highest + row, highest);
    store(rows->total + row, load(rows->total + row) * factor + total);
}

/* sum = sum * shrink + weights * values, for HEIGHT rows. */
static void add_values(const Rows *rows, float *sum, const float *v, const float *weights, const float *shrink) {
    for (int64_t d = 0; d < rows->head; d += WIDTH)
        multiply(rows, TILE, weights, WIDTH, 1, v + d, rows->head, sum + d, rows->head, shrink);
}

/* The value of key j becomes 0. */
static void drop_value(const Rows *rows, float *v, int j) {
    if (rows->numbers == 1) memset(v + j * rows->head, 0, rows->head * sizeof *v);
    else drop_half(v + j / 2 * rows->head, j % 2, rows->head);
}

/* The same where a value is not finite, and 0 times it would reach rows that do not see it: row by row, the same
 * product with 0 in place of what the row does not see, and of its results this row's. */
static void add_seen_values(Rows *rows, int64_t row, int32_t start, const float *weights, const float *shrink) {
    int64_t head = rows->head;
    for (int u = 0; u < HEIGHT; u++) {
        memcpy(rows->seen_v, rows->v, TILE / rows->numbers * head * sizeof(float));
        for (int j = 0; j < TILE; j++)
            if (start + j < rows->from[row + u] || start + j >= rows->to[row + u]) drop_value(rows, rows->seen_v, j);
        memcpy(rows->sums, rows->sum + row * head, HEIGHT * head * sizeof(float));
        add_values(rows, rows->sums, rows->seen_v, weights, shrink);
        memcpy(rows->sum + (row + u) * head, rows->sums + u * head, head * sizeof(float));
    }
}

/* All rows over those of the keys first..last-1 that they see. */
static void attend(
    Rows *rows, const void *k, const void *v, int64_t k_stride, int64_t v_stride, int64_t first, int64_t last) {
    int64_t D = rows->D, width = D / rows->numbers;
    float *weights = rows->weights, *factors = rows->numbers == 1 ? weights : rows->pairs, shrink[WIDTH];
    for (int64_t start = first; start < last; start += TILE) {
        const void *tile_k = at(k, start * k_stride, rows->dtype), *tile_v = at(v, start * v_stride, rows->dtype);
        int has_bad_value = load_tile(rows, tile_k, tile_v, k_stride, v_stride, least(TILE, last - start));
        for (int64_t panel = 0; panel < rows->num_rows; panel += WIDTH) {
            int64_t from = INT32_MAX, to = 0;
            for (int64_t row = panel; row < panel + WIDTH; row++)
                from = least(from, rows->from[row]), to = most(to, rows->to[row]);
            if (from >= start + TILE || to <= start) continue;
            for (int j = 0; j < TILE; j += HEIGHT)
                multiply(
                    rows, D, rows->keys + j * rows->apart, 1, rows->apart, rows->q + panel * width, WIDTH,
                    weights + j * WIDTH, WIDTH, 0);
            weigh(rows, panel, weights, start, shrink);
            if (panel + LANES < rows->num_rows) weigh(rows, panel + LANES, weights + LANES, start, shrink + LANES);
            if (rows->numbers == 2) pair_weights(rows->pairs, weights, TILE);
            for (int u = 0; u < WIDTH && panel + u < rows->num_rows; u += HEIGHT) {
                if (has_bad_value) add_seen_values(rows, panel + u, start, factors + u, shrink + u);
                else add_values(rows, rows->sum + (panel + u) * rows->head, rows->v, factors + u, shrink + u);
            }
        }
    }
}

/* `num_rows` rows of which nothing is known yet. */
static Rows *new_rows(int64_t num_rows, int64_t D, float scale, int dtype) {
    Rows *rows = &workspace;
    int64_t in_panels = (num_rows + WIDTH - 1) / WIDTH * WIDTH;
    rows->num_rows = num_rows, rows->D = D, rows->head = (D + WIDTH - 1) / WIDTH * WIDTH;
    rows->scale = scale, rows->dtype = dtype, rows->numbers = HAS_PAIRS && dtype == BF16 && D % 2 == 0 ? 2 : 1;
    memset(rows->q, 0, in_panels * D * sizeof(float));
    memset(rows->sum, 0, in_panels * rows->head * sizeof(float));
    memset(rows->total, 0, sizeof rows->total);
    for (int row = 0; row < in_panels; row++)
        rows->highest[row] = -INFINITY, rows->from[row] = INT32_MAX, rows->to[row] = 0;
    return rows;
}

static void load_query(Rows *rows, int64_t row, const void *q) {
    const int64_t width = rows->D / rows->numbers;
    float numbers[MAX_HEAD], *panel = rows->q + row / WIDTH * WIDTH * width + row % WIDTH;
    if (rows->numbers == 1) to_floats(numbers, q, rows->D, rows->dtype);
    else memcpy(numbers, q, width * sizeof *numbers);
    for (int64_t d = 0; d < width; d++) memcpy(panel + d * WIDTH, numbers + d, sizeof *numbers);
}

static void store_result(const Rows *rows, int64_t row, void *out, int sees_a_key) {
    float numbers[MAX_HEAD];
    for (int64_t d = 0; d < rows->D; d++) /* + 0: a tile that a row does not see may turn -0 into 0 */
        numbers[d] = sees_a_key ? rows->sum[row * rows->head + d] / rows->total[row] + 0.0f : 0.0f;
    from_floats(out, numbers, rows->D, rows->dtype);
}

/* dual_view_attention of one dtype: q and out [B, T, HQ, D], key_limit [B, T], blocks [B, T, HKV, D] or null with
 * block_size 0, all contiguous; caches [B, HKV, S, D]; window 0 for none. A task takes `tokens`, at most MAX_ROWS rows,
 * which moves no bit. */
void orthrus_attention(
    const void *q, const void *k_cache, const void *v_cache, const int32_t *key_limit, const void *k_block,
    const void *v_block, void *out, int64_t B, int64_t T, int64_t HQ, int64_t HKV, int64_t D, int64_t S,
    int64_t k_stride_b, int64_t k_stride_h, int64_t k_stride_s, int64_t v_stride_b, int64_t v_stride_h,
    int64_t v_stride_s, int64_t block_size, int64_t window, int64_t tokens, float scale_log2, int dtype,
    int num_threads) {
    int64_t group = HQ / HKV, chunks = (T + tokens - 1) / tokens;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < B * HKV * chunks; task++) {
        int64_t b = task / (HKV * chunks), h = task / chunks % HKV, first_t = task % chunks * tokens;
        int64_t end_t = least(first_t + tokens, T), lowest = INT32_MAX, longest = 0;
        Rows *rows = new_rows((end_t - first_t) * group, D, scale_log2, dtype);
        int64_t token[MAX_ROWS], place[MAX_ROWS]; /* a row's token, and where its head lies in q and out */
        int sees_a_key[MAX_ROWS];
        for (int64_t row = 0; row < rows->num_rows; row++) {
            int64_t t = token[row] = first_t + row / group, limit = most(0, least(key_limit[b * T + t], S));
            int64_t position = block_size ? limit + t % block_size : limit - 1;
            rows->from[row] = window ? most(0, position + 1 - window) : 0, rows->to[row] = limit;
            lowest = least(lowest, rows->from[row]), longest = most(longest, limit);
            sees_a_key[row] = block_size || rows->from[row] < limit;
            place[row] = ((b * T + t) * HQ + h * group + row % group) * D;
            load_query(rows, row, at(q, place[row], dtype));
        }
        const void *k = at(k_cache, b * k_stride_b + h * k_stride_h, dtype);
        const void *v = at(v_cache, b * v_stride_b + h * v_stride_h, dtype);
        attend(rows, k, v, k_stride_s, v_stride_s, lowest / TILE * TILE, longest);
        int64_t first_block = block_size ? first_t / block_size * block_size : end_t;
        for (int64_t block = first_block; block < end_t; block += block_size) {
            for (int64_t row = 0; row < rows->num_rows; row++)
                rows->from[row] = 0, rows->to[row] = token[row] / block_size * block_size == block ? block_size : 0;
            int64_t first = ((b * T + block) * HKV + h) * D;
            attend(rows, at(k_block, first, dtype), at(v_block, first, dtype), HKV * D, HKV * D, 0, block_size);
        }
        for (int64_t row = 0; row < rows->num_rows; row++)
            store_result(rows, row, at(out, place[row], dtype), sees_a_key[row]);
    }
}
