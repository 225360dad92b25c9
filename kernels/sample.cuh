// Logits as the choosing kernels see them: adjusted, in an order of whole numbers, and as weights of whole numbers.
//
// Sums of weights are sums of integers, so that they are the same in any order: the same token comes out whatever
// the number of blocks, and a row's token does not depend on other rows.
#pragma once

#include "common.cuh"

// Marks a token of the prompt in `counts`; the other bits count it in the answer.
#define IN_PROMPT 0x80000000u
#define NO_TOKEN 0xffffffffu

// What an output row's sequence wants of its next token.
struct SampleParams {
    u64 seed;
    u32 answered;      // tokens of the answer so far
    u32 seat;          // whose last token it is
    u32* counts;       // [vocab]: IN_PROMPT and times in the answer; null without penalties
    const float* bias; // [vocab]: null without logit biases
    float temperature; // 0: the most likely token
    u32 top_k;         // 0: all
    float top_p;       // 1: all
    float min_p;       // 0: all
    float repetition;  // 1: none
    float presence;    // 0: none
    float frequency;   // 0: none
    u32 logprobs;      // 0: none; otherwise one more than how many of the most likely tokens
};

// Parameters of a few rows, as an argument of the launch: nothing has to be copied to the device first.
#define FEW_OUTPUTS 16
struct FewParams {
    SampleParams rows[FEW_OUTPUTS];
};

// The token is for the host, for the sequence's next row, and for its penalties.
DEVICE void choose(u32 id, u32* token, u32* last_tokens, const SampleParams& p) {
    *token = id;
    last_tokens[p.seat] = id;
    if (p.counts) p.counts[id]++;
}

// Bias, then penalties, in the operations' order of the CPU.
DEVICE float adjusted(float logit, u32 id, const SampleParams& p) {
    if (p.bias) logit = __fadd_rn(logit, p.bias[id]);
    const u32 word = p.counts ? p.counts[id] : 0;
    if (word) {
        if (p.repetition != 1.0f) logit = logit > 0.0f ? __fdiv_rn(logit, p.repetition) : __fmul_rn(logit, p.repetition);
        const u32 times = word & ~IN_PROMPT;
        if (times) logit = __fsub_rn(logit, __fadd_rn(p.presence, __fmul_rn(p.frequency, (float)times)));
    }
    return logit;
}

// Integers in the order of the numbers: 0 for NaN, the same for 0.0 and -0.0.
DEVICE u32 key_of(float x) {
    if (x != x) return 0;
    const u32 bits = x == 0.0f ? 0 : __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float number_of(u32 key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }
#define KEY_BANNED 0x007fffffu   // of -inf: this and less is never drawn
#define KEY_INFINITE 0xff800000u // of inf

// The larger key wins, then the lower id. 0 stands for "only NaN so far".
DEVICE u64 ranked(u32 key, u32 id) { return (u64)key << 32 | ~id; }
DEVICE u32 id_of(u64 ranked) { return ranked >> 32 ? ~(u32)ranked : 0; }

DEVICE u64 warp_largest(u64 x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        const u64 other = __shfl_xor_sync(~0u, x, lanes);
        x = other > x ? other : x;
    }
    return x;
}
DEVICE u64 warp_total(u64 x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
}
// The sum of this lane's and all lower lanes' numbers.
template <typename U> DEVICE U warp_scan(U x) {
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
        const U other = __shfl_up_sync(~0u, x, lanes);
        if (threadIdx.x % 32 >= lanes) x += other;
    }
    return x;
}
// The largest of a block's numbers, in every thread. `parts` is shared memory for 32 numbers.
DEVICE u64 block_largest(u64 x, u64* parts) {
    x = warp_largest(x);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    return warp_largest(lane < blockDim.x / 32 ? parts[lane] : 0);
}

// The most likely token weighs 1 at any temperature.
struct Scale {
    float most, temperature;

    // How many powers of e a logit is below the largest.
    DEVICE float depth(float logit) const { return __fdiv_rn(most - logit, temperature); }
    // The CPU's f32 weight.
    DEVICE static float weight(float depth) { return expf(-depth); }
    // The weight in units of 2^-44: what is below one unit is never drawn, and 2^18 tokens' weights fit in 64 bits.
    DEVICE static u64 units(float weight) { return __float2ull_rz(weight * 17592186044416.0f); }
    DEVICE u64 units_of(u32 key) const { return key > KEY_BANNED ? units(weight(depth(number_of(key)))) : 0; }
};

// SplitMix64's output function.
DEVICE u64 mix(u64 word) {
    word += 0x9e3779b97f4a7c15ull;
    word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9ull;
    word = (word ^ (word >> 27)) * 0x94d049bb133111ebull;
    return word ^ (word >> 31);
}
// A number of 0.0..1.0 that depends on the seed and the place in the answer alone.
DEVICE double uniform(u64 seed, u64 place) {
    return (double)(mix(mix(seed) + place * 0x9e3779b97f4a7c15ull) >> 11) * (1.0 / 9007199254740992.0);
}
