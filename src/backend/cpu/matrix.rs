//! Weights as the files have them: not copied, not converted, not aligned.

use crate::{
    backend::Tensor,
    error::{Error, Result},
};

/// A linear layer's weights, or an embedding's.
pub struct Matrix {
    pub(super) parts: Vec<Part>,
    /// Rows of all parts: numbers that come out.
    pub(super) n: usize,
    /// Numbers that go in.
    pub(super) k: usize,
    pub(super) bias: Vec<f32>, // [n], or none
}

/// Consecutive rows of a matrix from one tensor.
pub(super) struct Part {
    pub(super) weights: Tensor, // [n, k]
    /// The first row's place in the matrix.
    pub(super) start: usize,
    pub(super) n: usize,
}

impl Matrix {
    pub(super) fn new(parts: &[Tensor], biases: &[Tensor]) -> Result<Self> {
        let wrong = |t: &Tensor, why: String| Err(Error::Engine(format!("tensor {}: {why}", t.name)));
        let Some(first) = parts.first() else {
            return Err(Error::Engine("a matrix of no tensors".into()));
        };
        let mut matrix = Matrix { parts: Vec::new(), n: 0, k: 0, bias: Vec::new() };
        for t in parts {
            let &[n, k] = t.shape.as_slice() else {
                return wrong(t, format!("shape {:?} is not that of a matrix", t.shape));
            };
            matrix.k = if matrix.parts.is_empty() { k } else { matrix.k };
            if k != matrix.k {
                return wrong(t, format!("rows of {k}, those of {} have {}", first.name, matrix.k));
            }
            matrix.parts.push(Part { weights: t.made()?, start: matrix.n, n });
            matrix.n += n;
        }
        if !biases.is_empty() && biases.len() != parts.len() {
            let why = format!("one of {} biases for {} matrices", biases.len(), parts.len());
            return wrong(&biases[0], why);
        }
        for (bias, part) in biases.iter().zip(&matrix.parts) {
            if bias.shape != [part.n] {
                let why =
                    format!("shape {:?}, that of {} makes it [{}]", bias.shape, part.weights.name, part.n);
                return wrong(bias, why);
            }
            matrix.bias.extend(bias.to_f32());
        }
        Ok(matrix)
    }

    /// The bytes of row `i`.
    pub(super) fn row(&self, i: usize) -> (&Tensor, &[u8]) {
        let part = &self.parts[self.parts.partition_point(|p| p.start <= i) - 1];
        let bytes = self.k * part.weights.dtype.size();
        (&part.weights, &part.weights.bytes()[(i - part.start) * bytes..][..bytes])
    }
}
