// Gates and ups for many rows, on the tensor cores of sm_90a: out = silu(x · gatesᵀ) * (x · upsᵀ), so that neither goes to memory.
//
// A tile is ROWS rows of x by FEATURES gates and the ups that belong to them; sums go over steps of 64 columns. Two blocks are a cluster
// and share a tile: 64 of its rows in turn for each of a block's groups, so that all have some where few are left. One block brings the
// gates and one the ups, for both. A warp group of each does nothing but bring, so that the others do nothing but multiply, and write.
//
// Clusters take tiles in turn. Where that would leave many without work in the end, the last tiles are dealt out by steps instead.
// variants for sm_90a: DTYPE=1,2
#include "cluster.cuh"
#include "ring.cuh"
#include "tensor_map.cuh"
#include "wgmma.cuh"

constexpr u32 GROUPS = 2, THREADS = 128 * (GROUPS + 1);
constexpr u32 ROWS = 256, FEATURES = 128;
constexpr u32 SLAB = 128; // bytes of a row in a step
constexpr u32 X_BYTES = 64 * GROUPS * SLAB, HALF_BYTES = FEATURES * SLAB, STAGE_BYTES = X_BYTES + 2 * HALF_BYTES;
constexpr u32 STAGES = 4;
constexpr u32 OUT_BYTES = 64 * 2 * SLAB; // of a group's rows, FEATURES numbers each

// `Shape` in gate_up.rs.
struct Shape {
    u32 rows, n; // of out
    u32 heights, widths; // tiles below each other, and beside each other
    u32 band; // tiles below each other that are gone through before the next beside them
    u32 steps;
    u32 whole; // tiles that are taken in turn
};

struct Maps {
    const Map& x;
    const Map& w;
    const Map& out;
};

DEVICE u32 data_at(const Ring& r, u32 stage) { return r.data + STAGE_BYTES * stage; }

// A tile, and which of its steps.
struct Work {
    u32 tile, first, count;
};

// What a cluster has still to do: whole tiles, then a range of steps of those that are dealt out. Ranges are dealt backwards: who needs
// another cluster's sums waits for one with a lower number.
struct Agenda {
    u32 whole, at, end;
};
DEVICE u32 clusters() { return gridDim.x / 2; }
DEVICE u32 range_start(const Shape& s, u32 cluster) {
    return (u64)(s.heights * s.widths - s.whole) * s.steps * (clusters() - cluster) / clusters();
}
DEVICE Agenda agenda(const Shape& s) {
    const u32 cluster = blockIdx.x / 2;
    return {cluster, range_start(s, cluster + 1), range_start(s, cluster)};
}
DEVICE bool take(Agenda& a, Work& w, const Shape& s) {
    if (a.whole < s.whole) {
        // Tiles with few rows lie in equal distances: the turn goes on by one with each round, so that nobody gets all of them.
        const u32 all = clusters(), round = a.whole / all;
        w = {(round + 1) * all > s.whole ? a.whole : round * all + (a.whole + round) % all, 0, s.steps};
        a.whole += all;
        return true;
    }
    if (a.at == a.end) return false;
    const u32 first = a.at % s.steps;
    w = {s.whole + a.at / s.steps, first, min(s.steps - first, a.end - a.at)};
    a.at += w.count;
    return true;
}

// The first row and feature of a tile. The first row is this block's first group's; the next group's is 128 further on.
struct Corner {
    u32 row, feature;
};
DEVICE Corner corner(u32 tile, const Shape& s) {
    const u32 band = tile / (s.band * s.widths), in_band = tile % (s.band * s.widths);
    const u32 heights = min(s.band, s.heights - band * s.band);
    return {(band * s.band + in_band % heights) * ROWS + cluster_rank() * 64, in_band / heights * FEATURES};
}

DEVICE void bring_weights(Corner c, u32 step, u32 stage, const Ring& ring, const Maps& m, const Shape& s) {
    const u32 rank = cluster_rank(), full = full_at(ring, stage), to = data_at(ring, stage) + X_BYTES + rank * HALF_BYTES;
    barrier_expect(full, STAGE_BYTES);
    copy_tile_to(3, to, m.w, step * 64, c.feature + rank * s.n, full);
}
DEVICE void bring_x(Corner c, u32 step, u32 stage, const Ring& ring, const Maps& m) {
#pragma unroll
    for (u32 group = 0; group < GROUPS; group++)
        copy_tile(data_at(ring, stage) + group * (64 * SLAB), m.x, step * 64, c.row + group * 128, full_at(ring, stage));
}

// One thread. The first weights are asked for before the kernel before has ended.
DEVICE void bring(const Maps& m, const Ring& ring, const Shape& s) {
    Agenda todo = agenda(s);
    Work w;
    if (!take(todo, w, s)) {
        wait_for_previous();
        return;
    }
    Corner c = corner(w.tile, s);
    const u32 room = min(STAGES, w.count);
    for (u32 i = 0; i < room; i++) bring_weights(c, w.first + i, i, ring, m, s);
    wait_for_previous();
    after_other_kernels();
    for (u32 i = 0; i < room; i++) bring_x(c, w.first + i, i, ring, m);
    Place at{room % STAGES, room == STAGES ? 0u : 1u};
    w.first += room, w.count -= room;
    do {
        c = corner(w.tile, s);
        for (u32 step = w.first; step < w.first + w.count; step++) {
            barrier_wait(empty_at(ring, at.stage), at.parity);
            bring_weights(c, step, at.stage, ring, m, s);
            bring_x(c, step, at.stage, ring, m);
            advance(at, STAGES);
        }
    } while (take(todo, w, s));
}

typedef float Sums[128]; // 64 of gates, then 64 of ups

// A group is done with a stage, which is filled from both blocks.
DEVICE void release(const Ring& ring, u32 stage) {
    if (threadIdx.x % 128 < 2) barrier_arrive_in(threadIdx.x % 128, empty_at(ring, stage));
}
DEVICE void group_sync() { asm volatile("bar.sync %0, 128;" ::"r"(1 + threadIdx.x / 128) : "memory"); }
// A group without rows goes along. No product keeps its warps together: one that missed two rounds of a barrier would wait for ever.
DEVICE void skip(u32 steps, Place& at, const Ring& ring) {
    for (; steps > 0; steps--) {
        barrier_wait(full_at(ring, at.stage), at.parity);
        group_sync();
        release(ring, at.stage);
        advance(at, STAGES);
    }
}
DEVICE void multiply(Sums& sums, u32 steps, Place& at, const Ring& ring) {
    Place done = at;
    for (u32 step = 0; step < steps; step++) {
        barrier_wait(full_at(ring, at.stage), at.parity);
        const u32 x = data_at(ring, at.stage) + threadIdx.x / 128 * (64 * SLAB), w = data_at(ring, at.stage) + X_BYTES;
        products_open();
#pragma unroll
        for (int k = 0; k < 4; k++)
            multiply_shared(sums, operand(x + k * 32, 0, 8 * SLAB), operand(w + k * 32, 0, 8 * SLAB), step > 0 || k > 0);
        products_close();
        products_wait<1>();
        if (step > 0) release(ring, done.stage);
        done = at;
        advance(at, STAGES);
    }
    products_wait<0>();
    registers_hold(sums);
    release(ring, done.stage);
}

// Each group has a part.
DEVICE u32 meeting_of(u32 block) { return GROUPS * block + threadIdx.x / 128; }
DEVICE float4* part_of(const Meeting& m, u32 block) { return m.parts + meeting_of(block) * (32 * 128) + threadIdx.x % 128; }

// Sums of a tile that the next cluster has the beginning of.
DEVICE void leave(const Sums& sums, const Meeting& m) {
    float4* part = part_of(m, blockIdx.x);
#pragma unroll
    for (int j = 0; j < 32; j++) part[j * 128] = make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
    __threadfence();
    group_sync();
    if (threadIdx.x % 128 == 0) say_left(m, meeting_of(blockIdx.x));
}
// The tile's other `steps` are in ranges of clusters with lower numbers, one after another.
DEVICE void take_up(Sums& sums, u32 steps, const Meeting& m, const Shape& s) {
    for (u32 block = blockIdx.x - 2;; block -= 2) {
        if (threadIdx.x % 128 == 0) wait_left(m, meeting_of(block));
        group_sync();
        const float4* part = part_of(m, block);
#pragma unroll
        for (int j = 0; j < 32; j++) {
            const float4 v = __ldcg(part + j * 128);
            sums[4 * j] += v.x, sums[4 * j + 1] += v.y, sums[4 * j + 2] += v.z, sums[4 * j + 3] += v.w;
        }
        const u32 length = range_start(s, block / 2) - range_start(s, block / 2 + 1);
        if (length >= steps) return;
        steps -= length;
    }
}

// Two of silu(gate) * up at the price of one division. Of gates below -41 the sigmoid is taken as 2^-60.
DEVICE u32 gated(float gate_0, float gate_1, float up_0, float up_1) {
    const float log2_e = 1.44269504f;
    const float a = 1.0f + power_of_2(fminf(-log2_e * gate_0, 60.0f)), b = 1.0f + power_of_2(fminf(-log2_e * gate_1, 60.0f));
    const float both = __fdividef(1.0f, a * b);
    return pack(gate_0 * up_0 * (both * b), gate_1 * up_1 * (both * a));
}

// Writes a group's part of a tile, through shared memory.
DEVICE void finish(const Sums& v, Corner c, const Map& out, u32 buffer) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const bool first = threadIdx.x % 128 == 0;
    if (first) stores_read();
    group_sync();
    // A row is 128 bytes of two slabs each, with its pieces swapped about.
    const u32 to = buffer + (warp * 16 + lane % 16) * SLAB;
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
        const float *g = v + 4 * j, *u = v + 64 + 4 * j;
        const u32 piece = (j % 8 + lane / 16) ^ (lane % 8);
        store_matrices(to + j / 8 * (64 * SLAB) + piece * 16, gated(g[0], g[1], u[0], u[1]), gated(g[2], g[3], u[2], u[3]),
                       gated(g[4], g[5], u[4], u[5]), gated(g[6], g[7], u[6], u[7]));
    }
    before_bulk();
    group_sync();
    if (first) {
        store_tile(out, c.feature, c.row, buffer);
        store_tile(out, c.feature + 64, c.row, buffer + 64 * SLAB);
        stores_close();
    }
}

DEVICE void product(const Maps& m, const Ring& ring, const Meeting& meeting, const Shape& s) {
    const u32 group = threadIdx.x / 128, buffer = ring.data + STAGES * STAGE_BYTES + group * OUT_BYTES;
    Place at{0, 0};
    Agenda todo = agenda(s);
    for (Work w; take(todo, w, s);) {
        Corner c = corner(w.tile, s);
        c.row += group * 128;
        if (c.row >= s.rows) {
            skip(w.count, at, ring);
            continue;
        }
        Sums sums;
        multiply(sums, w.count, at, ring);
        if (w.first > 0) {
            leave(sums, meeting);
            continue;
        }
        if (w.count < s.steps) take_up(sums, s.steps - w.count, meeting, s);
        finish(sums, c, m.out, buffer);
    }
    if (threadIdx.x % 128 == 0) stores_done();
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
gate_up(const __grid_constant__ Map x, const __grid_constant__ Map w, const __grid_constant__ Map out, Meeting meeting, Shape s) {
    extern __shared__ u8 memory[];
    __shared__ u64 barriers[2 * STAGES];
    // Tiles' rows are swapped about by the address, so stages begin at multiples of 1,024 bytes.
    u8* const data = memory + (1024 - shared_address(memory) % 1024) % 1024;
    const Ring ring{shared_address(data), shared_address(barriers)};
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < STAGES; i++) barrier_init(full_at(ring, i), 1), barrier_init(empty_at(ring, i), 2 * GROUPS);
        barriers_ready();
        let_next_start();
    }
    cluster_sync();
    const Maps maps{x, w, out};
    if (threadIdx.x >= 128 * GROUPS) {
        registers_down<24>();
        if (threadIdx.x == 128 * GROUPS) bring(maps, ring, s);
        else wait_for_previous();
    } else {
        registers_up<240>();
        wait_for_previous();
        product(maps, ring, meeting, s);
    }
    // Nobody leaves while the other block may still write to it.
    cluster_sync();
}
