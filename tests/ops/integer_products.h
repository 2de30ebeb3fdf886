/* Included before a kernel's source: AVX2's instruction for products of integers (AVX-VNNI), for CPUs without it. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

static inline __m256i products_one_by_one(__m256i sum, __m256i some, __m256i others) {
    int32_t sums[8];
    uint8_t unsigned_ones[32];
    int8_t signed_ones[32];
    memcpy(sums, &sum, 32), memcpy(unsigned_ones, &some, 32), memcpy(signed_ones, &others, 32);
    for (int i = 0; i < 32; i++) sums[i / 4] += unsigned_ones[i] * signed_ones[i];
    memcpy(&sum, sums, 32);
    return sum;
}

#define dot_int8(sum, some, others) products_one_by_one((__m256i)(sum), (__m256i)(some), (__m256i)(others))
