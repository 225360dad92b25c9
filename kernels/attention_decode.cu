// Attention of sequences with one row: the query heads of a KV head go through its tokens together.
//
// For many tokens all that counts is that every multiprocessor has enough bytes under way, from the first moment to the last; for
// few, how long the chain of what must wait for something else is. So a warp goes through its share (attention_share.cuh) without
// meeting any other, with pages under way ahead of it, the first of them before the kernel before has ended. It writes out the
// pairs that lie in its share as a whole. Of others it keeps a part: of one that began before its share, and of one that goes on
// after it. At the end parts become one (attention_parts.cuh).
//
// Scores are computed as K·Qᵀ (rows are tokens), values as Vᵀ·Pᵀ (rows are places in a head): 8 query heads are a product's
// columns. Tokens and places are dealt to lanes such that what a lane reads of a page is whole 16-byte pieces.
// variants: DTYPE=1,2 HEAD_DIM=64,80,96,128 HEAD_TILES=1,2 WARPS=4,8
// variants: DTYPE=1,2 HEAD_DIM=256 HEAD_TILES=1 WARPS=4,8
// variants: DTYPE=2 HEAD_DIM=64,128 HEAD_TILES=1,2 WARPS=8 STAGES=3,4
// variants: DTYPE=2 HEAD_DIM=64,128,256 HEAD_TILES=1 WARPS=2,6 STAGES=2
// variants: DTYPE=2 HEAD_DIM=64,128 HEAD_TILES=2 WARPS=2,6 STAGES=2
#include "attention_pages.cuh"

constexpr int K_WIDE = D / 32, K_TAIL = D % 32 / 4; // a key: 16-byte pieces a lane, then K_TAIL numbers

static_assert(D % 16 == 0 && (V_TAIL == 0 || V_TAIL == 2 || V_TAIL == 4), "no load has V_TAIL numbers");

// A warp's shared memory: its part of the pair that began before its share, then its ring, which in the end gives place to its part
// of the pair that goes on after it.
constexpr u32 WARP_BYTES = sizeof(Part) + RING_BYTES;
static_assert(sizeof(Part) <= RING_BYTES && sizeof(Part) % 16 == 0, "the second part takes the place of the ring");

// What a warp has still to fetch. The page's block is read one fetch ahead, so that no fetch waits for it.
struct Fetch {
    Segment segment;
    u32 page, block;
    bool more;
};

DEVICE void next_page(Fetch& f, const Args& a, const Batch& batch, u32 end) {
    if (f.page == f.segment.to) {
        f.more = segment_end(f.segment) < end;
        if (!f.more) return;
        advance(f.segment, a, batch, end);
        f.page = f.segment.from;
    }
    f.block = batch.blocks[f.segment.table + f.segment.first + f.page];
}

// Where a KV head's keys and values lie in a block of the pages.
DEVICE u64 page_at(const Args& a, u32 block, u32 kv_head) {
    return ((u64)block * a.kv_heads + kv_head) * (KV_BLOCK * D);
}

DEVICE void fetch(Fetch& f, const Args& a, const Batch& batch, u32 end, const Ring& ring, u32 stage) {
    if (f.more) {
        const u64 at = page_at(a, f.block, f.segment.kv_head);
        fill(ring, stage, a.keys + at, a.values + at);
        f.page++;
        next_page(f, a, batch, end);
    }
    filled();
}

// The queries of a pair as Qᵀ: two registers for 16 places. Heads beyond the group are zeros.
struct Queries {
    u32 v[HEAD_TILES][TILES][2];
};

DEVICE void load_queries(Queries& q, const Segment& s, const Args& a) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const Heads heads = heads_of(s, a);
    const T* row = a.qkv + ((u64)s.row * (a.heads + 2 * a.kv_heads) + heads.first) * D;
#pragma unroll
    for (int h = 0; h < HEAD_TILES; h++) {
        const bool there = h * 8 + g < heads.count;
        const T* from = row + (h * 8 + g) * D;
#pragma unroll
        for (int c = 0; c < K_WIDE; c++) {
            const uint4 x = there ? load_16(from + c * 32 + t * 8) : make_uint4(0, 0, 0, 0);
            q.v[h][2 * c][0] = x.x, q.v[h][2 * c][1] = x.y;
            q.v[h][2 * c + 1][0] = x.z, q.v[h][2 * c + 1][1] = x.w;
        }
        if (K_TAIL) {
            const uint2 x = there ? *reinterpret_cast<const uint2*>(from + K_WIDE * 32 + t * 4) : make_uint2(0, 0);
            q.v[h][TILES - 1][0] = x.x, q.v[h][TILES - 1][1] = x.y;
        }
    }
}

// A warp's sums over the pages that it took; a lane has heads 2t and 2t + 1 of each tile. `weight` is the lane's part.
struct Sums {
    float values[HEAD_TILES][TILES][4];
    float largest[HEAD_TILES][2], weight[HEAD_TILES][2];
};

DEVICE void clear(Sums& sums) {
#pragma unroll
    for (int h = 0; h < HEAD_TILES; h++) {
        sums.largest[h][0] = sums.largest[h][1] = -INFINITY_F;
        sums.weight[h][0] = sums.weight[h][1] = 0.0f;
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums.values[h][i][j] = 0.0f;
    }
}

// Scores of 16 tokens: K·Qᵀ. Two sums in turn, since a product waits for the one that it adds to.
DEVICE void scores(float (&score)[HEAD_TILES][4], const Queries& q, u32 keys) {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u32 row = keys + row_at(group_token(g / 2, g % 2) + g % 2);
    float other[HEAD_TILES][4];
#pragma unroll
    for (int h = 0; h < HEAD_TILES; h++)
#pragma unroll
        for (int j = 0; j < 4; j++) score[h][j] = other[h][j] = 0.0f;
#pragma unroll
    for (int c = 0; c < K_WIDE; c++) {
        const uint4 low = read_shared<uint4>(row + c * 64 + t * 16);
        const uint4 high = read_shared<uint4>(row + 2 * ROW_BYTES + c * 64 + t * 16);
#pragma unroll
        for (int h = 0; h < HEAD_TILES; h++) {
            multiply(score[h], make_uint4(low.x, high.x, low.y, high.y), q.v[h][2 * c][0], q.v[h][2 * c][1]);
            multiply(other[h], make_uint4(low.z, high.z, low.w, high.w), q.v[h][2 * c + 1][0], q.v[h][2 * c + 1][1]);
        }
    }
    if (K_TAIL) {
        const uint2 low = read_shared<uint2>(row + K_WIDE * 64 + t * 8);
        const uint2 high = read_shared<uint2>(row + 2 * ROW_BYTES + K_WIDE * 64 + t * 8);
#pragma unroll
        for (int h = 0; h < HEAD_TILES; h++)
            multiply(score[h], make_uint4(low.x, high.x, low.y, high.y), q.v[h][TILES - 1][0], q.v[h][TILES - 1][1]);
    }
#pragma unroll
    for (int h = 0; h < HEAD_TILES; h++)
#pragma unroll
        for (int j = 0; j < 4; j++) score[h][j] += other[h][j];
}

// Takes one head tile's scores into the softmax; the weights come back as Pᵀ.
DEVICE uint2 soften(Sums& sums, float (&score)[4], int h, float scale) {
    float shrink[2];
    bool grown = false;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float largest = fmaxf(score[j], score[j + 2]);
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
        const float before = sums.largest[h][j];
        largest = fmaxf(largest, before);
        grown = grown || largest > before;
        shrink[j] = power_of_2((before - largest) * scale);
        sums.largest[h][j] = largest;
        score[j] = power_of_2((score[j] - largest) * scale);
        score[j + 2] = power_of_2((score[j + 2] - largest) * scale);
        sums.weight[h][j] = sums.weight[h][j] * shrink[j] + (score[j] + score[j + 2]);
    }
    if (__any_sync(~0u, grown))
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums.values[h][i][j] *= shrink[j % 2];
    return make_uint2(transposed(pack(score[0], score[1])), transposed(pack(score[2], score[3])));
}

// Places 2i and 2i + 1 of 16-bit rows `v`, of tokens 2t, 2t+1, 2t+8, 2t+9, as a fragment of Vᵀ.
DEVICE uint4 value_fragment(u32 v0, u32 v1, u32 v2, u32 v3) {
    return make_uint4(__byte_perm(v0, v1, 0x5410), __byte_perm(v0, v1, 0x7632), __byte_perm(v2, v3, 0x5410),
                      __byte_perm(v2, v3, 0x7632));
}

DEVICE void add_tile(Sums& sums, int tile, const uint2 (&weights)[HEAD_TILES], uint4 fragment) {
#pragma unroll
    for (int h = 0; h < HEAD_TILES; h++) multiply(sums.values[h][tile], fragment, weights[h].x, weights[h].y);
}

DEVICE void add_values(Sums& sums, const uint2 (&weights)[HEAD_TILES], u32 values) {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    u32 rows[4]; // of tokens 2t, 2t + 1, 2t + 8, 2t + 9
#pragma unroll
    for (int r = 0; r < 4; r++) rows[r] = values + row_at(group_token(t, r % 2)) + r * ROW_BYTES;
#pragma unroll
    for (int c = 0; c < V_WIDE; c++) {
        uint4 v[4];
#pragma unroll
        for (int r = 0; r < 4; r++) v[r] = read_shared<uint4>(rows[r] + c * 128 + g * 16);
        add_tile(sums, c * 4 + 0, weights, value_fragment(v[0].x, v[1].x, v[2].x, v[3].x));
        add_tile(sums, c * 4 + 1, weights, value_fragment(v[0].y, v[1].y, v[2].y, v[3].y));
        add_tile(sums, c * 4 + 2, weights, value_fragment(v[0].z, v[1].z, v[2].z, v[3].z));
        add_tile(sums, c * 4 + 3, weights, value_fragment(v[0].w, v[1].w, v[2].w, v[3].w));
    }
    if (V_TAIL == 4) {
        uint2 v[4];
#pragma unroll
        for (int r = 0; r < 4; r++) v[r] = read_shared<uint2>(rows[r] + V_WIDE * 128 + g * 8);
        add_tile(sums, TILES - 2, weights, value_fragment(v[0].x, v[1].x, v[2].x, v[3].x));
        add_tile(sums, TILES - 1, weights, value_fragment(v[0].y, v[1].y, v[2].y, v[3].y));
    } else if (V_TAIL == 2) {
        u32 v[4];
#pragma unroll
        for (int r = 0; r < 4; r++) v[r] = read_shared<u32>(rows[r] + V_WIDE * 128 + g * 4);
        add_tile(sums, TILES - 1, weights, value_fragment(v[0], v[1], v[2], v[3]));
    }
}

// One page, which lies in `slot`.
DEVICE void take_page(Sums& sums, const Queries& q, const Newest& newest, const Segment& s, u32 page, u32 slot, float scale) {
    const u32 g = threadIdx.x % 32 / 4, token = (s.first + page) * KV_BLOCK;
    if (page + 1 == s.pages) complete_page(slot, s.len - token, newest);
    const u32 position = token + group_token(g / 2, g % 2) + g % 2;
    const bool low = position >= s.begin && position < s.len;
    const bool high = position + 2 >= s.begin && position + 2 < s.len;
    float score[HEAD_TILES][4];
    scores(score, q, slot);
    uint2 weights[HEAD_TILES];
#pragma unroll
    for (int h = 0; h < HEAD_TILES; h++) {
        if (!low) score[h][0] = score[h][1] = -INFINITY_F;
        if (!high) score[h][2] = score[h][3] = -INFINITY_F;
        weights[h] = soften(sums, score[h], h, scale);
    }
    add_values(sums, weights, slot + HALF_BYTES);
}

// Sums of weights over all lanes of a head.
DEVICE void add_lanes(Sums& sums) {
#pragma unroll
    for (int h = 0; h < HEAD_TILES; h++)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) sums.weight[h][j] += __shfl_xor_sync(~0u, sums.weight[h][j], lanes);
}

DEVICE float4 values_of(const Sums& sums, int h, int tile) {
    const float(&v)[4] = sums.values[h][tile];
    return make_float4(v[0], v[1], v[2], v[3]);
}

// A pair that lay in the warp's share as a whole.
DEVICE void write_pair(const Sums& sums, const Args& a, const Segment& s) {
#pragma unroll
    for (int h = 0; h < HEAD_TILES; h++) {
        const Pair p = {{sums.largest[h][0], sums.largest[h][1]}, {sums.weight[h][0], sums.weight[h][1]}};
#pragma unroll
        for (int i = 0; i < TILES; i++) write_out(a, s.row, heads_of(s, a), h * TILES + i, values_of(sums, h, i), p);
    }
}

DEVICE void keep(Part& part, const Sums& sums) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < HEAD_TILES; h++) {
#pragma unroll
        for (int i = 0; i < TILES; i++) part.values[(h * TILES + i) * 32 + lane] = values_of(sums, h, i);
#pragma unroll
        for (int j = 0; j < 2; j++)
            if (lane < 4) part.softmax[h * 8 + lane * 2 + j] = make_float2(sums.largest[h][j], sums.weight[h][j]);
    }
}

DEVICE Part& part_of(uint4* shared, u32 i) {
    return *reinterpret_cast<Part*>(reinterpret_cast<u8*>(shared) + i / 2 * WARP_BYTES + i % 2 * sizeof(Part));
}

// The block that holds a segment's newest token, if the segment has it.
DEVICE u32 newest_block(const Segment& s, const Batch& batch) {
    return s.to == s.pages ? batch.blocks[s.table + s.first + s.pages - 1] : NONE;
}

// The warp's share. Pairs that lie in it as a whole are written out; parts of others are noted and kept where its ring was.
DEVICE void take_share(const Args& a, const Batch& batch, const Share& share, Ring ring, uint4* shared, Note* notes) {
    const u32 warp = threadIdx.x / 32, end = share.end;
    Segment s = share.first;
    Fetch f = {s, s.from, 0, true};
    next_page(f, a, batch, end);
    u32 newest_in = newest_block(s, batch);
    for (u32 ahead = 0; ahead < STAGES; ahead++) fetch(f, a, batch, end, ring, ahead);
    wait_for_previous();

    while (true) {
        Queries q;
        load_queries(q, s, a);
        Newest newest;
        if (newest_in != NONE) {
            const u64 at = page_at(a, newest_in, s.kv_head) + (s.len - 1) % KV_BLOCK * D;
            load_newest(newest, a.keys + at, a.values + at);
        }
        Sums sums;
        clear(sums);
        for (u32 page = s.from; page < s.to; page++) {
            take_page(sums, q, newest, s, page, take(ring), a.scale);
            __syncwarp(); // all have read the slot
            fetch(f, a, batch, end, ring, ring.stage);
            next_slot(ring);
        }
        add_lanes(sums);
        const bool more = segment_end(s) < end;
        if (s.from == 0 && s.to == s.pages) {
            write_pair(sums, a, s);
        } else {
            if (threadIdx.x % 32 == 0) notes[!more] = note_of(a, share, s);
            keep(part_of(shared, 2 * warp + !more), sums);
        }
        if (!more) return;
        advance(s, a, batch, end);
        newest_in = newest_block(s, batch);
    }
}

DEVICE void run(const Args& a, const Batch& batch, uint4* shared) {
    __shared__ Note notes[2 * WARPS];
    let_next_start();
    const u32 warp = threadIdx.x / 32;
    const u32 slots = shared_address(shared) + warp * WARP_BYTES + sizeof(Part);
    const Ring ring = {slots, 0};
    if (threadIdx.x < 2 * WARPS) notes[threadIdx.x].row = NONE;
    Share share;
    if (!find_share(share, a, batch)) {
        // Blocks without work make room at once. One must wait, or this launch could end before the one before it.
        if (blockIdx.x == 0) wait_for_previous();
        return;
    }
    if (share.first.from < share.first.to) {
        take_share(a, batch, share, ring, shared, notes + 2 * warp);
    } else {
        wait_for_previous();
    }
    __syncthreads();
    finish(a, notes, [&](u32 i) -> const Part& { return part_of(shared, i); });
}

// Grid: as many blocks as fit on the device at once. Dynamic shared memory: WARPS * WARP_BYTES.
extern "C" __global__ void __launch_bounds__(32 * WARPS, WARPS <= 4 ? 2 : 1)
attention_decode(T* out, const T* qkv, const T* keys, const T* values, Parcel* parcels, Batch batch, u32 heads, u32 kv_heads,
                 u32 window, float scale) {
    extern __shared__ uint4 shared[];
    const u32 group = heads / kv_heads, tiles = (group + HEADS - 1) / HEADS;
    const Attention attention = {out, qkv, keys, values, heads, kv_heads, window, scale * LOG2_E};
    run({{attention, group, tiles}, parcels}, batch, shared);
}
