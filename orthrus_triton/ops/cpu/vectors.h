/* Vectors of fp32, as wide as the machine has them, and what the kernels are made of. Whatever is done to one row's
 * numbers never depends on other rows: those are other lanes, or other turns of a loop. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* a * b + c with one rounding; everywhere else products are rounded (-ffp-contract=off) */
#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define HEIGHT 8 /* of a small product: 32 registers hold 2 * HEIGHT sums and what they are made from */
#define fused(a, b, c) ((floats)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define fp16_of(x) ((halves)_mm512_cvtps_ph((__m512)(x), _MM_FROUND_TO_NEAREST_INT))
#define fp16_as_floats(x) ((floats)_mm512_cvtph_ps((__m256i)(x)))
#define int8_as_floats(from) ((floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((__m128i *)(from)))))
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define LANES 8
#define HEIGHT 4
#define fused(a, b, c) ((floats)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define fp16_of(x) ((halves)_mm256_cvtps_ph((__m256)(x), _MM_FROUND_TO_NEAREST_INT))
#define fp16_as_floats(x) ((floats)_mm256_cvtph_ps((__m128i)(x)))
#define int8_as_floats(from) ((floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((__m128i *)(from)))))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define LANES 4
#define HEIGHT 8
#define fused(a, b, c) ((floats)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define fp16_of(x) ((halves)vcvt_f16_f32((float32x4_t)(x)))
#define fp16_as_floats(x) ((floats)vcvt_f32_f16((float16x4_t)(x)))
static inline float32x4_t int8_as_floats_neon(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
#define int8_as_floats(from) ((floats)int8_as_floats_neon(from))
#else
#error "needs fused multiply-adds: AVX2 with FMA and F16C, AVX-512 or 64-bit ARM"
#endif
/* each lane's sum, plus four products of numbers of a byte with a sign; on x86 `some` are without one */
#if defined(__ARM_FEATURE_DOTPROD)
#define dot_int8(sum, some, others) vdotq_s32((int32x4_t)(sum), (int8x16_t)(some), (int8x16_t)(others))
#elif defined(__AVX512VNNI__) && LANES == 16
#define dot_int8(sum, some, others) _mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(some), (__m512i)(others))
#elif defined(__AVXVNNI__) && LANES == 8
#define dot_int8(sum, some, others) _mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(some), (__m256i)(others))
#endif
#define WIDTH (2 * LANES) /* of a small product */
#define MAX_HEAD 256      /* head_dim */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static inline floats load(const float *from) {
    floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

/* x in a register: compilers else read it anew for each product that it is a factor of. */
#ifdef __aarch64__
#define hold(x) __asm__("" : "+w"(x))
#else
#define hold(x) __asm__("" : "+v"(x))
#endif
static inline floats held(floats x) {
    hold(x);
    return x;
}

static inline ints load_ints(const int32_t *from) {
    ints x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline void store(float *to, floats x) { memcpy(to, &x, sizeof x); }
static inline floats all(float x) { return x - (floats){}; }
static inline ints all_ints(int32_t x) { return x - (ints){}; }

static inline floats choose(ints which, floats yes, floats no) {
    return (floats)((which & (ints)yes) | (~which & (ints)no));
}

static inline int any(ints mask) {
    int32_t some = 0;
    for (int i = 0; i < LANES; i++) some |= mask[i];
    return some != 0;
}

/* 2^x for x <= 0, to about one unit in the last place; NaN stays. */
static inline floats exp2_of(floats x) {
    const floats shift = all(12582912.0f + 127.0f);
    x = choose(x < all(-127.0f), all(-127.0f), x);
    /* the last bits of the sum are round(x) + 127, the result's exponent; at the lower end 0, and so is the result */
    floats shifted = x + shift, f = x - (shifted - shift);
    floats p = all(1.5353362e-4f);
    p = fused(p, f, all(1.3398874e-3f));
    p = fused(p, f, all(9.6184373e-3f));
    p = fused(p, f, all(5.5503324e-2f));
    p = fused(p, f, all(2.4022648e-1f));
    p = fused(p, f, all(6.9314720e-1f));
    p = fused(p, f, all(1.0f));
    return p * (floats)((ints)shifted << 23);
}

/* What numbers are kept in: DTYPES in kernels.py has the same order. */
enum { FP32, BF16, FP16 };

static inline int64_t size_of(int dtype) { return dtype == FP32 ? 4 : 2; }
static inline void *at(const void *data, int64_t n, int dtype) { return (char *)data + n * size_of(dtype); }

/* Rounded to the nearest, ties to even. */
static inline halves to_halves(floats x, int dtype) {
    if (dtype == FP16) return fp16_of(x);
    words bits = (words)x, odd = bits >> 16 & 1;
    bits = (words)choose(x == x, (floats)(bits + 0x7fff + odd), all(NAN));
    return __builtin_convertvector(bits >> 16, halves);
}

static inline floats of_halves(halves x, int dtype) {
    if (dtype == FP16) return fp16_as_floats(x);
    return (floats)(__builtin_convertvector(x, words) << 16);
}

static inline void to_floats(float *to, const void *from, int64_t n, int dtype) {
    if (dtype == FP32) {
        memcpy(to, from, n * sizeof *to);
        return;
    }
    const uint16_t *numbers = from;
    halves some = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        memcpy(&some, numbers + i, sizeof some);
        store(to + i, of_halves(some, dtype));
    }
    for (; i < n; i++) {
        some[0] = numbers[i];
        to[i] = of_halves(some, dtype)[0];
    }
}

static inline void from_floats(void *to, const float *from, int64_t n, int dtype) {
    if (dtype == FP32) {
        memcpy(to, from, n * sizeof *from);
        return;
    }
    uint16_t *numbers = to;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        halves some = to_halves(load(from + i), dtype);
        memcpy(numbers + i, &some, sizeof some);
    }
    for (; i < n; i++) numbers[i] = to_halves(all(from[i]), dtype)[0];
}

static inline floats rounded(floats x, int dtype) {
    return dtype == FP32 ? x : of_halves(to_halves(x, dtype), dtype);
}

static inline void round_floats(float *numbers, int64_t n, int dtype) {
    if (dtype == FP32) return;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(numbers + i, rounded(load(numbers + i), dtype));
    for (; i < n; i++) numbers[i] = rounded(all(numbers[i]), dtype)[0];
}

/* Lane by lane, in order. */
static inline float sum_of_lanes(floats x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}
