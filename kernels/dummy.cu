// Random weights, made on the device with the bits of model/weights/dummy.rs.
// variants: DTYPE=0,1,2
#include "common.cuh"

#define SPREAD 0.02f

// The last step of SplitMix64.
DEVICE u64 mix(u64 x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// Nearly normal: a sum of four even numbers, divided by its spread.
DEVICE float normal(u64 key, u64 index) {
    const u64 bits = mix(key + index * 0x9e3779b97f4a7c15ull);
    const u32 low = (u32)bits, high = (u32)(bits >> 32);
    const u32 sum = (low & 0xffff) + (low >> 16) + (high & 0xffff) + (high >> 16);
    const float x = __fsub_rn((float)sum, 131070.0f);
    // x / 37837.2, rounded to nearest, by one correction of the product with the reciprocal: tested for every sum.
    const float divisor = 37837.2f, reciprocal = 1.0f / 37837.2f;
    const float near = __fmul_rn(x, reciprocal);
    return __fmaf_rn(__fmaf_rn(-near, divisor, x), reciprocal, near);
}

DEVICE T value(u64 key, u64 index, float centre) {
    return From<T>::f32(__fadd_rn(centre, __fmul_rn(SPREAD, normal(key, index))));
}

// `out[i]` is number `first + i` of the tensor with this key. Any grid, 256 threads; `out` is aligned to 16 bytes.
extern "C" __global__ void __launch_bounds__(256)
dummy(T* out, u64 n, u64 key, float centre, u64 first) {
    const int len = Wide<T>::LEN;
    const u64 step = (u64)gridDim.x * blockDim.x, me = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_previous();
    let_next_start();
    for (u64 i = me; i < n / len; i += step) {
        Wide<T> wide;
#pragma unroll
        for (int j = 0; j < len; j++) wide.v[j] = value(key, first + i * len + j, centre);
        reinterpret_cast<Wide<T>*>(out)[i] = wide;
    }
    const u64 whole = n / len * len;
    if (me < n - whole) out[whole + me] = value(key, first + whole + me, centre);
}
