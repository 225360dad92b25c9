// What a warp does with a tile of keys and values in shared memory: scores of its rows, an online softmax, sums of values.
//
// Rows in shared memory are padded by 16 bytes, an odd number of 16-byte pieces in all, so that the 8 rows of a matrix lie in
// different banks. The file that includes this says HEAD_DIM, BLOCK_M (rows of a block), BLOCK_N (tokens of a tile) and
// ROW_TILES (of 16 rows each, a warp).
#pragma once

#include "attention.cuh"

constexpr int D = HEAD_DIM;
constexpr int WARP_ROWS = 16 * ROW_TILES;
constexpr int WARPS = BLOCK_M / WARP_ROWS;
constexpr int THREADS = 32 * WARPS;
constexpr int PIECES = D / 8;                  // 16-byte pieces of a row
constexpr u32 ROW_BYTES = (PIECES + 1) * 16;   // of a row in shared memory
constexpr u32 Q_BYTES = BLOCK_M * ROW_BYTES;
constexpr u32 TILE_BYTES = BLOCK_N * ROW_BYTES; // of keys or values
constexpr int S_TILES = BLOCK_N / 8, O_TILES = D / 8;

static_assert(D % 16 == 0, "rows must be an odd number of pieces with their padding");

// A warp's rows: sums of values, largest scores and sums of weights (a lane's part). A lane has rows g and g + 8 of each tile.
struct Sums {
    float values[ROW_TILES][O_TILES][4];
    float largest[ROW_TILES][2], weight[ROW_TILES][2];
};

DEVICE void clear(Sums& sums) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        sums.largest[r][0] = sums.largest[r][1] = -INFINITY_F;
        sums.weight[r][0] = sums.weight[r][1] = 0.0f;
#pragma unroll
        for (int n = 0; n < O_TILES; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums.values[r][n][j] = 0.0f;
    }
}

typedef float Scores[ROW_TILES][S_TILES][4];

// Q·Kᵀ
DEVICE void multiply_keys(Scores& score, u32 queries, u32 keys) {
    const u32 lane = threadIdx.x % 32;
    const u32 q = queries + lane % 16 * ROW_BYTES + lane / 16 * 16;
    const u32 k = keys + (lane / 16 * 8 + lane % 8) * ROW_BYTES + lane / 8 % 2 * 16;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int n = 0; n < S_TILES; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) score[r][n][j] = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint4 rows[ROW_TILES];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) rows[r] = matrices(q + r * 16 * ROW_BYTES + i * 32);
#pragma unroll
        for (int n = 0; n < S_TILES / 2; n++) {
            const uint4 columns = matrices(k + n * 16 * ROW_BYTES + i * 32);
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                multiply(score[r][2 * n], rows[r], columns.x, columns.y);
                multiply(score[r][2 * n + 1], rows[r], columns.z, columns.w);
            }
        }
    }
}

// Takes a tile's scores into the softmax; they become weights.
DEVICE void soften(Sums& sums, Scores& score, float scale) {
    float shrink[ROW_TILES][2];
    bool grown = false;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float largest = fmaxf(score[r][0][2 * half], score[r][0][2 * half + 1]);
#pragma unroll
            for (int n = 1; n < S_TILES; n++) largest = fmaxf(largest, fmaxf(score[r][n][2 * half], score[r][n][2 * half + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
            const float before = sums.largest[r][half];
            largest = fmaxf(largest, before);
            grown = grown || largest > before;
            sums.largest[r][half] = largest;
            const float base = largest == -INFINITY_F ? 0.0f : largest * scale; // a row may have seen no token yet
            shrink[r][half] = power_of_2(fmaf(before, scale, -base));
            float weight = 0.0f;
#pragma unroll
            for (int n = 0; n < S_TILES; n++)
#pragma unroll
                for (int j = 2 * half; j < 2 * half + 2; j++) {
                    score[r][n][j] = power_of_2(fmaf(score[r][n][j], scale, -base));
                    weight += score[r][n][j];
                }
            sums.weight[r][half] = sums.weight[r][half] * shrink[r][half] + weight;
        }
    if (!__any_sync(~0u, grown)) return;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int n = 0; n < O_TILES; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums.values[r][n][j] *= shrink[r][j / 2];
}

// sums += P·V
DEVICE void multiply_values(Sums& sums, const Scores& weight, u32 values) {
    const u32 lane = threadIdx.x % 32;
    const u32 v = values + lane % 16 * ROW_BYTES + lane / 16 * 16;
#pragma unroll
    for (int i = 0; i < BLOCK_N / 16; i++) {
        uint4 rows[ROW_TILES];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            const float(&low)[4] = weight[r][2 * i], (&high)[4] = weight[r][2 * i + 1];
            rows[r] = make_uint4(pack(low[0], low[1]), pack(low[2], low[3]), pack(high[0], high[1]), pack(high[2], high[3]));
        }
#pragma unroll
        for (int n = 0; n < O_TILES / 2; n++) {
            const uint4 columns = matrices_transposed(v + i * 16 * ROW_BYTES + n * 32);
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                multiply(sums.values[r][2 * n], rows[r], columns.x, columns.y);
                multiply(sums.values[r][2 * n + 1], rows[r], columns.z, columns.w);
            }
        }
    }
}

// Writes the block's first `rows` rows; `stride` numbers from one to the next.
DEVICE void write_out(const Sums& sums, T* out, u32 stride, u32 rows) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float weight = sums.weight[r][half];
            weight += __shfl_xor_sync(~0u, weight, 1);
            weight += __shfl_xor_sync(~0u, weight, 2);
            const u32 row = threadIdx.x / 32 * WARP_ROWS + r * 16 + half * 8 + g;
            if (row >= rows) continue;
            const float factor = 1.0f / weight;
            T* to = out + (u64)row * stride + t * 2;
#pragma unroll
            for (int n = 0; n < O_TILES; n++)
                *reinterpret_cast<u32*>(to + n * 8) =
                    pack(sums.values[r][n][2 * half] * factor, sums.values[r][n][2 * half + 1] * factor);
        }
}
