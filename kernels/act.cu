// The gate of the feed-forward part, and GELU.
// variants: DTYPE=0,1,2
#include "common.cuh"

// Numbers that a block writes: 256 threads of two times 16 bytes.
#define SPAN (256 * 2 * Wide<T>::LEN)

// Exact to a few last bits for f32; for 16-bit types the quick functions are exact enough.
DEVICE float silu_times(float gate, float up) {
    return DTYPE == 0 ? gate / (1.0f + expf(-gate)) * up : __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

DEVICE void silu_wide(T* to, const Wide<T>& gate, const Wide<T>& up) {
    Wide<T> out;
#pragma unroll
    for (int j = 0; j < Wide<T>::LEN; j++) out.v[j] = From<T>::f32(silu_times(to_f32(gate.v[j]), to_f32(up.v[j])));
    *reinterpret_cast<Wide<T>*>(to) = out;
}

// Grid: [rows, dim / SPAN rounded up], 256 threads. A row of `gate_up` is `dim` gates, then `dim` ups.
extern "C" __global__ void __launch_bounds__(256)
silu_mul(T* out, const T* gate_up, u32 dim) {
    const u64 row = blockIdx.x;
    const T* gates = gate_up + row * 2 * dim;
    const T* ups = gates + dim;
    T* to = out + row * dim;
    const int len = Wide<T>::LEN;
    const u32 first = blockIdx.y * SPAN, end = min(first + SPAN, dim);
    wait_for_previous();
    let_next_start();
    if (dim % len == 0) {
        // Both loads of both halves before the first use: enough bytes in flight for the memory's speed.
        const u32 a = first + threadIdx.x * len, b = a + 256 * len;
        Wide<T> gate[2], up[2];
        if (a < end) gate[0] = *reinterpret_cast<const Wide<T>*>(gates + a), up[0] = *reinterpret_cast<const Wide<T>*>(ups + a);
        if (b < end) gate[1] = *reinterpret_cast<const Wide<T>*>(gates + b), up[1] = *reinterpret_cast<const Wide<T>*>(ups + b);
        if (a < end) silu_wide(to + a, gate[0], up[0]);
        if (b < end) silu_wide(to + b, gate[1], up[1]);
    } else {
        for (u32 i = first + threadIdx.x; i < end; i += blockDim.x)
            to[i] = From<T>::f32(silu_times(to_f32(gates[i]), to_f32(ups[i])));
    }
}

// x * Φ(x), for `n` numbers, in place. Grid: [n / (256 * LEN) rounded up], 256 threads.
extern "C" __global__ void __launch_bounds__(256)
gelu(T* x, u64 n) {
    constexpr int LEN = Wide<T>::LEN;
    const u64 first = ((u64)blockIdx.x * 256 + threadIdx.x) * LEN;
    wait_for_previous();
    let_next_start();
    if (first + LEN <= n) {
        Wide<T> some = *reinterpret_cast<const Wide<T>*>(x + first);
#pragma unroll
        for (int j = 0; j < LEN; j++) some.v[j] = From<T>::f32(to_f32(some.v[j]) * normcdff(to_f32(some.v[j])));
        *reinterpret_cast<Wide<T>*>(x + first) = some;
    } else {
        for (u64 i = first; i < n; i++) x[i] = From<T>::f32(to_f32(x[i]) * normcdff(to_f32(x[i])));
    }
}
