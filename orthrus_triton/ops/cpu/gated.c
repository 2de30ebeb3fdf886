/* SwiGLU and GeGLU: silu(gate) * up or gelu(gate) * up in fp32, rounded once. */

#include "vectors.h"

#define CHUNK 512 /* numbers at a time */

static inline floats sigmoid_of(floats x) {
    ints negative = x < all(0.0f);
    /* e^-|x|: no large number arises on the way */
    floats small = exp2_of(choose(negative, x, -x) * all(1.44269504f));
    return choose(negative, small, all(1.0f)) / (all(1.0f) + small);
}

/* gate_up [rows, 2 * I] -> out [rows, I] of one dtype; with gelu, the one that goes by a tanh. */
void orthrus_gated(
    const void *gate_up, void *out, int64_t rows, int64_t I, int gelu, int dtype, int num_threads) {
    int64_t chunks = (I + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(num_threads) if (rows * I > 8192)
    for (int64_t task = 0; task < rows * chunks; task++) {
        int64_t row = task / chunks, col = task % chunks * CHUNK, n = least(CHUNK, I - col);
        float gates[CHUNK], ups[CHUNK];
        to_floats(gates, at(gate_up, row * 2 * I + col, dtype), n, dtype);
        to_floats(ups, at(gate_up, row * 2 * I + I + col, dtype), n, dtype);
        for (int64_t i = n; i % LANES; i++) gates[i] = ups[i] = 0;
        for (int64_t i = 0; i < n; i += LANES) {
            floats gate = load(gates + i);
            /* 1 + tanh(x) is 2 * sigmoid(2 * x) */
            floats x = gelu ? gate * (all(1.59576912f) + all(0.0713548163f) * (gate * gate)) : gate;
            store(gates + i, gate * sigmoid_of(x) * load(ups + i));
        }
        from_floats(at(out, row * I + col, dtype), gates, n, dtype);
    }
}
