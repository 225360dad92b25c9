// What the two ways to multiply a few rows share: gemv.cu (weights through a ring in shared memory) and gemv_any.cu
// (any k, any alignment, f32).
#pragma once

#include "common.cuh"

constexpr u32 WARPS = 8; // that multiply

// Rows to normalise before they are multiplied: x[rows, k] and the norm's weights[k].
struct Normed {
    const float* x;
    const float* weights;
    float eps;
};

struct Shape {
    u32 rows, n, k; // outputs are [rows, n]
    u32 stages;     // of the ring in shared memory
};

DEVICE float silu(float x) { return x / (1.0f + (DTYPE == 0 ? expf(-x) : __expf(-x))); }
DEVICE float bias_at(const float* bias, u32 i) { return bias ? bias[i] : 0.0f; }

// What an earlier kernel wrote is read past the first-level cache, where an older copy could be.
DEVICE float load_fresh(const float* p) {
    float x;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(p) : "memory");
    return x;
}
// Zeros if it is not there. No branch, so that many of them can be under way.
DEVICE float4 load_fresh_4(const float4* p, bool there) {
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];\n}"
                 : "+f"(x.x), "+f"(x.y), "+f"(x.z), "+f"(x.w)
                 : "l"(p), "r"((u32)there)
                 : "memory");
    return x;
}
DEVICE float squares_of(float4 x) { return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; }

// Among the warps that multiply.
DEVICE void multipliers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory"); }

// Four numbers as they are multiplied.
struct alignas(4 * sizeof(T)) Four {
    T v[4];
    DEVICE static Four scaled(float4 x, float scale, float4 gain) {
        Four four;
        four.v[0] = From<T>::f32(x.x * scale * gain.x);
        four.v[1] = From<T>::f32(x.y * scale * gain.y);
        four.v[2] = From<T>::f32(x.z * scale * gain.z);
        four.v[3] = From<T>::f32(x.w * scale * gain.w);
        return four;
    }
};
