/* The largest logit of each row, the lowest id among equals; NaN never wins. */

#include "vectors.h"

#define TILE 1024 /* logits */

/* logits [rows, V] of any dtype -> out [rows]; `none` where no logit is larger than -inf. */
void orthrus_greedy_choice(
    const void *logits, int64_t *out, int64_t rows, int64_t V, int64_t none, int dtype, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        float numbers[TILE], best = -INFINITY;
        int64_t best_tile = -1;
        for (int64_t first = 0; first < V; first += TILE) {
            int64_t n = least(TILE, V - first);
            to_floats(numbers, at(logits, row * V + first, dtype), n, dtype);
            for (int64_t i = n; i % LANES; i++) numbers[i] = -INFINITY;
            floats largest = all(-INFINITY);
            for (int64_t i = 0; i < n; i += LANES)
                largest = choose(load(numbers + i) > largest, load(numbers + i), largest);
            for (int i = 0; i < LANES; i++)
                if (largest[i] > best) best = largest[i], best_tile = first;
        }
        out[row] = none;
        if (best_tile < 0) continue;
        int64_t n = least(TILE, V - best_tile), i = 0;
        to_floats(numbers, at(logits, row * V + best_tile, dtype), n, dtype);
        while (numbers[i] != best) i++;
        out[row] = best_tile + i;
    }
}
