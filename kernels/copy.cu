// Rows from one place to another, which may be another device's memory.
// variants: DTYPE=0
#include "common.cuh"

// Any grid; 256 threads. Both places are aligned to 16 bytes.
extern "C" __global__ void __launch_bounds__(256)
copy_f32(float* to, const float* from, u64 n) {
    const u64 step = (u64)gridDim.x * blockDim.x, me = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_previous();
    let_next_start();
    const float4* wide_from = reinterpret_cast<const float4*>(from);
    float4* wide_to = reinterpret_cast<float4*>(to);
    u64 i = me;
    // Four loads before the first store: a store to another device is slow to be taken.
    for (; i + 3 * step < n / 4; i += 4 * step) {
        const float4 a = wide_from[i], b = wide_from[i + step], c = wide_from[i + 2 * step], d = wide_from[i + 3 * step];
        wide_to[i] = a;
        wide_to[i + step] = b;
        wide_to[i + 2 * step] = c;
        wide_to[i + 3 * step] = d;
    }
    for (; i < n / 4; i += step) wide_to[i] = wide_from[i];
    if (me < n % 4) to[n / 4 * 4 + me] = from[n / 4 * 4 + me];
}
