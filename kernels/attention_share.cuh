// How decoding's work is cut: the pages of all pairs of a sequence and a KV head are thought of as one long row, in the order of
// the sequences, their KV heads and their tokens. Each warp takes a share of it. Where shares lie follows from the batch alone.
//
// Pairs are cut one by one if they fit well: best so that each block has a single pair, whose parts then meet in shared memory;
// else so that each warp has. Otherwise shares are equal, whatever the lengths, and begin and end anywhere.
#pragma once

#include "attention.cuh"

#ifndef WARPS
#define WARPS 8 // of a block
#endif

constexpr int HEADS = 8 * HEAD_TILES; // query heads that go together

struct Decode : Attention {
    u32 group; // query heads of a KV head
    u32 tiles; // of HEADS query heads each, that they make
    DEVICE u32 pairs() const { return kv_heads * tiles; } // of a sequence
};

// A run of pages of one pair, all in this warp's share. A pair is a sequence, a KV head, and HEADS of its query heads.
struct Segment {
    u32 i;            // which of the single-row sequences
    u32 begin, len;   // tokens that its row sees
    u32 first, pages; // pages that hold them
    u32 table, row;   // where its blocks begin in the batch's; its row
    u32 kv_head, tile;
    u32 from, to;     // pages, counted from `first`
    u32 unit;         // where `from` lies in the long row
};

DEVICE void enter(Segment& s, const Decode& a, const Batch& batch, u32 i) {
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
DEVICE void advance(Segment& s, const Decode& a, const Batch& batch, u32 end) {
    s.unit = segment_end(s);
    s.from = s.to;
    if (s.from == s.pages) {
        s.from = 0;
        if (++s.tile == a.tiles) {
            s.tile = 0;
            if (++s.kv_head == a.kv_heads) {
                s.kv_head = 0;
                enter(s, a, batch, s.i + 1);
            }
        }
    }
    s.to = min(s.pages, s.from + (end - s.unit));
}

// How the long row is cut.
struct Division {
    u32 most, together; // pairs one by one: each into shares of at most `most` pages, `together` of them or a multiple
    u32 each, longer;   // `most` is 0: the first `longer` shares have a page more than `each`
};

// The warps of a pair of so many pages, where pairs are cut one by one.
DEVICE u32 warps_of(const Division& d, u32 pages) {
    const u32 together = d.most * d.together;
    return (pages + together - 1) / together * d.together;
}
// Where a share begins, where shares are equal.
DEVICE u32 share_begin(const Division& d, u32 warp) { return warp * d.each + min(warp, d.longer); }
// Whose share a unit is in, where shares are equal.
DEVICE u32 block_of(const Division& d, u32 unit) {
    const u32 first = d.longer * (d.each + 1);
    const u32 warp = unit < first ? unit / (d.each + 1) : d.longer + (unit - first) / d.each;
    return warp / WARPS;
}

constexpr u32 LEAST = 2;     // pages of a share, if there are warps to spare
constexpr u32 ATTEMPTS = 8;  // to cut pairs one by one
constexpr u32 PER_KIND = ATTEMPTS / 2;

// Attempts in order of preference: whole blocks for a pair, with shares up to two pages longer than equal ones would be; then
// without regard to blocks, up to one page longer.
DEVICE Division attempt(u32 i, u32 even) {
    const bool blocks = i < PER_KIND;
    const u32 spare = even / 16 + (blocks ? 2 : 1);
    return {max(LEAST, even + spare * (i % PER_KIND) / (PER_KIND - 1)), blocks ? (u32)WARPS : 1, 0, 0};
}

// The block's sums, in every thread.
template <int N> DEVICE void block_sums(u32 (&x)[N]) {
    __shared__ u32 sums[WARPS][N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = __reduce_add_sync(~0u, x[i]);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][i] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) x[i] += sums[w][i];
    }
}

// A thread's sequences, to find the division. Most often there is one at most, which is read once.
struct Own {
    u32 begin, end;
    Segment s;
};

template <typename Use> DEVICE void each_own(Own& own, const Decode& a, const Batch& batch, const Use& use) {
#pragma unroll 1
    for (u32 i = own.begin; i < own.end; i++) {
        if (own.end - own.begin > 1) enter(own.s, a, batch, i);
        use(own.s);
    }
}

DEVICE Division divide(Own& own, const Decode& a, const Batch& batch) {
    const u32 warps = gridDim.x * WARPS;
    u32 total[1] = {0};
    each_own(own, a, batch, [&](const Segment& s) { total[0] += s.pages * a.pairs(); });
    block_sums(total);
    const u32 even = (total[0] + warps - 1) / warps;
    u32 need[ATTEMPTS] = {};
    each_own(own, a, batch, [&](const Segment& s) {
#pragma unroll
        for (u32 i = 0; i < ATTEMPTS; i++) need[i] += warps_of(attempt(i, even), s.pages);
    });
    block_sums(need);
    Division d = {0, 0, total[0] / warps, total[0] % warps};
#pragma unroll
    for (int i = ATTEMPTS - 1; i >= 0; i--)
        if (need[i] * a.pairs() <= warps) d = attempt(i, even);
    return d;
}

// A warp's share: from `first` on to `end` in the long row. An empty one has first.from == first.to.
struct Share {
    Division division;
    Segment first;
    u32 end;
    u32 from_block, to_block; // pairs one by one: the blocks of the pair's warps
};

// Finds the warp's share; false if none of the block's warps has one. Every thread looks at some sequences.
DEVICE bool find_share(Share& share, const Decode& a, const Batch& batch) {
    __shared__ u32 warp_totals[WARPS], before_found[WARPS];
    __shared__ Segment found[WARPS]; // the sequences that the warps' shares begin in
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, index = blockIdx.x * WARPS + warp;
    const u32 singles = batch.counts[COUNT_SINGLE], each = (singles + 32 * WARPS - 1) / (32 * WARPS);
    Own own = {min(threadIdx.x * each, singles), min(threadIdx.x * each + each, singles)};
    if (own.end - own.begin == 1) enter(own.s, a, batch, own.begin);
    const Division d = divide(own, a, batch);
    // What lies before the thread's sequences, in warps or in pages.
    const auto length = [&](const Segment& s) { return (d.most ? warps_of(d, s.pages) : s.pages) * a.pairs(); };
    u32 mine = 0;
    each_own(own, a, batch, [&](const Segment& s) { mine += length(s); });
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
    const auto begin_of = [&](u32 w) { return d.most ? w : share_begin(d, w); };
    if (begin_of(blockIdx.x * WARPS) >= total) return false;
    u32 before = sum - mine;
    each_own(own, a, batch, [&](const Segment& s) {
        const u32 after = before + length(s);
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) {
            const u32 begin = begin_of(blockIdx.x * WARPS + w);
            if (before <= begin && begin < after) found[w] = s, before_found[w] = before;
        }
        before = after;
    });
    __syncthreads();
    share.division = d;
    Segment& s = share.first;
    s.from = s.to = 0;
    const u32 begin = begin_of(index), end = min(begin_of(index + 1), total);
    if (begin >= end) return true;
    s = found[warp];
    const u32 at = begin - before_found[warp], length_of_pair = d.most ? warps_of(d, s.pages) : s.pages;
    const u32 pair = at / length_of_pair, part = at % length_of_pair;
    s.kv_head = pair / a.tiles;
    s.tile = pair % a.tiles;
    if (d.most) {
        s.from = part * s.pages / length_of_pair;
        s.to = (part + 1) * s.pages / length_of_pair;
        s.unit = 0;
        share.end = s.to - s.from;
        share.from_block = (index - part) / WARPS;
        share.to_block = (index - part + length_of_pair - 1) / WARPS;
    } else {
        s.unit = begin;
        s.from = part;
        s.to = min(s.pages, s.from + (end - begin));
        share.end = end;
    }
    return true;
}

// The query heads of a segment's pair: the first, and how many of HEADS there are.
struct Heads {
    u32 first, count;
};
DEVICE Heads heads_of(const Segment& s, const Decode& a) {
    const u32 from = s.tile * HEADS;
    return {s.kv_head * a.group + from, min((u32)HEADS, a.group - from)};
}
