// What the fast attention kernels share: asynchronous copies to shared memory, 8x8 fragments and their products.
//
// A fragment's lanes, with g = lane / 4 and t = lane % 4, for mma m16n8k16 of 16-bit numbers (two a register):
//     a0: row g, k 2t..2t+1     a1: row g+8, k 2t..2t+1     a2: row g, k 2t+8..2t+9     a3: row g+8, k 2t+8..2t+9
//     b0: k 2t..2t+1, column g  b1: k 2t+8..2t+9, column g
//     c0, c1: row g, columns 2t, 2t+1                       c2, c3: row g+8, columns 2t, 2t+1
#pragma once

#include "batch.cuh"
#include "bulk.cuh"

#if DTYPE == 0
#error "the fast attention kernels are for 16-bit types; attention_generic.cu takes f32"
#endif

#define LOG2_E 1.4426950408889634f

struct Attention {
    T* out;          // [rows, heads, HEAD_DIM]
    const T* qkv;    // [rows, heads + 2 kv_heads, HEAD_DIM]
    const T* keys;   // [blocks, kv_heads, KV_BLOCK, HEAD_DIM]
    const T* values; // the same
    u32 heads, kv_heads;
    u32 window;      // 0: none
    float scale;     // times log2 e
};

template <typename U> DEVICE U read_shared(u32 address);
template <> DEVICE uint4 read_shared(u32 address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
    return x;
}
template <> DEVICE uint2 read_shared(u32 address) {
    uint2 x;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
    return x;
}
template <> DEVICE u32 read_shared(u32 address) {
    u32 x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}

// Copies BYTES (4, 8 or 16), of which the first `given` are read and the others are zeros.
template <int BYTES> DEVICE void copy_async(u32 to, const void* from, u32 given = BYTES) {
    if (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(given) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(given) : "memory");
    }
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most LEFT of this thread's groups are under way.
template <int LEFT> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// Four 8x8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE uint4 matrices(u32 address) {
    uint4 m;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
                 : "r"(address)
                 : "memory");
    return m;
}
DEVICE uint4 matrices_transposed(u32 address) {
    uint4 m;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
                 : "r"(address)
                 : "memory");
    return m;
}
// An 8x8 matrix held as a fragment, transposed across the warp.
DEVICE u32 transposed(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// c += a · b
DEVICE void multiply(float (&c)[4], uint4 a, u32 b0, u32 b1) {
#if DTYPE == 1
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
