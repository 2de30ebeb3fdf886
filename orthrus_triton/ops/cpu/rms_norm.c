/* RMSNorm of rows, optionally after adding a residual: rounded before the weight and after it, as transformers does. */

#include "vectors.h"

#define CHUNK 512 /* numbers at a time */

/* x, residual (or null), hidden (their sum; null without residual) and out [rows, H], weight [H], of one dtype. */
void orthrus_rms_norm(
    const void *x, const void *residual, const void *weight, void *out, void *hidden, int64_t rows, int64_t H,
    float eps, int dtype, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (rows > 1 && rows * H > 8192)
    for (int64_t row = 0; row < rows; row++) {
        float numbers[CHUNK], other[CHUNK];
        const void *source = residual ? hidden : x;
        floats squares = {};
        for (int64_t col = 0; col < H; col += CHUNK) {
            int64_t n = least(CHUNK, H - col), first = row * H + col;
            to_floats(numbers, at(x, first, dtype), n, dtype);
            if (residual) {
                to_floats(other, at(residual, first, dtype), n, dtype);
                for (int64_t i = 0; i < n; i++) numbers[i] += other[i];
                round_floats(numbers, n, dtype);
                from_floats(at(hidden, first, dtype), numbers, n, dtype);
            }
            for (int64_t i = n; i % LANES; i++) numbers[i] = 0;
            for (int64_t i = 0; i < n; i += LANES) squares = fused(load(numbers + i), load(numbers + i), squares);
        }
        float scale = 1 / sqrtf(sum_of_lanes(squares) / H + eps);
        for (int64_t col = 0; col < H; col += CHUNK) {
            int64_t n = least(CHUNK, H - col), first = row * H + col;
            to_floats(numbers, at(source, first, dtype), n, dtype);
            to_floats(other, at(weight, col, dtype), n, dtype);
            for (int64_t i = 0; i < n; i++) numbers[i] *= scale;
            round_floats(numbers, n, dtype);
            for (int64_t i = 0; i < n; i++) numbers[i] *= other[i];
            from_floats(at(out, first, dtype), numbers, n, dtype);
        }
    }
}
