//! The ops a model is written in. A backend is a device that carries them out.
//!
//! No op has a default body: one that is missing on a device cannot fall back to the host unnoticed.
//! Ops write into buffers of the caller; nothing is allocated in a step.

pub mod cpu;
pub mod cuda;
mod random;
mod tensor;
pub mod vision;

pub use random::{Random, mix};
pub use tensor::{Bytes, DType, Store, Tensor};

use std::{ops::Range, sync::Arc, time::Duration};

use crate::{
    batch::{MicroBatch, Sampled, Step},
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

/// What rows' queries and keys are rotated by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotation<'a> {
    /// Radians a position, for each pair of numbers.
    pub inv_freq: &'a [f32], // [head_dim / 2]
    /// Multiplies sines and cosines.
    pub scale: f32,
    /// How many of the frequencies, from the first on, turn by a row's time, how many by its place down, and how many across.
    /// `None`: all by its place in the sequence.
    pub sections: Option<[usize; 3]>,
}

impl<'a> Rotation<'a> {
    /// By the place in the sequence alone.
    pub fn plain(inv_freq: &'a [f32], scale: f32) -> Self {
        Rotation { inv_freq, scale, sections: None }
    }

    /// The first frequency that turns by the place down, and the first that turns by the place across.
    fn bounds(&self) -> [usize; 2] {
        let half = self.inv_freq.len();
        let Some([time, down, across]) = self.sections else { return [half; 2] };
        assert_eq!(time + down + across, half, "sections of other frequencies; this is a bug");
        [time, time + down]
    }
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

/// What is taken of a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct DeviceMemory {
    /// Bytes that were asked for through this backend.
    pub taken: usize,
    /// Bytes of the whole device that are in use, less those that were before its pipeline was made: what all its stages
    /// took, and what the driver needs for it.
    pub device: usize,
}

/// A made-up micro-batch that a device wants to have seen before requests come. What its rows leave in KV pages is
/// nonsense that no sequence sees.
#[derive(Debug, Clone)]
pub struct WarmUp {
    /// Its rows. Tokens are wanted if it has output rows, or sequences that end.
    pub batch: Arc<MicroBatch>,
    /// Through how many of a stage's layers it should go.
    pub layers: usize,
    /// How often.
    pub passes: usize,
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

/// Where results go that are some columns of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Columns {
    /// The first of them.
    pub first: usize,
    /// Numbers of a row of the matrix.
    pub width: usize,
}

impl Columns {
    /// All of a matrix.
    pub(crate) fn all(width: usize) -> Columns {
        Columns { first: 0, width }
    }
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

/// An RMS norm of whole rows.
pub struct Norm<'a, B: Backend> {
    /// Its weights.
    pub w: &'a B::Buf, // [dim]
    /// What it goes over.
    pub shape: NormShape,
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
    type Buf: Send + Sync;
    /// The weights of a linear layer or an embedding, kept in their type.
    type Matrix: Send + Sync;
    /// One layer's KV pages.
    type Kv: Send;
    /// A micro-batch as the ops want it: positions, rotations, block tables.
    type Batch: Send;
    /// Per-sequence state of sampling: penalties, random numbers.
    type Sampler: Send;
    /// Tokens that have been asked for and may not have been chosen yet.
    type Pending: Send;

    /// Whether ops return before they are done, so that the host can run a step ahead of what it has read.
    const ASYNC: bool;

    /// A moment on the device's clock.
    type Mark: Send;

    /// The device's name in messages and layouts: `cpu`, `cuda:1`.
    fn name(&self) -> String;
    /// What is taken of the device's memory; `None` where nobody counts.
    fn memory(&self) -> Option<DeviceMemory>;
    /// Whether all that the device was given has been done; `None` if ops are done when they return.
    fn is_idle(&self) -> Option<bool>;

    /// How many rows buffers must have room for, so that the ops can go over this many: some devices pad.
    fn rows_room(&self, rows: usize) -> usize;
    /// Makes a buffer of f32, zeroed: the residual stream, logits.
    fn buf(&self, len: usize) -> Result<Self::Buf>;
    /// Makes a buffer for what matrix products read, in the type that the device wants there.
    fn working_buf(&self, len: usize) -> Result<Self::Buf>;
    /// Loads a vector, widened: a norm's weights.
    fn vector(&self, tensor: &Tensor) -> Result<Self::Buf>;
    /// Loads tensors `[n_i, k]`, stacked to `[sum n_i, k]`, with their biases `[n_i]` (all or none).
    fn matrix(&self, parts: &[Tensor], biases: &[Tensor]) -> Result<Self::Matrix>;
    /// Waits until all weights have arrived: a device may still be copying when the calls above have returned.
    fn loaded(&self) -> Result<()>;
    /// Makes the KV pages of a layer.
    fn kv(&self, shape: KvShape) -> Result<Self::Kv>;
    /// Takes over from `before`, on the same device, so many bytes of what that one has taken.
    fn succeed(&self, before: &Self, bytes: usize);
    /// Finds the way that pages will come by from another device; what has to be tried for it takes its time here.
    fn find_way(&self, from: &Self) -> Result<()>;
    /// Makes sure that ops here can read buffers of `of` and write them; an error if they cannot, or if what is written does
    /// not arrive.
    fn find_way_back(&self, of: &Self) -> Result<()>;
    /// What comes later on this device waits for all that `other` has been asked for.
    fn await_all(&self, other: &Self) -> Result<()>;
    /// Copies runs of blocks from another device's pages of the same shape, by the way that has been found. Nothing else may
    /// use either side meanwhile. They have come when [`Backend::loaded`] returns.
    fn fetch_pages(&self, to: &mut Self::Kv, from: (&Self, &Self::Kv), runs: &[Range<usize>]) -> Result<()>;
    /// A run of blocks as every device has them on the host: the keys of all blocks and then the values, each `[blocks,
    /// kv_heads, KV_BLOCK, head_dim]` of the pages' type.
    fn read_pages(&self, from: &Self::Kv, blocks: Range<usize>) -> Result<Vec<u8>>;
    /// Writes what has been read so, of any device's pages of the same shape.
    fn write_pages(&self, to: &mut Self::Kv, blocks: Range<usize>, bytes: &[u8]) -> Result<()>;
    /// Makes room for a micro-batch.
    fn batch(&self, limits: Limits, rotation: Rotation<'_>) -> Result<Self::Batch>;
    /// Makes the state of sampling from `vocab` logits.
    fn sampler(&self, vocab: usize) -> Result<Self::Sampler>;

    /// What to try before requests come, since the device compiles, chooses or records something when it first sees it.
    fn warm_ups(&self, limits: Limits) -> Vec<WarmUp>;

    /// Brings a micro-batch to the device.
    fn set_batch(&self, batch: &mut Self::Batch, from: &MicroBatch) -> Result<()>;
    /// What comes later on the device waits for the tokens of this earlier step, whose choice must have been enqueued.
    fn await_tokens(&self, after: u64) -> Result<()>;
    /// Rows that the ops of a pass go over: those of the micro-batch, or more, the rest being padding.
    fn rows(&self, batch: &Self::Batch) -> usize;
    /// Output rows likewise.
    fn outputs(&self, batch: &Self::Batch) -> usize;
    /// Carries out the ops of a pass. A device may record them once and repeat them for every batch with the same
    /// numbers of rows: they must depend on nothing else, and always be given the same buffers.
    fn pass(&self, batch: &Self::Batch, ops: &mut dyn FnMut() -> Result<()>) -> Result<()>;
    /// Lets the device record these ops where [`Backend::pass`] would repeat them, without carrying them out. What they
    /// need has been tried before.
    fn record(&self, batch: &Self::Batch, ops: &mut dyn FnMut() -> Result<()>) -> Result<()>;
    /// Marks the moment when everything so far has been done.
    fn mark(&self) -> Result<Self::Mark>;
    /// The time between two moments; `None` if they have not both come yet.
    fn between(&self, from: &Self::Mark, to: &Self::Mark) -> Result<Option<Duration>>;
    /// Copies to the host.
    fn read(&self, out: &mut [f32], from: &Self::Buf) -> Result<()>;
    /// Copies from the host.
    fn write(&self, to: &mut Self::Buf, from: &[f32]) -> Result<()>;

    /// `out[row] = table[id of row]`, or the row of `images` that the id stands for.
    fn embed(
        &self,
        out: &mut Self::Buf,
        table: &Self::Matrix,
        images: Option<&Self::Buf>,
        batch: &Self::Batch,
    ) -> Result<()>;
    /// `out = norm(x) · wᵀ + bias`. `normed` is scratch for the rows in between.
    fn norm_linear(
        &self,
        out: &mut Self::Buf,
        normed: &mut Self::Buf,
        x: &Self::Buf,
        norm: Norm<'_, Self>,
        w: &Self::Matrix,
    ) -> Result<()>;
    /// The same into some columns of a matrix. It and `x` may be a device's whose buffers can be read and written here.
    fn norm_linear_columns(
        &self,
        out: (&mut Self::Buf, Columns),
        normed: &mut Self::Buf,
        x: &Self::Buf,
        norm: Norm<'_, Self>,
        w: &Self::Matrix,
    ) -> Result<()>;
    /// `out = silu(gate) * up`, where a row of `norm(x) · wᵀ + bias` is all gates, then all ups. `normed` and
    /// `gate_up` are scratch for the rows in between.
    fn norm_gate_up(
        &self,
        out: &mut Self::Buf,
        scratch: (&mut Self::Buf, &mut Self::Buf),
        x: &Self::Buf,
        norm: Norm<'_, Self>,
        w: &Self::Matrix,
    ) -> Result<()>;
    /// `x += y · wᵀ + bias`, for `rows` rows.
    fn linear_add(&self, x: &mut Self::Buf, y: &Self::Buf, w: &Self::Matrix, rows: usize) -> Result<()>;
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
    fn sample(&self, logits: &Self::Buf, sampler: &mut Self::Sampler, step: &Step) -> Result<Self::Pending>;
    /// The largest of each row's logits, of these tokens, with its token, to a place in `found`: two numbers a row, which are the device's own
    /// affair. `found` may be a device's whose buffers can be written here.
    fn find_largest(
        &self,
        found: (&mut Self::Buf, usize),
        logits: &Self::Buf,
        tokens: &Range<usize>,
        rows: usize,
    ) -> Result<()>;
    /// As `sample`, where all output rows want their most likely token and no more: from what so many parts of the vocabulary have
    /// found, each for so many rows.
    fn choose_found(
        &self,
        found: (&Self::Buf, usize, usize),
        sampler: &mut Self::Sampler,
        step: &Step,
    ) -> Result<Self::Pending>;
    /// Waits for the tokens of a micro-batch's output rows.
    fn collect(&self, pending: Self::Pending, batch: &MicroBatch) -> Result<Vec<Sampled>>;
}
