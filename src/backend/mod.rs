//! The ops a model is written in. A backend is a device that carries them out.
//!
//! No op has a default body: one that is missing on a device cannot fall back to the host unnoticed.
//! Ops write into buffers of the caller; nothing is allocated in a step.

pub mod cpu;
mod tensor;

pub use tensor::{Bytes, DType, Tensor};

use crate::{
    batch::{MicroBatch, Sampled},
    error::Result,
};

/// The most rows of a micro-batch and what follows from it for buffers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Rows of a micro-batch.
    pub rows_max: usize,
    /// Sequences of a micro-batch.
    pub seqs_max: usize,
    /// Output rows of a micro-batch.
    pub outputs_max: usize,
    /// Tokens of a sequence.
    pub context_max: usize,
}

/// One layer's KV pages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KvShape {
    /// Blocks of `KV_BLOCK` tokens.
    pub blocks: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Numbers a head.
    pub head_dim: usize,
    /// How keys and values are kept.
    pub dtype: DType,
}

impl KvShape {
    /// Bytes of keys and values of all blocks.
    pub fn bytes(&self) -> usize {
        2 * self.blocks * crate::batch::KV_BLOCK * self.kv_heads * self.head_dim * self.dtype.size()
    }
}

/// Rows to be normalised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormShape {
    /// Rows.
    pub rows: usize,
    /// Numbers a row.
    pub dim: usize,
    /// Added to the mean square.
    pub eps: f32,
}

/// Attention heads. A row of `qkv` is `heads` queries, then `kv_heads` keys, then `kv_heads` values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadShape {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Numbers a head; even.
    pub head_dim: usize,
}

impl HeadShape {
    /// Numbers in a row of `qkv`.
    pub fn qkv_dim(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Numbers in a row of queries, or of attention's result.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }
}

/// RMS norms of single heads, before the rotation (Qwen3).
pub struct QkNorm<'a, B: Backend> {
    /// Weights of the queries' norm.
    pub q: &'a B::Buf, // [head_dim]
    /// Weights of the keys' norm.
    pub k: &'a B::Buf, // [head_dim]
    /// Added to the mean square.
    pub eps: f32,
}

/// Softmax attention over a sequence's cached tokens up to each row's own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// The heads.
    pub heads: HeadShape,
    /// Multiplies the scores.
    pub scale: f32,
    /// A row sees itself and the `window - 1` tokens before it; `None`: all before it.
    pub window: Option<usize>,
}

/// A device and its ops.
pub trait Backend: Send + Sync + Sized + 'static {
    /// Numbers on the device: activations, norm weights.
    type Buf: Send;
    /// The weights of a linear layer or an embedding, kept in their type.
    type Matrix: Send + Sync;
    /// One layer's KV pages.
    type Kv: Send;
    /// A micro-batch as the ops want it: positions, rotations, block tables.
    type Batch: Send;
    /// Per-sequence state of sampling: penalties, random numbers.
    type Sampler: Send;

    /// The device's name in messages and layouts: `cpu`, `cuda:1`.
    fn name(&self) -> String;

    /// Makes a buffer of activations, zeroed.
    fn buf(&self, len: usize) -> Result<Self::Buf>;
    /// Loads a vector, widened: a norm's weights.
    fn vector(&self, tensor: &Tensor) -> Result<Self::Buf>;
    /// Loads tensors `[n_i, k]`, stacked to `[sum n_i, k]`, with their biases `[n_i]` (all or none).
    fn matrix(&self, parts: &[Tensor], biases: &[Tensor]) -> Result<Self::Matrix>;
    /// Makes the KV pages of a layer.
    fn kv(&self, shape: KvShape) -> Result<Self::Kv>;
    /// Makes room for a micro-batch. `inv_freq` is what the positions are multiplied by for the
    /// rotation, `rotation_scale` multiplies its sines and cosines.
    fn batch(&self, limits: Limits, inv_freq: &[f32], rotation_scale: f32) -> Result<Self::Batch>;
    /// Makes the state of sampling from `vocab` logits.
    fn sampler(&self, vocab: usize) -> Result<Self::Sampler>;

    /// Brings a micro-batch to the device.
    fn set_batch(&self, batch: &mut Self::Batch, from: &MicroBatch) -> Result<()>;
    /// Copies to the host.
    fn read(&self, out: &mut [f32], from: &Self::Buf) -> Result<()>;
    /// Copies from the host.
    fn write(&self, to: &mut Self::Buf, from: &[f32]) -> Result<()>;

    /// `out[row] = table[id of row]`.
    fn embed(&self, out: &mut Self::Buf, table: &Self::Matrix, batch: &Self::Batch) -> Result<()>;
    /// `out = x / sqrt(mean(x²) + eps) * w`, row by row.
    fn rms_norm(&self, out: &mut Self::Buf, x: &Self::Buf, w: &Self::Buf, shape: NormShape) -> Result<()>;
    /// `x += delta`, then `out = rms_norm(x)`.
    fn add_rms_norm(
        &self,
        out: &mut Self::Buf,
        x: &mut Self::Buf,
        delta: &Self::Buf,
        w: &Self::Buf,
        shape: NormShape,
    ) -> Result<()>;
    /// `x += delta`, for the first `len` numbers.
    fn add(&self, x: &mut Self::Buf, delta: &Self::Buf, len: usize) -> Result<()>;
    /// `out = x · wᵀ + bias`, for `rows` rows.
    fn linear(&self, out: &mut Self::Buf, x: &Self::Buf, w: &Self::Matrix, rows: usize) -> Result<()>;
    /// Normalises (if asked) and rotates queries and keys in place, by halves, and writes keys and values
    /// to the sequences' pages.
    fn rope_kv(
        &self,
        qkv: &mut Self::Buf,
        kv: &mut Self::Kv,
        batch: &Self::Batch,
        heads: HeadShape,
        norm: Option<QkNorm<'_, Self>>,
    ) -> Result<()>;
    /// Attention of each row's queries to its sequence's pages; `out` is `[rows, heads * head_dim]`.
    fn attention(
        &self,
        out: &mut Self::Buf,
        qkv: &Self::Buf,
        kv: &Self::Kv,
        batch: &Self::Batch,
        shape: AttentionShape,
    ) -> Result<()>;
    /// `out[i] = silu(gate) * up`; a row of `gate_up` is `dim` gates, then `dim` ups.
    fn silu_mul(&self, out: &mut Self::Buf, gate_up: &Self::Buf, rows: usize, dim: usize) -> Result<()>;
    /// Copies the micro-batch's output rows of `dim` numbers together.
    fn gather_outputs(
        &self,
        out: &mut Self::Buf,
        x: &Self::Buf,
        batch: &Self::Batch,
        dim: usize,
    ) -> Result<()>;
    /// Chooses a token for each output row, from `[outputs, vocab]` logits, with the state of its sequence;
    /// takes note of the sequences that start and end with this micro-batch.
    fn sample(
        &self,
        logits: &Self::Buf,
        sampler: &mut Self::Sampler,
        batch: &MicroBatch,
    ) -> Result<Vec<Sampled>>;
}
