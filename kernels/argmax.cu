// Choosing the most likely tokens, log-probabilities, and what is kept of a sequence for choosing.
// variants: DTYPE=0
// What it spills are registers around the call of the logarithm.
// spills: logprobs
#include "sample.cuh"

// Logits that a block reads.
#define SPAN 4096
#define LOGPROBS_MAX 20u

struct Logprobs {
    float chosen;
    u32 len;
    u32 ids[LOGPROBS_MAX];
    float values[LOGPROBS_MAX];
};

DEVICE u64 larger(u64 best, float logit, u32 id, const SampleParams& p) {
    const u32 key = key_of(adjusted(logit, id, p));
    const u64 r = key ? ranked(key, id) : 0;
    return r > best ? r : best;
}

// Grid: [vocab / SPAN rounded up, outputs], 256 threads. The last block of a row to come writes the token.
// `params` is null where `few` holds them. `best` and `done` are [outputs], zero before and after.
extern "C" __global__ void __launch_bounds__(256)
argmax(u32* tokens, u32* last_tokens, const float* logits, const SampleParams* params,
       const __grid_constant__ FewParams few, u32 vocab, u64* best, u32* done) {
    __shared__ u64 parts[32];
    const u32 output = blockIdx.y;
    wait_for_previous();
    let_next_start();
    const SampleParams& p = params ? params[output] : few.rows[output];
    const float* row = logits + (u64)output * vocab;
    const u32 first = blockIdx.x * SPAN, end = min(first + SPAN, vocab);
    u64 mine = 0;
    if (vocab % 4 == 0) {
        float4 v[SPAN / 1024];
#pragma unroll
        for (u32 j = 0; j < SPAN / 1024; j++) {
            const u32 id = first + threadIdx.x * 4 + j * 1024;
            if (id < end) v[j] = *reinterpret_cast<const float4*>(row + id);
        }
#pragma unroll
        for (u32 j = 0; j < SPAN / 1024; j++) {
            const u32 id = first + threadIdx.x * 4 + j * 1024;
            if (id >= end) continue;
            mine = larger(larger(mine, v[j].x, id, p), v[j].y, id + 1, p);
            mine = larger(larger(mine, v[j].z, id + 2, p), v[j].w, id + 3, p);
        }
    } else {
        for (u32 id = first + threadIdx.x; id < end; id += blockDim.x) mine = larger(mine, row[id], id, p);
    }
    mine = block_largest(mine, parts);
    if (threadIdx.x != 0) return;
    atomicMax(&best[output], mine);
    __threadfence();
    if (atomicAdd(&done[output], 1u) != gridDim.x - 1) return;
    __threadfence();
    const u32 id = id_of(atomicExch(&best[output], 0ull));
    done[output] = 0;
    choose(id, tokens + output, last_tokens, p);
}

// The best of each row of `n` logits of the tokens from `first` on, as they are. Grid: [outputs], 1024 threads. `found` may be
// another GPU's memory.
extern "C" __global__ void __launch_bounds__(1024)
largest(u64* found, const float* logits, u32 n, u32 first) {
    __shared__ u64 parts[32];
    const float* row = logits + (u64)blockIdx.x * n;
    wait_for_previous();
    let_next_start();
    u64 mine = 0;
    auto see = [&](float logit, u32 i) {
        const u32 key = key_of(logit);
        const u64 r = key ? ranked(key, first + i) : 0;
        mine = r > mine ? r : mine;
    };
    if (n % 4 == 0) {
        // Several loads on their way at once.
        for (u32 begin = threadIdx.x * 4; begin < n; begin += 4 * blockDim.x * 4) {
            float4 v[4];
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                const u32 i = begin + j * blockDim.x * 4;
                if (i < n) v[j] = *reinterpret_cast<const float4*>(row + i);
            }
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                const u32 i = begin + j * blockDim.x * 4;
                if (i < n) see(v[j].x, i), see(v[j].y, i + 1), see(v[j].z, i + 2), see(v[j].w, i + 3);
            }
        }
    } else {
        for (u32 i = threadIdx.x; i < n; i += blockDim.x) see(row[i], i);
    }
    mine = block_largest(mine, parts);
    if (threadIdx.x == 0) found[blockIdx.x] = mine;
}

// Chooses the best of what `parts` have found, each [pitch]. A thread an output; `params` is null where `few` holds them. Blocks
// of a warp find room beside others that have nearly all registers of a multiprocessor.
extern "C" __global__ void __launch_bounds__(32)
choose_found(u32* tokens, u32* last_tokens, const u64* found, const SampleParams* params, const __grid_constant__ FewParams few,
             u32 parts, u32 pitch, u32 outputs) {
    const u32 output = blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_previous();
    let_next_start();
    if (output >= outputs) return;
    u64 best = 0;
    for (u32 part = 0; part < parts; part++) {
        const u64 r = found[(u64)part * pitch + output];
        best = r > best ? r : best;
    }
    choose(id_of(best), tokens + output, last_tokens, params ? params[output] : few.rows[output]);
}

// Grid: [outputs], 1024 threads; outputs that want no log-probabilities are left as they are. `tokens` holds the chosen
// ones. Of the logits as the model gave them.
extern "C" __global__ void __launch_bounds__(1024)
logprobs(Logprobs* out, const u32* tokens, const float* logits, const SampleParams* params,
         const __grid_constant__ FewParams few, u32 vocab) {
    __shared__ u64 parts[32];
    const u32 output = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    wait_for_previous();
    let_next_start();
    const SampleParams& p = params ? params[output] : few.rows[output];
    if (p.logprobs == 0) return;
    const u32 wanted = min(p.logprobs - 1, LOGPROBS_MAX);
    const float* row = logits + (u64)output * vocab;
    // Each thread holds the best of its ids, which are 1024 apart.
    u64 mine = 0;
    for (u32 id = threadIdx.x; id < vocab; id += 1024) {
        const u64 r = ranked(key_of(row[id]), id);
        mine = r > mine ? r : mine;
    }
    u64 best = block_largest(mine, parts);
    const Scale scale = {number_of((u32)(best >> 32)), 1.0f};
    const bool finite = best >> 32 > KEY_BANNED && best >> 32 < KEY_INFINITE;
    u64 units = 0;
    if (finite)
        for (u32 id = threadIdx.x; id < vocab; id += 1024) units += scale.units_of(key_of(row[id]));
    units = warp_total(units);
    __syncthreads();
    if (lane == 0) parts[warp] = units;
    __syncthreads();
    units = warp_total(parts[lane]);
    const double log_sum = finite ? (double)scale.most + log((double)units * (1.0 / 17592186044416.0)) : 0.0;
    auto of = [&](float logit) {
        if (logit != logit) return -INFINITY_F;
        if (finite) return (float)((double)logit - log_sum);
        return logit == INFINITY_F ? 0.0f : -INFINITY_F;
    };
    Logprobs& to = out[output];
    u32 len = 0;
    while (len < wanted && best >> 32 != 0) {
        const u32 id = ~(u32)best, owner = id % 1024;
        if (threadIdx.x == 0) to.ids[len] = id, to.values[len] = of(row[id]);
        len++;
        if (warp == owner / 32) { // its whole warp looks for the owner's next
            u64 next = 0;
            for (u32 i = owner + lane * 1024; i < vocab; i += 32 * 1024) {
                const u64 r = ranked(key_of(row[i]), i);
                if (r < best && r > next) next = r;
            }
            next = warp_largest(next);
            if (threadIdx.x == owner) mine = next;
        }
        best = block_largest(mine, parts);
    }
    if (threadIdx.x == 0) {
        to.chosen = of(row[tokens[output]]);
        to.len = len;
        for (u32 i = len; i < LOGPROBS_MAX; i++) to.ids[i] = NO_TOKEN, to.values[i] = -INFINITY_F;
    }
}

// A sequence's start: `n` words become 0. Any grid.
extern "C" __global__ void clear_words(u32* words, u32 n) {
    wait_for_previous();
    let_next_start();
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) words[i] = 0;
}

// Marks the prompt's tokens in cleared `counts`. Any grid.
extern "C" __global__ void mark_prompt(u32* counts, const u32* ids, u32 n, u32 vocab) {
    wait_for_previous();
    let_next_start();
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        if (ids[i] < vocab) atomicOr(&counts[ids[i]], IN_PROMPT);
}

// Sets the biases of `n` different tokens in cleared `bias`. Any grid.
extern "C" __global__ void set_bias(float* bias, const u32* ids, const float* values, u32 n, u32 vocab) {
    wait_for_previous();
    let_next_start();
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        if (ids[i] < vocab) bias[ids[i]] = values[i];
}
