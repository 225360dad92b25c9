// The pages that a warp of attention_decode.cu has under way: a ring of its own in shared memory, each slot a page of keys and one
// of values. Lanes copy 16 bytes each, whole cache lines together: 64 sequences of 4,096 tokens are read at 4.36 TB/s on an H200,
// and at 3.7 by bulk copies of 1 KB.
//
// In a slot each four tokens lie together, 32 bytes of padding after them. Tokens are dealt to lanes such that lanes that
// read at once read different banks: of the products' 16 tokens, number 2t + o + 8h (o, h: 0 or 1) is token o + 2h of
// group (t + 2o) % 4. The four that a lane has of values, 2t, 2t + 1, 2t + 8 and 2t + 9, are then tokens 0 to 3 of their groups.
#pragma once

#include "attention_parts.cuh"

#ifndef STAGES
#define STAGES 2 // pages a warp has under way or in use
#endif

constexpr u32 ROW_BYTES = D * 2;
constexpr u32 GROUP_BYTES = 4 * ROW_BYTES;         // of four tokens
constexpr u32 HALF_BYTES = 4 * (GROUP_BYTES + 32); // of a slot: keys or values
constexpr u32 SLOT_BYTES = 2 * HALF_BYTES;
constexpr u32 RING_BYTES = STAGES * SLOT_BYTES;

// Where a token's row lies in half a slot.
DEVICE u32 row_at(u32 token) { return token / 4 * (GROUP_BYTES + 32) + token % 4 * ROW_BYTES; }
// Of the group that the products' tokens 2t + o and 2t + o + 8 lie in: its first token.
DEVICE u32 group_token(u32 t, u32 o) { return (t + 2 * o) % 4 * 4; }

// A warp's ring. Slots are filled and taken in turn, STAGES ahead at most; all lanes do all calls together.
struct Ring {
    u32 slots;
    u32 stage; // of the next slot to take
};

// Brings a page of keys and one of values to a slot.
DEVICE void fill(const Ring& ring, u32 stage, const T* keys, const T* values) {
    const u32 lane = threadIdx.x % 32, slot = ring.slots + stage * SLOT_BYTES;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const u32 piece = i * 32 + lane, to = slot + piece * 16 + piece / (GROUP_BYTES / 16) * 32;
        copy_async<16>(to, keys + piece * 8);
        copy_async<16>(to + HALF_BYTES, values + piece * 8);
    }
}

// Says that as many slots have been filled, or will never be, as there may be: they are counted.
DEVICE void filled() { copies_commit(); }

// Waits for the next slot.
DEVICE u32 take(const Ring& ring) {
    copies_wait<STAGES - 1>();
    __syncwarp();
    return ring.slots + ring.stage * SLOT_BYTES;
}

// The slot that was taken has been read, and may be filled again.
DEVICE void next_slot(Ring& ring) {
    if (++ring.stage == STAGES) ring.stage = 0;
}

// The keys and values of a sequence's newest token, for one KV head. An earlier kernel of the same pass writes them, so the page
// that they belong to is fetched as it was before, and they are put in.
constexpr u32 ROW_PIECES = D / 8; // of 16 bytes
constexpr int NEWEST = (2 * ROW_PIECES + 31) / 32;
struct Newest {
    uint4 v[NEWEST];
};

// `keys` and `values` are the token's.
DEVICE void load_newest(Newest& newest, const T* keys, const T* values) {
#pragma unroll
    for (int i = 0; i < NEWEST; i++) {
        const u32 piece = i * 32 + threadIdx.x % 32;
        if (piece < 2 * ROW_PIECES)
            newest.v[i] = load_16(piece < ROW_PIECES ? keys + piece * 8 : values + (piece - ROW_PIECES) * 8);
    }
}

// Puts the newest token, the last of `tokens`, into its page. Values after it become zeros: whatever lies there, times a weight of
// zero, must be zero.
DEVICE void complete_page(u32 slot, u32 tokens, const Newest& newest) {
    const auto write = [](u32 at, uint4 x) {
        asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
    };
    const u32 lane = threadIdx.x % 32, row = slot + row_at(tokens - 1);
#pragma unroll
    for (int i = 0; i < NEWEST; i++) {
        const u32 piece = i * 32 + lane;
        if (piece < 2 * ROW_PIECES)
            write(piece < ROW_PIECES ? row + piece * 16 : row + HALF_BYTES + (piece - ROW_PIECES) * 16, newest.v[i]);
    }
    for (u32 piece = tokens * ROW_PIECES + lane; piece < KV_BLOCK * ROW_PIECES; piece += 32)
        write(slot + HALF_BYTES + piece * 16 + piece / (GROUP_BYTES / 16) * 32, make_uint4(0, 0, 0, 0));
    __syncwarp();
}
