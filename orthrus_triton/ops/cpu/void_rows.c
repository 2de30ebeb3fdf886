/* No token for rows whose hidden state is not finite. */

#include "vectors.h"

/* choice and out [rows], hidden [rows, H]. */
void orthrus_void_rows(
    const int64_t *choice, const void *hidden, int64_t *out, int64_t rows, int64_t H, int64_t none, int dtype) {
    for (int64_t row = 0; row < rows; row++) {
        ints bad = {0};
        for (int64_t first = 0; first < H; first += LANES) {
            float numbers[LANES] = {0};
            to_floats(numbers, at(hidden, row * H + first, dtype), least(LANES, H - first), dtype);
            bad |= load(numbers) - load(numbers) != all(0);
        }
        out[row] = any(bad) ? none : choice[row];
    }
}
