// Matrix products for 1 to 8 rows, where the time is that of reading the weights once: out = x * W^T.
// variants: DTYPE=1,2 ROWS=1,2,4,8
// variants: DTYPE=2 ROWS=4,8 TILES=2,1 COLS=256
//
// A block takes a contiguous range of outputs and, for each tile of them, walks along k. COPIERS warps stream pieces of
// COLS columns of the tile's weight rows into a ring in shared memory; WARPS warps multiply them on the tensor cores,
// with weights as the 16-row operand and x as the 8-column one, so that eight rows cost no more than one. The ring is
// filled before `wait_for_previous`: weights are on their way while the kernel before still ends.
//
// The order of a sum is fixed and the same for every ROWS, TILES and COLS: warp w adds the steps of 32 columns w,
// w + WARPS, …, then the warps' sums are added in order. So a row alone and a row in a batch give the same bits.
#include "bulk.cuh"
#include "common.cuh"
#include "gemv.cuh"

#ifndef TILES
#define TILES 2
#endif
#ifndef COLS
#define COLS 512
#endif
// One warp alone could not ask for pieces as fast as memory delivers them.
constexpr u32 COPIERS = 4;
constexpr u32 THREADS = (WARPS + COPIERS) * 32;
constexpr u32 TILE_ROWS = TILES * 16;
constexpr u32 MAX_STAGES = 32;
// A row's piece in shared memory; 64 bytes off a multiple of 128, so that neighbouring rows use other banks.
constexpr u32 PIECE_STRIDE = COLS * 2 + 64;
constexpr u32 PART_STRIDE = TILE_ROWS + 4;

// Which outputs a block has, and in which tile and column the walk is.
template <bool PAIRS> struct Walk {
    static constexpr u32 OUTPUTS = PAIRS ? TILE_ROWS / 2 : TILE_ROWS;
    u32 n, k, end, output, col = 0;

    DEVICE Walk(u32 n, u32 k) : n(n), k(k) {
        output = (u64)blockIdx.x * n / gridDim.x;
        end = (u64)(blockIdx.x + 1) * n / gridDim.x;
    }
    DEVICE bool done() const { return output >= end; }
    DEVICE u32 cols() const { return min(COLS, k - col); }
    // The weight row behind row i of the tile. Pairs: eight gates, their eight ups, the next eight gates, …
    DEVICE bool has_row(u32 i) const { return output_of(i) < end; }
    DEVICE u64 weight_row(u32 i) const { return output_of(i) + (PAIRS && i / 8 % 2 ? n : 0); }
    DEVICE u32 output_of(u32 i) const { return output + (PAIRS ? i / 16 * 8 + i % 8 : i); }
    DEVICE void advance() {
        col += COLS;
        if (col >= k) {
            col = 0;
            output += OUTPUTS;
        }
    }
};

// Where things lie in shared memory.
template <bool NORM> struct Room {
    u64 *full, *empty; // [stages]
    float* parts;      // [WARPS, ROWS, PART_STRIDE], and [ROWS, WARPS] for the norm
    u8* x;             // NORM: [ROWS, x_stride] all of x; otherwise each stage has its columns of x
    u8* ring;          // [stages, STAGE]
    u32 x_stride;
    static constexpr u32 STAGE = TILE_ROWS * PIECE_STRIDE + (NORM ? 0 : ROWS * PIECE_STRIDE);

    DEVICE Room(u8* shared, const Shape& shape) {
        full = reinterpret_cast<u64*>(shared);
        empty = full + MAX_STAGES;
        parts = reinterpret_cast<float*>(empty + MAX_STAGES);
        x = reinterpret_cast<u8*>(parts + WARPS * ROWS * PART_STRIDE);
        x_stride = NORM ? (shape.k * 2 + 127) / 128 * 128 + 64 : PIECE_STRIDE;
        ring = x + (NORM ? ROWS * x_stride : 0);
    }
    DEVICE u8* weights(u32 stage) const { return ring + stage * STAGE; }
    // x at the columns of a stage.
    DEVICE const u8* x_at(u32 stage, u32 col) const {
        return NORM ? x + col * 2 : weights(stage) + TILE_ROWS * PIECE_STRIDE;
    }
};

// ---- the warps that copy ----

DEVICE u32 copier() { return threadIdx.x / 32 - WARPS; }

// Arrivals at a `full` barrier for the weights.
#if HAS_BULK
constexpr u32 WEIGHT_ARRIVALS = COPIERS;
#else
constexpr u32 WEIGHT_ARRIVALS = COPIERS * 32;
#endif

// A copier takes every COPIERS-th row of the tile.
template <bool NORM, bool PAIRS>
DEVICE void copy_weights(const Room<NORM>& room, const Walk<PAIRS>& walk, const T* w, u32 stage) {
    const u32 lane = threadIdx.x % 32, bytes = walk.cols() * 2;
    u8* to = room.weights(stage);
#if HAS_BULK
    static_assert(TILE_ROWS / COPIERS <= 32, "a lane a row");
    const u64 policy = policy_once();
    const u32 i = lane * COPIERS + copier();
    const bool has = i < TILE_ROWS && walk.has_row(i);
    const u32 rows = __popc(__ballot_sync(~0u, has));
    if (lane == 0) barrier_expect(room.full + stage, rows * bytes);
    __syncwarp();
    if (has) bulk_copy(to + i * PIECE_STRIDE, w + walk.weight_row(i) * walk.k + walk.col, bytes, room.full + stage, policy);
#else
    for (u32 i = copier(); i < TILE_ROWS; i += COPIERS)
        if (walk.has_row(i)) {
            const u8* from = reinterpret_cast<const u8*>(w + walk.weight_row(i) * walk.k + walk.col);
            for (u32 at = lane * 16; at < bytes; at += 32 * 16) copy_16(to + i * PIECE_STRIDE + at, from + at);
        }
    copies_arrive(room.full + stage);
#endif
}

// By 16-byte copies and not in bulk: those would queue behind all the weights that were asked for before.
template <bool NORM, bool PAIRS>
DEVICE void copy_x(const Room<NORM>& room, const Walk<PAIRS>& walk, const T* x, u32 rows, u32 stage) {
    const u32 units = walk.cols() / 8;
    u8* to = room.weights(stage) + TILE_ROWS * PIECE_STRIDE;
    for (u32 i = threadIdx.x - WARPS * 32; i < rows * (COLS / 8); i += COPIERS * 32) {
        const u32 row = i / (COLS / 8), unit = i % (COLS / 8);
        if (unit < units) copy_16(to + row * PIECE_STRIDE + unit * 16, x + (u64)row * walk.k + walk.col + unit * 8);
    }
    copies_arrive(room.full + stage);
}

template <bool NORM, bool PAIRS>
DEVICE void copy_all(const Room<NORM>& room, const Shape& shape, const T* w, const T* x) {
    Walk<PAIRS> walk(shape.n, shape.k);
    u32 filled = 0;
    for (; filled < shape.stages && !walk.done(); filled++, walk.advance()) copy_weights(room, walk, w, filled);
    wait_for_previous();
    if (!NORM) {
        Walk<PAIRS> again(shape.n, shape.k);
        for (u32 stage = 0; stage < filled; stage++, again.advance()) copy_x(room, again, x, shape.rows, stage);
    }
    u32 stage = 0, parity = 0;
    for (; !walk.done(); walk.advance()) {
        barrier_wait(room.empty + stage, parity);
        copy_weights(room, walk, w, stage);
        if (!NORM) copy_x(room, walk, x, shape.rows, stage);
        if (++stage == shape.stages) stage = 0, parity ^= 1;
    }
}

// ---- the warps that multiply ----

DEVICE void multiply(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if DTYPE == 1
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
    asm volatile(MMA " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 32 columns from `col` on of the stage. A lane reads 8 columns in a row of both operands, which permutes k within
// the step alike for both: no shuffles, and each 16-byte read is free of bank conflicts. Columns from `limit` on are none.
DEVICE void add_step(float (&sums)[TILES][4], const u8* w, const u8* x, u32 x_stride, u32 col, u32 limit, u32 rows) {
    const u32 lane = threadIdx.x % 32, group = lane / 4, at = col + lane % 4 * 8;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    const bool inside = at < limit;
    const uint4 b = inside && group < rows ? load_16(x + group * x_stride + at * 2) : zero;
#pragma unroll
    for (u32 t = 0; t < TILES; t++) {
        const u8* row = w + (t * 16 + group) * PIECE_STRIDE + at * 2;
        const uint4 low = inside ? load_16(row) : zero;
        const uint4 high = inside ? load_16(row + 8 * PIECE_STRIDE) : zero;
        multiply(sums[t], low.x, high.x, low.y, high.y, b.x, b.y);
        multiply(sums[t], low.z, high.z, low.w, high.w, b.z, b.w);
    }
}

// Each of the multiplying threads has these outputs of a tile: number `threadIdx.x`, and so on in steps of the threads.
template <bool PAIRS> struct Outputs {
    static constexpr u32 EACH = (Walk<PAIRS>::OUTPUTS * ROWS + WARPS * 32 - 1) / (WARPS * 32);
    // `act(number among this thread's, row of x, place in the tile)` for those that exist.
    template <typename Act> DEVICE static void each(const Walk<PAIRS>& tile, u32 rows, Act act) {
#pragma unroll
        for (u32 j = 0; j < EACH; j++) {
            const u32 i = threadIdx.x + j * WARPS * 32;
            const u32 row = i / Walk<PAIRS>::OUTPUTS, at = i % Walk<PAIRS>::OUTPUTS;
            if (row < rows && tile.output + at < tile.end) act(j, row, at);
        }
    }
};

// A tile's sums over all warps: `act(number among this thread's, row, output, sum, sum of the up)`.
template <bool PAIRS, typename Act>
DEVICE void finish_tile(float* parts, const float (&sums)[TILES][4], const Walk<PAIRS>& tile, u32 rows, Act act) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4;
    multipliers_sync(); // the tile before has been read
#pragma unroll
    for (u32 i = 0; i < TILES * 4; i++) {
        const u32 col = lane % 4 * 2 + i % 2, row = i / 4 * 16 + i % 4 / 2 * 8 + group;
        if (col < ROWS) parts[(warp * ROWS + col) * PART_STRIDE + row] = sums[i / 4][i % 4];
    }
    multipliers_sync();
    Outputs<PAIRS>::each(tile, rows, [&](u32 j, u32 row, u32 at) {
        const float* part = parts + row * PART_STRIDE + (PAIRS ? at / 8 * 16 + at % 8 : at);
        float sum = 0.0f, up = 0.0f;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) {
            sum += part[w * ROWS * PART_STRIDE];
            if (PAIRS) up += part[w * ROWS * PART_STRIDE + 8];
        }
        act(j, row, tile.output + at, sum, up);
    });
}

template <bool NORM, bool PAIRS, typename Ends>
DEVICE void multiply_all(const Room<NORM>& room, const Shape& shape, const Ends& ends) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 stage = 0, parity = 0;
    Walk<PAIRS> walk(shape.n, shape.k);
    while (!walk.done()) {
        float sums[TILES][4] = {};
        const Walk<PAIRS> tile = walk;
        float2 held[Outputs<PAIRS>::EACH];
        Outputs<PAIRS>::each(tile, shape.rows, [&](u32 j, u32 row, u32 at) { held[j] = ends.load(row, tile.output + at); });
        while (walk.output == tile.output) {
            barrier_wait(room.full + stage, parity);
            const u8 *w = room.weights(stage), *x = room.x_at(stage, walk.col);
#pragma unroll
            for (u32 col = 0; col < COLS; col += WARPS * 32)
                if (col + warp * 32 < walk.cols())
                    add_step(sums, w, x, room.x_stride, col + warp * 32, walk.cols(), shape.rows);
            __syncwarp();
            if (lane == 0) barrier_arrive(room.empty + stage);
            if (++stage == shape.stages) stage = 0, parity ^= 1;
            walk.advance();
        }
        finish_tile(room.parts, sums, tile, shape.rows, [&](u32 j, u32 row, u32 output, float sum, float up) {
            ends.store(row, output, sum, up, held[j]);
        });
    }
}

// Normalises all rows into shared memory, in the type that is multiplied. A load takes a microsecond while weights stream,
// so all that registers hold are under way at once, of all rows: HELD units of 4 numbers a row and thread. Of longer
// rows the units beyond pass through the last of them one after another, and those between are read again.
struct Normaliser {
    static constexpr u32 HELD = ROWS <= 2 ? 8 : ROWS == 4 ? 6 : 4, LAST = HELD - 1, STEP = WARPS * 32;
    const Normed& x;
    const Shape& shape;
    u32 units, last; // the last unit of a thread
    float4 held[ROWS][HELD], gains[HELD];

    DEVICE Normaliser(const Normed& x, const Shape& shape) : x(x), shape(shape), units(shape.k / 4) {
        last = max(HELD, (units + STEP - 1) / STEP) - 1;
    }
    DEVICE u32 unit(u32 j) const { return threadIdx.x + j * STEP; }
    DEVICE float4 at(u32 row, u32 i) const {
        return load_fresh_4(reinterpret_cast<const float4*>(x.x + (u64)row * shape.k) + i, row < shape.rows && i < units);
    }
    DEVICE float4 gain(u32 i) const { return load_fresh_4(reinterpret_cast<const float4*>(x.weights) + i, i < units); }
    DEVICE void store(const Room<true>& room, u32 row, u32 i, u32 slot, float scale) const {
        if (row < shape.rows && i < units)
            reinterpret_cast<Four*>(room.x + row * room.x_stride)[i] = Four::scaled(held[row][slot], scale, gains[slot]);
    }

    // Before `wait_for_previous`.
    DEVICE void load_gains() {
#pragma unroll
        for (u32 j = 0; j < LAST; j++) gains[j] = gain(unit(j));
    }

    // The sums of a thread's squares, unit after unit.
    DEVICE void load(float (&squares)[ROWS]) {
#pragma unroll
        for (u32 j = 0; j < HELD; j++)
#pragma unroll
            for (u32 row = 0; row < ROWS; row++) held[row][j] = at(row, unit(j));
#pragma unroll
        for (u32 row = 0; row < ROWS; row++)
#pragma unroll
            for (u32 j = 0; j < HELD; j++) squares[row] += squares_of(held[row][j]);
        for (u32 j = HELD; j * STEP < units; j++) {
#pragma unroll
            for (u32 row = 0; row < ROWS; row++) held[row][LAST] = at(row, unit(j));
#pragma unroll
            for (u32 row = 0; row < ROWS; row++) squares[row] += squares_of(held[row][LAST]);
        }
        gains[LAST] = gain(unit(last));
    }

    DEVICE void store_all(const Room<true>& room, const float (&scales)[ROWS]) {
#pragma unroll
        for (u32 j = 0; j < LAST; j++)
#pragma unroll
            for (u32 row = 0; row < ROWS; row++) store(room, row, unit(j), j, scales[row]);
        for (u32 j = last;;) {
#pragma unroll
            for (u32 row = 0; row < ROWS; row++) store(room, row, unit(j), LAST, scales[row]);
            if (j-- == LAST) break;
            gains[LAST] = gain(unit(j));
#pragma unroll
            for (u32 row = 0; row < ROWS; row++) held[row][LAST] = at(row, unit(j));
        }
    }
};

DEVICE void normalise(const Room<true>& room, const Normed& x, const Shape& shape) {
    Normaliser rows(x, shape);
    float squares[ROWS] = {}, scales[ROWS];
    rows.load_gains();
    wait_for_previous();
    rows.load(squares);
#pragma unroll
    for (u32 row = 0; row < ROWS; row++) {
        squares[row] = warp_sum(squares[row]);
        if (threadIdx.x % 32 == 0) room.parts[row * WARPS + threadIdx.x / 32] = squares[row];
    }
    multipliers_sync();
#pragma unroll
    for (u32 row = 0; row < ROWS; row++) {
        float sum = 0.0f;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) sum += room.parts[row * WARPS + w];
        scales[row] = rsqrtf(sum / shape.k + x.eps);
    }
    rows.store_all(room, scales);
    multipliers_sync();
}

// ---- kernels ----

// `ends` prepares x and begins and ends each output; it calls `wait_for_previous`.
template <bool NORM, bool PAIRS, typename Ends>
DEVICE void gemv(const Shape& shape, const T* w, const T* x, const Ends& ends) {
    extern __shared__ __align__(128) u8 shared[];
    let_next_start();
    const Room<NORM> room(shared, shape);
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < shape.stages; i++) {
            barrier_init(room.full + i, WEIGHT_ARRIVALS + (NORM ? 0 : COPIERS * 32));
            barrier_init(room.empty + i, WARPS);
        }
        barriers_ready();
    }
    __syncthreads();
    if (threadIdx.x >= WARPS * 32) {
        copy_all<NORM, PAIRS>(room, shape, w, x);
    } else {
        ends.prepare(room, shape);
        multiply_all<NORM, PAIRS>(room, shape, ends);
    }
}

// Ends of the products of normalised rows. `bias` may be null.
template <typename Out> struct Plain {
    Out* out;
    Normed x;
    const float* bias;
    u32 n;
    DEVICE void prepare(const Room<true>& room, const Shape& shape) const { normalise(room, x, shape); }
    DEVICE float2 load(u32, u32 i) const { return make_float2(bias_at(bias, i), 0.0f); }
    DEVICE void store(u32 row, u32 i, float sum, float, float2 held) const {
        out[(u64)row * n + i] = From<Out>::f32(sum + held.x);
    }
};
struct Silu : Plain<T> {
    DEVICE float2 load(u32, u32 i) const { return make_float2(bias_at(bias, i), bias_at(bias, n + i)); }
    DEVICE void store(u32 row, u32 i, float gate, float up, float2 held) const {
        out[(u64)row * n + i] = From<T>::f32(silu(gate + held.x) * (up + held.y));
    }
};
struct Add {
    float* hidden;
    const float* bias;
    u32 n;
    DEVICE void prepare(const Room<false>&, const Shape&) const { wait_for_previous(); }
    DEVICE float2 load(u32 row, u32 i) const { return make_float2(bias_at(bias, i), load_fresh(hidden + (u64)row * n + i)); }
    DEVICE void store(u32 row, u32 i, float sum, float, float2 held) const {
        hidden[(u64)row * n + i] = held.y + (sum + held.x);
    }
};

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, 1)

// out[rows, n] = rms_norm(x[rows, k]) * w[n, k]^T + bias[n].
KERNEL gemv_norm(T* out, Normed x, const T* w, const float* bias, Shape shape) {
    gemv<true, false>(shape, w, nullptr, Plain<T>{out, x, bias, shape.n});
}

// The same in f32: logits.
KERNEL gemv_norm_f32(float* out, Normed x, const T* w, const float* bias, Shape shape) {
    gemv<true, false>(shape, w, nullptr, Plain<float>{out, x, bias, shape.n});
}

// out[rows, n] = silu(gate) * up, with w[2 * n, k] and bias[2 * n] = gates, then ups.
KERNEL gemv_norm_silu(T* out, Normed x, const T* w, const float* bias, Shape shape) {
    gemv<true, true>(shape, w, nullptr, Silu{{out, x, bias, shape.n}});
}

// hidden[rows, n] += x[rows, k] * w[n, k]^T + bias[n].
KERNEL gemv_add(float* hidden, const T* x, const T* w, const float* bias, Shape shape) {
    gemv<false, false>(shape, w, x, Add{hidden, bias, shape.n});
}
