// The products of gemv.cu for what its ring of 16-byte pieces cannot take: f32, a k that is no multiple of 8, weights that
// are not aligned. Same names, same arguments; `stages` is ignored. Threads: whole warps; any grid.
// variants: DTYPE=0,1,2 ROWS=1,8
#include "common.cuh"
#include "gemv.cuh"

// The factor that normalises each row, in every thread of the block.
DEVICE void scales_of(float (&scales)[ROWS], const Normed& x, const Shape& shape, float* parts) {
    for (u32 row = 0; row < ROWS; row++) {
        float squares = 0.0f;
        if (row < shape.rows)
            for (u32 i = threadIdx.x; i < shape.k; i += blockDim.x) {
                const float v = load_fresh(x.x + (u64)row * shape.k + i);
                squares += v * v;
            }
        scales[row] = rsqrtf(block_sum(squares, parts) / shape.k + x.eps);
    }
}

// A weight row with all rows of x, by a warp: the sums in every lane. `at(row, i)` is x.
template <typename At> DEVICE void dot(float (&sums)[ROWS], const T* w, const Shape& shape, At at) {
    for (u32 row = 0; row < ROWS; row++) sums[row] = 0.0f;
    for (u32 i = threadIdx.x % 32; i < shape.k; i += 32) {
        const float weight = to_f32(w[i]);
#pragma unroll
        for (u32 row = 0; row < ROWS; row++)
            if (row < shape.rows) sums[row] += weight * at(row, i);
    }
#pragma unroll
    for (u32 row = 0; row < ROWS; row++) sums[row] = warp_sum(sums[row]);
}

// A warp an output. `store(row, output, sum, sum of the up)` runs in one lane for each row.
template <bool PAIRS, typename At, typename Store> DEVICE void each_output(const T* w, const Shape& shape, At at, Store store) {
    const u32 warps = gridDim.x * (blockDim.x / 32), lane = threadIdx.x % 32;
    for (u32 i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; i < shape.n; i += warps) {
        float sums[ROWS], ups[ROWS] = {};
        dot(sums, w + (u64)i * shape.k, shape, at);
        if (PAIRS) dot(ups, w + (u64)(shape.n + i) * shape.k, shape, at);
#pragma unroll
        for (u32 row = 0; row < ROWS; row++)
            if (row < shape.rows && lane == row) store(row, i, sums[row], ups[row]);
    }
}

template <bool PAIRS, typename Store> DEVICE void normed(const T* w, const Normed& x, const Shape& shape, Store store) {
    __shared__ float parts[32];
    let_next_start();
    wait_for_previous();
    float scales[ROWS];
    scales_of(scales, x, shape, parts);
    // Rounded to T, as rows are that gemv.cu keeps in shared memory.
    const auto at = [&](u32 row, u32 i) {
        return to_f32(From<T>::f32(load_fresh(x.x + (u64)row * shape.k + i) * scales[row] * x.weights[i]));
    };
    each_output<PAIRS>(w, shape, at, store);
}

#define KERNEL extern "C" __global__ void __launch_bounds__(256, 4)

KERNEL gemv_norm(T* out, Normed x, const T* w, const float* bias, Shape shape) {
    normed<false>(w, x, shape, [&](u32 row, u32 i, float sum, float) {
        out[(u64)row * shape.n + i] = From<T>::f32(sum + bias_at(bias, i));
    });
}

KERNEL gemv_norm_f32(float* out, Normed x, const T* w, const float* bias, Shape shape) {
    normed<false>(w, x, shape, [&](u32 row, u32 i, float sum, float) {
        out[(u64)row * shape.n + i] = sum + bias_at(bias, i);
    });
}

KERNEL gemv_norm_silu(T* out, Normed x, const T* w, const float* bias, Shape shape) {
    normed<true>(w, x, shape, [&](u32 row, u32 i, float gate, float up) {
        gate = silu(gate + bias_at(bias, i));
        out[(u64)row * shape.n + i] = From<T>::f32(gate * (up + bias_at(bias, shape.n + i)));
    });
}

KERNEL gemv_add(float* hidden, const T* x, const T* w, const float* bias, Shape shape) {
    let_next_start();
    wait_for_previous();
    const auto at = [&](u32 row, u32 i) { return to_f32(x[(u64)row * shape.k + i]); };
    each_output<false>(w, shape, at, [&](u32 row, u32 i, float sum, float) {
        float* to = hidden + (u64)row * shape.n + i;
        *to = load_fresh(to) + (sum + bias_at(bias, i));
    });
}
