// Root-mean-square norm of f32 rows into the type that matrix products read.
// variants: DTYPE=0,1,2
#include "common.cuh"

// Groups of four numbers that a thread keeps in registers: rows of up to 16 * threads numbers are read once.
#define KEPT 4

struct alignas(4 * sizeof(T)) Four {
    T v[4];
};

DEVICE float scale_of(float squares, u32 dim, float eps, float* parts) {
    return 1.0f / sqrtf(block_sum(squares, parts) / dim + eps);
}
DEVICE float square_sum(float4 v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }
DEVICE Four scaled(float4 v, float scale, float4 w) {
    return {From<T>::f32(v.x * scale * w.x), From<T>::f32(v.y * scale * w.y), From<T>::f32(v.z * scale * w.z),
            From<T>::f32(v.w * scale * w.w)};
}

// A row that fits in registers, of a multiple of 4 numbers.
DEVICE void norm_kept(T* out, const float* x, const float* w, u32 dim, float eps, float* parts) {
    const float4* row = reinterpret_cast<const float4*>(x);
    const float4* weights = reinterpret_cast<const float4*>(w);
    float4 v[KEPT], g[KEPT];
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        const u32 i = threadIdx.x + k * blockDim.x;
        if (i < dim / 4) g[k] = weights[i];
    }
    wait_for_previous();
    let_next_start();
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        const u32 i = threadIdx.x + k * blockDim.x;
        v[k] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (i < dim / 4) v[k] = row[i];
    }
#pragma unroll
    for (int k = 0; k < KEPT; k++) squares += square_sum(v[k]);
    const float scale = scale_of(squares, dim, eps, parts);
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        const u32 i = threadIdx.x + k * blockDim.x;
        if (i < dim / 4) reinterpret_cast<Four*>(out)[i] = scaled(v[k], scale, g[k]);
    }
}

// Any row.
DEVICE void norm_any(T* out, const float* x, const float* w, u32 dim, float eps, float* parts) {
    wait_for_previous();
    let_next_start();
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < dim; i += blockDim.x) squares += x[i] * x[i];
    const float scale = scale_of(squares, dim, eps, parts);
    for (u32 i = threadIdx.x; i < dim; i += blockDim.x) out[i] = From<T>::f32(x[i] * scale * w[i]);
}

// Grid: [rows]; any whole number of warps. With few rows many threads are quickest, with many rows dim / 16 are.
extern "C" __global__ void __launch_bounds__(1024)
rms_norm(T* out, const float* x, const float* __restrict__ w, u32 dim, float eps) {
    __shared__ float parts[32];
    x += (u64)blockIdx.x * dim;
    out += (u64)blockIdx.x * dim;
    if (dim % 4 == 0 && dim <= KEPT * 4 * blockDim.x)
        norm_kept(out, x, w, dim, eps, parts);
    else
        norm_any(out, x, w, dim, eps, parts);
}
