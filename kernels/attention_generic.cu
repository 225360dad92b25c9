// Attention for any type and head size, plainly: f32 sums of exact products. The fast kernels take what they can, this one
// the rest: f32, and unusual head sizes, as long as they are even.
// variants: DTYPE=0,1,2 HEAD_DIM=10,64,100,256
// spills: attention_generic
#include "batch.cuh"

static_assert(HEAD_DIM % 2 == 0 && HEAD_DIM <= 256, "lanes take two or four numbers at a time");

constexpr int ROWS = 4;  // rows of a sequence that go together through its tokens
constexpr int WARPS = 4; // share a sequence's tokens, 32 at a time
constexpr int WIDTH = HEAD_DIM % 4 == 0 ? 4 : 2; // numbers that a lane takes at a time
constexpr int PIECES = HEAD_DIM / WIDTH;
constexpr int PARTS = (PIECES + 31) / 32; // times that a lane takes a piece of a head

struct alignas(WIDTH * sizeof(T)) Piece {
    T v[WIDTH];
};

// A piece; what is beyond its width is zero.
DEVICE float4 load_piece(const T* p) {
    const Piece piece = *reinterpret_cast<const Piece*>(p);
    float4 x = make_float4(to_f32(piece.v[0]), to_f32(piece.v[1]), 0.0f, 0.0f);
    if (WIDTH == 4) x.z = to_f32(piece.v[WIDTH - 2]), x.w = to_f32(piece.v[WIDTH - 1]);
    return x;
}

DEVICE void store_piece(T* p, float4 x) {
    Piece piece;
    piece.v[0] = From<T>::f32(x.x), piece.v[1] = From<T>::f32(x.y);
    if (WIDTH == 4) piece.v[WIDTH - 2] = From<T>::f32(x.z), piece.v[WIDTH - 1] = From<T>::f32(x.w);
    *reinterpret_cast<Piece*>(p) = piece;
}

// A warp's sums over the tokens that it took, for each row.
struct Sums {
    float4 values[ROWS][PARTS];
    float largest[ROWS], weight[ROWS];
};

// What a warp knows of a row's softmax when it is done.
struct Shared {
    float4 queries[ROWS][PIECES];
    float4 values[WARPS][ROWS][PIECES];
    float largest[WARPS][ROWS], weight[WARPS][ROWS];
};

// The four rows' scores of one token.
DEVICE void scores(float (&score)[ROWS], const Shared& shared, const T* key) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) score[r] = 0.0f;
#pragma unroll 4
    for (int i = 0; i < PIECES; i++) {
        const float4 k = load_piece(key + WIDTH * i);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float4 q = shared.queries[r][i];
            score[r] = fmaf(q.x, k.x, fmaf(q.y, k.y, fmaf(q.z, k.z, fmaf(q.w, k.w, score[r]))));
        }
    }
}

// Takes 32 scores a row into the softmax: what was summed so far shrinks, and `score` becomes the lane's weight.
DEVICE void soften(Sums& sums, float (&score)[ROWS]) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float largest = fmaxf(sums.largest[r], warp_max(score[r]));
        const float base = largest == -INFINITY_F ? 0.0f : largest; // no token of these was seen
        const float shrink = expf(sums.largest[r] - base);
        score[r] = expf(score[r] - base);
        sums.largest[r] = largest;
        sums.weight[r] = sums.weight[r] * shrink + warp_sum(score[r]);
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            sums.values[r][i].x *= shrink, sums.values[r][i].y *= shrink;
            sums.values[r][i].z *= shrink, sums.values[r][i].w *= shrink;
        }
    }
}

DEVICE void add_value(Sums& sums, const float (&score)[ROWS], const T* value, int token) {
    float weight[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) weight[r] = __shfl_sync(~0u, score[r], token);
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        const u32 piece = i * 32 + threadIdx.x % 32;
        if (piece >= PIECES) continue;
        const float4 v = load_piece(value + piece * WIDTH);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float4& sum = sums.values[r][i];
            sum.x = fmaf(weight[r], v.x, sum.x), sum.y = fmaf(weight[r], v.y, sum.y);
            sum.z = fmaf(weight[r], v.z, sum.z), sum.w = fmaf(weight[r], v.w, sum.w);
        }
    }
}

// Adds the warps' sums in their order and writes the rows.
DEVICE void merge(T* out, u32 out_stride, u32 rows, const Shared& shared) {
    for (u32 i = threadIdx.x; i < rows * PIECES; i += blockDim.x) {
        const u32 r = i / PIECES, at = i % PIECES;
        float largest = -INFINITY_F, weight = 0.0f;
        for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, shared.largest[w][r]);
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int w = 0; w < WARPS; w++) {
            const float part = expf(shared.largest[w][r] - largest);
            const float4 v = shared.values[w][r][at];
            weight += part * shared.weight[w][r];
            sum.x += part * v.x, sum.y += part * v.y, sum.z += part * v.z, sum.w += part * v.w;
        }
        const float4 mean = make_float4(sum.x / weight, sum.y / weight, sum.z / weight, sum.w / weight);
        store_piece(out + (u64)r * out_stride + at * WIDTH, mean);
    }
}

// Grid (rows, heads): a block takes up to ROWS rows of a sequence, those from its own on, and one head. Which tokens a warp
// takes depends on their positions alone, so a row's bits do not depend on the rows beside it.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
attention_generic(T* out, const T* qkv, const T* keys, const T* values, Batch batch, u32 heads,
                  u32 kv_heads, u32 window, float scale) {
    __shared__ Shared shared;
    const u32 row = blockIdx.x, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 seq = row < batch.counts[COUNT_ROWS] ? batch.row_seq[row] : NONE;
    const u32 offset = seq == NONE ? 1 : row - batch.seq_row[seq];
    wait_for_previous();
    let_next_start();
    if (offset % ROWS) return; // another block's rows, or none
    const u32 rows = min(ROWS, batch.seq_rows[seq] - offset);
    const u32 position = batch.seq_len[seq] - batch.seq_rows[seq] + offset; // of the first row
    const u32 qkv_dim = (heads + 2 * kv_heads) * HEAD_DIM, kv_head = head / (heads / kv_heads);

    for (u32 i = threadIdx.x; i < ROWS * PIECES; i += blockDim.x) {
        const u32 r = i / PIECES, at = i % PIECES;
        float4 q = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (r < rows) q = load_piece(qkv + (u64)(row + r) * qkv_dim + head * HEAD_DIM + at * WIDTH);
        shared.queries[r][at] = q;
    }
    __syncthreads();

    Sums sums;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        sums.largest[r] = -INFINITY_F, sums.weight[r] = 0.0f;
#pragma unroll
        for (int i = 0; i < PARTS; i++) sums.values[r][i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    const u32 end = position + rows; // tokens that the last row sees end here
    const u32 begin = window && position + 1 > window ? position + 1 - window : 0;
    const u32* blocks = batch.blocks + batch.seq_blocks[seq];
    for (u32 tile = begin / 32; tile * 32 < end; tile++) {
        if (tile % WARPS != warp) continue;
        const u32 token = tile * 32 + lane;
        u64 at = 0; // the lane's token in the pages
        float score[ROWS];
        if (token < end) {
            at = (((u64)blocks[token / KV_BLOCK] * kv_heads + kv_head) * KV_BLOCK + token % KV_BLOCK) * HEAD_DIM;
            scores(score, shared, keys + at);
        }
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            const bool seen = token <= position + r && (!window || token + window > position + r) && token < end;
            score[r] = seen ? score[r] * scale : -INFINITY_F;
        }
        soften(sums, score);
        const int tokens = min(32u, end - tile * 32);
        for (int i = 0; i < tokens; i++) add_value(sums, score, values + __shfl_sync(~0u, at, i), i);
    }

#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (lane == 0) shared.largest[warp][r] = sums.largest[r], shared.weight[warp][r] = sums.weight[r];
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            if (i * 32 + lane < PIECES) shared.values[warp][r][i * 32 + lane] = sums.values[r][i];
    }
    __syncthreads();
    merge(out + (u64)row * heads * HEAD_DIM + head * HEAD_DIM, heads * HEAD_DIM, rows, shared);
}
