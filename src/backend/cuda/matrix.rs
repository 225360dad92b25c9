//! Weights on the GPU.
#![allow(unsafe_code)]

use std::sync::Arc;

use super::{Cuda, DevicePtr, dummy, memory::DeviceBuf};
use crate::{
    backend::{DType, Tensor},
    error::Result,
};

/// The weights `[n, k]` of a linear layer, with their biases.
pub struct Matrix {
    weights: Arc<DeviceBuf>,
    /// As f32, and in the weights' type, for products whose result is of that type.
    bias: Option<(Arc<DeviceBuf>, Arc<DeviceBuf>)>,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) dtype: DType,
}

impl Matrix {
    pub(super) fn new(cuda: &Cuda, parts: &[Tensor], biases: &[Tensor]) -> Result<Matrix> {
        let shape = |part: &Tensor| match part.shape[..] {
            [n, k] => (n, k),
            _ => panic!("a matrix of shape {:?}; this is a bug", part.shape),
        };
        let (_, k) = parts.first().map(shape).expect("a matrix of no parts; this is a bug");
        let n = parts.iter().map(|p| shape(p).0).sum();
        let dtype = cuda.dtype;
        assert!(
            parts.iter().all(|p| shape(p).1 == k && p.dtype == dtype),
            "parts of different widths, or of another type than the model's; this is a bug"
        );
        let weights = Arc::new(cuda.take(n * k * dtype.size())?);
        let mut at = 0;
        for part in parts {
            match part.random_numbers() {
                // SAFETY: the parts' numbers lie one after another in what has just been taken.
                Some(random) => unsafe { dummy::fill(cuda, weights.ptr().add(at), part.len(), random)? },
                None => cuda.uploader.upload(&weights, at, part.stored())?,
            }
            at += part.len() * dtype.size();
        }
        let bias = if biases.is_empty() { None } else { Some(upload_bias(cuda, biases, n)?) };
        Ok(Matrix { weights, bias, n, k, dtype })
    }

    pub(super) fn weights(&self) -> DevicePtr {
        self.weights.ptr()
    }

    /// The biases, if there are any, as `dtype`.
    pub(super) fn bias(&self, dtype: DType) -> Option<DevicePtr> {
        let (wide, own) = self.bias.as_ref()?;
        Some(if dtype == DType::F32 { wide.ptr() } else { own.ptr() })
    }
}

fn upload_bias(cuda: &Cuda, biases: &[Tensor], n: usize) -> Result<(Arc<DeviceBuf>, Arc<DeviceBuf>)> {
    let wide: Vec<f32> = biases.iter().flat_map(Tensor::to_f32).collect();
    assert_eq!(wide.len(), n, "as many biases as rows; this is a bug");
    let own = Tensor::from_f32("bias", vec![n], cuda.dtype, &wide)?;
    Ok((cuda.upload_f32(&wide)?, cuda.upload(own.stored())?))
}
