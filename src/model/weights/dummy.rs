//! Random tensors, for measuring models whose weights are not at hand.

use std::sync::Arc;

use half::slice::HalfFloatSliceExt;

use crate::{
    backend::{Bytes, DType, Tensor},
    error::{Error, Result, shown},
};

/// As models are initialised for training.
const SPREAD: f32 = 0.02;
/// Numbers made at a time: they stay in the first-level cache.
const CHUNK: usize = 4096;

/// A random tensor: a vector that is not a bias is a norm's and lies around 1, all else around 0.
pub(super) fn tensor(name: &str, shape: &[usize], dtype: DType, seed: u64) -> Result<Tensor> {
    let too_large = || Error::Engine(format!("random tensor {}: {shape:?} is too large", shown(name)));
    let len = shape.iter().try_fold(1, |n: usize, &d| n.checked_mul(d)).ok_or_else(too_large)?;
    let mut bytes: Vec<u8> = Vec::new();
    let size = len.checked_mul(dtype.size()).ok_or_else(too_large)?;
    bytes.try_reserve_exact(size).map_err(|_| too_large())?;
    bytes.resize(size, 0);
    let centre = if shape.len() == 1 && !name.ends_with("bias") { 1.0 } else { 0.0 };
    let key = key(name, seed);
    let mut values = [0.0; CHUNK];
    for (chunk, out) in bytes.chunks_mut(CHUNK * dtype.size()).enumerate() {
        let values = &mut values[..out.len() / dtype.size()];
        for (i, value) in (chunk * CHUNK..).zip(values.iter_mut()) {
            *value = centre + SPREAD * normal(key, i as u64);
        }
        write(out, values, dtype);
    }
    Tensor::new(name, shape.to_vec(), dtype, Bytes::new(Arc::new(bytes), 0..size))
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
    let bits = mix(key.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    let sum: i32 = (0..4).map(|i| (bits >> (16 * i) & 0xffff) as i32).sum();
    // Each part has mean 32767.5 and variance (2^32 - 1) / 12.
    (sum as f32 - 4.0 * 32767.5) / 37837.2
}

/// FNV-1a of the name, mixed with the seed.
fn key(name: &str, seed: u64) -> u64 {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    mix(hash ^ mix(seed))
}

/// The last step of SplitMix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_from_seed_name_and_index() {
        let make = |name, len, seed| tensor(name, &[len, 1], DType::F32, seed).unwrap().to_f32();
        let a = make("a", 10_000, 1);
        assert_eq!(a[..5000], make("a", 5000, 1)[..], "the length does not matter");
        assert_ne!(a, make("a", 10_000, 2));
        assert_ne!(a, make("b", 10_000, 1));
        let halves = tensor("a", &[10_000, 1], DType::F16, 1).unwrap();
        let rounded = Tensor::from_f32("a", vec![10_000, 1], DType::F16, &a).unwrap();
        assert_eq!(halves.bytes(), rounded.bytes());
    }

    #[test]
    fn numbers_look_normal_around_0_and_norms_around_1() {
        let moments = |shape: &[usize], name| {
            let values = tensor(name, shape, DType::F32, 7).unwrap().to_f32();
            let mean = values.iter().sum::<f32>() / values.len() as f32;
            let spread =
                (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / values.len() as f32).sqrt();
            (mean, spread)
        };
        for (shape, name, centre) in [
            (&[100, 1000][..], "q.weight", 0.0),
            (&[100_000], "norm.weight", 1.0),
            (&[100_000], "q_proj.bias", 0.0),
        ] {
            let (mean, spread) = moments(shape, name);
            assert!((mean - centre).abs() < 5e-4, "{name}: mean {mean}");
            assert!((spread - SPREAD).abs() < 5e-4, "{name}: spread {spread}");
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        for shape in [&[usize::MAX, 2][..], &[usize::MAX / 8, 1]] {
            assert!(tensor("huge", shape, DType::F32, 0).is_err());
        }
    }
}
