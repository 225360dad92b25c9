// Choosing tokens that are drawn at random; `argmax.cu` has the cheaper way for batches without any.
// variants: DTYPE=0
// What it spills on sm_100a are registers around the calls for the division's rare cases.
// spills: sample
//
// A row of logits stays in the shared memory of a cluster, as ordered integers. All cuts (top-k, top-p) and the draw
// itself are one question: at which token, from the most likely one on, does a sum of ones or of weights reach a
// given number? A histogram over depths below the largest logit, then finer ones over keys, answer it without a sort.
// The draw goes by rank where top-k or top-p limit it, otherwise by id, as on the CPU: the same token comes out but
// where the rounding of a weight's last bit decides.
#include "cluster.cuh"
#include "sample.cuh"

#define THREADS 512
#define WARPS (THREADS / 32)
#define BINS 256
// Bins for each power of e. The last bin begins at a depth of 30.9, where weights are below one unit.
#define BINS_PER_E 8.25f

// Ones and weights in each bin; a weight's halves apart, since there is no 64-bit addition in shared memory.
struct Bins {
    u32 count[BINS], low[BINS], high[BINS];
    DEVICE void clear(u32 bin) { count[bin] = low[bin] = high[bin] = 0; }
};
// Sums over this and all likelier bins.
struct Sums {
    u32 count[BINS];
    u64 weight[BINS];
};
struct Shared {
    Bins bins[2]; // by turns, so that one can be cleared while others still read the other
    Sums coarse, fine;
    u64 parts[32], warps[WARPS];
    u64 totals[2], best;
    u32 warp_counts[8], edges[2], found;
};

enum Measure { COUNT, WEIGHT };

// Where a sum is reached: at a token of this key, and what all tokens of larger keys sum up to.
struct Cut {
    bool found;
    u32 key;
    u64 count, weight;
};
struct Total {
    u64 all, before; // of all blocks, of the blocks before this one
};

// One row, shared out among the blocks of a cluster by id.
struct Row {
    Shared& s;
    const float* logits;
    const SampleParams& params;
    u32* keys; // this block's, in shared memory; null if they do not fit
    u32 vocab, rank, per_warp, first, end, largest;
    u32 round;
    Scale scale;

    DEVICE u32 key(u32 id) const { return keys ? keys[id - first] : key_of(adjusted(logits[id], id, params)); }

    DEVICE u64 load();
    DEVICE u32 bin_of(u32 key) const;
    DEVICE u32 edge(u32 bin) const;
    DEVICE void add(u32 bin, u64 weight);
    DEVICE void merge(Sums& sums);
    DEVICE void coarse();
    DEVICE u32 locate(const Sums& sums, Measure measure, u64 wanted);
    DEVICE Cut search(Measure measure, u64 wanted);
    template <typename F> DEVICE Total sum(int slot, F measure);
    template <typename F> DEVICE u32 pick(F measure, u64 wanted);
    DEVICE u64 draw_total();
    DEVICE u32 draw(double u);
};

// Keeps the keys, if there is room, and finds the largest with its id.
DEVICE u64 Row::load() {
    u64 best = 0;
    const u32 wide_end = vocab % 4 == 0 && keys ? end : first;
    for (u32 id = first + threadIdx.x * 4; id < wide_end; id += THREADS * 4) {
        const float4 four = *reinterpret_cast<const float4*>(logits + id);
        const float v[4] = {four.x, four.y, four.z, four.w};
        uint4 k;
        u32* to[4] = {&k.x, &k.y, &k.z, &k.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            *to[j] = key_of(adjusted(v[j], id + j, params));
            const u64 r = *to[j] ? ranked(*to[j], id + j) : 0;
            best = r > best ? r : best;
        }
        *reinterpret_cast<uint4*>(keys + (id - first)) = k;
    }
    for (u32 id = wide_end + threadIdx.x; id < end; id += THREADS) {
        const u32 k = key_of(adjusted(logits[id], id, params));
        if (keys) keys[id - first] = k;
        const u64 r = k ? ranked(k, id) : 0;
        best = r > best ? r : best;
    }
    best = block_largest(best, s.parts);
    if (threadIdx.x == 0) s.best = best;
    cluster_sync();
    for (u32 r = 0; r < CLUSTER; r++) {
        const u64 other = *in_block(&s.best, r);
        best = other > best ? other : best;
    }
    return best;
}

// Monotone: a larger key is never in a later bin.
DEVICE u32 Row::bin_of(u32 key) const {
    const float bin = scale.depth(number_of(key)) * BINS_PER_E;
    return bin < BINS - 1 ? (u32)bin : BINS - 1;
}

// The smallest key in this bin or one before it. By a whole warp: five bits at a time.
DEVICE u32 Row::edge(u32 bin) const {
    u64 below = 0; // this many keys, from 0 on, are in later bins
    for (int shift = 30; shift >= 0; shift -= 5) {
        const u64 tried = below + ((u64)(threadIdx.x % 32) << shift);
        const u32 last = (u32)(tried - 1);
        const bool is_below = tried == 0 || (tried <= largest && (last <= KEY_BANNED || bin_of(last) > bin));
        below += (u64)(__popc(__ballot_sync(~0u, is_below)) - 1) << shift;
    }
    return (u32)below;
}

DEVICE void Row::add(u32 bin, u64 weight) {
    Bins& bins = s.bins[round % 2];
    atomicAdd(&bins.count[bin], 1u);
    const u32 low = (u32)weight;
    u32 high = (u32)(weight >> 32);
    if (low) high += atomicAdd(&bins.low[bin], low) > ~low;
    if (high) atomicAdd(&bins.high[bin], high);
}

// Ends a round: the sums over the bins of all blocks.
DEVICE void Row::merge(Sums& sums) {
    cluster_sync();
    const u32 t = threadIdx.x;
    u32 count = 0;
    u64 weight = 0;
    if (t < BINS) {
#pragma unroll
        for (u32 r = 0; r < CLUSTER; r++) {
            const Bins* bins = in_block(&s.bins[round % 2], r);
            count += bins->count[t];
            weight += bins->low[t] + ((u64)bins->high[t] << 32);
        }
        count = warp_scan(count), weight = warp_scan(weight);
        if (t % 32 == 31) s.warp_counts[t / 32] = count, s.parts[t / 32] = weight;
    }
    round++;
    __syncthreads();
    if (t < BINS) {
        for (u32 warp = 0; warp < t / 32; warp++) count += s.warp_counts[warp], weight += s.parts[warp];
        sums.count[t] = count, sums.weight[t] = weight;
        // The round before last: every block has read it by now.
        s.bins[round % 2].clear(t);
    }
    __syncthreads();
}

// The histogram over depths, that every search begins with.
DEVICE void Row::coarse() {
    for (u32 id = first + threadIdx.x; id < end; id += THREADS) {
        const u32 k = key(id);
        if (k <= KEY_BANNED) continue;
        const float depth = scale.depth(number_of(k)), bin = depth * BINS_PER_E;
        if (bin < BINS - 1) add((u32)bin, Scale::units(Scale::weight(depth)));
    }
    merge(s.coarse);
}

// The bin in which the sum reaches `wanted`; BINS if none.
DEVICE u32 Row::locate(const Sums& sums, Measure measure, u64 wanted) {
    const u32 t = threadIdx.x;
    __syncthreads();
    if (t == 0) s.found = BINS;
    __syncthreads();
    if (t < BINS) {
        const u64 reached = measure == COUNT ? sums.count[t] : sums.weight[t];
        const u64 before = t == 0 ? 0 : measure == COUNT ? sums.count[t - 1] : sums.weight[t - 1];
        if (before < wanted && wanted <= reached) s.found = t;
    }
    __syncthreads();
    return s.found;
}

// Where the sum from the largest key down reaches `wanted`, which is at least 1.
DEVICE Cut Row::search(Measure measure, u64 wanted) {
    const u32 bin = locate(s.coarse, measure, wanted);
    if (bin == BINS) return {false, 0, 0, 0};
    Cut cut = {true, 0, bin ? s.coarse.count[bin - 1] : 0, bin ? s.coarse.weight[bin - 1] : 0};
    const u32 warp = threadIdx.x / 32;
    if (warp < 2) {
        const u32 at = warp == 0 ? edge(bin) : bin == 0 ? largest + 1 : edge(bin - 1);
        if (threadIdx.x % 32 == 0) s.edges[warp] = at;
    }
    __syncthreads();
    u32 low = s.edges[0], high = s.edges[1] - 1;
    while (low < high) {
        const int bits = 32 - __clz(high - low), shift = bits > 8 ? bits - 8 : 0;
        for (u32 id = first + threadIdx.x; id < end; id += THREADS) {
            const u32 k = key(id);
            if (low <= k && k <= high) add((high - k) >> shift, scale.units_of(k));
        }
        merge(s.fine);
        const u32 j = locate(s.fine, measure, wanted - (measure == COUNT ? cut.count : cut.weight));
        if (j > 0) cut.count += s.fine.count[j - 1], cut.weight += s.fine.weight[j - 1];
        high -= j << shift;
        const u32 width = (1u << shift) - 1;
        low = high - low > width ? high - width : low;
    }
    cut.key = high;
    return cut;
}

// The sum of a measure of keys; `s.warps` keeps what each warp's ids sum up to. A slot can be used once.
template <typename F> DEVICE Total Row::sum(int slot, F measure) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 from = first + warp * per_warp, to = min(from + per_warp, end);
    u64 mine = 0;
    for (u32 id = from + lane; id < to; id += 32) mine += measure(key(id));
    mine = warp_total(mine);
    if (lane == 0) s.warps[warp] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
        u64 total = 0;
        for (u32 w = 0; w < WARPS; w++) total += s.warps[w];
        s.totals[slot] = total;
    }
    cluster_sync();
    Total total = {0, 0};
    for (u32 r = 0; r < CLUSTER; r++) {
        const u64 block = *in_block(&s.totals[slot], r);
        total.all += block;
        if (r < rank) total.before += block;
    }
    return total;
}

// After `sum`: in one lane of one block the id at which the measure's sum by id reaches `wanted`, counted from this
// block's first; NO_TOKEN everywhere else.
template <typename F> DEVICE u32 Row::pick(F measure, u64 wanted) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u64 reached = 0;
    for (u32 w = 0; w < warp; w++) reached += s.warps[w];
    if (!(reached < wanted && wanted <= reached + s.warps[warp])) return NO_TOKEN;
    const u32 from = first + warp * per_warp, to = min(from + per_warp, end);
    for (u32 base = from; base < to; base += 32) {
        const u32 id = base + lane;
        const u64 sums = reached + warp_scan(id < to ? measure(key(id)) : 0);
        const u32 there = __ballot_sync(~0u, sums >= wanted);
        if (there) return lane + 1 == __ffs(there) ? id : NO_TOKEN;
        reached = __shfl_sync(~0u, sums, 31);
    }
    return NO_TOKEN;
}

DEVICE u64 at_least_one(double x, u64 most) {
    const u64 n = x < 1.0 ? 1 : (u64)x;
    return n < most ? n : most;
}
DEVICE u64 divide_up(u64 a, u64 b) { return (a + b - 1) / b; }

// The weight of the tokens that top-k, top-p and min-p leave: a likeliest part of all of them.
DEVICE u64 Row::draw_total() {
    u64 total = s.coarse.weight[BINS - 1];
    if (params.top_k > 0) {
        const Cut cut = search(COUNT, params.top_k);
        if (cut.found) total = cut.weight + (params.top_k - cut.count) * scale.units_of(cut.key);
    }
    if (params.top_p < 1.0f) {
        const u64 enough = at_least_one(ceil((double)params.top_p * (double)total), total);
        const Cut cut = search(WEIGHT, enough);
        const u64 each = scale.units_of(cut.key);
        total = cut.weight + divide_up(enough - cut.weight, each) * each;
    }
    if (params.min_p > 0.0f) {
        const Scale scale = this->scale;
        const float least = params.min_p;
        const Total kept = sum(0, [=](u32 k) {
            const float weight = k > KEY_BANNED ? Scale::weight(scale.depth(number_of(k))) : 0.0f;
            return weight >= least ? Scale::units(weight) : 0;
        });
        total = kept.all < total ? kept.all : total;
    }
    return total;
}

// Draws a token; it comes back in one lane of one block, NO_TOKEN in all others.
DEVICE u32 Row::draw(double u) {
    const Scale scale = this->scale;
    if (params.top_k == 0 && params.top_p >= 1.0f) {
        const float least = params.min_p;
        auto weigh = [=](u32 k) {
            const float weight = k > KEY_BANNED ? Scale::weight(scale.depth(number_of(k))) : 0.0f;
            return weight >= least ? Scale::units(weight) : 0;
        };
        const Total total = sum(0, weigh);
        const u64 wanted = at_least_one(floor(u * (double)total.all) + 1.0, total.all);
        return wanted > total.before ? pick(weigh, wanted - total.before) : NO_TOKEN;
    }
    coarse();
    const u64 total = draw_total();
    const u64 wanted = at_least_one(floor(u * (double)total) + 1.0, total);
    const Cut cut = search(WEIGHT, wanted);
    const u32 key = cut.key;
    const u64 place = divide_up(wanted - cut.weight, scale.units_of(key)); // among equals, by id
    auto equal = [=](u32 k) { return (u64)(k == key); };
    const Total equals = sum(1, equal);
    return place > equals.before ? pick(equal, place - equals.before) : NO_TOKEN;
}

// Grid: [outputs * CLUSTER], 512 threads. `params` is null where `few` holds them. With `keep`, dynamic shared memory for `per_warp * 16` keys, where `per_warp` is
// vocab / (CLUSTER * 16) rounded up to a multiple of 4. Any mixture of greedy and drawn rows.
extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS)
sample(u32* tokens, u32* last_tokens, const float* logits, const SampleParams* params, const __grid_constant__ FewParams few,
       u32 vocab, u32 keep) {
    extern __shared__ uint4 room[];
    __shared__ Shared s;
    const u32 output = blockIdx.x / CLUSTER;
    wait_for_previous();
    let_next_start();
    const SampleParams& p = params ? params[output] : few.rows[output];
    const u32 per_warp = ((vocab + CLUSTER * WARPS - 1) / (CLUSTER * WARPS) + 3) / 4 * 4, rank = cluster_rank();
    const u32 first = min(rank * per_warp * WARPS, vocab), end = min(first + per_warp * WARPS, vocab);
    u32* keys = keep ? reinterpret_cast<u32*>(room) : nullptr;
    Row row = {s, logits + (u64)output * vocab, p, keys, vocab, rank, per_warp, first, end, 0, 0, {0.0f, p.temperature}};
    if (threadIdx.x < BINS) s.bins[0].clear(threadIdx.x);
    const u64 best = row.load();
    row.largest = (u32)(best >> 32);
    u32 id = rank == 0 && threadIdx.x == 0 ? id_of(best) : NO_TOKEN;
    if (p.temperature > 0.0f && row.largest > KEY_BANNED && row.largest < KEY_INFINITE) {
        row.scale.most = number_of(row.largest);
        id = row.draw(uniform(p.seed, p.answered));
    }
    if (id != NO_TOKEN) choose(id, tokens + output, last_tokens, p);
    cluster_sync(); // other blocks may still read this one's shared memory
}
