//! One register of sixteen lanes; with `BF16`, products of bf16 numbers in one instruction.

use std::arch::x86_64::*;

use super::{Kernel, Vector, intrinsics, memory_intrinsics};

/// See [`Vector`].
#[derive(Clone, Copy)]
pub(super) struct Lanes<const BF16: bool>(__m512);

/// SAFETY: the machine has `Simd::Avx512`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Lanes<false>>()
}

/// SAFETY: the machine has `Simd::Avx512Bf16`.
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn run_bf16<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Lanes<true>>()
}

/// Lanes 8 apart, then 4, 2, 1.
#[inline(always)]
fn fold(v: __m512, f: impl Fn(__m256, __m256) -> __m256) -> f32 {
    // SAFETY: see `intrinsics`.
    unsafe {
        let v = f(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
        let v = f(v, _mm256_permute2f128_ps::<1>(v, v));
        let v = f(v, _mm256_shuffle_ps::<0b01_00_11_10>(v, v));
        _mm256_cvtss_f32(f(v, _mm256_shuffle_ps::<0b10_11_00_01>(v, v)))
    }
}

#[inline(always)]
fn odd(pairs: __m512i) -> __m512 {
    // SAFETY: see `intrinsics`.
    unsafe { _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x1_0000))) }
}

#[inline(always)]
fn even(pairs: __m512i) -> __m512 {
    // SAFETY: see `intrinsics`.
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)) }
}

impl<const BF16: bool> Vector for Lanes<BF16> {
    type Pairs = __m512i;
    const WIDE: bool = true;

    intrinsics! {
        fn splat(v: f32) -> Self { Lanes(_mm512_set1_ps(v)) }
        fn add(self, o: Self) -> Self { Lanes(_mm512_add_ps(self.0, o.0)) }
        fn sub(self, o: Self) -> Self { Lanes(_mm512_sub_ps(self.0, o.0)) }
        fn mul(self, o: Self) -> Self { Lanes(_mm512_mul_ps(self.0, o.0)) }
        fn div(self, o: Self) -> Self { Lanes(_mm512_div_ps(self.0, o.0)) }
        fn fma(self, b: Self, c: Self) -> Self { Lanes(_mm512_fmadd_ps(self.0, b.0, c.0)) }
        fn min(self, o: Self) -> Self { Lanes(_mm512_min_ps(self.0, o.0)) }
        fn max(self, o: Self) -> Self { Lanes(_mm512_max_ps(self.0, o.0)) }
        fn zero_where_less(self, x: Self, bound: Self) -> Self {
            let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, bound.0);
            Lanes(_mm512_maskz_mov_ps(keep, self.0))
        }
        fn bits_to_exponent(self) -> Self {
            Lanes(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(self.0))))
        }
        fn sum(self) -> f32 { fold(self.0, |a, b| _mm256_add_ps(a, b)) }
        fn largest(self) -> f32 { fold(self.0, |a, b| _mm256_max_ps(a, b)) }
        fn sum4(of: [Self; 4]) -> [f32; 4] {
            let [Lanes(a), Lanes(b), Lanes(c), Lanes(d)] = of;
            // Quarters 0 1 of a and of b, plus their quarters 2 3.
            let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
            let ab = _mm512_add_ps(low, _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b));
            let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(c, d);
            let cd = _mm512_add_ps(low, _mm512_shuffle_f32x4::<0b11_10_11_10>(c, d));
            // One quarter each.
            let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd);
            let v = _mm512_add_ps(even, _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd));
            // Within the quarters.
            let v = _mm512_add_ps(v, _mm512_permute_ps::<0b01_00_11_10>(v));
            let v = _mm512_add_ps(v, _mm512_permute_ps::<0b10_11_00_01>(v));
            let firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
            let v = _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, v));
            std::mem::transmute::<__m128, [f32; 4]>(v)
        }
        fn add_products(self, a: __m512i, b: __m512i) -> Self {
            if BF16 {
                let pairs = |v| std::mem::transmute::<__m512i, __m512bh>(v);
                return Lanes(_mm512_dpbf16_ps(self.0, pairs(a), pairs(b)));
            }
            let odds = _mm512_fmadd_ps(odd(a), odd(b), self.0);
            Lanes(_mm512_fmadd_ps(even(a), even(b), odds))
        }
    }

    memory_intrinsics! {
        fn load(from: *const f32) -> Self { Lanes(_mm512_loadu_ps(from)) }
        fn load_f16(from: *const u16) -> Self { Lanes(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
        fn load_bf16(from: *const u16) -> Self {
            Lanes(even(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()))))
        }
        fn load_pairs(from: *const u16) -> __m512i { _mm512_loadu_si512(from.cast()) }
        fn store(self, to: *mut f32) { _mm512_storeu_ps(to, self.0) }
        fn store_f16(self, to: *mut u16) {
            _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0))
        }
        fn store_bf16(self, to: *mut u16) {
            // Not the instruction for it, which takes subnormal numbers for zero.
            let bits = _mm512_castps_si512(self.0);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let more = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, more));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(rounded))
        }
    }
}
