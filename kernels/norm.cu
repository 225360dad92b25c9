// Root-mean-square norm of f32 rows into the type that matrix products read.
// variants: DTYPE=0,1,2
#include "common.cuh"

// A block a row; `dim` is a multiple of 4. Each thread keeps its part of the row in registers when the row is short.
extern "C" __global__ void __launch_bounds__(512)
rms_norm(T* __restrict__ out, const float* __restrict__ x, const float* __restrict__ w, u32 dim, float eps) {
    __shared__ float parts[32];
    wait_for_previous();
    let_next_start();
    const float4* row = reinterpret_cast<const float4*>(x + (u64)blockIdx.x * dim);
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < dim / 4; i += blockDim.x) {
        const float4 v = row[i];
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    const float scale = rsqrtf(block_sum(squares, parts) / dim + eps);
    const float4* weights = reinterpret_cast<const float4*>(w);
    T* to = out + (u64)blockIdx.x * dim;
    for (u32 i = threadIdx.x; i < dim / 4; i += blockDim.x) {
        const float4 v = row[i], g = weights[i];
        struct alignas(4 * sizeof(T)) Four { T v[4]; } four;
        four.v[0] = From<T>::f32(v.x * scale * g.x);
        four.v[1] = From<T>::f32(v.y * scale * g.y);
        four.v[2] = From<T>::f32(v.z * scale * g.z);
        four.v[3] = From<T>::f32(v.w * scale * g.w);
        reinterpret_cast<Four*>(to)[i] = four;
    }
}
