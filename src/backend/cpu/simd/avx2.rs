//! Two registers of eight lanes.

use std::arch::x86_64::*;

use super::{Kernel, Vector, intrinsics, memory_intrinsics};

/// See [`Vector`].
#[derive(Clone, Copy)]
pub(super) struct Lanes(__m256, __m256);

/// SAFETY: the machine has `Simd::Avx2`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Lanes>()
}

/// Lanes 4 apart, then 2, then 1.
#[inline(always)]
fn fold(v: __m256, f: impl Fn(__m128, __m128) -> __m128) -> f32 {
    // SAFETY: see `intrinsics`.
    unsafe {
        let v = f(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = f(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(f(v, _mm_shuffle_ps::<1>(v, v)))
    }
}

#[inline(always)]
fn round_bf16(v: __m256) -> __m256i {
    // SAFETY: see `intrinsics`.
    unsafe {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let more = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, more));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan)
    }
}

#[inline(always)]
fn odd(pairs: __m256i) -> __m256 {
    // SAFETY: see `intrinsics`.
    unsafe { _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-0x1_0000))) }
}

#[inline(always)]
fn even(pairs: __m256i) -> __m256 {
    // SAFETY: see `intrinsics`.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)) }
}

impl Vector for Lanes {
    type Pairs = (__m256i, __m256i);
    const WIDE: bool = false;

    intrinsics! {
        fn splat(v: f32) -> Self { Lanes(_mm256_set1_ps(v), _mm256_set1_ps(v)) }
        fn add(self, o: Self) -> Self { Lanes(_mm256_add_ps(self.0, o.0), _mm256_add_ps(self.1, o.1)) }
        fn sub(self, o: Self) -> Self { Lanes(_mm256_sub_ps(self.0, o.0), _mm256_sub_ps(self.1, o.1)) }
        fn mul(self, o: Self) -> Self { Lanes(_mm256_mul_ps(self.0, o.0), _mm256_mul_ps(self.1, o.1)) }
        fn div(self, o: Self) -> Self { Lanes(_mm256_div_ps(self.0, o.0), _mm256_div_ps(self.1, o.1)) }
        fn fma(self, b: Self, c: Self) -> Self {
            Lanes(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1))
        }
        fn min(self, o: Self) -> Self { Lanes(_mm256_min_ps(self.0, o.0), _mm256_min_ps(self.1, o.1)) }
        fn max(self, o: Self) -> Self { Lanes(_mm256_max_ps(self.0, o.0), _mm256_max_ps(self.1, o.1)) }
        fn zero_where_less(self, x: Self, bound: Self) -> Self {
            let less0 = _mm256_cmp_ps::<_CMP_LT_OQ>(x.0, bound.0);
            let less1 = _mm256_cmp_ps::<_CMP_LT_OQ>(x.1, bound.1);
            Lanes(_mm256_andnot_ps(less0, self.0), _mm256_andnot_ps(less1, self.1))
        }
        fn bits_to_exponent(self) -> Self {
            let (a, b) = (_mm256_castps_si256(self.0), _mm256_castps_si256(self.1));
            let (a, b) = (_mm256_slli_epi32::<23>(a), _mm256_slli_epi32::<23>(b));
            Lanes(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b))
        }
        fn sum(self) -> f32 { fold(_mm256_add_ps(self.0, self.1), |a, b| _mm_add_ps(a, b)) }
        fn largest(self) -> f32 { fold(_mm256_max_ps(self.0, self.1), |a, b| _mm_max_ps(a, b)) }
        fn add_products(self, a: Self::Pairs, b: Self::Pairs) -> Self {
            let low = _mm256_fmadd_ps(odd(a.0), odd(b.0), self.0);
            let high = _mm256_fmadd_ps(odd(a.1), odd(b.1), self.1);
            Lanes(_mm256_fmadd_ps(even(a.0), even(b.0), low), _mm256_fmadd_ps(even(a.1), even(b.1), high))
        }
    }

    memory_intrinsics! {
        fn load(from: *const f32) -> Self { Lanes(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        fn load_f16(from: *const u16) -> Self {
            let (low, high) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast()));
            Lanes(_mm256_cvtph_ps(low), _mm256_cvtph_ps(high))
        }
        fn load_bf16(from: *const u16) -> Self {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
            Lanes(even(low), even(high))
        }
        fn load_pairs(from: *const u16) -> Self::Pairs {
            (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(16).cast()))
        }
        fn store(self, to: *mut f32) {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1)
        }
        fn store_f16(self, to: *mut u16) {
            _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0));
            _mm_storeu_si128(to.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.1))
        }
        fn store_bf16(self, to: *mut u16) {
            // Packing works on halves of registers: put the quarters in order again.
            let packed = _mm256_packus_epi32(round_bf16(self.0), round_bf16(self.1));
            _mm256_storeu_si256(to.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed))
        }
    }
}
