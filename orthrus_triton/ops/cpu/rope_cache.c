/* From the fused qkv product to attention's inputs: optional norms of q and k, rotation, and the K/V write. */

#include "vectors.h"

/* A head's norm, rounded as in rms_norm.c. */
static void norm_head(float *numbers, const void *weight, int64_t D, float eps, float offset, int dtype) {
    float weights[MAX_HEAD];
    floats squares = {};
    for (int64_t d = D; d % LANES; d++) numbers[d] = 0;
    for (int64_t d = 0; d < D; d += LANES) squares = fused(load(numbers + d), load(numbers + d), squares);
    float scale = 1 / sqrtf(sum_of_lanes(squares) / D + eps);
    for (int64_t d = 0; d < D; d++) numbers[d] *= scale;
    if (offset == 0) round_floats(numbers, D, dtype);
    to_floats(weights, weight, D, dtype);
    for (int64_t d = 0; d < D; d++) numbers[d] *= weights[d] + offset;
    round_floats(numbers, D, dtype);
}

/* rope_cache of one dtype: qkv [B, T, (HQ + 2 * HKV) * D], cos and sin [B, T, D / 2] with a stride of their own
 * along B or null, slots [B, T], norms [D] or null, q_out [B, T, HQ, D]; k_out and v_out [B, HKV, S, D]. */
void orthrus_rope_cache(
    const void *qkv, const float *cos, const float *sin, const int32_t *slots, const void *q_norm, const void *k_norm,
    void *q_out, void *k_out, void *v_out, int64_t B, int64_t T, int64_t HQ, int64_t HKV, int64_t D, int64_t S,
    int64_t angle_stride_b, int64_t k_stride_b, int64_t k_stride_h, int64_t k_stride_s, int64_t v_stride_b,
    int64_t v_stride_h, int64_t v_stride_s, float eps, float offset, int dtype, int num_threads) {
    int64_t heads = HQ + 2 * HKV, half = D / 2;
#pragma omp parallel for num_threads(num_threads) if (B * T * heads * D > 8192)
    for (int64_t token = 0; token < B * T; token++) {
        int64_t b = token / T, t = token % T, slot = slots[token];
        for (int64_t head = 0; head < heads; head++) {
            const void *from = at(qkv, (token * heads + head) * D, dtype);
            if (head >= HQ && (slot < 0 || slot >= S)) break;
            if (head >= HQ + HKV) {
                int64_t first = b * v_stride_b + (head - HQ - HKV) * v_stride_h + slot * v_stride_s;
                memcpy(at(v_out, first, dtype), from, D * size_of(dtype));
                continue;
            }
            float numbers[MAX_HEAD], rotated[MAX_HEAD], *result = cos ? rotated : numbers;
            to_floats(numbers, from, D, dtype);
            if (q_norm) norm_head(numbers, head < HQ ? q_norm : k_norm, D, eps, offset, dtype);
            if (cos) {
                const float *c = cos + b * angle_stride_b + t * half, *s = sin + b * angle_stride_b + t * half;
                for (int64_t d = 0; d < half; d++) {
                    rotated[d] = numbers[d] * c[d] - numbers[half + d] * s[d];
                    rotated[half + d] = numbers[half + d] * c[d] + numbers[d] * s[d];
                }
            }
            void *to = head < HQ ? at(q_out, (token * HQ + head) * D, dtype)
                                 : at(k_out, b * k_stride_b + (head - HQ) * k_stride_h + slot * k_stride_s, dtype);
            from_floats(to, result, D, dtype);
        }
    }
}
