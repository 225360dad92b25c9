// What a vision tower does with the places of patches: the table of rotations, the rotation of queries and keys, and tokens
// put back into the images' own order.
// variants: DTYPE=0,1,2 HEAD_DIM=16,20,80,128
#include "common.cuh"

constexpr int HALF = HEAD_DIM / 2, QUARTER = HEAD_DIM / 4;

static_assert(HEAD_DIM % 4 == 0, "a quarter of a head turns by the place down, and one by the place across");

// out[row][i] = (cos, sin) of the row's place times inv_freq: down for the first half of them, then across. One thread a number.
// The product is rounded to f32, as where models are trained; the functions are the accurate ones, also for large angles.
extern "C" __global__ void __launch_bounds__(128)
place_rotations(float2* out, const uint2* places, const float* __restrict__ inv_freq, u32 rows) {
    const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_previous();
    let_next_start();
    const u32 row = i / HALF, at = i % HALF;
    if (row >= rows) return;
    const uint2 place = places[row];
    float2 turn;
    sincosf(__fmul_rn((float)(at < QUARTER ? place.x : place.y), inv_freq[at % QUARTER]), &turn.y, &turn.x);
    out[i] = turn;
}

// Neighbouring numbers that a thread takes, and those half a head further: 16 bytes each where heads allow it.
constexpr int most(int n) { return HALF % n ? most(n / 2) : n; }
constexpr int TOGETHER = most(16 / sizeof(T));
constexpr int PIECES = HALF / TOGETHER;
constexpr int ROWS = 4; // that a block takes in turn

struct alignas(TOGETHER * sizeof(T)) Few {
    T v[TOGETHER];
};

// Grid (rows / ROWS rounded up, queries' and keys' heads over those of a block rounded up); a block has PIECES threads for each
// of some heads.
extern "C" __global__ void __launch_bounds__(1024)
rope_places(T* qkv, const float2* rotations, u32 rows, u32 heads) {
    const u32 head = blockIdx.y * (blockDim.x / PIECES) + threadIdx.x / PIECES, at = threadIdx.x % PIECES * TOGETHER;
    wait_for_previous();
    let_next_start();
    if (head >= 2 * heads) return;
    const u32 end = min(rows, (blockIdx.x + 1) * ROWS);
    for (u32 row = blockIdx.x * ROWS; row < end; row++) {
        Few* const low_at = reinterpret_cast<Few*>(qkv + ((u64)row * 3 * heads + head) * HEAD_DIM + at);
        Few* const high_at = reinterpret_cast<Few*>(qkv + ((u64)row * 3 * heads + head) * HEAD_DIM + HALF + at);
        const float2* const turns = rotations + (u64)row * HALF + at;
        Few low = *low_at, high = *high_at;
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const float2 by = turns[i];
            const float a = to_f32(low.v[i]), b = to_f32(high.v[i]);
            low.v[i] = From<T>::f32(a * by.x - b * by.y);
            high.v[i] = From<T>::f32(b * by.x + a * by.y);
        }
        *low_at = low;
        *high_at = high;
    }
}

// out[cells[row]] = x[row], of `dim` numbers. Grid (cells, dim / SPAN rounded up), 128 threads.
#define SPAN 1024
extern "C" __global__ void __launch_bounds__(128)
scatter_cells(float* out, const float* x, const u32* cells, u32 dim) {
    const u32 first = blockIdx.y * SPAN, end = min(first + SPAN, dim);
    const float* const from = x + (u64)blockIdx.x * dim;
    wait_for_previous();
    let_next_start();
    float* const to = out + (u64)cells[blockIdx.x] * dim;
    if (dim % 4 == 0) {
        for (u32 i = first + threadIdx.x * 4; i < end; i += blockDim.x * 4)
            *reinterpret_cast<float4*>(to + i) = *reinterpret_cast<const float4*>(from + i);
    } else {
        for (u32 i = first + threadIdx.x; i < end; i += blockDim.x) to[i] = from[i];
    }
}
