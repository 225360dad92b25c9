// Attention within segments for any type and head size, plainly: segment_attention.cu takes 16-bit types and usual heads.
// variants: DTYPE=0,1,2 HEAD_DIM=20,80,256
#include "common.cuh"

constexpr int WARPS = 4;
constexpr int PARTS = (HEAD_DIM + 31) / 32; // numbers of a head that a lane takes

// Grid (rows / WARPS rounded up, heads): a warp takes a row and a head through the row's segment, 32 rows at a time, each
// lane one of them. `segments` are each row's first and the end.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
segment_attention_plain(T* out, const T* qkv, const uint2* segments, u32 rows, u32 heads, float scale) {
    __shared__ float queries[WARPS][HEAD_DIM];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y;
    const u32 row = blockIdx.x * WARPS + warp, stride = 3 * heads * HEAD_DIM;
    wait_for_previous();
    let_next_start();
    if (row >= rows) return;
    const T* const query = qkv + (u64)row * stride + head * HEAD_DIM;
    for (u32 i = lane; i < HEAD_DIM; i += 32) queries[warp][i] = to_f32(query[i]);
    __syncwarp();
    const uint2 segment = segments[row];
    float sums[PARTS] = {}, largest = -INFINITY_F, weight = 0.0f;
    for (u32 begin = segment.x; begin < segment.y; begin += 32) {
        const T* const first = qkv + (u64)begin * stride + (heads + head) * HEAD_DIM;
        float score = -INFINITY_F;
        if (begin + lane < segment.y) {
            score = 0.0f;
            for (u32 i = 0; i < HEAD_DIM; i++) score = fmaf(queries[warp][i], to_f32(first[(u64)lane * stride + i]), score);
            score *= scale;
        }
        const float before = largest;
        largest = fmaxf(largest, warp_max(score)); // of 32 rows at least one is there
        const float shrink = expf(before - largest), mine = expf(score - largest);
        weight = weight * shrink + warp_sum(mine);
#pragma unroll
        for (int i = 0; i < PARTS; i++) sums[i] *= shrink;
        for (u32 j = 0; j < min(32u, segment.y - begin); j++) {
            const T* const value = first + (u64)j * stride + heads * HEAD_DIM;
            const float share = __shfl_sync(~0u, mine, j);
#pragma unroll
            for (int i = 0; i < PARTS; i++)
                if (i * 32 + lane < HEAD_DIM) sums[i] = fmaf(share, to_f32(value[i * 32 + lane]), sums[i]);
        }
    }
    T* const to = out + ((u64)row * heads + head) * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < PARTS; i++)
        if (i * 32 + lane < HEAD_DIM) to[i * 32 + lane] = From<T>::f32(sums[i] / weight);
}
