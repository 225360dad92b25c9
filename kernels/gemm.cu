// Products for more rows than gemv.cu takes, and not many, on the tensor cores of sm_90a: out = x · wᵀ, with what is around it.
//
// Weights are the products' first operand, so that tiles are full whatever the number of rows. A tile is FEATURES rows of weights by all
// rows of x; sums go over steps of 64 columns. With few tiles the blocks of a cluster share the steps of each, and add up through shared
// memory. With many, tiles and steps are one row of units, of which each block takes an equal, unbroken range: so every multiprocessor
// has as many bytes to read, whatever the matrix.
//
// What counts is that weights are under way all the time. So a block has a multiprocessor's shared memory to itself, and asks for as
// many weights as fit there before the kernel before has ended.
// variants for sm_90a: DTYPE=1,2 ROWS=16,32,64,128
#include "cluster.cuh"
#include "ring.cuh"
#include "tensor_map.cuh"
#include "wgmma.cuh"

constexpr u32 GROUPS = 2, THREADS = 128 * GROUPS;
constexpr u32 FEATURES = 64 * GROUPS;
constexpr u32 SLAB = 128; // bytes of a row in a step
constexpr u32 W_BYTES = FEATURES * SLAB, X_BYTES = ROWS * SLAB, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr u32 STAGES_MAX = 16;
constexpr u32 OCTETS = ROWS / 8; // of columns of the sums, which are rows of out

// `Shape` in gemm.rs.
struct Shape {
    u32 rows, n; // of out
    u32 tiles, steps, stages;
    u32 split; // blocks of a cluster, which share tiles; 1: blocks have ranges
};

// Units that a block has still to do: so many, from a tile's step on.
struct Units {
    u32 left, tile, step;
};

// Ranges are dealt backwards: who needs another block's sums waits for one with a lower number.
DEVICE u32 range_start(const Shape& s, u32 block) { return (u64)s.tiles * s.steps * (gridDim.x - block) / gridDim.x; }
DEVICE Units own_units(const Shape& s) {
    u32 at, end;
    if (s.split == 1) {
        at = range_start(s, blockIdx.x + 1), end = range_start(s, blockIdx.x);
    } else {
        const u32 first = blockIdx.x / s.split * s.steps, rank = blockIdx.x % s.split;
        at = first + s.steps * rank / s.split, end = first + s.steps * (rank + 1) / s.split;
    }
    return {end - at, at / s.steps, at % s.steps};
}

DEVICE u32 data_at(const Ring& r, u32 stage) { return r.data + STAGE_BYTES * stage; }

enum Op { PLAIN, PLAIN_F32, SILU, ADD };

struct Sources {
    const Map& w;
    const Map& x;
};

template <Op OP> DEVICE void bring_weights(const Units& f, u32 stage, const Ring& r, const Map& w) {
    const u32 to = data_at(r, stage), full = full_at(r, stage);
    barrier_expect(full, STAGE_BYTES);
    // Gates and ups in turn, eight rows each: see `finish`.
    if (OP == SILU)
        copy_tile(to, w, f.step * 64, 0, 0, f.tile * (FEATURES / 16), full, policy_once());
    else
        copy_tile(to, w, f.step * 64, f.tile * FEATURES, full, policy_once());
}
DEVICE void bring_x(const Units& f, u32 stage, const Ring& r, const Map& x) {
    copy_tile(data_at(r, stage) + W_BYTES, x, f.step * 64, 0, full_at(r, stage));
}
DEVICE void next(Units& f, const Shape& s) {
    if (++f.step == s.steps) f.step = 0, f.tile++;
    f.left--;
}

// One thread: weights as far as there is room, before the kernel before has ended, then x. What is still to be asked for.
template <Op OP> DEVICE Units begin(const Ring& ring, const Sources& from, const Shape& s) {
    const Units first = own_units(s);
    const u32 room = min(s.stages, first.left);
    Units feed = first;
    for (u32 i = 0; i < room; i++) bring_weights<OP>(feed, i, ring, from.w), next(feed, s);
    wait_for_previous();
    after_other_kernels();
    feed = first;
    for (u32 i = 0; i < room; i++) bring_x(feed, i, ring, from.x), next(feed, s);
    return feed;
}

// A group is done with a stage; the feeding thread fills it again.
template <Op OP> DEVICE void release(Place done, Units& feed, const Ring& ring, const Sources& from, const Shape& s) {
    if (threadIdx.x % 128 != 0) return;
    barrier_arrive(empty_at(ring, done.stage));
    if (threadIdx.x != 0 || feed.left == 0) return;
    barrier_wait(empty_at(ring, done.stage), done.parity);
    bring_weights<OP>(feed, done.stage, ring, from.w);
    bring_x(feed, done.stage, ring, from.x);
    next(feed, s);
}

typedef float Sums[4 * OCTETS];

template <Op OP>
DEVICE void multiply(Sums& sums, u32 steps, Place& at, Units& feed, const Ring& ring, const Sources& from, const Shape& s) {
    Place done = at;
    for (u32 step = 0; step < steps; step++) {
        barrier_wait(full_at(ring, at.stage), at.parity);
        const u32 w = data_at(ring, at.stage) + threadIdx.x / 128 * (64 * SLAB), x = data_at(ring, at.stage) + W_BYTES;
        products_open();
#pragma unroll
        for (int k = 0; k < 4; k++)
            multiply_shared(sums, operand(w + k * 32, 0, 8 * SLAB), operand(x + k * 32, 0, 8 * SLAB), step > 0 || k > 0);
        products_close();
        products_wait<1>();
        if (step > 0) release<OP>(done, feed, ring, from, s);
        done = at;
        advance(at, s.stages);
    }
    products_wait<0>();
    registers_hold(sums);
    release<OP>(done, feed, ring, from, s);
}

// Of 8 by 8 numbers, two a lane, the transposed.
DEVICE u32 transposed(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

DEVICE float silu_times(float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }

struct Target {
    void* out;
    const void* bias;
};

// What a lane has of the biases: of its feature, and of the one 8 further on.
template <Op OP> DEVICE float2 biases(const Target& to, u32 tile, const Shape& s) {
    const u32 feature = tile * FEATURES + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    float2 more = make_float2(0.0f, 0.0f);
    if (OP == SILU || !to.bias) return more;
    const T* own = (const T*)to.bias;
    const float* wide = (const float*)to.bias;
    if (feature < s.n) more.x = OP == PLAIN ? to_f32(own[feature]) : wide[feature];
    if (feature + 8 < s.n) more.y = OP == PLAIN ? to_f32(own[feature + 8]) : wide[feature + 8];
    return more;
}

// Puts an octet where it belongs. A lane has of its 8 rows of out two of feature lane / 4, and two of the feature 8 further on.
template <Op OP> DEVICE void finish(float4 v, u32 octet, float2 more, const Target& to, u32 tile, const Shape& s) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 first = tile * FEATURES + threadIdx.x / 32 * 16; // of 16 rows of weights
    const u32 row = octet * 8 + g;
    if (OP == SILU) {
        const u32 feature = first / 2 + 2 * t;
        const u32 pair = transposed(pack(silu_times(v.x, v.z), silu_times(v.y, v.w)));
        if (row < s.rows && feature < s.n) *(u32*)((T*)to.out + (u64)row * s.n + feature) = pair;
    } else if (OP == PLAIN) {
        const u32 feature = first + 2 * t;
        const u32 low = transposed(pack(v.x + more.x, v.y + more.x)), high = transposed(pack(v.z + more.y, v.w + more.y));
        T* out = (T*)to.out + (u64)row * s.n + feature;
        if (row < s.rows && feature < s.n) *(u32*)out = low;
        if (row < s.rows && feature + 8 < s.n) *(u32*)(out + 8) = high;
    } else {
        const float sums[4] = {v.x + more.x, v.y + more.x, v.z + more.y, v.w + more.y};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 x = octet * 8 + 2 * t + i % 2, feature = first + g + i / 2 * 8;
            float* out = (float*)to.out + (u64)x * s.n + feature;
            if (x >= s.rows || feature >= s.n) continue;
            // Nobody else adds to it: it is only that nothing waits for what is there.
            if (OP == ADD)
                asm volatile("red.global.add.f32 [%0], %1;" ::"l"(out), "f"(sums[i]) : "memory");
            else
                *out = sums[i];
        }
    }
}

template <Op OP> DEVICE void finish_all(const Sums& sums, const Target& to, u32 tile, const Shape& s) {
    const float2 more = biases<OP>(to, tile, s);
#pragma unroll
    for (int j = 0; j < OCTETS; j++)
        finish<OP>(make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]), j, more, to, tile, s);
}

// Each block of the cluster adds up its share of the octets, in the order of the blocks.
template <Op OP> DEVICE void finish_together(const Sums& sums, float4* part, const Target& to, u32 tile, const Shape& s) {
    const float2 more = biases<OP>(to, tile, s);
    __syncthreads(); // the ring is not read any more
#pragma unroll
    for (int j = 0; j < OCTETS; j++)
        part[j * THREADS + threadIdx.x] = make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
    cluster_sync();
    const u32 rank = cluster_rank();
#pragma unroll 2
    for (u32 j = OCTETS * rank / s.split; j < OCTETS * (rank + 1) / s.split; j++) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (u32 block = 0; block < s.split; block++) {
            const float4 v = *in_block(part + j * THREADS + threadIdx.x, block);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        finish<OP>(sum, j, more, to, tile, s);
    }
    cluster_sync();
}

DEVICE float4* part_of(const Meeting& m, u32 block) { return m.parts + (u64)block * (OCTETS * THREADS) + threadIdx.x; }

// Sums of a tile that the next block has the beginning of.
DEVICE void leave(const Sums& sums, const Meeting& m) {
    float4* part = part_of(m, blockIdx.x);
#pragma unroll
    for (int j = 0; j < OCTETS; j++) part[j * THREADS] = make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) say_left(m, blockIdx.x);
}
// The tile's other `steps` are in ranges of blocks with lower numbers, one after another.
DEVICE void take_up(Sums& sums, u32 steps, const Meeting& m, const Shape& s) {
    for (u32 block = blockIdx.x - 1;; block--) {
        if (threadIdx.x == 0) wait_left(m, block);
        __syncthreads();
        const float4* part = part_of(m, block);
#pragma unroll
        for (int j = 0; j < OCTETS; j++) {
            const float4 v = __ldcg(part + j * THREADS);
            sums[4 * j] += v.x, sums[4 * j + 1] += v.y, sums[4 * j + 2] += v.z, sums[4 * j + 3] += v.w;
        }
        const u32 length = range_start(s, block) - range_start(s, block + 1);
        if (length >= steps) return;
        steps -= length;
    }
}

template <Op OP> DEVICE void product(const Target& to, const Sources& from, const Meeting& meeting, const Shape& s) {
    extern __shared__ u8 memory[];
    __shared__ u64 barriers[2 * STAGES_MAX];
    // Tiles' rows are swapped about by the address, so stages begin at multiples of 1,024 bytes.
    u8* const data = memory + (1024 - shared_address(memory) % 1024) % 1024;
    const Ring ring{shared_address(data), shared_address(barriers)};
    Units feed{};
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < s.stages; i++) barrier_init(full_at(ring, i), 1), barrier_init(empty_at(ring, i), GROUPS);
        barriers_ready();
        let_next_start();
        feed = begin<OP>(ring, from, s);
    }
    wait_for_previous();
    __syncthreads();
    Place at{0, 0};
    for (Units own = own_units(s); own.left > 0;) {
        const u32 tile = own.tile, first = own.step, count = min(s.steps - first, own.left);
        own = {own.left - count, tile + 1, 0};
        Sums sums;
        multiply<OP>(sums, count, at, feed, ring, from, s);
        if (s.split > 1) {
            finish_together<OP>(sums, reinterpret_cast<float4*>(data), to, tile, s);
        } else if (first > 0) {
            leave(sums, meeting);
        } else {
            if (count < s.steps) take_up(sums, s.steps - count, meeting, s);
            finish_all<OP>(sums, to, tile, s);
        }
    }
}

// Registers are left for the short kernels that wait beside it.
#define KERNEL(NAME, OP)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, ROWS <= 64 ? 2 : 1)                                                                \
    NAME(Target to, const __grid_constant__ Map w, const __grid_constant__ Map x, Meeting meeting, Shape s) {                         \
        product<OP>(to, {w, x}, meeting, s);                                                                                         \
    }

KERNEL(gemm, PLAIN)
KERNEL(gemm_f32, PLAIN_F32)
KERNEL(gemm_silu, SILU)
KERNEL(gemm_add, ADD)
