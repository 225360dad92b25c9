//! What the ops compute, in plain loops over f64: slow, to be read, and to test the fast ones against.
//!
//! Matrices are row by row. Numbers are rounded only where a device keeps them in a narrower type.

use crate::backend::{AttentionShape, DType, HeadShape, NormShape};

/// A number as `dtype` keeps it.
pub fn rounded(dtype: DType, value: f32) -> f32 {
    match dtype {
        DType::F32 => value,
        DType::F16 => half::f16::from_f32(value).to_f32(),
        DType::BF16 => half::bf16::from_f32(value).to_f32(),
    }
}

/// `x · wᵀ + bias`; x is `[rows, k]`, w `[n, k]`, bias `[n]` or empty.
pub fn linear(x: &[f32], w: &[f32], bias: &[f32], rows: usize, k: usize) -> Vec<f32> {
    let n = w.len() / k;
    let mut out = Vec::with_capacity(rows * n);
    for row in x.chunks_exact(k).take(rows) {
        for (i, column) in w.chunks_exact(k).enumerate() {
            out.push((dot(row, column) + f64::from(*bias.get(i).unwrap_or(&0.0))) as f32);
        }
    }
    out
}

/// `x / sqrt(mean(x²) + eps) * w`, row by row.
pub fn rms_norm(x: &[f32], w: &[f32], shape: NormShape) -> Vec<f32> {
    let mut out = Vec::with_capacity(shape.rows * shape.dim);
    for row in x.chunks_exact(shape.dim).take(shape.rows) {
        let root = (dot(row, row) / shape.dim as f64 + f64::from(shape.eps)).sqrt();
        out.extend(row.iter().zip(w).map(|(x, w)| (f64::from(*x) / root * f64::from(*w)) as f32));
    }
    out
}

/// `silu(gate) * up`; a row is `dim` gates, then `dim` ups.
pub fn silu_mul(gate_up: &[f32], dim: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(gate_up.len() / 2);
    for row in gate_up.chunks_exact(2 * dim) {
        let (gates, ups) = row.split_at(dim);
        for (gate, up) in gates.iter().zip(ups) {
            let gate = f64::from(*gate);
            out.push((gate / (1.0 + (-gate).exp()) * f64::from(*up)) as f32);
        }
    }
    out
}

/// Rotates one head at a position, by halves. The angles are f32 products, as models are trained with.
pub fn rotate(head: &mut [f32], position: usize, inv_freq: &[f32], scale: f32) {
    let half = head.len() / 2;
    for (i, freq) in inv_freq.iter().enumerate() {
        let angle = f64::from(position as f32 * freq);
        let (sin, cos) = (angle.sin() * f64::from(scale), angle.cos() * f64::from(scale));
        let (a, b) = (f64::from(head[i]), f64::from(head[i + half]));
        head[i] = (a * cos - b * sin) as f32;
        head[i + half] = (b * cos + a * sin) as f32;
    }
}

/// One row of `qkv` at a position: norms of heads, if there are any, and rotation.
pub struct Heads<'a> {
    /// The heads.
    pub shape: HeadShape,
    /// Radians a position.
    pub inv_freq: &'a [f32], // [head_dim / 2]
    /// Multiplies sines and cosines.
    pub rotation_scale: f32,
    /// Weights for queries and for keys, and what is added to the mean square.
    pub norm: Option<(&'a [f32], &'a [f32], f32)>,
}

impl Heads<'_> {
    /// Normalises and rotates queries and keys in place.
    pub fn rope(&self, qkv: &mut [f32], position: usize) {
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        for (i, head) in qkv.chunks_exact_mut(head_dim).take(heads + kv_heads).enumerate() {
            if let Some((q, k, eps)) = self.norm {
                let shape = NormShape { rows: 1, dim: head_dim, eps };
                head.copy_from_slice(&rms_norm(head, if i < heads { q } else { k }, shape));
            }
            rotate(head, position, self.inv_freq, self.rotation_scale);
        }
    }
}

/// Attention of the query at `position` to a sequence's rows of `qkv`, one for each position, whose keys and
/// values are rounded to `dtype`.
pub fn attention(
    query: &[f32],    // [heads, head_dim]
    sequence: &[f32], // [positions, qkv_dim]
    position: usize,
    shape: AttentionShape,
    dtype: DType,
) -> Vec<f32> {
    let HeadShape { heads, kv_heads, head_dim } = shape.heads;
    let dim = shape.heads.qkv_dim();
    let first = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
    // The numbers of the `index`th head among keys and values.
    let at = |p: usize, index: usize| -> Vec<f32> {
        let start = p * dim + (heads + index) * head_dim;
        sequence[start..start + head_dim].iter().map(|&v| rounded(dtype, v)).collect()
    };
    let mut out = Vec::with_capacity(heads * head_dim);
    for (head, query) in query.chunks_exact(head_dim).enumerate() {
        let kv_head = head / (heads / kv_heads);
        let score = |p: usize| dot(query, &at(p, kv_head)) * f64::from(shape.scale);
        let scores: Vec<f64> = (first..=position).map(score).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
        let mut sums = vec![0f64; head_dim];
        for (p, weight) in (first..=position).zip(&weights) {
            for (sum, value) in sums.iter_mut().zip(at(p, kv_heads + kv_head)) {
                *sum += weight * f64::from(value);
            }
        }
        let total: f64 = weights.iter().sum();
        out.extend(sums.iter().map(|s| (s / total) as f32));
    }
    out
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
