// A ring of stages in shared memory that some warps fill and others empty. A stage has two barriers: `full` counts the
// bytes and copies that arrive, `empty` the warps that are done with it. A wait takes the parity of the round: 0 for a
// stage's first use, then 1, 0, …
//
// From sm_90 on rows are copied by the bulk copy engine, which needs one thread and no registers; before that by
// 16-byte asynchronous copies of a whole warp. Sources, targets and lengths are multiples of 16 bytes.
#pragma once

#include "common.cuh"

#define HAS_BULK (__CUDA_ARCH__ >= 900)

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE void barrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After all `barrier_init`, by the thread that made them: the copy engine must see them too.
DEVICE void barriers_ready() {
#if HAS_BULK
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
DEVICE void barrier_arrive(u64* barrier) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(shared_address(barrier))
                 : "memory");
}
DEVICE bool barrier_passed(u64* barrier, u32 parity) {
    u32 passed;
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(passed)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
#else
    // The parity form of test_wait came with later instruction sets; try it until it holds.
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(passed)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
#endif
    return passed != 0;
}
DEVICE void barrier_wait(u64* barrier, u32 parity) {
    while (!barrier_passed(barrier, parity)) {
    }
}

#if HAS_BULK
// One arrival that also announces bytes to come.
DEVICE void barrier_expect(u64* barrier, u32 bytes) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}
// Weights pass through the second-level cache once, so they are the first to leave it.
DEVICE u64 policy_once() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
DEVICE void bulk_copy(void* to, const void* from, u32 bytes, u64* barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
        : "memory");
}
#endif

// 16 bytes, asynchronously and past the first-level cache; `copies_arrive` makes one arrival once all copies that this
// thread began before it are complete.
DEVICE void copy_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void copies_arrive(u64* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
