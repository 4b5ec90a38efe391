// What lies between the products of a tile: blocks of scores become weights, and their gradients. NUMBER is the dtype
// of q, k and v, WIDE that of sums. A launch has one batch entry; blockIdx.y is the head of q. Addresses are those of the
// block's corner.

struct Terms {  // what is done to q.k
    const BIAS *bias;
    const Byte *mask;
    Count bias_head, bias_row, bias_key, mask_head, mask_row, mask_key, lo, hi;
    WIDE cap;

    __device__ WIDE score(WIDE raw, Count head, Count row, Count key) const {
        if (key - row < lo || key - row > hi) return NOTHING;
        if (mask && !mask[head * mask_head + row * mask_row + key * mask_key]) return NOTHING;
#if SOFT
        raw = cap * tanh(raw / cap);
#endif
        if (!bias) return raw;
        const WIDE added = WIDE(bias[head * bias_head + row * bias_row + key * bias_key]);
        return added == NOTHING ? NOTHING : raw + added;  // whatever raw is
    }

    // The derivative of the score by q.k; NaN where an infinity was bounded, which must show.
    __device__ WIDE slope(WIDE raw) const {
#if SOFT
        const WIDE inner = tanh(raw / cap);
        return WIDE(1) - inner * inner + (raw - raw);
#else
        return WIDE(1);
#endif
    }
};

#define TERMS                                                                                                          \
    const BIAS *bias, Count bh, Count bs, Count bt, const Byte *mask, Count kh, Count ks, Count kt, Count lo,          \
        Count hi, double cap
#define GIVEN_TERMS Terms{bias, mask, bh, bs, bt, kh, ks, kt, lo, hi, WIDE(cap)}

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
    WIDE held[MOST_KEYS / LANES], top = NOTHING;
#pragma unroll
    for (int n = 0; n < MOST_KEYS / LANES; n++) {
        const Count key = n * LANES + lane();
        if (key < keys) {
            held[n] = terms.score(scores[key], head, row, key);
            top = held[n] > top ? held[n] : top;
        }
    }
    top = largest_of_row(top);
    if (seen && !(old_top < top)) top = old_top;
    const WIDE reference = top == NOTHING ? WIDE(0) : top;
    WIDE sums = 0;
#pragma unroll
    for (int n = 0; n < MOST_KEYS / LANES; n++) {
        const Count key = n * LANES + lane();
        if (key < keys) {
            const WIDE weight = exp(held[n] - reference);
            sums += weight;
            weights[key] = poisoned[key] && held[n] != NOTHING ? NUMBER(float(NOTHING - NOTHING)) : NUMBER(weight);
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

    __device__ Finished(const WIDE *maximum, const WIDE *total, const WIDE *delta_)
        : top(*maximum), sums(*total), delta(delta_ ? *delta_ : WIDE(0)),
          seen(*maximum != NOTHING && *total != WIDE(0)) {}

    __device__ WIDE weight(WIDE score) const { return hidden(score) ? WIDE(0) : exp(score - top) / sums; }

    // The gradient of the score, given that of the weight.
    __device__ WIDE gradient(WIDE score, WIDE of_weight) const {
        return hidden(score) ? WIDE(0) : weight(score) * (of_weight - delta);
    }

    __device__ bool hidden(WIDE score) const { return !seen || score == NOTHING; }
};

// A block of q.k into the finished rows' weights, and of dout.v, if there is one, into the gradients of q.k. A row whose
// dout is poisoned makes NaN of the keys that it sees.
extern "C" __global__ void pull_back(
    const WIDE *scores, const WIDE *slopes, NUMBER *weights, NUMBER *gradients, Count rows, Count keys,
    Count block_head, Count block_row, const WIDE *maximum, const WIDE *total, const WIDE *delta, Count mh, Count ms,
    Count th, Count ts, Count dh, Count ds, const Byte *poisoned, Count poisoned_head, TERMS
) {
    const Count row = row_of_grid(), head = blockIdx.y;
    if (row >= rows) return;
    const Terms terms = GIVEN_TERMS;
    const Finished finished(
        maximum + head * mh + row * ms, total + head * th + row * ts, delta ? delta + head * dh + row * ds : 0
    );
    const bool poison = poisoned[head * poisoned_head + row];
    const Count at = head * block_head + row * block_row;
    for (Count key = lane(); key < keys; key += LANES) {
        const WIDE raw = scores[at + key], score = terms.score(raw, head, row, key);
        const bool hidden = finished.hidden(score);
        if (slopes) {
            const WIDE gradient = finished.gradient(score, slopes[at + key]);
            gradients[at + key] = NUMBER(hidden ? WIDE(0) : gradient * terms.slope(raw));
        }
        weights[at + key] = NUMBER(poison && !hidden ? NOTHING - NOTHING : finished.weight(score));
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
    WIDE sum = 0;
    for (Count head = own_head; head < (own_heads == 1 ? heads : own_head + 1); head++)
        for (Count row = own_row; row < (own_rows == 1 ? rows : own_row + 1); row++) {
            const Finished finished(
                maximum + head * mh + row * ms, total + head * th + row * ts, delta + head * dh + row * ds
            );
            const Count at = head * block_head + row * block_row;
            for (Count key = own_key; key < (own_keys == 1 ? keys : own_key + 1); key++)
                sum += finished.gradient(terms.score(scores[at + key], head, row, key), slopes[at + key]);
        }
    dbias[own_head * gh + own_row * gs + own_key * gt] += sum;
}
