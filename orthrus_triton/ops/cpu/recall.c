/* What followed the newest tokens earlier in the text; the rules of ops/recall.py. */

#include "vectors.h"

typedef struct {
    const int64_t *prompt, *output;
    int64_t prompt_len, newest, last;
} text;

static inline int64_t token_at(const text *of, int64_t at) {
    if (at == of->last) return of->newest;
    return at < of->prompt_len ? of->prompt[at] : of->output[at - of->prompt_len];
}

/* prompt_ids and output_ids [B, L]; prompt_len, newest and last [B]; tokens and bonus [B, count]. */
void orthrus_recall(
    const int64_t *prompt_ids, const int64_t *output_ids, const int32_t *prompt_len, const int64_t *newest,
    const int32_t *last, int64_t *tokens, float *bonus, int64_t B, int64_t L, int64_t count, int64_t longest,
    float bonus_of_one) {
    for (int64_t b = 0; b < B; b++, tokens += count, bonus += count) {
        const text of = {prompt_ids + b * L, output_ids + b * L, prompt_len[b], newest[b], least(last[b], L - 1)};
        int64_t length = 0, place = 0;
        for (int64_t at = 0; at < of.last; at++) {
            int64_t back = 0;
            while (back < longest && back <= at) {
                int64_t token = token_at(&of, at - back);
                if (token < 0 || token != token_at(&of, of.last - back)) break;
                back++;
            }
            if (back >= length) length = back, place = at; /* of equally long ones the last */
        }
        for (int64_t ahead = 0; ahead < count; ahead++) {
            int64_t at = place + 1 + ahead % most(of.last - place, 1);
            tokens[ahead] = most(token_at(&of, least(at, L - 1)), 0);
            bonus[ahead] = length ? least(length - 1 + ahead, longest) * bonus_of_one : 0;
        }
    }
}
