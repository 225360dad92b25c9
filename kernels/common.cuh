// What every kernel shares: the 16-bit types, conversions, wide loads, reductions, and the order of launches.
//
// A kernel is compiled for one numeric type: DTYPE is 0 for f32, 1 for f16, 2 for bf16. Nothing here needs a
// header of the toolkit, so that NVRTC alone can compile it.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

#if DTYPE == 0
typedef float T;
#elif DTYPE == 1
typedef f16 T;
#elif DTYPE == 2
typedef bf16 T;
#else
#error "DTYPE must be 0 (f32), 1 (f16) or 2 (bf16)"
#endif

#define DEVICE __device__ __forceinline__
#define INFINITY_F __int_as_float(0x7f800000)

// Conversions: to f32 exactly, from f32 rounded to nearest even.
DEVICE float to_f32(float x) { return x; }
DEVICE float to_f32(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
DEVICE float to_f32(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

template <typename U> struct From;
template <> struct From<float> {
    DEVICE static float f32(float x) { return x; }
};
template <> struct From<f16> {
    DEVICE static f16 f32(float x) {
        f16 y;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
        return y;
    }
};
template <> struct From<bf16> {
    DEVICE static bf16 f32(float x) {
        bf16 y;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
        return y;
    }
};

#if DTYPE != 0
// Two numbers rounded to T in one register, the first in the low half.
DEVICE u32 pack(float low, float high) {
    u32 x;
#if DTYPE == 1
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
#endif
    return x;
}
#endif

// To all but the last bits.
DEVICE float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes at once. Pointers must be aligned to 16 bytes.
template <typename U> struct alignas(16) Wide {
    static constexpr int LEN = 16 / sizeof(U);
    U v[LEN];
};

DEVICE uint4 load_16(const void* p) { return *reinterpret_cast<const uint4*>(p); }
// For weights: read once, so they need not stay in the first-level cache.
DEVICE uint4 load_16_once(const void* p) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(p));
    return x;
}

// The sum, or the largest, of a warp's numbers, in every lane.
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
    return x;
}

// The sum of a block's numbers, in every thread. `parts` is shared memory for 32 numbers; the block is whole warps.
DEVICE float block_sum(float x, float* parts) {
    x = warp_sum(x);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    __syncthreads();
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? parts[lane] : 0.0f);
}

// Order of launches: a kernel may start while the one before it in the stream still runs (programmatic dependent
// launch, from sm_90 on). Nothing that the one before wrote may be read, and nothing that it reads may be
// written, before `wait_for_previous`. Every thread of every kernel calls it: a kernel that ended without it would
// let the one after next run ahead of what it needs. Pointers to what earlier kernels write must not be
// `const __restrict__`: loads through such pointers may be moved ahead of the wait. `let_next_start` says that the next kernel's blocks may be
// placed as soon as there is room.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
