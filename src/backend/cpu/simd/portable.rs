//! Arrays, for the compiler to make the best of.

use half::f16;

use super::{LANES, Vector};

/// See [`Vector`].
#[derive(Clone, Copy)]
pub(super) struct Lanes([f32; LANES]);

impl Lanes {
    #[inline(always)]
    fn map(mut self, f: impl Fn(f32) -> f32) -> Self {
        for a in &mut self.0 {
            *a = f(*a);
        }
        self
    }

    #[inline(always)]
    fn zip(mut self, o: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        for (a, b) in self.0.iter_mut().zip(o.0) {
            *a = f(*a, b);
        }
        self
    }

    #[inline(always)]
    fn fold(self, f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut lanes = self.0;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] = f(lanes[i], lanes[i + half]);
            }
        }
        lanes[0]
    }

    /// SAFETY: 16 numbers can be read.
    #[inline(always)]
    unsafe fn from_u16(from: *const u16, f: impl Fn(u16) -> f32) -> Self {
        let mut lanes = [0f32; LANES];
        for (i, lane) in lanes.iter_mut().enumerate() {
            // SAFETY: the caller's.
            *lane = f(unsafe { from.add(i).read_unaligned() });
        }
        Lanes(lanes)
    }

    /// SAFETY: 16 numbers can be written.
    #[inline(always)]
    unsafe fn to_u16(self, to: *mut u16, f: impl Fn(f32) -> u16) {
        for (i, lane) in self.0.into_iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { to.add(i).write_unaligned(f(lane)) };
        }
    }
}

/// `a * b + c`, rounded once, without an instruction for it: the product is exact in f64; the sum is rounded
/// to odd, so that rounding it again to f32 cannot go wrong.
#[inline(always)]
fn fma(a: f32, b: f32, c: f32) -> f32 {
    let product = f64::from(a) * f64::from(b);
    let c = f64::from(c);
    let sum = product + c;
    let back = sum - product;
    let error = (product - (sum - back)) + (c - back);
    let bits = sum.to_bits();
    // An inexact even sum moves one step towards the exact one: up in magnitude if the signs agree. The
    // error of an infinite or undefined sum is undefined: neither more nor less than zero.
    let away = (error > 0.0) == (sum > 0.0);
    let inexact = (error > 0.0) | (error < 0.0);
    let step = if away { 1 } else { u64::MAX };
    let odd = if inexact & (bits & 1 == 0) { bits.wrapping_add(step) } else { bits };
    f64::from_bits(odd) as f32
}

/// Exact: the exponent is moved by a product, which also makes subnormal numbers normal.
#[inline(always)]
fn from_f16(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff);
    let sign = u32::from(bits & 0x8000) << 16;
    let scaled = (f32::from_bits(magnitude << 13) * f32::from_bits(0x7780_0000)).to_bits();
    let value = if magnitude >= 0x7c00 { 0x7f80_0000 | (magnitude << 13) } else { scaled };
    f32::from_bits(value | sign)
}

#[inline(always)]
fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[inline(always)]
fn to_bf16(v: f32) -> u16 {
    let bits = v.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if v.is_nan() { 0x7fc0 } else { rounded as u16 }
}

impl Vector for Lanes {
    type Pairs = [u32; LANES];
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(v: f32) -> Self {
        Lanes([v; LANES])
    }
    #[inline(always)]
    fn add(self, o: Self) -> Self {
        self.zip(o, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, o: Self) -> Self {
        self.zip(o, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, o: Self) -> Self {
        self.zip(o, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, o: Self) -> Self {
        self.zip(o, |a, b| a / b)
    }
    // Too long to stand wherever it is used.
    #[inline(never)]
    fn fma(mut self, b: Self, c: Self) -> Self {
        for ((a, b), c) in self.0.iter_mut().zip(b.0).zip(c.0) {
            *a = fma(*a, b, c);
        }
        self
    }
    #[inline(always)]
    fn min(self, o: Self) -> Self {
        self.zip(o, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, o: Self) -> Self {
        self.zip(o, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn zero_where_less(mut self, x: Self, bound: Self) -> Self {
        for ((a, x), bound) in self.0.iter_mut().zip(x.0).zip(bound.0) {
            *a = if x < bound { 0.0 } else { *a };
        }
        self
    }
    #[inline(always)]
    fn bits_to_exponent(self) -> Self {
        self.map(|a| f32::from_bits(a.to_bits() << 23))
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        self.fold(|a, b| a + b)
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        self.fold(|a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn add_products(self, a: Self::Pairs, b: Self::Pairs) -> Self {
        let part = |pairs: Self::Pairs, odd: bool| {
            Lanes(pairs.map(|p| f32::from_bits(if odd { p & 0xffff_0000 } else { p << 16 })))
        };
        let odd = part(a, true).fma(part(b, true), self);
        part(a, false).fma(part(b, false), odd)
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        Lanes(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the caller's.
        unsafe { Lanes::from_u16(from, from_f16) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller's.
        unsafe { Lanes::from_u16(from, from_bf16) }
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const u16) -> Self::Pairs {
        // SAFETY: the caller's.
        unsafe { from.cast::<Self::Pairs>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        // SAFETY: the caller's.
        unsafe { self.to_u16(to, |v| f16::from_f32(v).to_bits()) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        // SAFETY: the caller's.
        unsafe { self.to_u16(to, to_bf16) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of all sizes, whose products nearly cancel with sums or halve a unit in the last place.
    fn bits(state: &mut u64) -> u32 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        (*state >> 16) as u32
    }

    #[test]
    fn fma_rounds_once() {
        let mut state = 0x9e37_79b9_7f4a_7c15;
        let special = [0.0, -0.0, 1.0, -1.0, f32::MAX, f32::MIN_POSITIVE, 1e-45, f32::INFINITY, f32::NAN];
        let check = |a: f32, b: f32, c: f32| {
            let (got, want) = (fma(a, b, c), a.mul_add(b, c));
            let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
            assert!(same, "{a:e} * {b:e} + {c:e}: {got:e}, not {want:e}");
        };
        for a in special {
            for b in special {
                for c in special {
                    check(a, b, c);
                    check(a, b, -c);
                }
            }
        }
        for _ in 0..1_000_000 {
            let [a, b, c] = [0; 3].map(|_| f32::from_bits(bits(&mut state)));
            check(a, b, c);
            // Near a tie: a product of few bits and a sum of a very different size.
            let few = |v: f32| f32::from_bits(v.to_bits() & 0xbfff_f000 | 0x3000_0000);
            check(few(a), few(b), f32::from_bits(c.to_bits() & 0xbfff_ffff | 0x2000_0000));
            check(few(a), few(b), -(few(a) * few(b)));
            check(few(a), 1.0 + f32::EPSILON, few(c) * 1e-8);
        }
    }

    #[test]
    fn every_f16_widens_and_bf16_rounds_as_half_does() {
        for bits in 0..=u16::MAX {
            let (got, want) = (from_f16(bits), f16::from_bits(bits).to_f32());
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{bits:#x}");
        }
        let mut state = 7;
        for _ in 0..1_000_000 {
            let v = f32::from_bits(bits(&mut state));
            let (got, want) = (half::bf16::from_bits(to_bf16(v)), half::bf16::from_f32(v));
            assert!(got == want || (v.is_nan() && got.is_nan()), "{v:e}");
        }
    }
}
