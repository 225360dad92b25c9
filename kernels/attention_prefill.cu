// Attention of sequences with several rows: prompts, or their parts after tokens that are in the pages already.
//
// A block takes BLOCK_M rows of a sequence and one head through the tokens that they see, BLOCK_N at a time, with an online
// softmax. While one tile of keys and values is worked on, the next is on its way to shared memory. A warp has 32 rows
// (16 where a head is too long for the registers): every key and value that it reads from shared memory serves two products.
//
// Where a few rows come after many tokens there would be few blocks, each with much to do. Then the tokens of a tile of rows
// are shared out among the blocks of the grid's z: each leaves its sums in f32, and attention_prefill_merge makes one of them.
//
// BLOCK_N is 64 where a multiprocessor has shared memory for two such blocks, else 32.
// variants: DTYPE=1,2 HEAD_DIM=64,80,96,128,256 BLOCK_M=128 BLOCK_N=32
// variants for sm_90a,sm_100a: DTYPE=1,2 HEAD_DIM=64,80,96,128,256 BLOCK_M=128 BLOCK_N=64
#define ROW_TILES (HEAD_DIM <= 128 ? 2 : 1)
#include "attention_tiles.cuh"

constexpr int PAGES = 32; // whose blocks a warp's lanes know

static_assert(PAGES * KV_BLOCK % BLOCK_N == 0, "a tile's blocks are known together");

// The block's rows, and the tokens that they see.
struct Work {
    u32 head, kv_head;
    u32 row, rows;         // in the micro-batch
    u32 position;          // the first row's
    u32 cached, len;       // tokens of earlier micro-batches; all tokens
    const u32* blocks;     // the sequence's
    u32 begin, end;        // tiles of tokens
};

template <bool SHARED> DEVICE Work find_work(const Attention& a, const Batch& batch, uint2 tile) {
    Work w;
    const u32 seq = tile.x, seq_rows = batch.seq_rows[seq];
    w.head = blockIdx.x;
    w.kv_head = w.head / (a.heads / a.kv_heads);
    w.row = batch.seq_row[seq] + tile.y;
    w.rows = min((u32)BLOCK_M, seq_rows - tile.y);
    w.len = batch.seq_len[seq];
    w.cached = w.len - seq_rows;
    w.position = w.cached + tile.y;
    w.blocks = batch.blocks + batch.seq_blocks[seq];
    w.begin = (a.window && w.position + 1 > a.window ? w.position + 1 - a.window : 0) / BLOCK_N;
    w.end = (w.position + w.rows - 1) / BLOCK_N + 1;
    if (SHARED) {
        const u32 share = (w.end - w.begin + gridDim.z - 1) / gridDim.z;
        w.begin = min(w.begin + blockIdx.z * share, w.end);
        w.end = min(w.begin + share, w.end);
    }
    return w;
}

// Brings queries to shared memory; rows that are not there are zeros.
DEVICE void fetch_queries(const Attention& a, const Work& w, u32 to) {
    const u32 stride = (a.heads + 2 * a.kv_heads) * D;
    const T* from = a.qkv + (u64)w.row * stride + w.head * D;
#pragma unroll
    for (int i = 0; i < BLOCK_M * PIECES / THREADS; i++) {
        const u32 piece = i * THREADS + threadIdx.x, row = piece / PIECES, at = piece % PIECES;
        const bool there = row < w.rows;
        copy_async<16>(to + row * ROW_BYTES + at * 16, from + (u64)(there ? row : 0) * stride + at * 8, there ? 16 : 0);
    }
}

// The blocks of PAGES pages, one a lane.
struct Table {
    u32 first, block; // pages from `first` on
};

// Brings a tile of keys and values to shared memory; tokens that are not there are zeros.
DEVICE void fetch_tile(Table& table, const Attention& a, const Work& w, u32 tile, u32 to) {
    const u32 first = tile * BLOCK_N / KV_BLOCK / PAGES * PAGES;
    if (first != table.first) {
        table.first = first;
        table.block = w.blocks[min(first + threadIdx.x % 32, (w.len - 1) / KV_BLOCK)];
    }
#pragma unroll 2 // more would take registers from the sums
    for (int i = 0; i < (BLOCK_N * PIECES + THREADS - 1) / THREADS; i++) {
        const u32 piece = i * THREADS + threadIdx.x, row = piece / PIECES, at = piece % PIECES;
        const bool mine = BLOCK_N * PIECES % THREADS == 0 || row < BLOCK_N;
        const u32 token = tile * BLOCK_N + row;
        const u32 block = __shfl_sync(~0u, table.block, token / KV_BLOCK - first);
        const u64 from = (((u64)block * a.kv_heads + w.kv_head) * KV_BLOCK + row % KV_BLOCK) * D + at * 8;
        const u32 given = token < w.len ? 16 : 0;
        if (!mine) continue;
        copy_async<16>(to + row * ROW_BYTES + at * 16, a.keys + from, given);
        copy_async<16>(to + TILE_BYTES + row * ROW_BYTES + at * 16, a.values + from, given);
    }
}

// Takes away the scores of tokens that a row does not see. `position` is the warp's first row's, `token` the tile's first.
DEVICE void mask(Scores& score, u32 position, u32 token, u32 window) {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int n = 0; n < S_TILES; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u32 row = position + r * 16 + j / 2 * 8 + g, column = token + n * 8 + t * 2 + j % 2;
                if (column > row || (window && column + window <= row)) score[r][n][j] = -INFINITY_F;
            }
}

// The warp's rows of one tile of tokens. Tiles that it does not see are skipped, and only those at an edge masked.
DEVICE void take_tile(Sums& sums, const Attention& a, const Work& w, u32 tile, u32 queries, u32 keys) {
    const u32 warp_row = threadIdx.x / 32 * WARP_ROWS;
    const u32 first = w.position + warp_row, last = first + WARP_ROWS - 1;
    const u32 token = tile * BLOCK_N, token_last = token + BLOCK_N - 1;
    if (warp_row >= w.rows || token > last || (a.window && token_last + a.window <= first)) return;
    Scores score;
    multiply_keys(score, queries + warp_row * ROW_BYTES, keys);
    if (token_last > first || (a.window && token + a.window <= last)) mask(score, first, token, a.window);
    soften(sums, score, a.scale);
    multiply_values(sums, score, keys + TILE_BYTES);
}

// What a block with a share of the tokens leaves: of each row the sums, and (largest score, sum of weights).
struct Part {
    float values[BLOCK_M][D];
    float2 softmax[BLOCK_M];
};

DEVICE void leave_part(Sums& sums, const Work& w, Part& part) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float weight = sums.weight[r][half];
            weight += __shfl_xor_sync(~0u, weight, 1);
            weight += __shfl_xor_sync(~0u, weight, 2);
            const u32 row = threadIdx.x / 32 * WARP_ROWS + r * 16 + half * 8 + g;
            if (row >= w.rows) continue;
            if (t == 0) part.softmax[row] = make_float2(sums.largest[r][half], weight);
#pragma unroll
            for (int n = 0; n < O_TILES; n++)
                *reinterpret_cast<float2*>(&part.values[row][n * 8 + t * 2]) =
                    make_float2(sums.values[r][n][2 * half], sums.values[r][n][2 * half + 1]);
        }
}

template <bool SHARED> DEVICE void run(const Attention& a, const Batch& batch, uint2 tile, u32 queries, Part* parts) {
    const Work w = find_work<SHARED>(a, batch, tile);
    const u32 stages = queries + Q_BYTES; // two, of keys and values
    Table table = {NONE, 0};
    // Tokens of earlier micro-batches need not wait for this one's.
    const bool some = !SHARED || w.begin < w.end, early = some && (w.begin + 1) * BLOCK_N <= w.cached;
    if (early) fetch_tile(table, a, w, w.begin, stages);
    wait_for_previous();
    let_next_start();
    fetch_queries(a, w, queries);
    if (!early && some) fetch_tile(table, a, w, w.begin, stages);
    copies_commit();

    Sums sums;
    clear(sums);
    u32 stage = 0;
    for (u32 i = w.begin; i < w.end; i++) {
        copies_wait<0>();
        __syncthreads(); // tile i is there for all, and all are done with the one before
        if (i + 1 < w.end) fetch_tile(table, a, w, i + 1, stages + (stage ^ 1) * 2 * TILE_BYTES);
        copies_commit();
        take_tile(sums, a, w, i, queries, stages + stage * 2 * TILE_BYTES);
        stage ^= 1;
    }
    if (SHARED) {
        leave_part(sums, w, parts[(blockIdx.y * gridDim.x + blockIdx.x) * gridDim.z + blockIdx.z]);
    } else {
        write_out(sums, a.out + ((u64)w.row * a.heads + w.head) * D, a.heads * D, w.rows);
    }
}

template <bool SHARED> DEVICE void start(const Attention& a, const Batch& batch, Part* parts) {
    extern __shared__ uint4 shared[];
    const u32 tiles = batch.counts[COUNT_TILES];
    if (blockIdx.y >= tiles) {
        wait_for_previous();
        return;
    }
    run<SHARED>(a, batch, batch.tiles[blockIdx.y], shared_address(shared), parts);
}

// Grid (heads, tiles): the heads of a KV head run side by side; the batch's tiles come in the order of their work, most first.
// Dynamic shared memory: queries, then two stages of keys and values; see the launcher.
extern "C" __global__ void __launch_bounds__(THREADS, D <= 128 ? 2 : 1)
attention_prefill(T* out, const T* qkv, const T* keys, const T* values, Batch batch, u32 heads, u32 kv_heads, u32 window,
                  float scale) {
    start<false>({out, qkv, keys, values, heads, kv_heads, window, scale * LOG2_E}, batch, nullptr);
}

#if BLOCK_N == 32 // with more there are too few registers
// The same with a grid (heads, tiles, shares of the tokens).
extern "C" __global__ void __launch_bounds__(THREADS, D <= 128 ? 2 : 1)
attention_prefill_shares(T* out, const T* qkv, const T* keys, const T* values, Batch batch, u32 heads, u32 kv_heads,
                         u32 window, float scale, Part* parts) {
    start<true>({out, qkv, keys, values, heads, kv_heads, window, scale * LOG2_E}, batch, parts);
}

constexpr u32 MERGE_ROWS = 4; // of a block, a warp each

// Grid (heads, tiles, BLOCK_M / MERGE_ROWS): makes one of what the `shares` blocks of each tile and head have left.
extern "C" __global__ void __launch_bounds__(32 * MERGE_ROWS)
attention_prefill_merge(T* out, Batch batch, u32 heads, float scale, const Part* parts, u32 shares) {
    wait_for_previous();
    let_next_start();
    if (blockIdx.y >= batch.counts[COUNT_TILES]) return;
    const uint2 tile = batch.tiles[blockIdx.y];
    const u32 row = blockIdx.z * MERGE_ROWS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= min((u32)BLOCK_M, batch.seq_rows[tile.x] - tile.y)) return;
    const Part* first = parts + (u64)(blockIdx.y * heads + blockIdx.x) * shares;
    float largest = -INFINITY_F;
    for (u32 i = 0; i < shares; i++) largest = fmaxf(largest, first[i].softmax[row].x);
    float weight = 0.0f;
    float2 sum[(D / 2 + 31) / 32] = {};
    for (u32 i = 0; i < shares; i++) {
        const float2 softmax = first[i].softmax[row];
        const float factor = power_of_2((softmax.x - largest) * scale * LOG2_E);
        weight += softmax.y * factor;
#pragma unroll
        for (u32 j = 0; j < (D / 2 + 31) / 32; j++) {
            const u32 at = j * 32 + lane;
            if (at >= D / 2) continue;
            const float2 value = *reinterpret_cast<const float2*>(&first[i].values[row][2 * at]);
            sum[j].x = fmaf(value.x, factor, sum[j].x), sum[j].y = fmaf(value.y, factor, sum[j].y);
        }
    }
    T* to = out + ((u64)(batch.seq_row[tile.x] + tile.y + row) * heads + blockIdx.x) * D;
#pragma unroll
    for (u32 j = 0; j < (D / 2 + 31) / 32; j++) {
        const u32 at = j * 32 + lane;
        if (at < D / 2) *reinterpret_cast<u32*>(to + 2 * at) = pack(sum[j].x / weight, sum[j].y / weight);
    }
}
#endif
