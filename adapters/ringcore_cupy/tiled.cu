// What lies between the products of a tile: blocks of scores become weights, and their gradients. NUMBER is the dtype
// of q, k and v, WIDE that of sums. A launch has one batch entry; blockIdx.y is the head of q. Addresses are those of the
// block's corner.

#if DROPS
typedef unsigned int Word;

struct Draw {  // which weights dropout takes away, by the words of ringcore/dropout.py
    Word seed, least;
    WIDE scale;
    Count batch, head, head_step, row, row_step, key, key_step;

    static __device__ Word absorbed(Word state, Word word) {
        word *= 0xCC9E2D51u;
        state ^= (word << 15 | word >> 17) * 0x1B873593u;
        return (state << 13 | state >> 19) * 5 + 0xE6546B64u;
    }

    static __device__ Word placed(Word state, Count place) {
        return absorbed(absorbed(state, Word(place)), Word(place >> 32));
    }

    static __device__ Word finished(Word x) {
        x = (x ^ x >> 16) * 0x85EBCA6Bu;
        x = (x ^ x >> 13) * 0xC2B2AE35u;
        return x ^ x >> 16;
    }

    __device__ Word of_row(Count in_heads, Count in_rows) const {
        return finished(placed(placed(placed(seed, batch), head + in_heads * head_step), row + in_rows * row_step));
    }

    // What the weight of a key is multiplied with.
    __device__ WIDE factor(Word of_row, Count in_keys) const {
        Word x = finished(of_row + placed(0, key + in_keys * key_step));
        x = (x ^ of_row * 0x9E3779B1u) * 0xC2B2AE35u;
        return (x ^ x >> 16) >= least ? scale : WIDE(0);
    }
};
#else
struct Draw {  // nothing is taken away
    __device__ int of_row(Count, Count) const { return 0; }
    __device__ WIDE factor(int, Count) const { return WIDE(1); }
};
#endif

struct Terms {  // what is done to q.k
    const BIAS *bias;
    const Byte *mask;
    Count bias_head, bias_row, bias_key, mask_head, mask_row, mask_key, lo, hi;
    WIDE cap;
    Draw draw;

    // Whether a row sees a key, and what is added to their score.
    __device__ bool shows(Count head, Count row, Count key, WIDE &added) const {
        added = 0;
        if (key - row < lo || key - row > hi) return false;
        if (mask && !mask[head * mask_head + row * mask_row + key * mask_key]) return false;
        if (bias) added = WIDE(bias[head * bias_head + row * bias_row + key * bias_key]);
        return added != NOTHING;
    }

    __device__ WIDE score(WIDE raw, WIDE added) const {
#if SOFT
        raw = cap * tanh(raw / cap);
#endif
        return raw + added;
    }

    // The derivative of the score by q.k.
    __device__ WIDE slope(WIDE raw) const {
#if SOFT
        const WIDE inner = tanh(raw / cap);
        return WIDE(1) - inner * inner;
#else
        return WIDE(1);
#endif
    }
};

#if DROPS
#define DRAW                                                                                                           \
    , Count seed, Count least, double kept, Count first_batch, Count first_head, Count head_step, Count first_row,     \
        Count row_step, Count first_key, Count key_step
#define GIVEN_DRAW                                                                                                     \
    Draw{                                                                                                              \
        Word(seed), Word(least), WIDE(kept), first_batch, first_head, head_step, first_row, row_step, first_key,       \
        key_step                                                                                                       \
    }
#else
#define DRAW
#define GIVEN_DRAW Draw{}
#endif
#define TERMS                                                                                                          \
    const BIAS *bias, Count bh, Count bs, Count bt, const Byte *mask, Count kh, Count ks, Count kt, Count lo,          \
        Count hi, double cap DRAW
#define POISON (NOTHING - NOTHING)  // NaN
#define GIVEN_TERMS Terms{bias, mask, bh, bs, bt, kh, ks, kt, lo, hi, WIDE(cap), GIVEN_DRAW}

// A copy without gaps [B, H, T, W], 0 for NaN and infinities: products multiply what is hidden by 0. Which rows had some.
extern "C" __global__ void clean(
    const NUMBER *x, NUMBER *out, Byte *poisoned, Count rows, Count width, Count xb, Count xh, Count xs, Count xw
) {
    const Count row = row_of_grid(), head = blockIdx.y, batch = blockIdx.z;
    if (row >= rows) return;
    const Count at = (batch * gridDim.y + head) * rows + row;
    x += batch * xb + head * xh + row * xs;
    out += at * width;
    WIDE bad = 0;
    for (Count c = lane(); c < width; c += LANES) {
        const WIDE value = WIDE(x[c * xw]);
        const bool finite = value - value == WIDE(0);
        out[c] = finite ? x[c * xw] : NUMBER(0.0f);
        if (!finite) bad = 1;
    }
    bad = largest_of_row(bad);
    if (lane() == 0) poisoned[at] = bad > 0;
}

// A block of scores into weights exp(s - maximum), its rows of the partial under the new maximum. A key whose v is
// poisoned makes NaN of the rows that see it.
extern "C" __global__ void weigh(
    const WIDE *scores, NUMBER *weights, Count rows, Count keys, Count block_head, Count block_row, WIDE *weighted,
    WIDE *maximum, WIDE *total, Count width, Count wh, Count ws, Count mh, Count ms, Count th, Count ts,
    const Byte *poisoned, Count poisoned_head, Count group, TERMS
) {
    const Count row = row_of_grid(), head = blockIdx.y;
    if (row >= rows) return;
    const Terms terms = GIVEN_TERMS;
    scores += head * block_head + row * block_row;
    weights += head * block_head + row * block_row;
    poisoned += head / group * poisoned_head;
    weighted += head * wh + row * ws;
    maximum += head * mh + row * ms;
    total += head * th + row * ts;
    const WIDE old_top = *maximum, old_sums = *total;
    const bool seen = old_top != NOTHING && old_sums != WIDE(0);
    WIDE held[MOST_KEYS / LANES], top = NOTHING, added;
#pragma unroll
    for (int n = 0; n < MOST_KEYS / LANES; n++) {
        const Count key = n * LANES + lane();
        if (key < keys) {
            held[n] = terms.shows(head, row, key, added) ? terms.score(scores[key], added) : NOTHING;
            top = held[n] > top ? held[n] : top;
        }
    }
    top = largest_of_row(top);
    if (seen && old_top > top) top = old_top;
    const WIDE reference = top == NOTHING ? WIDE(0) : top;
    const auto of_row = terms.draw.of_row(head, row);
    WIDE sums = 0;
#pragma unroll
    for (int n = 0; n < MOST_KEYS / LANES; n++) {
        const Count key = n * LANES + lane();
        if (key < keys) {
            WIDE weight = exp(held[n] - reference);
            sums += weight;
            weight *= terms.draw.factor(of_row, key);
            weights[key] = NUMBER(poisoned[key] && terms.shows(head, row, key, added) ? POISON : weight);
        }
    }
    sums = sum_of_row(sums);
    const WIDE factor = seen ? exp(old_top - reference) : WIDE(0);
    if (seen) sums += old_sums * factor;
    // The row's statistics may not be written before all lanes have read them.
    __syncwarp();
    if (lane() == 0) {
        *maximum = sums == sums ? top : sums;  // the largest of NaN alone would say that the row saw no key
        *total = sums;
    }
    if (factor == WIDE(1)) return;
    for (Count c = lane(); c < width; c += LANES) weighted[c] = seen ? weighted[c] * factor : WIDE(0);
}

struct Finished {  // a row's statistics over all keys
    WIDE top, sums, delta;
    bool seen;

    __device__ Finished(const WIDE *maximum, const WIDE *total, const WIDE *delta)
        : top(*maximum), sums(*total), delta(*delta), seen(top != NOTHING && sums != WIDE(0)) {}

    __device__ WIDE weight(WIDE score) const { return exp(score - top) / sums; }

    // The gradient of a score, given that of its weight.
    __device__ WIDE gradient(WIDE score, WIDE of_weight) const { return weight(score) * (of_weight - delta); }
};

// A block of q.k into the finished rows' weights, and of dout.v, if there is one, into the gradients of q.k. Where q, k or
// dout is poisoned the pairs that see it show NaN; bad_*: a byte for each row of these.
extern "C" __global__ void pull_back(
    const WIDE *scores, const WIDE *slopes, NUMBER *weights, NUMBER *gradients, Count rows, Count keys,
    Count block_head, Count block_row, const WIDE *maximum, const WIDE *total, const WIDE *delta, Count mh, Count ms,
    Count th, Count ts, Count dh, Count ds, const Byte *bad_dout, Count bad_dout_head, const Byte *bad_q,
    Count bad_q_head, const Byte *bad_k, Count bad_k_head, Count group, TERMS
) {
    const Count row = row_of_grid(), head = blockIdx.y;
    if (row >= rows) return;
    const Terms terms = GIVEN_TERMS;
    const Finished finished(
        maximum + head * mh + row * ms, total + head * th + row * ts, delta + head * dh + row * ds
    );
    const bool bad_weights = bad_dout[head * bad_dout_head + row], bad_row = bad_q[head * bad_q_head + row];
    bad_k += head / group * bad_k_head;
    const auto of_row = terms.draw.of_row(head, row);
    const Count at = head * block_head + row * block_row;
    for (Count key = lane(); key < keys; key += LANES) {
        const WIDE raw = scores[at + key];
        WIDE added, weight = 0, gradient = 0;
        if (finished.seen && terms.shows(head, row, key, added)) {
            const WIDE score = terms.score(raw, added);
            const WIDE factor = terms.draw.factor(of_row, key);
            weight = bad_weights ? POISON : finished.weight(score) * factor;
            if (slopes) gradient = finished.gradient(score, slopes[at + key] * factor) * terms.slope(raw);
            if (bad_row || bad_k[key]) gradient = POISON;
        }
        weights[at + key] = NUMBER(weight);
        if (slopes) gradients[at + key] = NUMBER(gradient);
    }
}

// Adds to a block of dbias the gradients of all scores that its numbers were added to. One thread has one number, so
// that every run gives the same bits; own_*: the lengths of dbias's axes, 1 where one number serves all.
extern "C" __global__ void pull_back_bias(
    const WIDE *scores, const WIDE *slopes, Count heads, Count rows, Count keys, Count block_head, Count block_row,
    const WIDE *maximum, const WIDE *total, const WIDE *delta, Count mh, Count ms, Count th, Count ts, Count dh,
    Count ds, WIDE *dbias, Count own_heads, Count own_rows, Count own_keys, Count gh, Count gs, Count gt, TERMS
) {
    const Count number = (Count)blockIdx.x * blockDim.x + threadIdx.x;
    const Count own_key = number % own_keys, own_row = number / own_keys % own_rows;
    const Count own_head = number / own_keys / own_rows;
    if (own_head >= own_heads) return;
    const Terms terms = GIVEN_TERMS;
    WIDE sum = 0, added;
    for (Count head = own_head; head < (own_heads == 1 ? heads : own_head + 1); head++)
        for (Count row = own_row; row < (own_rows == 1 ? rows : own_row + 1); row++) {
            const Finished finished(
                maximum + head * mh + row * ms, total + head * th + row * ts, delta + head * dh + row * ds
            );
            if (!finished.seen) continue;
            const auto of_row = terms.draw.of_row(head, row);
            const Count at = head * block_head + row * block_row;
            for (Count key = own_key; key < (own_keys == 1 ? keys : own_key + 1); key++)
                if (terms.shows(head, row, key, added)) {
                    const WIDE slope = slopes[at + key] * terms.draw.factor(of_row, key);
                    sum += finished.gradient(terms.score(scores[at + key], added), slope);
                }
        }
    dbias[own_head * gh + own_row * gs + own_key * gt] += sum;
}
