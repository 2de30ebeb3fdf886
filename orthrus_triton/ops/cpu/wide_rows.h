/* Of products in fp32 of rows that were turned to it before, padded to whole vectors. */

typedef float row_number;
typedef floats factors;

static inline floats load_rows(const float *from) {
#if LANES == 8 /* not enough registers to hold them */
    return load(from);
#else
    return held(load(from));
#endif
}
#define load_last_rows(from, n) load_rows(from)

static inline floats add_product(floats sum, floats rows, floats weights) { return fused(rows, weights, sum); }
