// A ring of stages that the copy engine fills and groups of warps use up, and sums of a tile that several blocks have steps of.
#pragma once

#include "bulk.cuh"

// Where a ring's stages are, and two barriers for each: it has been filled, and it may be.
struct Ring {
    u32 data, barriers;
};
DEVICE u32 full_at(const Ring& r, u32 stage) { return r.barriers + 16 * stage; }
DEVICE u32 empty_at(const Ring& r, u32 stage) { return r.barriers + 16 * stage + 8; }

// A ring's place.
struct Place {
    u32 stage, parity;
};
DEVICE void advance(Place& p, u32 stages) {
    if (++p.stage == stages) p.stage = 0, p.parity ^= 1;
}

// Where sums of a tile are left that another block has the beginning of: parts, and a number for each; `left` is zeros between launches.
struct Meeting {
    float4* parts;
    u32* left;
};
// One thread, when all have left a part.
DEVICE void say_left(const Meeting& m, u32 part) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(m.left + part), "r"(1) : "memory");
}
// One thread, before others look at it.
DEVICE void wait_left(const Meeting& m, u32 part) {
    u32 there = 0;
    while (!there) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(m.left + part) : "memory");
    m.left[part] = 0;
}
