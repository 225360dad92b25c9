// Products of a warp group, four warps together, on the tensor cores of sm_90a. One operand or both are read from shared memory, and
// the threads go on meanwhile. What products read and write must stay as it is until `products_wait` says that they are done.
//
// A thread has of each eight columns of the sums what it would have of a fragment of attention.cuh, the warp's rows being 16 of the
// group's 64.
#pragma once

#include "common.cuh"

// An operand in shared memory: slabs of 64 columns, each row 128 bytes with its pieces swapped about, from `address`. Eight rows are
// `rows_8` bytes apart from the next eight. If rows are what is summed over, slabs are `slab` bytes apart; else that says nothing.
DEVICE u64 operand(u32 address, u32 slab, u32 rows_8) {
    const u64 swap_128 = 1;
    return (u64)(address % (1 << 18) / 16) | (u64)(slab / 16) << 16 | (u64)(rows_8 / 16) << 32 | swap_128 << 62;
}

// Before products that use registers which have been written.
DEVICE void products_open() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The products since the last call are a batch.
DEVICE void products_close() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most LEFT batches are under way.
template <int LEFT> DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
// The compiler must not move reads and writes of these over this place: it does not know what products do to them later.
template <int N> DEVICE void registers_hold(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

// A warp group gives registers back, or takes them.
template <int LEFT> DEVICE void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LEFT)); }
template <int ALL> DEVICE void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(ALL)); }

// A thread's sums as operands, and their names in the instruction.
#define SUMS_8(s, i) \
    "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), "+f"(s[i + 4]), "+f"(s[i + 5]), "+f"(s[i + 6]), "+f"(s[i + 7])
#define SUMS_16(s, i) SUMS_8(s, i), SUMS_8(s, i + 8)
#define SUMS_32(s, i) SUMS_16(s, i), SUMS_16(s, i + 16)
#define SUMS_64(s, i) SUMS_32(s, i), SUMS_32(s, i + 32)
#define SUMS_128(s, i) SUMS_64(s, i), SUMS_64(s, i + 64)
#define NAMES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define NAMES_16 NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_32 NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64                                                                                                       \
    NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
             "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_128                                                                                                      \
    NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91," \
             "%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115," \
             "%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#if DTYPE == 1
#define PRODUCT(COLUMNS) "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.f16.f16 "
#else
#define PRODUCT(COLUMNS) "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 "
#endif

// sums = a · bᵀ, or sums + a · bᵀ: 64 rows and COLUMNS columns, over 16 columns of both. A, B, ADD: what follows the sums.
#define MULTIPLY_SHARED(COLUMNS, SUMS, A, B, ADD)                                                                           \
    DEVICE void multiply_shared(float (&sums)[SUMS], u64 a, u64 b, bool add) {                                              \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD ", 0;\n" PRODUCT(COLUMNS) "{" NAMES_##SUMS "}, %" #A ", %" #B \
                     ", add, 1, 1, 0, 0;\n}"                                                                                \
                     : SUMS_##SUMS(sums, 0)                                                                                 \
                     : "l"(a), "l"(b), "r"((u32)add)                                                                        \
                     : "memory");                                                                                           \
    }
MULTIPLY_SHARED(16, 8, 8, 9, 10)
MULTIPLY_SHARED(32, 16, 16, 17, 18)
MULTIPLY_SHARED(64, 32, 32, 33, 34)
MULTIPLY_SHARED(128, 64, 64, 65, 66)
MULTIPLY_SHARED(256, 128, 128, 129, 130)

// sums += a · b: 64 rows and COLUMNS columns, over 16 rows of b. A0 to A3, B: what follows the sums.
#define MULTIPLY_REGISTERS(COLUMNS, SUMS, A0, A1, A2, A3, B)                                                                \
    DEVICE void multiply_registers(float (&sums)[SUMS], uint4 a, u64 b) {                                                   \
        asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n" PRODUCT(COLUMNS) "{" NAMES_##SUMS "}, {%" #A0 ",%" #A1       \
                     ",%" #A2 ",%" #A3 "}, %" #B ", add, 1, 1, 1;\n}"                                                       \
                     : SUMS_##SUMS(sums, 0)                                                                                 \
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b)                                                       \
                     : "memory");                                                                                           \
    }
MULTIPLY_REGISTERS(64, 32, 32, 33, 34, 35, 36)
MULTIPLY_REGISTERS(128, 64, 64, 65, 66, 67, 68)

// 16 rows by 16 columns of T from the registers of a warp to shared memory; `to` is where a lane's row begins, of the first eight columns
// for the first half of the warp.
DEVICE void store_matrices(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
