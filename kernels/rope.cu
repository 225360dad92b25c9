// Rotary positions: the table of a pass, and the rotation of queries and keys on their way to the KV pages.
// variants: DTYPE=0,1,2 HEAD_DIM=64,80,128
#include "batch.cuh"

#define HALF (HEAD_DIM / 2)

static_assert(HEAD_DIM % 2 == 0, "a rotation turns pairs");

// out[row][i] = scale * (cos, sin) of position * inv_freq[i]. One thread a number, rows * half of them. The product is
// rounded to f32, as where models are trained; the functions are the accurate ones, also for large angles. Where rows have
// turns, frequencies from `down` on take the second of them, and those from `across` on the third.
extern "C" __global__ void __launch_bounds__(128)
rotations(float2* __restrict__ out, Batch batch, const float* __restrict__ inv_freq, u32 half, u32 down, u32 across,
          float scale) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 row = i / half, freq = i % half;
    const bool mine = row < batch.counts[COUNT_ROWS];
    float2 turn = make_float2(0.0f, 0.0f);
    if (mine) {
        const u32 section = (freq >= down) + (freq >= across);
        const u32 place = batch.turns ? batch.turns[(u64)row * 3 + section] : batch.positions[row];
        sincosf(__fmul_rn((float)place, inv_freq[freq]), &turn.y, &turn.x);
    }
    wait_for_previous();
    let_next_start();
    if (mine) out[i] = make_float2(turn.x * scale, turn.y * scale);
}

// Neighbouring numbers that a lane takes together.
constexpr int TOGETHER = HALF % 4 == 0 ? 4 : HALF % 2 == 0 ? 2 : 1;
// Lanes that share a head: a warp takes several short ones.
constexpr int lanes(int wanted) { return wanted >= 32 ? 32 : wanted > 16 ? 32 : wanted > 8 ? 16 : wanted > 4 ? 8 : 4; }
constexpr int LANES = lanes(HALF / TOGETHER);
// How often a lane takes some, to cover half a head.
constexpr int TURNS = (HALF + LANES * TOGETHER - 1) / (LANES * TOGETHER);

struct alignas(TOGETHER * sizeof(T)) Few {
    T v[TOGETHER];
};

// One lane's part of a head: numbers of the low half, and those half a head further.
struct Part {
    float low[TURNS][TOGETHER], high[TURNS][TOGETHER];
};

DEVICE u32 place(int turn) { return (turn * LANES + threadIdx.x % LANES) * TOGETHER; }

DEVICE void load(Part& part, const T* head) {
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const u32 at = place(turn);
        if (at < HALF) {
            const Few low = *reinterpret_cast<const Few*>(head + at), high = *reinterpret_cast<const Few*>(head + HALF + at);
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) part.low[turn][i] = to_f32(low.v[i]), part.high[turn][i] = to_f32(high.v[i]);
        } else {
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) part.low[turn][i] = part.high[turn][i] = 0.0f;
        }
    }
}

DEVICE void store(T* head, const Part& part) {
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const u32 at = place(turn);
        if (at >= HALF) continue;
        Few low, high;
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) low.v[i] = From<T>::f32(part.low[turn][i]), high.v[i] = From<T>::f32(part.high[turn][i]);
        *reinterpret_cast<Few*>(head + at) = low;
        *reinterpret_cast<Few*>(head + HALF + at) = high;
    }
}

DEVICE void normalise(Part& part, const float* weights, float eps, bool wanted) {
    float squares = 0.0f;
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++)
#pragma unroll
        for (int i = 0; i < TOGETHER; i++)
            squares += part.low[turn][i] * part.low[turn][i] + part.high[turn][i] * part.high[turn][i];
#pragma unroll
    for (int far = LANES / 2; far > 0; far /= 2) squares += __shfl_xor_sync(~0u, squares, far);
    const float scale = rsqrtf(squares / HEAD_DIM + eps);
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++)
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const u32 at = place(turn) + i;
            if (at >= HALF || !wanted) continue;
            part.low[turn][i] *= scale * weights[at];
            part.high[turn][i] *= scale * weights[HALF + at];
        }
}

DEVICE void rotate(Part& part, const float2* turns) {
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++)
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const u32 at = place(turn) + i;
            if (at >= HALF) continue;
            const float2 by = turns[at];
            const float low = part.low[turn][i], high = part.high[turn][i];
            part.low[turn][i] = low * by.x - high * by.y;
            part.high[turn][i] = high * by.x + low * by.y;
        }
}

// LANES lanes a head of a row: grid (rows, heads with both kinds of KV heads over the block's groups of lanes). Norm weights
// may be null.
extern "C" __global__ void __launch_bounds__(128)
rope_kv(T* qkv, T* keys, T* values, const float* __restrict__ q_norm,
        const float* __restrict__ k_norm, Batch batch, u32 heads, u32 kv_heads, float eps) {
    const u32 row = blockIdx.x, head = blockIdx.y * (blockDim.x / LANES) + threadIdx.x / LANES;
    const u32 seq = row < batch.counts[COUNT_ROWS] ? batch.row_seq[row] : NONE;
    const bool mine = seq != NONE && head < heads + 2 * kv_heads;
    u64 page = 0; // where the row's token lies in the pages, for KV head 0
    if (mine) {
        const u32 position = batch.positions[row];
        page = (u64)batch.blocks[batch.seq_blocks[seq] + position / KV_BLOCK] * kv_heads * KV_BLOCK + position % KV_BLOCK;
    }
    // Attention begins before the wait: it fetches what earlier passes have left.
    let_next_start();
    wait_for_previous();
    T* from = qkv + ((u64)row * (heads + 2 * kv_heads) + head) * HEAD_DIM;
    Part part = {};
    if (mine) load(part, from);
    // Of a warp's lanes some may have a value's head, or none: they take part in the norm's sums all the same.
    if (q_norm) normalise(part, head < heads ? q_norm : k_norm, eps, head < heads + kv_heads);
    if (!mine) return;
    if (head < heads + kv_heads) rotate(part, batch.rotations + (u64)row * HALF);
    if (head < heads + kv_heads) store(from, part);
    if (head >= heads) {
        T* pages = head < heads + kv_heads ? keys : values;
        store(pages + (page + (head - heads) % kv_heads * KV_BLOCK) * HEAD_DIM, part);
    }
}
