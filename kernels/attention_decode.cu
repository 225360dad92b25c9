// Attention of sequences with one row: the query heads of a KV head go through its tokens together.
//
// It is bound by memory, so all that counts is that every multiprocessor has enough bytes under way, from the first moment to
// the last. The pages of all (sequence, KV head) pairs are thought of as one long row, which is cut into equal shares, a warp
// each, whatever the lengths. A warp goes through its share without meeting any other and writes out the pairs that lie
// in it as a whole. Of others it keeps a part: of one that began before its share, and of one that goes on after it. At the end
// the block adds up its warps' parts in shared memory, and where several blocks had a part of a pair, the last to arrive
// adds up all parts, in the order of the blocks.
//
// Scores are computed as K·Qᵀ (rows are tokens), values as Vᵀ·Pᵀ (rows are places in a head): 8 query heads are a product's
// columns. Tokens and places are dealt to lanes such that what a lane reads of a page is whole 16-byte pieces.
// variants: DTYPE=1,2 HEAD_DIM=64,80,96,128 HEAD_TILES=1,2 WARPS=4,8
// variants: DTYPE=1,2 HEAD_DIM=256 HEAD_TILES=1 WARPS=4,8
#include "attention_pages.cuh"

constexpr int TILES = D / 16;         // of 16 places each
constexpr int K_WIDE = D / 32, K_TAIL = D % 32 / 4; // a key: 16-byte pieces a lane, then K_TAIL numbers
constexpr int V_WIDE = D / 64, V_TAIL = D % 64 / 8; // a value
constexpr u32 SUMS = HEAD_TILES * TILES * 32; // float4

static_assert(D % 16 == 0 && (V_TAIL == 0 || V_TAIL == 2 || V_TAIL == 4), "no load has V_TAIL numbers");

// A part of a pair: sums [HEAD_TILES][TILES][lane], and (largest score, sum of weights) of each head.
struct Part {
    float4 values[SUMS];
    float2 softmax[HEADS];
};
// A warp's shared memory: its part of the pair that began before its share, then its ring, which in the end gives place to its part
// of the pair that goes on after it.
constexpr u32 WARP_BYTES = sizeof(Part) + RING_BYTES;
static_assert(sizeof(Part) <= RING_BYTES && sizeof(Part) % 16 == 0, "the second part takes the place of the ring");

struct Args : Attention {
    Part* parts;  // [2 * blocks of the grid]
    u32* arrived; // [blocks of the grid]: zeros between launches
};

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

// Whether the page holds this step's token, which an earlier kernel of the same pass writes.
DEVICE bool is_fresh(const Fetch& f) { return f.page + 1 == f.segment.pages; }

DEVICE void fetch(Fetch& f, const Args& a, const Batch& batch, u32 end, const Ring& ring, u32 stage) {
    if (f.more) {
        const u64 at = ((u64)f.block * a.kv_heads + f.segment.pair / tiles_of_group(a)) * (KV_BLOCK * D);
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
    const Heads heads = heads_of(s.pair, a);
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

// The first of the two places that a lane has in a tile.
DEVICE u32 place(u32 tile, u32 g) {
    return tile < V_WIDE * 4 ? tile / 4 * 64 + g * 8 + tile % 4 * 2 : V_WIDE * 64 + g * V_TAIL + (tile - V_WIDE * 4) * 2;
}

// One page, which lies in `slot`.
DEVICE void take_page(Sums& sums, const Queries& q, const Segment& s, u32 page, u32 slot, float scale) {
    const u32 g = threadIdx.x % 32 / 4, token = (s.first + page) * KV_BLOCK;
    if (token + KV_BLOCK > s.len) clear_values(slot, s.len - token);
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

// A pair that a warp has a part of.
struct Note {
    u32 unit, pages; // where the pair begins in the long row; NONE: there is no part
    u32 row, pair;
};
DEVICE Note note_of(const Segment& s) { return {s.unit - s.from, s.pages, s.row, s.pair}; }

// Two heads' softmax over several parts: the largest score, the sum of weights.
struct Pair {
    float largest[2], weight[2];
};
DEVICE Pair no_part() { return {{-INFINITY_F, -INFINITY_F}, {0.0f, 0.0f}}; }
DEVICE void widen(Pair& p, float4 softmax) {
    p.largest[0] = fmaxf(p.largest[0], softmax.x);
    p.largest[1] = fmaxf(p.largest[1], softmax.z);
}
// Adds a part's weights; the factor of its sums comes back.
DEVICE float2 add_weight(Pair& p, float4 softmax, float scale) {
    const float2 by = make_float2(power_of_2((softmax.x - p.largest[0]) * scale), power_of_2((softmax.z - p.largest[1]) * scale));
    p.weight[0] = fmaf(softmax.y, by.x, p.weight[0]);
    p.weight[1] = fmaf(softmax.w, by.y, p.weight[1]);
    return by;
}
DEVICE void add_part(float4& sum, float4 part, float2 by) {
    sum.x = fmaf(part.x, by.x, sum.x), sum.y = fmaf(part.y, by.y, sum.y);
    sum.z = fmaf(part.z, by.x, sum.z), sum.w = fmaf(part.w, by.y, sum.w);
}

// Writes two heads' two places of tile `at`, counted over head tiles.
DEVICE void write_out(const Args& a, const Note& note, u32 at, float4 sum, const Pair& p) {
    const u32 lane = threadIdx.x % 32, head = at / TILES * 8 + lane % 4 * 2;
    const Heads heads = heads_of(note.pair, a);
    T* to = a.out + ((u64)note.row * a.heads + heads.first + head) * D + place(at % TILES, lane / 4);
    if (head < heads.count) *reinterpret_cast<u32*>(to) = pack(sum.x / p.weight[0], sum.z / p.weight[0]);
    if (head + 1 < heads.count) *reinterpret_cast<u32*>(to + D) = pack(sum.y / p.weight[1], sum.w / p.weight[1]);
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
DEVICE void write_pair(const Sums& sums, const Args& a, const Note& note) {
#pragma unroll
    for (int h = 0; h < HEAD_TILES; h++) {
        const Pair p = {{sums.largest[h][0], sums.largest[h][1]}, {sums.weight[h][0], sums.weight[h][1]}};
#pragma unroll
        for (int i = 0; i < TILES; i++) write_out(a, note, h * TILES + i, values_of(sums, h, i), p);
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

// Two heads' softmax in a part.
DEVICE float4 softmax_of(const float2* softmax, u32 at) {
    return *reinterpret_cast<const float4*>(softmax + at / TILES * 8 + threadIdx.x % 4 * 2);
}

// The parts of a block's warps: two each, in the order of the long row.
struct Board {
    Note notes[2 * WARPS];
    Note over[2]; // pairs that other blocks have parts of too: one begun before this block's share, one in it
    bool last[2]; // this block is the last of them
};

DEVICE Part& part_of(uint4* shared, u32 i) {
    return *reinterpret_cast<Part*>(reinterpret_cast<u8*>(shared) + i / 2 * WARP_BYTES + i % 2 * sizeof(Part));
}

// Adds up parts `from` to `to` of the block's warps, all of one pair: to its row, or to the block's part.
DEVICE void add_warps(const Args& a, const Board& board, uint4* shared, u32 from, u32 to, Part* part) {
    const u32 lane = threadIdx.x % 32;
    for (u32 at = threadIdx.x / 32; at < HEAD_TILES * TILES; at += WARPS) {
        Pair p = no_part();
        for (u32 i = from; i < to; i++)
            if (board.notes[i].unit != NONE) widen(p, softmax_of(part_of(shared, i).softmax, at));
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (u32 i = from; i < to; i++)
            if (board.notes[i].unit != NONE) {
                const Part& x = part_of(shared, i);
                add_part(sum, x.values[at * 32 + lane], add_weight(p, softmax_of(x.softmax, at), a.scale));
            }
        if (!part) {
            write_out(a, board.notes[from], at, sum, p);
            continue;
        }
        part->values[at * 32 + lane] = sum;
        if (at % TILES == 0 && lane < 4)
            *reinterpret_cast<float4*>(part->softmax + at / TILES * 8 + lane * 2) =
                make_float4(p.largest[0], p.weight[0], p.largest[1], p.weight[1]);
    }
}

constexpr int DEEP = 16; // parts that a thread has under way

// Adds up a pair's parts, of blocks `from` to `to`. `softmax` is shared memory for all of theirs.
DEVICE void merge_parts(const Args& a, const Note& note, u32 from, u32 to, float2* softmax) {
    const u32 lane = threadIdx.x % 32;
    const auto part = [&](u32 block) -> const Part& { return a.parts[2 * block + (block == from)]; };
    float4 x[DEEP];
    const auto load = [&](u32 at, u32 first) {
#pragma unroll
        for (int i = 0; i < DEEP; i++)
            if (first + i <= to) x[i] = __ldcg(&part(first + i).values[at * 32 + lane]);
    };
    u32 at = threadIdx.x / 32;
    if (at < HEAD_TILES * TILES) load(at, from);
    for (u32 i = threadIdx.x; i < (to - from + 1) * HEADS; i += 32 * WARPS)
        softmax[i] = __ldcg(&part(from + i / HEADS).softmax[i % HEADS]);
    __syncthreads();
    while (at < HEAD_TILES * TILES) {
        Pair p = no_part();
#pragma unroll 8
        for (u32 i = 0; i <= to - from; i++) widen(p, softmax_of(softmax + i * HEADS, at));
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (u32 first = from; first <= to; first += DEEP) {
            if (first > from) load(at, first);
#pragma unroll
            for (int i = 0; i < DEEP; i++)
                if (first + i <= to)
                    add_part(sum, x[i], add_weight(p, softmax_of(softmax + (first - from + i) * HEADS, at), a.scale));
        }
        write_out(a, note, at, sum, p);
        at += WARPS;
        if (at < HEAD_TILES * TILES) load(at, from);
    }
}

// The end of a block: its warps' parts become one a pair, and the last of a pair's blocks adds up all.
DEVICE void finish(const Args& a, const Shares& shares, Board& board, uint4* shared) {
    const u32 block = blockIdx.x;
    const auto first = [&](const Note& note) { return block_of(shares, note.unit); };
    const auto last = [&](const Note& note) { return block_of(shares, note.unit + note.pages - 1); };
    bool over = false;
    for (u32 i = 0, end; i < 2 * WARPS; i = end) {
        end = i + 1;
        const Note note = board.notes[i];
        if (note.unit == NONE) continue;
        while (end < 2 * WARPS && (board.notes[end].unit == NONE || board.notes[end].unit == note.unit)) end++;
        const bool here = first(note) == block;
        const bool whole = here && last(note) == block;
        if (!whole && threadIdx.x == 0) board.over[here] = note;
        over = over || !whole;
        add_warps(a, board, shared, i, end, whole ? nullptr : a.parts + 2 * block + here);
    }
    if (!over) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x < 2 && board.over[threadIdx.x].unit != NONE) {
        const Note& note = board.over[threadIdx.x];
        u32& arrived = a.arrived[first(note)];
        const bool is_last = atomicAdd(&arrived, 1) == last(note) - first(note);
        board.last[threadIdx.x] = is_last;
        if (is_last) arrived = 0;
    }
    __syncthreads();
    for (u32 i = 0; i < 2; i++) {
        const Note& note = board.over[i];
        if (note.unit == NONE || !board.last[i]) continue;
        __threadfence();
        __syncthreads(); // the shared memory is free
        merge_parts(a, note, first(note), last(note), reinterpret_cast<float2*>(shared));
    }
}

// The warp's share. Pairs that lie in it as a whole are written out; parts of others are noted and kept where its ring was.
DEVICE void take_share(const Args& a, const Batch& batch, Segment s, u32 end, Ring ring, uint4* shared, Note* notes) {
    Fetch f = {s, s.from, 0, true};
    next_page(f, a, batch, end);
    u32 ahead = 0;
    for (; ahead < STAGES && f.more && !is_fresh(f); ahead++) fetch(f, a, batch, end, ring, ahead);
    wait_for_previous();
    let_next_start();
    for (; ahead < STAGES; ahead++) fetch(f, a, batch, end, ring, ahead);

    const u32 warp = threadIdx.x / 32;
    while (true) {
        Queries q;
        load_queries(q, s, a);
        Sums sums;
        clear(sums);
        for (u32 page = s.from; page < s.to; page++) {
            take_page(sums, q, s, page, take(ring), a.scale);
            __syncwarp(); // all have read the slot
            fetch(f, a, batch, end, ring, ring.stage);
            next_slot(ring);
        }
        add_lanes(sums);
        const bool more = segment_end(s) < end;
        if (s.from == 0 && s.to == s.pages) {
            write_pair(sums, a, note_of(s));
        } else {
            if (threadIdx.x % 32 == 0) notes[!more] = note_of(s);
            keep(part_of(shared, 2 * warp + !more), sums);
        }
        if (!more) return;
        advance(s, a, batch, end);
    }
}

DEVICE void run(const Args& a, const Batch& batch, uint4* shared, Board& board, u32 barriers) {
    const u32 warp = threadIdx.x / 32, index = blockIdx.x * WARPS + warp;
    const u32 slots = shared_address(shared) + warp * WARP_BYTES + sizeof(Part);
    const Ring ring = make_ring(slots, barriers + warp * STAGES * 8);
    if (threadIdx.x < 2 * WARPS) board.notes[threadIdx.x].unit = NONE;
    if (threadIdx.x < 2) board.over[threadIdx.x].unit = NONE;
    Segment s;
    const Shares shares = find_share(s, a, batch);
    if (blockIdx.x >= shares.blocks) {
        wait_for_previous();
        return;
    }
    const u32 end = share_begin(shares, index + 1);
    if (share_begin(shares, index) < end) {
        take_share(a, batch, s, end, ring, shared, board.notes + 2 * warp);
    } else {
        wait_for_previous();
    }
    __syncthreads();
    finish(a, shares, board, shared);
}

// Grid: as many blocks as fit on the device at once. Dynamic shared memory: WARPS * WARP_BYTES.
extern "C" __global__ void __launch_bounds__(32 * WARPS, WARPS < 8 ? 2 : 1)
attention_decode(T* out, const T* qkv, const T* keys, const T* values, Part* parts, u32* arrived, Batch batch, u32 heads,
                 u32 kv_heads, u32 window, float scale) {
    extern __shared__ uint4 shared[];
    __shared__ Board board;
    __shared__ u64 barriers[WARPS * STAGES];
    run({{out, qkv, keys, values, heads, kv_heads, window, scale * LOG2_E}, parts, arrived}, batch, shared, board,
        shared_address(barriers));
}
