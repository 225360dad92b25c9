//! Random tensors, for measuring models whose weights are not at hand.

use crate::{
    backend::{DType, Random, Tensor, mix},
    error::Result,
};

/// A random tensor: a vector that is not a bias is a norm's and lies around 1, all else around 0.
pub(super) fn tensor(name: &str, shape: &[usize], dtype: DType, seed: u64) -> Result<Tensor> {
    let centre = if shape.len() == 1 && !name.ends_with("bias") { 1.0 } else { 0.0 };
    Tensor::random(name, shape.to_vec(), dtype, Random { key: key(name, seed), centre })
}

/// FNV-1a of the name, mixed with the seed.
fn key(name: &str, seed: u64) -> u64 {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    mix(hash ^ mix(seed))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPREAD: f32 = 0.02;

    #[test]
    fn numbers_follow_from_seed_name_and_index() {
        let make = |name, len, seed| tensor(name, &[len, 1], DType::F32, seed).unwrap().to_f32();
        let a = make("a", 10_000, 1);
        assert_eq!(a[..5000], make("a", 5000, 1)[..], "the length does not matter");
        assert_ne!(a, make("a", 10_000, 2));
        assert_ne!(a, make("b", 10_000, 1));
        let halves = tensor("a", &[10_000, 1], DType::F16, 1).unwrap();
        let rounded = Tensor::from_f32("a", vec![10_000, 1], DType::F16, &a).unwrap();
        assert_eq!(halves.made().unwrap().bytes(), rounded.bytes());
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
            assert!(tensor("huge", shape, DType::F32, 0).and_then(|t| t.made()).is_err());
        }
    }
}
