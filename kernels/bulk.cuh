// Copies to shared memory that nobody waits for, and the barriers that say when they are there. From sm_90 on the bulk copy
// engine brings a run of bytes, which needs one thread and no registers; before that lanes copy 16 bytes each. Sources,
// targets and lengths are multiples of 16 bytes.
//
// A barrier counts arrivals, and with the copy engine bytes. A wait takes the parity of the round: 0 for the first, then 1, 0, …
#pragma once

#include "common.cuh"

#define HAS_BULK (__CUDA_ARCH__ >= 900)

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// A place in shared memory: a pointer, or what `shared_address` made of it.
struct Shared {
    u32 at;
    DEVICE Shared(u32 address) : at(address) {}
    DEVICE Shared(const void* p) : at(shared_address(p)) {}
};

DEVICE void barrier_init(Shared barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier.at), "r"(arrivals) : "memory");
}
DEVICE void barrier_arrive(Shared barrier) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(barrier.at) : "memory");
}
DEVICE bool barrier_passed(Shared barrier, u32 parity) {
    // The form that sleeps came with sm_90; before, it is asked again and again.
#if HAS_BULK
#define BARRIER_ASK "mbarrier.try_wait.parity.shared::cta.b64"
#else
#define BARRIER_ASK "mbarrier.test_wait.parity.shared::cta.b64"
#endif
    u32 passed;
    asm volatile("{\n.reg .pred p;\n" BARRIER_ASK " p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(passed)
                 : "r"(barrier.at), "r"(parity)
                 : "memory");
    return passed != 0;
}
DEVICE void barrier_wait(Shared barrier, u32 parity) {
    while (!barrier_passed(barrier, parity)) {
    }
}

#if HAS_BULK
// Later bulk copies come after what this thread did to shared memory.
DEVICE void before_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// One arrival that also announces bytes to come.
DEVICE void barrier_expect(Shared barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier.at), "r"(bytes) : "memory");
}
DEVICE void bulk_copy(Shared to, const void* from, u32 bytes, Shared barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to.at), "l"(from),
                 "r"(bytes), "r"(barrier.at)
                 : "memory");
}
DEVICE void bulk_copy(Shared to, const void* from, u32 bytes, Shared barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to.at),
        "l"(from), "r"(bytes), "r"(barrier.at), "l"(policy)
        : "memory");
}
// Weights pass through the second-level cache once, so they are the first to leave it.
DEVICE u64 policy_once() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
#endif

// After all `barrier_init`, by the thread that made them: the copy engine must see them too.
DEVICE void barriers_ready() {
#if HAS_BULK
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    before_bulk();
#endif
}

// 16 bytes, asynchronously and past the first-level cache; `copies_arrive` makes one arrival once all copies that this
// thread began before it are complete.
DEVICE void copy_16(Shared to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to.at), "l"(from) : "memory");
}
DEVICE void copies_arrive(Shared barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier.at) : "memory");
}
