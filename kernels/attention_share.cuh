// How decoding's work is cut: the pages of all pairs of a sequence and a KV head are thought of as one long row, in the order of
// the sequences, their KV heads and their tokens. Each warp takes an equal share, whatever the lengths; a share begins
// and ends anywhere. Where it lies follows from the batch alone.
#pragma once

#include "attention.cuh"

#ifndef WARPS
#define WARPS 8 // of a block
#endif
#ifndef SPREAD
#define SPREAD 16 // a larger number makes fewer blocks of a small batch; in 16ths
#endif

constexpr int HEADS = 8 * HEAD_TILES; // query heads that go together

// A run of pages of one pair, all in this warp's share. A pair is a sequence, a KV head, and HEADS of its query heads.
struct Segment {
    u32 i;            // which of the single-row sequences
    u32 begin, len;   // tokens that its row sees
    u32 first, pages; // pages that hold them
    u32 table, row;   // where its blocks begin in the batch's; its row
    u32 pair;         // of the sequence
    u32 from, to;     // pages, counted from `first`
    u32 unit;         // where `from` lies in the long row
};

DEVICE u32 tiles_of_group(const Attention& a) { return (a.heads / a.kv_heads + HEADS - 1) / HEADS; }
DEVICE u32 pairs(const Attention& a) { return a.kv_heads * tiles_of_group(a); }

DEVICE void enter(Segment& s, const Attention& a, const Batch& batch, u32 i) {
    const u32 seq = batch.single[i];
    s.i = i;
    s.len = batch.seq_len[seq];
    s.table = batch.seq_blocks[seq];
    s.row = batch.seq_row[seq];
    s.begin = a.window && s.len > a.window ? s.len - a.window : 0;
    s.first = s.begin / KV_BLOCK;
    s.pages = (s.len + KV_BLOCK - 1) / KV_BLOCK - s.first;
}

DEVICE u32 segment_end(const Segment& s) { return s.unit + (s.to - s.from); }

// On to the segment that begins where this one ends; the share ends at `end`, and there is more before it.
DEVICE void advance(Segment& s, const Attention& a, const Batch& batch, u32 end) {
    s.unit = segment_end(s);
    s.from = s.to;
    if (s.from == s.pages) {
        s.from = 0;
        if (++s.pair == pairs(a)) {
            s.pair = 0;
            enter(s, a, batch, s.i + 1);
        }
    }
    s.to = min(s.pages, s.from + (end - s.unit));
}

// The long row's division: the first `longer` shares have a page more than `each`.
struct Shares {
    u32 each, longer;
    u32 blocks; // that have work
};

DEVICE u32 share_begin(const Shares& shares, u32 warp) { return warp * shares.each + min(warp, shares.longer); }
// Whose share a unit is in.
DEVICE u32 block_of(const Shares& shares, u32 unit) {
    const u32 first = shares.longer * (shares.each + 1);
    const u32 warp = unit < first ? unit / (shares.each + 1) : shares.longer + (unit - first) / shares.each;
    return warp / WARPS;
}

// One more page in turn for every warp of a block costs about as much as 8 more parts in a merge. With n pages a pair, the sum
// of both is least near √n pages a block; but never fewer pages than warps.
DEVICE Shares divide(u32 total, u32 pairs) {
    const float least = SPREAD / 16.0f * sqrtf((float)total / pairs);
    const u32 pages = max((u32)WARPS, (u32)least), blocks = min(gridDim.x, (total + pages - 1) / pages);
    const u32 warps = blocks * WARPS;
    return {total / warps, total % warps, min(blocks, (total + WARPS - 1) / WARPS)};
}

// Finds the division and this warp's first segment, if its share is not empty. Every thread adds up the pages of some sequences.
DEVICE Shares find_share(Segment& first, const Attention& a, const Batch& batch) {
    __shared__ u32 warp_totals[WARPS], before_found[WARPS];
    __shared__ Segment found[WARPS]; // the sequences that the warps' shares begin in
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 singles = batch.counts[COUNT_SINGLE], each = (singles + 32 * WARPS - 1) / (32 * WARPS);
    const u32 i_begin = min(threadIdx.x * each, singles), i_end = min(i_begin + each, singles);
    Segment s;
    u32 mine = 0;
    for (u32 i = i_begin; i < i_end; i++) {
        enter(s, a, batch, i);
        mine += s.pages * pairs(a);
    }
    u32 sum = mine;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
        const u32 other = __shfl_up_sync(~0u, sum, lanes);
        if (lane >= lanes) sum += other;
    }
    if (lane == 31) warp_totals[warp] = sum;
    __syncthreads();
    u32 total = 0;
#pragma unroll
    for (u32 w = 0; w < WARPS; w++) {
        if (w < warp) sum += warp_totals[w];
        total += warp_totals[w];
    }
    if (total == 0) return {0, 0, 0};
    const Shares shares = divide(total, singles * pairs(a));
    if (blockIdx.x >= shares.blocks) return shares;
    u32 before = sum - mine;
    for (u32 i = i_begin; i < i_end; i++) {
        if (i_end - i_begin > 1) enter(s, a, batch, i);
        const u32 after = before + s.pages * pairs(a);
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) {
            const u32 begin = share_begin(shares, blockIdx.x * WARPS + w);
            if (before <= begin && begin < after) found[w] = s, before_found[w] = before;
        }
        before = after;
    }
    __syncthreads();
    const u32 begin = share_begin(shares, blockIdx.x * WARPS + warp), end = share_begin(shares, blockIdx.x * WARPS + warp + 1);
    if (begin == end) return shares;
    first = found[warp];
    first.unit = begin;
    first.pair = (begin - before_found[warp]) / first.pages;
    first.from = (begin - before_found[warp]) % first.pages;
    first.to = min(first.pages, first.from + (end - begin));
    return shares;
}

// The pair's first query head, and how many of HEADS there are.
struct Heads {
    u32 first, count;
};
DEVICE Heads heads_of(u32 pair, const Attention& a) {
    const u32 group = a.heads / a.kv_heads, tiles = tiles_of_group(a);
    const u32 from = pair % tiles * HEADS;
    return {pair / tiles * group + from, min((u32)HEADS, group - from)};
}
