// Parts of a pair, and how they become one: warps' parts meet in shared memory, blocks' parts in the memory of the last of the
// pair's blocks, which adds them up in the order of the blocks.
//
// A block's part says itself that it has arrived: its place holds NONE everywhere between launches, which no arithmetic gives (a NaN
// that it gives is 0x7fffffff). So there is no flag to wait for and no fence. Blocks are placed in the order of their numbers
// and let nobody wait before, so those that the last one waits for are running or done.
#pragma once

#include "attention_share.cuh"

constexpr int D = HEAD_DIM;
constexpr int TILES = D / 16;         // of 16 places in a head each
constexpr int V_WIDE = D / 64, V_TAIL = D % 64 / 8; // a value: 16-byte pieces a lane, then V_TAIL numbers
constexpr u32 ALL_TILES = HEAD_TILES * TILES;

// A warp's part: sums [HEAD_TILES][TILES][lane], and (largest score, sum of weights) of each head.
struct Part {
    float4 values[ALL_TILES * 32];
    float2 softmax[HEADS];
};

// A block's part, for one tile: of each lane the sums, and two heads' softmax.
struct Parcel {
    float4 values[32];
    float4 softmax[4];
};

struct Args : Decode {
    Parcel* parcels; // [blocks of the grid, ALL_TILES]
};

// A pair that a warp has a part of, and the blocks that have.
struct Note {
    u32 row; // NONE: there is no part
    Heads heads;
    u32 from_block, to_block;
};
DEVICE Note note_of(const Args& a, const Share& share, const Segment& s) {
    const Division& d = share.division;
    if (d.most) return {s.row, heads_of(s, a), share.from_block, share.to_block};
    const u32 begin = s.unit - s.from;
    return {s.row, heads_of(s, a), block_of(d, begin), block_of(d, begin + s.pages - 1)};
}

// Two heads' softmax over several parts: the largest score, the sum of weights.
struct Pair {
    float largest[2], weight[2];
};

// What is not there, as the softmax of a part.
DEVICE float4 no_softmax() { return make_float4(-INFINITY_F, 0.0f, -INFINITY_F, 0.0f); }

// Adds N parts, in their order: the sums of two heads' two places, with their softmax.
template <int N> DEVICE void absorb(Pair& p, float4& sum, const float4 (&softmax)[N], const float4 (&values)[N], float scale) {
    float largest[2] = {p.largest[0], p.largest[1]};
#pragma unroll
    for (int i = 0; i < N; i++) {
        largest[0] = fmaxf(largest[0], softmax[i].x);
        largest[1] = fmaxf(largest[1], softmax[i].z);
    }
    const float x = power_of_2((p.largest[0] - largest[0]) * scale), y = power_of_2((p.largest[1] - largest[1]) * scale);
    p = {{largest[0], largest[1]}, {p.weight[0] * x, p.weight[1] * y}};
    sum.x *= x, sum.y *= y, sum.z *= x, sum.w *= y;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float x = power_of_2((softmax[i].x - largest[0]) * scale), y = power_of_2((softmax[i].z - largest[1]) * scale);
        p.weight[0] = fmaf(softmax[i].y, x, p.weight[0]), p.weight[1] = fmaf(softmax[i].w, y, p.weight[1]);
        sum.x = fmaf(values[i].x, x, sum.x), sum.y = fmaf(values[i].y, y, sum.y);
        sum.z = fmaf(values[i].z, x, sum.z), sum.w = fmaf(values[i].w, y, sum.w);
    }
}

// The first of the two places that a lane has in a tile.
DEVICE u32 place(u32 tile, u32 g) {
    return tile < V_WIDE * 4 ? tile / 4 * 64 + g * 8 + tile % 4 * 2 : V_WIDE * 64 + g * V_TAIL + (tile - V_WIDE * 4) * 2;
}

// Writes two heads' two places of tile `at`, counted over head tiles.
DEVICE void write_out(const Args& a, u32 row, Heads heads, u32 at, float4 sum, const Pair& p) {
    const u32 lane = threadIdx.x % 32, head = at / TILES * 8 + lane % 4 * 2;
    const float x = 1.0f / p.weight[0], y = 1.0f / p.weight[1];
    T* to = a.out + ((u64)row * a.heads + heads.first + head) * D + place(at % TILES, lane / 4);
    if (head < heads.count) *reinterpret_cast<u32*>(to) = pack(sum.x * x, sum.z * x);
    if (head + 1 < heads.count) *reinterpret_cast<u32*>(to + D) = pack(sum.y * y, sum.w * y);
}

DEVICE float4 look(const float4& at) {
    float4 x;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(&at)
                 : "memory");
    return x;
}
DEVICE void leave(float4& at, float4 x) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(&at), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}
DEVICE bool is_whole(float4 x) {
    const u32 largest = max(max(__float_as_uint(x.x), __float_as_uint(x.y)), max(__float_as_uint(x.z), __float_as_uint(x.w)));
    return largest != NONE;
}

DEVICE void send(Parcel& to, float4 sum, const Pair& p) {
    const u32 lane = threadIdx.x % 32;
    leave(to.values[lane], sum);
    if (lane < 4) leave(to.softmax[lane], make_float4(p.largest[0], p.weight[0], p.largest[1], p.weight[1]));
}

constexpr int DEEP = 8; // parts under way

// Adds tile `at` of the parts of blocks `from` to `to`, without the last.
DEVICE void receive(const Args& a, u32 at, u32 from, u32 to, Pair& p, float4& sum) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll 1
    for (u32 first = from; first < to; first += DEEP) {
        Parcel* parcel = a.parcels + (u64)first * ALL_TILES + at;
        float4 softmax[DEEP], values[DEEP];
#pragma unroll
        for (int i = 0; i < DEEP; i++) softmax[i] = no_softmax(), values[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        bool there;
        do {
            there = true;
#pragma unroll
            for (int i = 0; i < DEEP; i++) {
                if (first + i >= to) continue;
                values[i] = look(parcel[i * ALL_TILES].values[lane]);
                softmax[i] = look(parcel[i * ALL_TILES].softmax[lane % 4]);
            }
#pragma unroll
            for (int i = 0; i < DEEP; i++) there = there && is_whole(values[i]) && is_whole(softmax[i]);
        } while (!__all_sync(~0u, there));
        absorb(p, sum, softmax, values, a.scale);
        __syncwarp(); // all lanes have read what they share
        const float none = __uint_as_float(NONE);
#pragma unroll 1
        for (int i = 0; i < DEEP && first + i < to; i++) {
            leave(parcel[i * ALL_TILES].values[lane], make_float4(none, none, none, none));
            if (lane < 4) leave(parcel[i * ALL_TILES].softmax[lane], make_float4(none, none, none, none));
        }
    }
}

// Makes one of a pair's parts in this block, and of all its blocks' if this is the last. `members`: bit 2w + i is set if part i
// of warp w is one; `part_of` finds it.
template <typename PartOf> DEVICE void finish_pair(const Args& a, const Note& note, u32 members, const PartOf& part_of) {
    const u32 lane = threadIdx.x % 32;
    for (u32 at = threadIdx.x / 32; at < ALL_TILES; at += WARPS) {
        float4 softmax[WARPS], values[WARPS];
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) {
            const u32 which = members >> 2 * w & 3; // a warp has one part of a pair at most
            softmax[w] = no_softmax(), values[w] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (which == 0) continue;
            const Part& part = part_of(2 * w + which / 2);
            softmax[w] = *reinterpret_cast<const float4*>(part.softmax + at / TILES * 8 + lane % 4 * 2);
            values[w] = part.values[at * 32 + lane];
        }
        Pair p = {{-INFINITY_F, -INFINITY_F}, {0.0f, 0.0f}};
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        absorb(p, sum, softmax, values, a.scale);
        if (blockIdx.x < note.to_block) {
            send(a.parcels[(u64)blockIdx.x * ALL_TILES + at], sum, p);
        } else {
            receive(a, at, note.from_block, note.to_block, p, sum);
            write_out(a, note.row, note.heads, at, sum, p);
        }
    }
}

// The end of a block: `notes` are its warps' parts, two each, in the order of the long row.
template <typename PartOf> DEVICE void finish(const Args& a, const Note* notes, const PartOf& part_of) {
    static_assert(2 * WARPS <= 32, "a lane a note");
    const u32 lane = threadIdx.x % 32;
    const u32 row = lane < 2 * WARPS ? notes[lane].row : NONE, head = row == NONE ? 0 : notes[lane].heads.first;
    const u32 there = __ballot_sync(~0u, row != NONE), before = there & ((1u << lane) - 1);
    const u32 last = 31 - __clz(before | 1); // the part before this one, if there is any
    const u32 row_before = __shfl_sync(~0u, row, last), head_before = __shfl_sync(~0u, head, last);
    u32 begins = __ballot_sync(~0u, row != NONE && (!before || row != row_before || head != head_before));
    // From the last on: a part that another block waits for is sent before this one waits for others'.
    for (u32 left = there; begins;) {
        const u32 first = 31 - __clz(begins), members = left >> first << first;
        finish_pair(a, notes[first], members, part_of);
        begins ^= 1u << first;
        left ^= members;
    }
}
