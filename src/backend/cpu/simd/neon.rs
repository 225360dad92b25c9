//! Four registers of four lanes.

use std::arch::{aarch64::*, asm};

use super::{Kernel, Vector, intrinsics, memory_intrinsics};

/// See [`Vector`].
#[derive(Clone, Copy)]
pub(super) struct Lanes([float32x4_t; 4]);

/// SAFETY: the machine has `Simd::Neon`.
#[target_feature(enable = "neon")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Lanes>()
}

/// One expression for each of the four registers.
macro_rules! each {
    ($i:ident => $e:expr) => {
        Lanes([
            { const $i: usize = 0; $e },
            { const $i: usize = 1; $e },
            { const $i: usize = 2; $e },
            { const $i: usize = 3; $e },
        ])
    };
}

#[inline(always)]
fn odd(pairs: uint32x4_t) -> float32x4_t {
    // SAFETY: see `intrinsics`.
    unsafe { vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff_0000))) }
}

#[inline(always)]
fn even(pairs: uint32x4_t) -> float32x4_t {
    // SAFETY: see `intrinsics`.
    unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)) }
}

/// f16 to f32. Its intrinsic needs a newer compiler than this crate does.
#[inline(always)]
fn widen_f16(halves: uint16x4_t) -> float32x4_t {
    let out: float32x4_t;
    // SAFETY: an instruction of base NEON between registers.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) out, in(vreg) halves, options(pure, nomem, nostack))
    };
    out
}

/// f32 to the nearest f16, ties to even.
#[inline(always)]
fn narrow_f16(v: float32x4_t) -> uint16x4_t {
    let out: uint16x4_t;
    // SAFETY: as above.
    unsafe { asm!("fcvtn {0:v}.4h, {1:v}.4s", out(vreg) out, in(vreg) v, options(pure, nomem, nostack)) };
    out
}

#[inline(always)]
fn round_bf16(v: float32x4_t) -> uint16x4_t {
    // SAFETY: see `intrinsics`.
    unsafe {
        let bits = vreinterpretq_u32_f32(v);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let rounded = vshrq_n_u32::<16>(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))));
        vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(0x7fc0)))
    }
}

#[inline(always)]
fn larger(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: see `intrinsics`. Not the instruction for it: a NaN has to lose as on x86.
    unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
}

impl Vector for Lanes {
    type Pairs = [uint32x4_t; 4];
    const WIDE: bool = false;

    intrinsics! {
        fn splat(v: f32) -> Self { Lanes([vdupq_n_f32(v); 4]) }
        fn add(self, o: Self) -> Self { each!(I => vaddq_f32(self.0[I], o.0[I])) }
        fn sub(self, o: Self) -> Self { each!(I => vsubq_f32(self.0[I], o.0[I])) }
        fn mul(self, o: Self) -> Self { each!(I => vmulq_f32(self.0[I], o.0[I])) }
        fn div(self, o: Self) -> Self { each!(I => vdivq_f32(self.0[I], o.0[I])) }
        fn fma(self, b: Self, c: Self) -> Self { each!(I => vfmaq_f32(c.0[I], self.0[I], b.0[I])) }
        fn min(self, o: Self) -> Self {
            each!(I => vbslq_f32(vcltq_f32(self.0[I], o.0[I]), self.0[I], o.0[I]))
        }
        fn max(self, o: Self) -> Self {
            each!(I => vbslq_f32(vcgtq_f32(self.0[I], o.0[I]), self.0[I], o.0[I]))
        }
        fn zero_where_less(self, x: Self, bound: Self) -> Self {
            each!(I => vbslq_f32(vcltq_f32(x.0[I], bound.0[I]), vdupq_n_f32(0.0), self.0[I]))
        }
        fn bits_to_exponent(self) -> Self {
            each!(I => vreinterpretq_f32_u32(vshlq_n_u32::<23>(vreinterpretq_u32_f32(self.0[I]))))
        }
        fn sum(self) -> f32 {
            let [a, b, c, d] = self.0;
            let v = vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d));
            let v = vadd_f32(vget_low_f32(v), vget_high_f32(v));
            vget_lane_f32::<0>(v) + vget_lane_f32::<1>(v)
        }
        fn largest(self) -> f32 {
            let [a, b, c, d] = self.0;
            let v = larger(larger(a, c), larger(b, d));
            let v = larger(v, vextq_f32::<2>(v, v));
            vgetq_lane_f32::<0>(larger(v, vextq_f32::<1>(v, v)))
        }
        fn add_products(self, a: Self::Pairs, b: Self::Pairs) -> Self {
            let odds: Lanes = each!(I => vfmaq_f32(self.0[I], odd(a[I]), odd(b[I])));
            each!(I => vfmaq_f32(odds.0[I], even(a[I]), even(b[I])))
        }
    }

    memory_intrinsics! {
        fn load(from: *const f32) -> Self { each!(I => vld1q_f32(from.add(4 * I))) }
        fn load_f16(from: *const u16) -> Self { each!(I => widen_f16(vld1_u16(from.add(4 * I)))) }
        fn load_bf16(from: *const u16) -> Self { each!(I => even(vmovl_u16(vld1_u16(from.add(4 * I))))) }
        fn load_pairs(from: *const u16) -> Self::Pairs {
            let pairs = from.cast::<u8>();
            let load = |i: usize| vreinterpretq_u32_u8(vld1q_u8(pairs.add(16 * i)));
            [load(0), load(1), load(2), load(3)]
        }
        fn store(self, to: *mut f32) {
            for i in 0..4 {
                vst1q_f32(to.add(4 * i), self.0[i]);
            }
        }
        fn store_f16(self, to: *mut u16) {
            for i in 0..4 {
                vst1_u16(to.add(4 * i), narrow_f16(self.0[i]));
            }
        }
        fn store_bf16(self, to: *mut u16) {
            for i in 0..4 {
                vst1_u16(to.add(4 * i), round_bf16(self.0[i]));
            }
        }
    }
}
