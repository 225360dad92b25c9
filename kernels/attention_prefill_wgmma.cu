// Attention of sequences with several rows, as attention_prefill.cu has it, for GPUs whose tensor cores read shared memory by
// themselves (sm_90a).
//
// A block is on a multiprocessor alone and takes tiles of 128 rows and one head, one after another. Two groups of four warps have 64
// rows each; a third brings what they need, two of its warps queries and keys, two values, which may be a tile of tokens ahead. While a
// group's tensor cores add up one tile's values, its other units work on the next tile's softmax.
//
// In shared memory a tile is slabs of 64 columns, whose rows of 128 bytes have their 16-byte pieces swapped about, piece p of row r
// being at p ^ r % 8: so the tensor cores want it.
// variants for sm_90a: DTYPE=1,2 HEAD_DIM=64,128
#include "attention.cuh"
#include "wgmma.cuh"

constexpr int D = HEAD_DIM;
constexpr int GROUPS = 2;                 // of warps that compute
constexpr int GROUP = 128;                // threads
constexpr int READERS = GROUPS * GROUP / 32; // warps that read what is brought
constexpr int BLOCK_M = GROUPS * 64, BLOCK_N = 128;
constexpr int STAGES = 2;                 // tiles of keys, of values and of queries
constexpr int SLABS = D / 64;
constexpr u32 SLAB_BYTES = 128 * 128;     // 128 rows of 64 columns
constexpr u32 TILE_BYTES = SLABS * SLAB_BYTES;
constexpr int PIECES = D / 8;             // 16-byte pieces of a row
constexpr int BRINGERS = 64;              // threads that bring keys; as many bring values
constexpr int O_TILES = D / 8, S_TILES = BLOCK_N / 8;

static_assert(BLOCK_M == 128 && BLOCK_N == 128, "tiles of rows and of tokens have the same slabs");

// The rows and tokens of an item: a tile of rows and a head.
struct Work {
    u32 head, kv_head;
    u32 row, rows;     // in the micro-batch
    u32 position, len; // the first row's; all tokens
    const u32* blocks; // the sequence's
    u32 begin, end;    // tiles of tokens
};

DEVICE Work find_work(const Attention& a, const Batch& batch, u32 item) {
    Work w;
    const uint2 tile = batch.tiles[item / a.heads];
    const u32 seq_rows = batch.seq_rows[tile.x];
    w.head = item % a.heads;
    w.kv_head = w.head / (a.heads / a.kv_heads);
    w.row = batch.seq_row[tile.x] + tile.y;
    w.rows = min((u32)BLOCK_M, seq_rows - tile.y);
    w.len = batch.seq_len[tile.x];
    w.position = w.len - seq_rows + tile.y;
    w.blocks = batch.blocks + batch.seq_blocks[tile.x];
    w.begin = (a.window && w.position + 1 > a.window ? w.position + 1 - a.window : 0) / BLOCK_N;
    w.end = (w.position + w.rows - 1) / BLOCK_N + 1;
    return w;
}

// The block's items: one of each round, which takes its items forth and back in turn, since they come in the order of their work.
struct Items {
    u32 round, count;
    DEVICE bool next(u32& item) {
        item = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        round++;
        return item < count || round * gridDim.x < count;
    }
};

// Barriers: "full" is passed when what is in a stage has come, "free" when no warp reads it any more. Each warp speaks for itself: a
// warp that has not seen a round before the next two have passed could not tell them apart, and would wait for ever. Where a group has
// no rows, nothing else keeps its warps together.
struct Barriers {
    u64 q_full[STAGES], q_free[STAGES], k_full[STAGES], k_free[STAGES], v_full[STAGES], v_free[STAGES];
};

// How many stages of a kind have been filled, or taken.
struct Turn {
    u32 count;
    DEVICE u32 stage() const { return count % STAGES; }
    DEVICE u32 parity() const { return count / STAGES % 2; }
};

// A thread brings the same piece of every STEP'th row, from row FIRST on. Only two of its rows' places differ by how pieces are swapped.
constexpr int STEP = BRINGERS / PIECES;
static_assert(KV_BLOCK % STEP == 0 && 8 % STEP == 0, "a page's rows are brought in whole steps");

struct Bringer {
    u32 row, from, to[8 / STEP]; // its first row; where its piece is in a row, and in a tile, of its i'th row % 8
};
DEVICE Bringer bringer() {
    Bringer b;
    const u32 thread = threadIdx.x % BRINGERS, piece = thread % PIECES;
    b.row = thread / PIECES;
    b.from = piece * 8;
#pragma unroll
    for (int i = 0; i < 8 / STEP; i++) {
        const u32 row = b.row + i * STEP;
        b.to[i] = piece / 8 * SLAB_BYTES + row * 128 + ((piece % 8) ^ row) * 16;
    }
    return b;
}
DEVICE u32 place(const Bringer& b, int i) { return b.to[i % (8 / STEP)] + i / (8 / STEP) * 8 * 128; }

// Rows that are not there are zeros.
DEVICE void bring_queries(const Attention& a, const Work& w, const Bringer& b, u32 to) {
    const u32 stride = (a.heads + 2 * a.kv_heads) * D;
    const T* from = a.qkv + (u64)(w.row + b.row) * stride + w.head * D + b.from;
#pragma unroll 8
    for (int i = 0; i < BLOCK_M / STEP; i++, from += STEP * stride) {
        const bool there = i * STEP + b.row < w.rows;
        copy_async<16>(to + place(b, i), there ? from : a.qkv, there ? 16 : 0);
    }
}

// A tile of keys, or of values; tokens that are not there are zeros.
DEVICE void bring_tokens(const Attention& a, const Work& w, const Bringer& b, const T* from, u32 tile, u32 to) {
    constexpr u32 PAGES = BLOCK_N / KV_BLOCK;
    constexpr int COPIES = KV_BLOCK / STEP; // of a page, by this thread
    // The blocks of the tile's pages, one a lane.
    const u32 blocks = w.blocks[min(tile * PAGES + threadIdx.x % PAGES, (w.len - 1) / KV_BLOCK)];
    const u32 tokens = w.len - tile * BLOCK_N;
    from += (w.kv_head * KV_BLOCK + b.row) * D + b.from;
#pragma unroll
    for (int page = 0; page < PAGES; page++) {
        const T* in_page = from + (u64)__shfl_sync(~0u, blocks, page) * (a.kv_heads * KV_BLOCK * D);
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const u32 row = page * KV_BLOCK + i * STEP;
            const u32 given = row + b.row < tokens ? 16 : 0;
            copy_async<16>(to + place(b, page * COPIES + i), in_page + i * STEP * D, given);
        }
    }
}

// What this thread has begun to copy has come, and the tensor cores may read it.
DEVICE void brought(Shared full) {
    copies_commit();
    copies_wait<0>();
    before_bulk();
    barrier_arrive(full);
}

// The two warps that bring queries and keys.
DEVICE void bring_keys(const Attention& a, const Batch& batch, Items items, Barriers& b, u32 queries, u32 keys) {
    const Bringer own = bringer();
    Turn q = {0}, k = {0};
    u32 item;
    while (items.next(item)) {
        if (item >= items.count) continue;
        const Work w = find_work(a, batch, item);
        barrier_wait(&b.q_free[q.stage()], q.parity() ^ 1);
        bring_queries(a, w, own, queries + q.stage() * TILE_BYTES);
        brought(&b.q_full[q.stage()]);
        q.count++;
        for (u32 tile = w.begin; tile < w.end; tile++, k.count++) {
            barrier_wait(&b.k_free[k.stage()], k.parity() ^ 1);
            bring_tokens(a, w, own, a.keys, tile, keys + k.stage() * TILE_BYTES);
            brought(&b.k_full[k.stage()]);
        }
    }
}

// The two warps that bring values.
DEVICE void bring_values(const Attention& a, const Batch& batch, Items items, Barriers& b, u32 values) {
    const Bringer own = bringer();
    Turn v = {0};
    u32 item;
    while (items.next(item)) {
        if (item >= items.count) continue;
        const Work w = find_work(a, batch, item);
        for (u32 tile = w.begin; tile < w.end; tile++, v.count++) {
            barrier_wait(&b.v_free[v.stage()], v.parity() ^ 1);
            bring_tokens(a, w, own, a.values, tile, values + v.stage() * TILE_BYTES);
            brought(&b.v_full[v.stage()]);
        }
    }
}

// Of a thread's rows, g and g + 8 of its warp's 16: sums of values, largest scores, sums of weights (its part).
struct Sums {
    float values[O_TILES * 4];
    float largest[2], weight[2];
};

// Begins Q·Kᵀ.
DEVICE void multiply_keys(float (&score)[S_TILES * 4], u32 queries, u32 keys) {
    const u64 q = operand(queries, 0, 1024), k = operand(keys, 0, 1024);
    registers_hold(score);
    products_open();
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const u64 step = (i / 4 * SLAB_BYTES + i % 4 * 32) / 16; // 16 columns are 32 bytes of a slab's rows
        multiply_shared(score, q + step, k + step, i > 0);
    }
    products_close();
    registers_hold(score);
}

// Begins sums += P·V.
DEVICE void multiply_values(float (&sums)[O_TILES * 4], const u32 (&weights)[S_TILES * 2], u32 values) {
    const u64 v = operand(values, SLAB_BYTES, 1024);
    registers_hold(sums);
    products_open();
#pragma unroll
    for (int i = 0; i < BLOCK_N / 16; i++) {
        const uint4 rows = make_uint4(weights[4 * i], weights[4 * i + 1], weights[4 * i + 2], weights[4 * i + 3]);
        multiply_registers(sums, rows, v + i * 16 * 128 / 16); // 16 tokens are 16 rows of a slab
    }
    products_close();
    registers_hold(sums);
}

// Takes away the scores of tokens that a row does not see. `position` is the group's first row's, `token` the tile's first.
DEVICE void mask(float (&score)[S_TILES * 4], u32 position, u32 token, u32 window) {
    const u32 first = position + threadIdx.x % GROUP / 32 * 16 + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < S_TILES; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 row = first + j / 2 * 8, column = token + n * 8 + t * 2 + j % 2;
            if (column > row || (window && column + window <= row)) score[n * 4 + j] = -INFINITY_F;
        }
}

// Takes a tile's scores into the softmax; they become weights. What was summed up before is to be multiplied by `shrink`.
DEVICE void soften(Sums& sums, float (&score)[S_TILES * 4], float (&shrink)[2], float scale) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float largest = fmaxf(score[2 * half], score[2 * half + 1]);
#pragma unroll
        for (int n = 1; n < S_TILES; n++) largest = fmaxf(largest, fmaxf(score[n * 4 + 2 * half], score[n * 4 + 2 * half + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        const float before = sums.largest[half];
        largest = fmaxf(largest, before);
        sums.largest[half] = largest;
        const float base = largest == -INFINITY_F ? 0.0f : largest * scale; // a row may have seen no token yet
        shrink[half] = power_of_2(fmaf(before, scale, -base));
        float weight = 0.0f;
#pragma unroll
        for (int n = 0; n < S_TILES; n++)
#pragma unroll
            for (int j = 2 * half; j < 2 * half + 2; j++) {
                score[n * 4 + j] = power_of_2(fmaf(score[n * 4 + j], scale, -base));
                weight += score[n * 4 + j];
            }
        sums.weight[half] = sums.weight[half] * shrink[half] + weight;
    }
}

DEVICE void to_operand(u32 (&weights)[S_TILES * 2], const float (&score)[S_TILES * 4]) {
#pragma unroll
    for (int i = 0; i < S_TILES * 2; i++) weights[i] = pack(score[2 * i], score[2 * i + 1]);
}

DEVICE void write_out(const Sums& sums, const Attention& a, const Work& w, u32 group) {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float weight = sums.weight[half];
        weight += __shfl_xor_sync(~0u, weight, 1);
        weight += __shfl_xor_sync(~0u, weight, 2);
        const u32 row = group * 64 + threadIdx.x % GROUP / 32 * 16 + half * 8 + g;
        if (row >= w.rows) continue;
        const float factor = 1.0f / weight;
        T* to = a.out + ((u64)(w.row + row) * a.heads + w.head) * D + t * 2;
#pragma unroll
        for (int n = 0; n < O_TILES; n++)
            *reinterpret_cast<u32*>(to + n * 8) =
                pack(sums.values[n * 4 + 2 * half] * factor, sums.values[n * 4 + 2 * half + 1] * factor);
    }
}

// A group's reading of stages: it waits for them, and says when it has read them.
struct Reader {
    Barriers& b;
    Turn q, k, v;
    bool one; // this thread speaks for its warp

    DEVICE void await(const u64 (&full)[STAGES], Turn turn) { barrier_wait(&full[turn.stage()], turn.parity()); }
    DEVICE void done(const u64 (&free)[STAGES], Turn& turn) {
        __syncwarp(); // all lanes have seen that it was full
        if (one) barrier_arrive(&free[turn.stage()]);
        turn.count++;
    }
    DEVICE void skip(u32 tiles) {
        for (; tiles > 0; tiles--) {
            await(b.k_full, k), done(b.k_free, k);
            await(b.v_full, v), done(b.v_free, v);
        }
    }
};

// An item's tiles of tokens from `begin` to `end`, for a group's rows, the first of which is at `first`.
DEVICE void attend(Sums& sums, const Attention& a, Reader& r, u32 first, u32 begin, u32 end, u32 queries, u32 keys, u32 values) {
    const u32 last = first + 63;
    float score[S_TILES * 4], shrink[2];
    u32 weights[S_TILES * 2];
    const auto soften_tile = [&](u32 tile) {
        const u32 token = tile * BLOCK_N, token_last = token + BLOCK_N - 1;
        if (token_last > first || (a.window && token + a.window <= last)) mask(score, first, token, a.window);
        soften(sums, score, shrink, a.scale);
    };
    const auto begin_keys = [&] {
        r.await(r.b.k_full, r.k);
        multiply_keys(score, queries, keys + r.k.stage() * TILE_BYTES);
    };
    const auto begin_values = [&] {
        r.await(r.b.v_full, r.v);
        multiply_values(sums.values, weights, values + r.v.stage() * TILE_BYTES);
    };
    begin_keys();
    products_wait<0>();
    registers_hold(score);
    r.done(r.b.k_free, r.k);
    soften_tile(begin); // nothing has been summed up that would shrink
    to_operand(weights, score);
    for (u32 tile = begin + 1; tile < end; tile++) {
        begin_keys();
        begin_values();
        products_wait<1>();
        registers_hold(score);
        r.done(r.b.k_free, r.k);
        soften_tile(tile);
        products_wait<0>();
        registers_hold(sums.values);
        r.done(r.b.v_free, r.v);
#pragma unroll
        for (int i = 0; i < O_TILES * 4; i++) sums.values[i] *= shrink[i / 2 % 2];
        to_operand(weights, score);
    }
    begin_values();
    products_wait<0>();
    registers_hold(sums.values);
    r.done(r.b.v_free, r.v);
}

DEVICE void compute(const Attention& a, const Batch& batch, Items items, Barriers& b, u32 queries, u32 keys, u32 values) {
    const u32 group = threadIdx.x / GROUP;
    Reader r = {b, {0}, {0}, {0}, threadIdx.x % 32 == 0};
    u32 item;
    while (items.next(item)) {
        if (item >= items.count) continue;
        const Work w = find_work(a, batch, item);
        const u32 rows = w.rows > group * 64 ? min(w.rows - group * 64, 64u) : 0, first = w.position + group * 64;
        // Tiles that a row of the group sees.
        const u32 begin = (a.window && first + 1 > a.window ? first + 1 - a.window : 0) / BLOCK_N;
        const u32 end = (first + rows - 1) / BLOCK_N + 1;
        Sums sums;
#pragma unroll
        for (int i = 0; i < O_TILES * 4; i++) sums.values[i] = 0.0f;
        sums.largest[0] = sums.largest[1] = -INFINITY_F;
        sums.weight[0] = sums.weight[1] = 0.0f;
        r.await(b.q_full, r.q);
        if (rows == 0) {
            r.skip(w.end - w.begin);
        } else {
            r.skip(begin - w.begin);
            attend(sums, a, r, first, begin, end, queries + r.q.stage() * TILE_BYTES + group * 64 * 128, keys, values);
            r.skip(w.end - end);
        }
        r.done(b.q_free, r.q);
        if (rows > 0) write_out(sums, a, w, group);
    }
}

// Grid: as many blocks as multiprocessors, or items if there are fewer. The batch's tiles come in the order of their work, most first.
// Dynamic shared memory: two stages each of queries, keys and values, and 1 KB to align them.
extern "C" __global__ void __launch_bounds__((GROUPS + 1) * GROUP, 1)
attention_prefill_wgmma(T* out, const T* qkv, const T* keys, const T* values, Batch batch, u32 heads, u32 kv_heads, u32 window,
                        float scale) {
    extern __shared__ uint4 shared[];
    __shared__ Barriers barriers;
    const Attention a = {out, qkv, keys, values, heads, kv_heads, window, scale * LOG2_E};
    const Items items = {0, batch.counts[COUNT_TILES] * heads};
    const u32 q = (shared_address(shared) + 1023) / 1024 * 1024, k = q + STAGES * TILE_BYTES, v = k + STAGES * TILE_BYTES;
    if (threadIdx.x < STAGES) {
        const u32 i = threadIdx.x;
        barrier_init(&barriers.q_full[i], BRINGERS), barrier_init(&barriers.q_free[i], READERS);
        barrier_init(&barriers.k_full[i], BRINGERS), barrier_init(&barriers.k_free[i], READERS);
        barrier_init(&barriers.v_full[i], BRINGERS), barrier_init(&barriers.v_free[i], READERS);
        barriers_ready();
    }
    __syncthreads();
    wait_for_previous();
    let_next_start();
    if (threadIdx.x >= GROUPS * GROUP) {
        registers_down<72>();
        const u32 bringer = threadIdx.x - GROUPS * GROUP;
        if (bringer < BRINGERS) {
            bring_keys(a, batch, items, barriers, q, k);
        } else {
            bring_values(a, batch, items, barriers, v);
        }
    } else {
        registers_up<216>();
        compute(a, batch, items, barriers, q, k, v);
    }
}
