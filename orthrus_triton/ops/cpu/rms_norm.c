/* RMSNorm of rows, after a residual was added or before it is: rounded before the weight and after it, as in most of
   transformers' models (OLMo's are rounded after it alone); with an offset to the weight, once, as Gemma's are. */

#include "vectors.h"

#define CHUNK 512 /* numbers at a time */

/* The squares of n numbers in a CHUNK, added lane by lane; what fills the last vector becomes 0. */
static inline floats add_squares(floats squares, float *numbers, int64_t n) {
    for (int64_t i = n; i % LANES; i++) numbers[i] = 0;
    for (int64_t i = 0; i < n; i += LANES) squares = fused(load(numbers + i), load(numbers + i), squares);
    return squares;
}

static inline float scale_of(floats squares, int64_t H, float eps) { return 1 / sqrtf(sum_of_lanes(squares) / H + eps); }

/* n numbers of a row's norm, in fp32 and not yet rounded. */
static inline void normed(
    float *numbers, const void *source, const void *weight, int64_t first, int64_t col, int64_t n, float scale,
    float offset, int dtype) {
    float weights[CHUNK];
    to_floats(numbers, at(source, first, dtype), n, dtype);
    to_floats(weights, at(weight, col, dtype), n, dtype);
    for (int64_t i = 0; i < n; i++) numbers[i] *= scale;
    if (offset == 0) round_floats(numbers, n, dtype);
    for (int64_t i = 0; i < n; i++) numbers[i] *= weights[i] + offset;
}

static inline void store_normed(
    void *out, const void *source, const void *weight, int64_t row, int64_t H, float scale, float offset,
    int dtype) {
    float numbers[CHUNK];
    for (int64_t col = 0; col < H; col += CHUNK) {
        int64_t n = least(CHUNK, H - col), first = row * H + col;
        normed(numbers, source, weight, first, col, n, scale, offset, dtype);
        from_floats(at(out, first, dtype), numbers, n, dtype);
    }
}

/* The sum of residual and the n numbers, rounded; to hidden, too. */
static inline void add_residual(
    float *numbers, const void *residual, void *hidden, int64_t first, int64_t n, int dtype) {
    float other[CHUNK];
    to_floats(other, at(residual, first, dtype), n, dtype);
    for (int64_t i = 0; i < n; i++) numbers[i] += other[i];
    round_floats(numbers, n, dtype);
    from_floats(at(hidden, first, dtype), numbers, n, dtype);
}

/* x, residual (or null), hidden (their sum; null without residual) and out [rows, H], weight [H], of one dtype. */
void orthrus_rms_norm(
    const void *x, const void *residual, const void *weight, void *out, void *hidden, int64_t rows, int64_t H,
    float eps, float offset, int dtype, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (rows > 1 && rows * H > 8192)
    for (int64_t row = 0; row < rows; row++) {
        float numbers[CHUNK];
        floats squares = {};
        for (int64_t col = 0; col < H; col += CHUNK) {
            int64_t n = least(CHUNK, H - col), first = row * H + col;
            to_floats(numbers, at(x, first, dtype), n, dtype);
            if (residual) add_residual(numbers, residual, hidden, first, n, dtype);
            squares = add_squares(squares, numbers, n);
        }
        store_normed(out, residual ? hidden : x, weight, row, H, scale_of(squares, H, eps), offset, dtype);
    }
}

static inline void norm_span(
    const void *x, void *out, const void *weight, int64_t size, float eps, float offset, int dtype) {
    float numbers[CHUNK];
    floats squares = {};
    for (int64_t col = 0; col < size; col += CHUNK) {
        int64_t n = least(CHUNK, size - col);
        to_floats(numbers, at(x, col, dtype), n, dtype);
        squares = add_squares(squares, numbers, n);
    }
    store_normed(out, x, weight, 0, size, scale_of(squares, size, eps), offset, dtype);
}

/* Of each row of qkv [rows, width], the first Q numbers as their norm, the next K as theirs, and the rest; to out, alike.
   The weights are [Q] and [K]. */
void orthrus_norm_spans(
    const void *qkv, const void *q_weight, const void *k_weight, void *out, int64_t rows, int64_t width, int64_t Q,
    int64_t K, float eps, float offset, int dtype, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (rows > 1 && rows * width > 8192)
    for (int64_t row = 0; row < rows; row++) {
        int64_t k = row * width + Q, rest = k + K;
        norm_span(at(qkv, row * width, dtype), at(out, row * width, dtype), q_weight, Q, eps, offset, dtype);
        norm_span(at(qkv, k, dtype), at(out, k, dtype), k_weight, K, eps, offset, dtype);
        memcpy(at(out, rest, dtype), at(qkv, rest, dtype), (width - Q - K) * size_of(dtype));
    }
}

/* hidden = residual + the norm of x; and, unless next_weight is null, out = the norm of hidden. All of one dtype: x,
   residual, hidden and out [rows, H], the weights [H]. */
void orthrus_add_normed(
    const void *x, const void *residual, const void *weight, const void *next_weight, void *out, void *hidden,
    int64_t rows, int64_t H, float eps, float next_eps, float offset, int dtype, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (rows > 1 && rows * H > 8192)
    for (int64_t row = 0; row < rows; row++) {
        float numbers[CHUNK];
        floats squares = {}, next_squares = {};
        for (int64_t col = 0; col < H; col += CHUNK) {
            int64_t n = least(CHUNK, H - col);
            to_floats(numbers, at(x, row * H + col, dtype), n, dtype);
            squares = add_squares(squares, numbers, n);
        }
        float scale = scale_of(squares, H, eps);
        for (int64_t col = 0; col < H; col += CHUNK) {
            int64_t n = least(CHUNK, H - col), first = row * H + col;
            normed(numbers, x, weight, first, col, n, scale, offset, dtype);
            round_floats(numbers, n, dtype);
            add_residual(numbers, residual, hidden, first, n, dtype);
            next_squares = add_squares(next_squares, numbers, n);
        }
        if (next_weight) {
            float next_scale = scale_of(next_squares, H, next_eps);
            store_normed(out, hidden, next_weight, row, H, next_scale, offset, dtype);
        }
    }
}
