// Attention within segments of rows, without a mask: a vision tower's windows and frames.
//
// A block takes up to BLOCK_M rows of a segment and one head through all of the segment's rows, BLOCK_N at a time, as
// attention_prefill.cu does: what is worked on is in shared memory, and the next keys and values are on their way there.
// Windows are as long as BLOCK_N or shorter: all that is to be fetched is fetched at once, and the more blocks a
// multiprocessor holds, the more is on its way. So their blocks have half as many rows, and warps of 16.
// variants: DTYPE=1,2 HEAD_DIM=16,64,80,96,128 BLOCK_M=128 ROW_TILES=2
// variants: DTYPE=1,2 HEAD_DIM=16,64,80,96,128 BLOCK_M=64 ROW_TILES=1
#define BLOCK_N 64
#include "attention_tiles.cuh"

// The block's rows, and those of their segment.
struct Work {
    u32 row, rows;
    u32 begin, end;
};

// Brings as many rows as there are of up to ROWS to shared memory; the others are zeros. `from` is the first one's.
template <int ROWS> DEVICE void fetch(u32 to, const T* from, u32 stride, u32 rows) {
#pragma unroll
    for (int i = 0; i < ROWS * PIECES / THREADS; i++) {
        const u32 piece = i * THREADS + threadIdx.x, row = piece / PIECES, at = piece % PIECES;
        const bool there = row < rows;
        copy_async<16>(to + row * ROW_BYTES + at * 16, from + (u64)(there ? row : 0) * stride + at * 8, there ? 16 : 0);
    }
}

// Takes away the scores of the tile's rows from `count` on.
DEVICE void mask(Scores& score, u32 count) {
    const u32 t = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int n = 0; n < S_TILES; n++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (n * 8 + t * 2 + j % 2 >= count) score[r][n][j] = -INFINITY_F;
}

// Grid (heads of each tile): they run side by side, since their keys share cache lines. A tile is its first row, its segment's
// first row, and where the segment ends. Dynamic shared memory: queries, then keys and values of a tile, and those
// of another one if a segment is longer.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCK_M == 128 ? 2 : __CUDA_ARCH__ >= 900 && D <= 96 ? 4 : 3)
segment_attention(T* out, const T* qkv, const uint4* tiles, u32 heads, float scale) {
    extern __shared__ uint4 shared[];
    const u32 head = blockIdx.x % heads;
    const uint4 tile = tiles[blockIdx.x / heads];
    const Work w = {tile.x, min((u32)BLOCK_M, tile.z - tile.x), tile.y, tile.z};
    const u32 stride = 3 * heads * D, queries = shared_address(shared), stages = queries + Q_BYTES;
    const T* keys = qkv + (heads + head) * D;
    const T* values = keys + heads * D;
    const auto fetch_tile = [&](u32 begin, u32 to) {
        const u32 rows = min((u32)BLOCK_N, w.end - begin);
        fetch<BLOCK_N>(to, keys + (u64)begin * stride, stride, rows);
        fetch<BLOCK_N>(to + TILE_BYTES, values + (u64)begin * stride, stride, rows);
    };
    wait_for_previous();
    let_next_start();
    fetch<BLOCK_M>(queries, qkv + (u64)w.row * stride + head * D, stride, w.rows);
    fetch_tile(w.begin, stages);
    copies_commit();

    const u32 warp_row = threadIdx.x / 32 * WARP_ROWS;
    Sums sums;
    clear(sums);
    u32 stage = 0;
    for (u32 begin = w.begin; begin < w.end; begin += BLOCK_N) {
        copies_wait<0>();
        __syncthreads(); // this tile is there for all, and all are done with the one before
        if (begin + BLOCK_N < w.end) fetch_tile(begin + BLOCK_N, stages + (stage ^ 1) * 2 * TILE_BYTES);
        copies_commit();
        const u32 tile_at = stages + stage * 2 * TILE_BYTES;
        stage ^= 1;
        if (warp_row >= w.rows) continue;
        Scores score;
        multiply_keys(score, queries + warp_row * ROW_BYTES, tile_at);
        if (begin + BLOCK_N > w.end) mask(score, w.end - begin);
        soften(sums, score, scale * LOG2_E);
        multiply_values(sums, score, tile_at + TILE_BYTES);
    }
    write_out(sums, out + ((u64)w.row * heads + head) * D, heads * D, w.rows);
}
