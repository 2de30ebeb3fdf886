/* Coupled sampling: the token with the largest logit / temperature + Gumbel noise among those that top-k, top-p and
 * min-p keep. The ids of ops/sampling.py's kernels, found as they find them. */

#include "vectors.h"
#include "noise.h"

#define LARGEST 3.0e38f /* +inf logits are this */
#define MASS_ONE 0x1p40f

typedef int64_t longs __attribute__((vector_size(8 * LANES)));

typedef struct {
    const void *logits;
    int64_t V;
    int dtype;
    float temperature, min_p, z_max;
    float z_k;  /* what top-k leaves is at least this */
    float luck; /* a token whose noise is above weight * luck is worse than the likeliest */
    noise_words key;
} row_data;

typedef struct {
    int64_t mass, id;
    float score;
} found;

/* Logits / temperature of LANES tokens; -inf for NaN and beyond V. Zero has one sign. */
static inline floats scaled(const row_data *row, int64_t first) {
    float numbers[LANES];
    int64_t n = least(LANES, row->V - first);
    for (int64_t i = n; i < LANES; i++) numbers[i] = -INFINITY;
    if (n == LANES) to_floats(numbers, at(row->logits, first, row->dtype), LANES, row->dtype);
    else to_floats(numbers, at(row->logits, first, row->dtype), n, row->dtype);
    floats x = load(numbers), z = x / all(row->temperature);
    z = choose(x == x, z, all(-INFINITY));
    return choose(z < all(LARGEST), z, all(LARGEST)) + all(0.0f);
}

/* The lowest id of the largest scaled logit, which goes to z_max; -1 where all are -inf. */
static int64_t likeliest(row_data *row) {
    int64_t id = -1;
    row->z_max = -INFINITY;
    for (int64_t first = 0; first < row->V; first += LANES) {
        floats z = scaled(row, first);
        if (!any(z > all(row->z_max))) continue;
        for (int i = 0; i < LANES; i++)
            if (z[i] > row->z_max) row->z_max = z[i], id = first + i;
    }
    return id;
}

/* The k-th largest scaled logit, byte by byte of the word that orders as the number does. */
static float k_th_largest(const row_data *row, int64_t k) {
    uint32_t prefix = 0, known = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t counts[256] = {0};
        for (int64_t first = 0; first < row->V; first += LANES) {
            ints bits = (ints)scaled(row, first);
            words key = (words)bits ^ ((words)(bits >> 31) | 0x80000000u);
            ints alike = ((key ^ prefix) & known) == 0;
            if (!any(alike)) continue;
            for (int i = 0; i < least(LANES, row->V - first); i++)
                if (alike[i]) counts[key[i] >> shift & 255]++;
        }
        uint32_t digit = 255;
        while (counts[digit] < k) k -= counts[digit--];
        prefix |= digit << shift;
        known |= 255u << shift;
    }
    word wide = {.bits = prefix & 0x80000000u ? prefix ^ 0x80000000u : ~prefix};
    return wide.number;
}

/* Among tokens above `bound` that top-k keeps: their mass, and the one with the best score that min-p keeps, unless
 * another of the row has a better one for sure; id -1 if there is none. */
static found best_above(const row_data *row, float bound) {
    found best = {0, -1, -INFINITY};
    longs mass = {0};
    for (int64_t first = 0; first < row->V; first += LANES) {
        floats z = scaled(row, first);
        ints above = (z > all(bound)) & (z >= all(row->z_k));
        if (!any(above)) continue;
        floats weight = portable_exp(z - all(row->z_max));
        mass += __builtin_convertvector(choose(above, weight * all(MASS_ONE), all(0.0f)), longs);
        floats high = __builtin_convertvector(upper_words(first, row->key), floats);
        ints hopeful = above & (weight >= all(row->min_p)) & (high * all(0x1p-32f) <= weight * all(row->luck));
        if (!any(hopeful)) continue;
        for (int i = 0; i < LANES; i++) {
            if (!hopeful[i]) continue;
            float score = z[i] - portable_log(exponential(words_of(first + i, row->key)));
            if (score > best.score) best.score = score, best.id = first + i;
        }
    }
    for (int i = 0; i < LANES; i++) best.mass += mass[i];
    return best;
}

static float scaled_at(const row_data *row, int64_t id) { return scaled(row, id / LANES * LANES)[id % LANES]; }

/* logits [B, T, V] of any dtype, positions [B, T], the others [B] -> out [B, T]; `none` where no logit is larger than
 * -inf. */
void orthrus_sample_choice(
    const void *logits, const int32_t *positions, const float *temperature, const int32_t *top_k, const float *top_p,
    const float *min_p, const int64_t *seed, const int32_t *sequence, int64_t *out, int64_t B, int64_t T, int64_t V,
    int64_t stream, int64_t none, int dtype, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
    for (int64_t r = 0; r < B * T; r++) {
        int64_t b = r / T;
        int samples = temperature[b] > 0;
        row_data row = {
            .logits = at(logits, r * V, dtype), .V = V, .dtype = dtype, .min_p = min_p[b], .z_k = -INFINITY,
            .temperature = samples ? temperature[b] : 1, .key = row_key(seed[b], sequence[b], positions[r], stream)};
        int64_t top = likeliest(&row);
        out[r] = top < 0 ? none : top;
        if (top < 0 || !samples) continue;
        if (0 < top_k[b] && top_k[b] < V) row.z_k = k_th_largest(&row, top_k[b]);
        /* one hundredth covers what scores are rounded by, unless they are large */
        row.luck = fabsf(row.z_max) < 1024 ? exponential(words_of(top, row.key)) * 1.01f : LARGEST;
        found best = best_above(&row, -INFINITY);
        if (best.id < 0) continue; /* min_p is above 1 */
        out[r] = best.id;
        if (!(top_p[b] < 1)) continue;
        /* what top-p drops has `enough` mass above it; then so has everything that is not likelier */
        const float enough = top_p[b] * (float)best.mass;
        for (;;) {
            best = best_above(&row, scaled_at(&row, out[r]));
            if (best.id < 0 || (float)best.mass < enough) break;
            out[r] = best.id;
        }
    }
}
