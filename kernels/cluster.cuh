// A cluster: blocks that run together and read each other's shared memory (from sm_90 on). On older devices a
// cluster is a single block, so that the same kernel runs there.
#pragma once

#include "common.cuh"

#if __CUDA_ARCH__ >= 900
#define CLUSTER 8
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTER 1
#define IN_CLUSTERS
#endif

// Which block of the cluster this is.
DEVICE u32 cluster_rank() {
    u32 rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

// `__syncthreads` for all blocks of the cluster.
DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
#else
    __syncthreads();
#endif
}

// The same variable of shared memory in another block of the cluster. It must not end before the last use.
template <typename U> DEVICE const U* in_block(const U* shared, u32 rank) {
#if __CUDA_ARCH__ >= 900
    u64 there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
    return reinterpret_cast<const U*>(there);
#else
    return shared;
#endif
}

#if __CUDA_ARCH__ >= 900
// An arrival at a barrier in the same place of a block of the cluster.
DEVICE void barrier_arrive_in(u32 block, u32 barrier) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(
                     barrier),
                 "r"(block)
                 : "memory");
}
#endif
