/* Noise and the functions it takes, bit for bit those of ops/gumbel.py and ops/portable_math.py: from additions,
 * products, divisions and integers alone. */

#define WEYL 0x9E3779B9u
#define ROUNDS 7

typedef struct {
    uint32_t high, low;
} noise_words;
typedef union {
    float number;
    uint32_t bits;
} word;

/* Philox-2x32. */
static inline noise_words philox(uint32_t c0, uint32_t c1, uint32_t key) {
    for (int i = 0; i < ROUNDS; i++) {
        uint64_t product = (uint64_t)c0 * 0xD256D193u;
        c0 = (uint32_t)(product >> 32) ^ key ^ c1;
        c1 = (uint32_t)product;
        key += WEYL;
    }
    return (noise_words){c0, c1};
}

/* The key of all that is drawn in one row. */
static inline noise_words row_key(int64_t seed, int32_t sequence, int32_t position, uint32_t stream) {
    noise_words first = philox((uint32_t)position, (uint32_t)sequence, (uint32_t)seed);
    return philox(first.high, first.low, (uint32_t)((uint64_t)seed >> 32) ^ stream);
}

/* Those of one token. */
static inline noise_words words_of(uint32_t id, noise_words key) { return philox(id, key.low, key.high); }

/* log(m * 2^e) from m - 1. */
static inline float log_from_parts(float m_minus_1, float e) {
    float s = m_minus_1 / (m_minus_1 + 2.0f), s2 = s * s;
    float p = s2 * (float)(2.0 / 9) + (float)(2.0 / 7);
    p = p * s2 + (float)(2.0 / 5);
    p = p * s2 + (float)(2.0 / 3);
    p = p * s2 + 2.0f;
    return (s * p + e * -2.12194440e-4f) + e * 0.693359375f;
}

/* x > 0, normal, as m * 2^e with sqrt(1/2) <= m < sqrt(2). */
static inline float split_float(float x, float *e) {
    word wide = {x};
    int32_t exponent = (int32_t)(wide.bits - 0x3F3504F3u) >> 23;
    wide.bits -= (uint32_t)exponent << 23;
    *e = exponent;
    return wide.number;
}

static inline float portable_log(float x) {
    float e, m = split_float(x, &e);
    return log_from_parts(m - 1.0f, e);
}

/* Standard exponential noise. */
static inline float exponential(noise_words words) {
    const int small = words.high < 0x4AFB0CCC;
    uint32_t high = small ? words.high : ~words.high, low = small ? words.low : ~words.low;
    float w = (float)high * 0x1p-32f + ((float)low + 0.5f) * 0x1p-64f, e, m = split_float(w, &e);
    return -log_from_parts(small ? -w : m - 1.0f, small ? 0.0f : e);
}

/* exp of x <= 0. */
static inline floats portable_exp(floats x) {
    floats y = x * all(1.4426950408889634f) + all(0.5f);
    y = choose(y > all(-200.0f), y, all(-200.0f)); /* so that it is an int */
    floats n = __builtin_convertvector(__builtin_convertvector(y, ints), floats);
    n = choose(n > y, n - all(1.0f), n); /* the floor */
    n = choose(n > all(-126.0f), n, all(-126.0f));
    floats r = (x - n * all(0.693359375f)) - n * all(-2.12194440e-4f);
    floats p = r * all((float)(1.0 / 720)) + all((float)(1.0 / 120));
    p = p * r + all((float)(1.0 / 24));
    p = p * r + all((float)(1.0 / 6));
    p = p * r + all(0.5f);
    p = p * r + all(1.0f);
    p = p * r + all(1.0f);
    floats scale = (floats)((__builtin_convertvector(n, ints) + 127) << 23);
    return choose(x >= all(-87.0f), p * scale, all(0.0f));
}

/* The upper noise words of LANES tokens in a row, the first of which is `id`. */
static inline words upper_words(uint32_t id, noise_words key) {
    typedef uint64_t longs __attribute__((vector_size(8 * LANES)));
    words c0 = {0}, c1 = (words){0} + key.low, k = (words){0} + key.high;
    for (int lane = 0; lane < LANES; lane++) c0[lane] = id + lane;
    for (int i = 0; i < ROUNDS; i++) {
        longs product = __builtin_convertvector(c0, longs) * 0xD256D193u;
        c0 = __builtin_convertvector(product >> 32, words) ^ k ^ c1;
        c1 = __builtin_convertvector(product, words);
        k += WEYL;
    }
    return c0;
}
