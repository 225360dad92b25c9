//! Random numbers that follow from a key and their place alone, so that a device can make them where it needs them.

use half::slice::HalfFloatSliceExt;

use super::DType;

/// As models are initialised for training.
const SPREAD: f32 = 0.02;
/// Numbers made at a time: they stay in the first-level cache.
const CHUNK: usize = 4096;
/// Between the keys of neighbours, as in SplitMix64.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Nearly normal numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Random {
    /// Different keys give different numbers.
    pub key: u64,
    /// The mean.
    pub centre: f32,
}

impl Random {
    /// Number `index`.
    pub fn at(&self, index: u64) -> f32 {
        self.centre + SPREAD * normal(self.key, index)
    }

    /// The numbers from this one on.
    pub(super) fn from(self, index: u64) -> Random {
        Random { key: self.key.wrapping_add(index.wrapping_mul(STEP)), ..self }
    }

    /// Fills bytes with the first numbers, little-endian.
    pub(super) fn fill(&self, bytes: &mut [u8], dtype: DType) {
        let mut values = [0.0; CHUNK];
        for (chunk, out) in bytes.chunks_mut(CHUNK * dtype.size()).enumerate() {
            let values = &mut values[..out.len() / dtype.size()];
            for (i, value) in (chunk * CHUNK..).zip(values.iter_mut()) {
                *value = self.at(i as u64);
            }
            write(out, values, dtype);
        }
    }
}

fn write(out: &mut [u8], values: &[f32], dtype: DType) {
    match dtype {
        DType::F32 => {
            for (out, v) in out.chunks_exact_mut(4).zip(values) {
                out.copy_from_slice(&v.to_le_bytes());
            }
        }
        DType::F16 => {
            let mut halves = [half::f16::ZERO; CHUNK];
            let halves = &mut halves[..values.len()];
            halves.convert_from_f32_slice(values);
            for (out, v) in out.chunks_exact_mut(2).zip(halves) {
                out.copy_from_slice(&v.to_le_bytes());
            }
        }
        DType::BF16 => {
            for (out, &v) in out.chunks_exact_mut(2).zip(values) {
                out.copy_from_slice(&half::bf16::from_f32(v).to_le_bytes());
            }
        }
    }
}

/// Nearly normal, mean 0, variance 1: a sum of four even numbers.
fn normal(key: u64, index: u64) -> f32 {
    let bits = mix(key.wrapping_add(index.wrapping_mul(STEP)));
    let sum: i32 = (0..4).map(|i| (bits >> (16 * i) & 0xffff) as i32).sum();
    // Each part has mean 32767.5 and variance (2^32 - 1) / 12.
    (sum as f32 - 4.0 * 32767.5) / 37837.2
}

/// The last step of SplitMix64: a number whose bits all depend on all of x's.
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
