// Tiles of matrices that the copy engine brings to shared memory (sm_90 and later), 128 bytes a row, the pieces of each eight rows
// swapped about as `operand` of wgmma.cuh wants them. What lies outside of the matrix comes as zeros.
#pragma once

#include "bulk.cuh"

// What the driver has encoded of a matrix (`cuTensorMapEncodeTiled`).
struct alignas(64) Map {
    u64 words[16];
};

// What kernels before wrote is seen by the copy engine, too. After `wait_for_previous`.
DEVICE void after_other_kernels() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

DEVICE void copy_tile(u32 to, const Map& map, u32 column, u32 row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(&map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}
DEVICE void copy_tile(u32 to, const Map& map, u32 column, u32 row, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], "
                 "[%4], %5;" ::"r"(to),
                 "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
                 : "memory");
}
// Of rows in `half`, eights from `row_8` on.
DEVICE void copy_tile(u32 to, const Map& map, u32 column, u32 row, u32 half, u32 row_8, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4, "
                 "%5}], [%6], %7;" ::"r"(to),
                 "l"(&map), "r"(column), "r"(row), "r"(half), "r"(row_8), "r"(barrier), "l"(policy)
                 : "memory");
}

// To the same place of several blocks of the cluster, whose barriers are told alike: a bit for each.
DEVICE void copy_tile_to(u32 blocks, u32 to, const Map& map, u32 column, u32 row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], "
                 "[%4], %5;" ::"r"(to),
                 "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"((u16)blocks)
                 : "memory");
}

// A tile to memory, as far as it is within the matrix. After `before_bulk`.
DEVICE void store_tile(const Map& map, u32 column, u32 row, u32 from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column), "r"(row),
                 "r"(from)
                 : "memory");
}
// A thread's stores since the last call are a batch.
DEVICE void stores_close() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until shared memory may be written again.
DEVICE void stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Waits until all is in memory.
DEVICE void stores_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
