/* The longest prefix on which draft and choice agree, and what it changes; the rules of ops/consensus.py. */

#include "vectors.h"

/* candidate and choice [B, K], eos_ids [E]; limit, context_len, output_len and finished [B], output_ids [B, L], block
 * and histogram [B, W]. */
void orthrus_consensus(
    const int64_t *candidate, const int64_t *choice, const int64_t *eos_ids, const int32_t *limit,
    int32_t *context_len, int64_t *output_ids, int32_t *output_len, uint8_t *finished, int64_t *block,
    int32_t *histogram, int64_t B, int64_t K, int64_t E, int64_t L, int64_t W, int64_t mask_token_id) {
    for (int64_t b = 0; b < B; b++, candidate += K, choice += K, output_ids += L, block += W, histogram += W) {
        if (finished[b]) continue;
        int64_t accepted = 0, first_eos = 0, is_eos = 0, written = output_len[b];
        while (accepted < K - 1 && candidate[accepted + 1] == choice[accepted]) accepted++;
        for (; first_eos <= accepted; first_eos++) {
            for (int64_t e = 0; e < E; e++) is_eos |= choice[first_eos] == eos_ids[e];
            if (is_eos) break;
        }
        int64_t count = least(least(accepted, first_eos) + 1, most(limit[b] - written, 0));
        for (int64_t row = 0; row < least(count, L - written); row++) output_ids[written + row] = choice[row];
        output_len[b] += count, context_len[b] += count;
        finished[b] = (is_eos && first_eos < count) || output_len[b] >= limit[b];
        if (count) block[0] = most(choice[count - 1], 0);
        for (int64_t row = 1; count && row < W; row++) block[row] = mask_token_id;
        histogram[accepted]++;
    }
}
