//! Sixteen lanes of f32, whatever the machine has for them.
//!
//! Kernels are written once, over [`Vector`], and compiled for each instruction set. Every operation here
//! rounds alike on all of them, so the results have the same bits everywhere. The one exception:
//! `Avx512Bf16` takes subnormal numbers for zero in products of two bf16 numbers.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use crate::backend::DType;

/// Numbers in a [`Vector`].
pub(super) const LANES: usize = 16;

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Simd {
    /// None in particular: slow, and the same bits.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with products of bf16 numbers.
    Avx512Bf16,
    /// NEON, on 64-bit ARM.
    Neon,
}

impl Simd {
    /// Every instruction set, the best one last.
    pub const ALL: [Simd; 5] = [Simd::Portable, Simd::Neon, Simd::Avx2, Simd::Avx512, Simd::Avx512Bf16];

    /// The best one that this machine has.
    pub fn best() -> Simd {
        Simd::ALL.into_iter().rfind(|s| s.available()).unwrap_or(Simd::Portable)
    }

    /// Whether this machine has it.
    #[cfg(target_arch = "x86_64")]
    pub fn available(self) -> bool {
        match self {
            Simd::Portable => true,
            Simd::Neon => false,
            Simd::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            Simd::Avx512 => {
                Simd::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            Simd::Avx512Bf16 => Simd::Avx512.available() && is_x86_feature_detected!("avx512bf16"),
        }
    }

    /// Whether this machine has it.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn available(self) -> bool {
        self == Simd::Portable || (self == Simd::Neon && cfg!(target_arch = "aarch64"))
    }

    /// As in messages.
    pub fn name(self) -> &'static str {
        match self {
            Simd::Portable => "portable",
            Simd::Avx2 => "avx2",
            Simd::Avx512 => "avx512",
            Simd::Avx512Bf16 => "avx512bf16",
            Simd::Neon => "neon",
        }
    }

    /// Runs a kernel on this instruction set, which must be available: `Cpu` checks it once.
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Simd::Portable => kernel.run::<portable::Lanes>(),
            // SAFETY: `Cpu` holds only instruction sets that this machine has.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => unsafe { avx2::run(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512Bf16 if K::BF16 => unsafe { avx512::run_bf16(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 | Simd::Avx512Bf16 => unsafe { avx512::run(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Simd::Neon => unsafe { neon::run(kernel) },
            _ => panic!("{} was chosen and is not available; this is a bug", self.name()),
        }
    }
}

/// Something to be compiled for every instruction set. `run`, and what it calls with a `V`, must be
/// `#[inline(always)]`: only what is inlined into the instruction set's own function may use it.
pub(super) trait Kernel {
    type Output;
    /// Whether it multiplies bf16 numbers: the others need not be compiled for `Avx512Bf16` again.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    const BF16: bool = false;

    fn run<V: Vector>(self) -> Self::Output;
}

/// Sixteen lanes of f32. Pointers need not be aligned.
pub(super) trait Vector: Copy {
    /// 32 bf16 numbers.
    type Pairs: Copy;
    /// Whether there are registers for 6 x 4 sums and what is added to them (AVX-512 has 32), not only for 3 x 2.
    const WIDE: bool;

    fn splat(v: f32) -> Self;
    fn add(self, o: Self) -> Self;
    fn sub(self, o: Self) -> Self;
    fn mul(self, o: Self) -> Self;
    fn div(self, o: Self) -> Self;
    /// `self * b + c`, rounded once.
    fn fma(self, b: Self, c: Self) -> Self;
    /// `self < o ? self : o`: `o` if either is NaN.
    fn min(self, o: Self) -> Self;
    /// `self > o ? self : o`: `o` if either is NaN.
    fn max(self, o: Self) -> Self;
    /// `self`, with zeros where `x < bound`.
    fn zero_where_less(self, x: Self, bound: Self) -> Self;
    /// The lowest bits of the lanes, as they are in memory, become exponents: `bits << 23`.
    fn bits_to_exponent(self) -> Self;
    /// Lanes 8 apart are added, then 4, 2, 1 apart.
    fn sum(self) -> f32;
    /// The largest lane.
    fn largest(self) -> f32;
    /// [`Vector::sum`] of each.
    #[inline(always)]
    fn sum4(of: [Self; 4]) -> [f32; 4] {
        [of[0].sum(), of[1].sum(), of[2].sum(), of[3].sum()]
    }
    /// Adds the products of the odd numbers, then those of the even ones, each product and sum rounded once.
    fn add_products(self, a: Self::Pairs, b: Self::Pairs) -> Self;

    /// SAFETY: 16 numbers from `from` on can be read.
    unsafe fn load(from: *const f32) -> Self;
    /// SAFETY: 16 f16 numbers from `from` on can be read.
    unsafe fn load_f16(from: *const u16) -> Self;
    /// SAFETY: 16 bf16 numbers from `from` on can be read.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// SAFETY: 32 bf16 numbers from `from` on can be read.
    unsafe fn load_pairs(from: *const u16) -> Self::Pairs;
    /// SAFETY: 16 numbers from `to` on can be written.
    unsafe fn store(self, to: *mut f32);
    /// Rounds to the nearest f16, ties to even. SAFETY: 16 numbers from `to` on can be written.
    unsafe fn store_f16(self, to: *mut u16);
    /// Rounds to the nearest bf16, ties to even. SAFETY: 16 numbers from `to` on can be written.
    unsafe fn store_bf16(self, to: *mut u16);
}

/// Methods whose bodies are intrinsics of one instruction set.
macro_rules! intrinsics {
    ($(fn $name:ident($($args:tt)*) $(-> $ret:ty)? $body:block)*) => {$(
        #[inline(always)]
        fn $name($($args)*) $(-> $ret)? {
            // SAFETY: this code runs only inlined into this instruction set's `run`, which is called only
            // on machines that have it; it touches no memory.
            unsafe { $body }
        }
    )*};
}

/// Methods whose bodies are intrinsics that read or write memory.
macro_rules! memory_intrinsics {
    ($(fn $name:ident($($args:tt)*) $(-> $ret:ty)? $body:block)*) => {$(
        #[inline(always)]
        unsafe fn $name($($args)*) $(-> $ret)? {
            // SAFETY: as in `intrinsics`; the caller vouches for the memory.
            unsafe { $body }
        }
    )*};
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use {intrinsics, memory_intrinsics};

/// `e` to the power of each lane, wrong by about one unit in the last place; 0 below -87.33, no more than
/// `exp(88)`.
#[inline(always)]
pub(super) fn exp<V: Vector>(x: V) -> V {
    const LOWEST: f32 = -87.33;
    // Added to a number below 2^22 it leaves the whole number, plus 127, in the lowest bits.
    const WHOLE: f32 = 12_582_912.0 + 127.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const POLYNOMIAL: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let clamped = V::splat(88.0).min(V::splat(LOWEST).max(x));
    let shifted = clamped.fma(V::splat(std::f32::consts::LOG2_E), V::splat(WHOLE));
    let whole = shifted.sub(V::splat(WHOLE));
    let rest = whole.fma(V::splat(-LN2_HIGH), clamped);
    let rest = whole.fma(V::splat(-LN2_LOW), rest);
    let mut p = V::splat(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = p.fma(rest, V::splat(*c));
    }
    let p = p.fma(rest.mul(rest), rest).add(V::splat(1.0));
    p.mul(shifted.bits_to_exponent()).zero_where_less(x, V::splat(LOWEST))
}

/// 16 numbers of a type.
///
/// SAFETY: they can be read.
#[inline(always)]
unsafe fn load_as<V: Vector>(dtype: DType, from: *const u8) -> V {
    // SAFETY: the caller's.
    unsafe {
        match dtype {
            DType::F32 => V::load(from.cast()),
            DType::F16 => V::load_f16(from.cast()),
            DType::BF16 => V::load_bf16(from.cast()),
        }
    }
}

/// The first `n < 16` of 16 lanes, the others zero.
///
/// SAFETY: `n` numbers can be read.
#[inline(always)]
pub(super) unsafe fn load_part<V: Vector>(from: *const f32, n: usize) -> V {
    let mut lanes = [0f32; LANES];
    // SAFETY: the caller's; n < 16.
    unsafe {
        std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n);
        V::load(lanes.as_ptr())
    }
}

/// Writes the first `n < 16` of 16 lanes.
///
/// SAFETY: `n` numbers can be written.
#[inline(always)]
pub(super) unsafe fn store_part<V: Vector>(v: V, to: *mut f32, n: usize) {
    let mut lanes = [0f32; LANES];
    // SAFETY: the caller's; n < 16.
    unsafe {
        v.store(lanes.as_mut_ptr());
        std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n);
    }
}

/// Widens `to.len()` numbers.
///
/// SAFETY: they can be read from `from` on.
#[inline(always)]
pub(super) unsafe fn widen<V: Vector>(dtype: DType, from: *const u8, to: &mut [f32]) {
    // SAFETY: the caller's. The type is a constant in each arm, and no question in the loops.
    unsafe {
        match dtype {
            DType::F32 => widen_from::<V>(DType::F32, from, to),
            DType::F16 => widen_from::<V>(DType::F16, from, to),
            DType::BF16 => widen_from::<V>(DType::BF16, from, to),
        }
    }
}

/// SAFETY: as for `widen`.
#[inline(always)]
unsafe fn widen_from<V: Vector>(dtype: DType, from: *const u8, to: &mut [f32]) {
    let whole = to.len() / LANES * LANES;
    let mut last = [0u8; 4 * LANES];
    // SAFETY: the caller's; the last, incomplete 16 are copied to a place that has room for all.
    unsafe {
        for i in (0..whole).step_by(LANES) {
            load_as::<V>(dtype, from.add(i * dtype.size())).store(to.as_mut_ptr().add(i));
        }
        let rest = to.len() - whole;
        if rest > 0 {
            let from = from.add(whole * dtype.size());
            std::ptr::copy_nonoverlapping(from, last.as_mut_ptr(), rest * dtype.size());
            store_part(load_as::<V>(dtype, last.as_ptr()), to.as_mut_ptr().add(whole), rest);
        }
    }
}

/// Rounds 16 lanes to f16 or bf16.
///
/// SAFETY: 16 numbers can be written.
#[inline(always)]
unsafe fn store_as<V: Vector>(dtype: DType, v: V, to: *mut u16) {
    // SAFETY: the caller's.
    unsafe {
        match dtype {
            DType::F16 => v.store_f16(to),
            DType::BF16 => v.store_bf16(to),
            DType::F32 => panic!("f32 is not a 16-bit number; this is a bug"),
        }
    }
}

/// Rounds to 16-bit numbers: f16, or bf16.
///
/// SAFETY: `from.len()` numbers can be written from `to` on.
#[inline(always)]
pub(super) unsafe fn narrow<V: Vector>(dtype: DType, from: &[f32], to: *mut u16) {
    let whole = from.len() / LANES * LANES;
    let mut last = [0u16; LANES];
    // SAFETY: the caller's; the last, incomplete 16 go through a place that has room for all.
    unsafe {
        for i in (0..whole).step_by(LANES) {
            store_as(dtype, V::load(from.as_ptr().add(i)), to.add(i));
        }
        let rest = from.len() - whole;
        if rest > 0 {
            store_as::<V>(dtype, load_part(from.as_ptr().add(whole), rest), last.as_mut_ptr());
            std::ptr::copy_nonoverlapping(last.as_ptr(), to.add(whole), rest);
        }
    }
}
