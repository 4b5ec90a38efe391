// Merging, finishing and lse, each in one pass over memory. WIDE is the accumulation dtype; a block of the grid has
// some rows of the head blockIdx.y and the batch entry blockIdx.z.

#define AT_ONCE 4  // numbers side by side that a lane has: one access to memory, where they are aligned

template <typename T> struct alignas(AT_ONCE * sizeof(T)) Pack { T at[AT_ONCE]; };

// Whether a row consists of packs.
template <typename T> __device__ bool packed(const T *row, Count width) {
    return width % AT_ONCE == 0 && (size_t)row % sizeof(Pack<T>) == 0;
}

template <typename T> __device__ Pack<T> load(const T *row, Count start, Count width, bool whole) {
    if (whole) return *(const Pack<T> *)(row + start);
    Pack<T> found;
#pragma unroll
    for (int n = 0; n < AT_ONCE; n++) if (start + n < width) found.at[n] = row[start + n];
    return found;
}

template <typename T> __device__ void store(T *row, Count start, Count width, bool whole, const Pack<T> &held) {
    if (whole) {
        *(Pack<T> *)(row + start) = held;
        return;
    }
#pragma unroll
    for (int n = 0; n < AT_ONCE; n++) if (start + n < width) row[start + n] = held.at[n];
}

__device__ bool saw(WIDE maximum, WIDE total) { return maximum != NOTHING && total != WIDE(0); }

// A partial into another, in place. finish: the totals are all 1 and stay so, weighted is the output, maximum the lse.
extern "C" __global__ void merge(
    STATE *weighted, WIDE *maximum, WIDE *total, const PART *part_weighted, const WIDE *part_maximum,
    const WIDE *part_total, Count rows, Count width, Count finish, Count wb, Count wh, Count ws, Count mb, Count mh,
    Count ms, Count tb, Count th, Count ts, Count pwb, Count pwh, Count pws, Count pmb, Count pmh, Count pms,
    Count ptb, Count pth, Count pts
) {
    const Count row = row_of_grid(), head = blockIdx.y, batch = blockIdx.z;
    if (row >= rows) return;
    maximum += batch * mb + head * mh + row * ms;
    total += batch * tb + head * th + row * ts;
    part_maximum += batch * pmb + head * pmh + row * pms;
    part_total += batch * ptb + head * pth + row * pts;
    const WIDE top = *maximum, sums = *total, part_top = *part_maximum, part_sums = *part_total;
    // None of these may be written before all lanes have read them.
    __syncwarp();
    const bool seen = saw(top, sums), part_seen = saw(part_top, part_sums);
    if (seen && !part_seen) return;
    // What stands under a row that saw no key is never read: it may be NaN.
    const WIDE largest = seen ? larger(top, part_top) : part_seen ? part_top : NOTHING;
    WIDE mine = seen ? exp(top - largest) : WIDE(0), theirs = part_seen ? exp(part_top - largest) : WIDE(0);
    const WIDE both = mine + theirs;
    if (lane() == 0) {
        *maximum = finish && part_seen ? largest + log(both) : largest;
        if (!finish) *total = seen ? sums * mine + part_sums * theirs : part_seen ? part_sums : WIDE(0);
    }
    if (finish) mine /= both, theirs /= both;
    weighted += batch * wb + head * wh + row * ws;
    part_weighted += batch * pwb + head * pwh + row * pws;
    const bool whole = packed(weighted, width), part_whole = packed(part_weighted, width);
    for (Count start = AT_ONCE * lane(); start < width; start += AT_ONCE * LANES) {
        Pack<STATE> held;
        Pack<PART> part;
        if (seen) held = load(weighted, start, width, whole);
        if (part_seen) part = load(part_weighted, start, width, part_whole);
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            WIDE number = part_seen ? WIDE(part.at[n]) : WIDE(0);
            if (seen) number = WIDE(held.at[n]) * mine + number * theirs;
            held.at[n] = STATE(number);
        }
        store(weighted, start, width, whole, held);
    }
}

// weighted / total, 0 in rows that saw no key; out may be weighted itself.
extern "C" __global__ void divide(
    const STATE *weighted, const WIDE *maximum, const WIDE *total, PART *out, Count rows, Count width,
    Count wb, Count wh, Count ws, Count mb, Count mh, Count ms, Count tb, Count th, Count ts, Count ob, Count oh,
    Count os
) {
    const Count row = row_of_grid(), head = blockIdx.y, batch = blockIdx.z;
    if (row >= rows) return;
    const WIDE sums = total[batch * tb + head * th + row * ts];
    const bool seen = saw(maximum[batch * mb + head * mh + row * ms], sums);
    weighted += batch * wb + head * wh + row * ws;
    out += batch * ob + head * oh + row * os;
    const bool whole = packed(weighted, width), out_whole = packed(out, width);
    for (Count start = AT_ONCE * lane(); start < width; start += AT_ONCE * LANES) {
        Pack<STATE> held;
        Pack<PART> found;
        if (seen) held = load(weighted, start, width, whole);
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) found.at[n] = PART(seen ? WIDE(held.at[n]) / sums : WIDE(0));
        store(out, start, width, out_whole, found);
    }
}

// maximum + log(total), without gaps; ``empty`` in rows that saw no key. One thread has one row.
extern "C" __global__ void lse(
    const WIDE *maximum, const WIDE *total, WIDE *out, Count rows, double empty, Count mb, Count mh, Count ms,
    Count tb, Count th, Count ts
) {
    const Count row = (Count)blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y, batch = blockIdx.z;
    if (row >= rows) return;
    const WIDE top = maximum[batch * mb + head * mh + row * ms], sums = total[batch * tb + head * th + row * ts];
    out[(batch * gridDim.y + head) * rows + row] = saw(top, sums) ? top + log(sums) : WIDE(empty);
}
