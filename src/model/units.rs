//! What a layout places: units, with their bytes, and with the work that a pass makes them do.

use std::{fmt, ops::Range};

use serde::{Deserialize, Serialize};

use super::spec::ModelSpec;
use crate::{backend::DType, batch::PassShape};

/// A part of a model that is on one device as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// From tokens to rows; always on the first stage.
    Embed,
    /// Attention and feed-forward part.
    Layer(usize),
    /// The last norm, the logits and the choice of tokens; always on the last stage.
    Head,
    /// The same for one of several near-equal parts of the vocabulary. The last of them is on the last stage, which chooses
    /// tokens from the logits of all.
    HeadPart {
        /// Which.
        part: usize,
        /// Of how many.
        parts: usize,
    },
}

/// The shape of a micro-batch, as far as its cost goes.
///
/// ```
/// use pipeline_infer::{batch::PassShape, model::units::Pass};
///
/// let decode = Pass::Decode { rows: 64, context: 640 };
/// assert_eq!((decode.rows(), decode.outputs(), decode.attended(None)), (64, 64, 40_960.0));
/// // As a run had it.
/// let shape = PassShape { rows: 64, outputs: 64, attended: 40_960, read: 40_960 };
/// assert_eq!(Pass::of(shape), decode);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pass {
    /// One new token of each of `rows` sequences.
    Decode {
        /// Sequences.
        rows: usize,
        /// Tokens that each row attends to.
        context: usize,
    },
    /// Tokens of one prompt.
    Chunk {
        /// How many.
        rows: usize,
        /// Tokens of the prompt before them.
        before: usize,
    },
    /// Rows of whatever sequences, as a run had them: prompts, or prompts beside single steps.
    Batch(PassShape),
}

/// Bytes that are moved, and floating-point operations on matrix units.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Demand {
    /// Read and written.
    pub bytes: f64,
    /// Multiplications and additions.
    pub flops: f64,
}

/// Attention of several rows of a sequence at once, which multiplies rather than reads.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Prompts {
    /// Rows.
    pub rows: usize,
    /// Pairs of a row and a token that it attends to.
    pub pairs: f64,
    /// Multiplications and additions of a pair.
    pub flops: f64,
}

/// What a unit does in a pass.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Work {
    /// Rows of its matrix products.
    pub rows: usize,
    /// Its matrix products.
    pub products: Demand,
    /// Attention to cached keys and values, of rows that are alone in their sequences.
    pub attention: Demand,
    /// The same of rows of prompts, and all that is not cached.
    pub prompts: Prompts,
    /// Bytes that everything else reads and writes: norms, rotations, activations, logits.
    pub other_bytes: f64,
    /// Kernels whose start nothing hides.
    pub kernels: usize,
}

/// Up to so many rows, products are made by kernels of which each starts while the one before it runs, and which make the
/// norms and sums beside them.
pub const FEW_ROWS: usize = 8;
/// Where the vocabulary is cut, logits begin at 256 bytes, as the fastest products want them. A vocabulary of fewer tokens has
/// empty parts.
const PART_STEP: usize = 64;
/// A layer's kernels with more rows; and what attention to prompts, of one or two kernels, costs beside them in passes that
/// are not recorded.
const KERNELS: usize = 7;
const PROMPT_KERNELS: usize = 3;

/// The units of a stage with these layers, in order, where one stage has the whole head.
///
/// ```
/// use pipeline_infer::{backend::DType, model::{shapes, units::{Unit, units_of}}};
///
/// let spec = shapes::find("7b").unwrap()?;
/// assert_eq!(units_of(&spec, &(26..28)), [Unit::Layer(26), Unit::Layer(27), Unit::Head]);
/// let megabytes = |unit: Unit| unit.weight_bytes(&spec, DType::BF16) / 1_000_000;
/// assert_eq!((megabytes(Unit::Layer(26)), megabytes(Unit::Head)), (466, 1090));
/// # Ok::<(), pipeline_infer::Error>(())
/// ```
pub fn units_of(spec: &ModelSpec, layers: &Range<usize>) -> Vec<Unit> {
    let mut units: Vec<Unit> = layers.clone().map(Unit::Layer).collect();
    if layers.start == 0 {
        units.insert(0, Unit::Embed);
    }
    if layers.end == spec.layers.len() {
        units.push(Unit::Head);
    }
    units
}

impl Pass {
    /// A micro-batch that a run had: answers alone, or whatever else.
    pub fn of(shape: PassShape) -> Pass {
        match shape.rows {
            rows if rows > 0 && shape.read == shape.attended && shape.outputs == rows => {
                Pass::Decode { rows, context: shape.attended / rows }
            }
            _ => Pass::Batch(shape),
        }
    }

    /// Whether each row is a new token of an answer.
    pub fn decodes(self) -> bool {
        matches!(self, Pass::Decode { .. })
    }

    /// Rows of the micro-batch.
    pub fn rows(self) -> usize {
        match self {
            Pass::Decode { rows, .. } | Pass::Chunk { rows, .. } => rows,
            Pass::Batch(shape) => shape.rows,
        }
    }

    /// Rows whose logits are wanted.
    pub fn outputs(self) -> usize {
        match self {
            Pass::Decode { rows, .. } => rows,
            Pass::Chunk { .. } => 1,
            Pass::Batch(shape) => shape.outputs,
        }
    }

    /// Pairs of a row and a token that it attends to, where it sees the last `window` of them.
    pub fn attended(self, window: Option<usize>) -> f64 {
        let window = window.unwrap_or(usize::MAX);
        match self {
            Pass::Decode { rows, context } => rows as f64 * context.min(window) as f64,
            Pass::Chunk { rows, before } => {
                // Rows see one token more each, until the window is full.
                let growing = window.saturating_sub(before).min(rows);
                let grown = growing as f64 * (before as f64 + (growing as f64 + 1.0) / 2.0);
                let full = if growing < rows { (rows - growing) as f64 * window as f64 } else { 0.0 };
                grown + full
            }
            Pass::Batch(shape) => (shape.attended as f64).min(shape.rows as f64 * window as f64),
        }
    }

    /// Rows of prompts.
    pub fn prompt_rows(self) -> usize {
        match self {
            Pass::Decode { .. } => 0,
            Pass::Chunk { rows, .. } => rows,
            // A prompt's last row has logits as well: one of thousands.
            Pass::Batch(shape) if shape.read > 0 => (shape.rows - shape.outputs.min(shape.rows)).max(1),
            Pass::Batch(shape) => shape.rows,
        }
    }

    /// Of the pairs, those of rows that are alone in their sequences.
    fn attended_alone(self, window: Option<usize>) -> f64 {
        match self {
            Pass::Decode { .. } => self.attended(window),
            Pass::Chunk { .. } => 0.0,
            Pass::Batch(shape) => self.read(shape, window),
        }
    }

    /// What rows read that are alone in their sequences.
    fn read(self, shape: PassShape, window: Option<usize>) -> f64 {
        let alone = shape.rows.saturating_sub(self.prompt_rows()) as f64;
        (shape.read as f64).min(alone * window.unwrap_or(usize::MAX) as f64).min(self.attended(window))
    }

    /// Tokens whose keys and values are read.
    pub fn cached(self, window: Option<usize>) -> f64 {
        let window = window.unwrap_or(usize::MAX);
        match self {
            Pass::Decode { rows, context } => rows as f64 * context.min(window) as f64,
            Pass::Chunk { rows, before } => rows as f64 + before.min(window) as f64,
            // Rows of one prompt share what is read.
            Pass::Batch(shape) => shape.rows as f64 + self.read(shape, Some(window)),
        }
    }
}

/// `64 rows at 640`, `2048 of a prompt`, `900 rows, 3 tokens`.
impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = |n: usize| if n == 1 { "" } else { "s" };
        match *self {
            Pass::Decode { rows, context } => write!(f, "{rows} row{} at {context}", plural(rows)),
            Pass::Chunk { rows, before: 0 } => write!(f, "{rows} of a prompt"),
            Pass::Chunk { rows, before } => write!(f, "{rows} of a prompt after {before}"),
            Pass::Batch(PassShape { rows, outputs, .. }) => {
                write!(f, "{rows} row{}, {outputs} token{}", plural(rows), plural(outputs))
            }
        }
    }
}

impl Unit {
    /// A part of the head; of one, all of it.
    pub(crate) fn head(part: usize, parts: usize) -> Unit {
        if parts == 1 { Unit::Head } else { Unit::HeadPart { part, parts } }
    }

    /// The tokens of a vocabulary whose logits it makes; none if it is not of the head.
    ///
    /// ```
    /// # use pipeline_infer::model::units::Unit;
    /// let part = |part| Unit::HeadPart { part, parts: 3 }.tokens(1000);
    /// assert_eq!([part(0), part(1), part(2)], [0..320, 320..640, 640..1000]);
    /// assert_eq!(Unit::Head.tokens(1000), 0..1000);
    /// ```
    pub fn tokens(self, vocab: usize) -> Range<usize> {
        match self {
            Unit::Embed | Unit::Layer(_) => 0..0,
            Unit::Head => 0..vocab,
            Unit::HeadPart { part, parts } => {
                let cut = |i: usize| vocab / PART_STEP * i / parts * PART_STEP;
                cut(part)..if part + 1 == parts { vocab } else { cut(part + 1) }
            }
        }
    }

    /// Bytes of each of its tensors, in the order in which they are loaded. A tied head counts in full: only a stage that
    /// holds the embedding too shares it.
    pub fn tensor_sizes(self, spec: &ModelSpec, dtype: DType) -> Vec<usize> {
        let (dim, heads, bias) = (spec.dim, spec.heads, spec.bias);
        let vector = |n: usize| n * DType::F32.size();
        let matrix = |n: usize, k: usize, bias: bool| n * k * dtype.size() + if bias { vector(n) } else { 0 };
        match self {
            Unit::Embed => vec![matrix(spec.vocab, dim, false)],
            Unit::Head | Unit::HeadPart { .. } => {
                vec![vector(dim), matrix(self.tokens(spec.vocab).len(), dim, false)]
            }
            Unit::Layer(_) => {
                let mut sizes = vec![vector(dim), matrix(heads.qkv_dim(), dim, bias.qkv)];
                if spec.qk_norm {
                    sizes.extend([vector(heads.head_dim); 2]);
                }
                sizes.extend([
                    matrix(dim, heads.q_dim(), bias.out),
                    vector(dim),
                    matrix(2 * spec.ffn, dim, bias.mlp),
                    matrix(dim, spec.ffn, bias.mlp),
                ]);
                sizes
            }
        }
    }

    /// Bytes of its weights.
    pub fn weight_bytes(self, spec: &ModelSpec, dtype: DType) -> usize {
        self.tensor_sizes(spec, dtype).into_iter().sum()
    }

    /// Bytes of its keys and values of one token.
    pub fn kv_bytes_per_token(self, spec: &ModelSpec, dtype: DType) -> usize {
        match self {
            Unit::Layer(_) => spec.kv_bytes_per_token(dtype),
            Unit::Embed | Unit::Head | Unit::HeadPart { .. } => 0,
        }
    }

    /// What it does in a pass.
    pub fn work(self, spec: &ModelSpec, dtype: DType, pass: Pass) -> Work {
        match self {
            Unit::Embed => {
                let row = spec.dim * (dtype.size() + DType::F32.size());
                Work { other_bytes: (pass.rows() * row) as f64, kernels: 1, ..Work::default() }
            }
            Unit::Layer(i) => layer_work(spec, dtype, pass, spec.layers[i].window),
            // Nobody wants logits.
            Unit::Head | Unit::HeadPart { .. } if pass.outputs() == 0 => Work::default(),
            Unit::Head | Unit::HeadPart { .. } => {
                let (rows, tokens) = (pass.outputs(), self.tokens(spec.vocab).len());
                let (numbers, weights) = ((tokens * spec.dim) as f64, self.weight_bytes(spec, dtype) as f64);
                // Logits are written once, and read to find the largest and by what may change them: of a part's by the former alone.
                let times = if self == Unit::Head { 3 } else { 2 };
                let logits = times * rows * tokens * DType::F32.size();
                Work {
                    rows,
                    products: Demand { bytes: weights, flops: 2.0 * rows as f64 * numbers },
                    other_bytes: logits as f64,
                    kernels: 3,
                    ..Work::default()
                }
            }
        }
    }
}

fn layer_work(spec: &ModelSpec, dtype: DType, pass: Pass, window: Option<usize>) -> Work {
    let (rows, heads, wide) = (pass.rows(), spec.heads, DType::F32.size());
    let weights = Unit::Layer(0).weight_bytes(spec, dtype) as f64;
    let per_row = heads.qkv_dim() * spec.dim + spec.dim * heads.q_dim() + 3 * spec.ffn * spec.dim;
    let kv = pass.cached(window) * spec.kv_bytes_per_token(dtype) as f64;
    // Two norms from wide rows to narrow ones; the rotation in place; gates and ups to one.
    let other = 2 * spec.dim * (wide + dtype.size()) + (2 * heads.qkv_dim() + 3 * spec.ffn) * dtype.size();
    let (pair, alone) = (4.0 * heads.q_dim() as f64, pass.attended_alone(window));
    let (prompt_rows, pairs) = (pass.prompt_rows(), pass.attended(window) - alone);
    Work {
        rows,
        products: Demand { bytes: weights, flops: 2.0 * rows as f64 * per_row as f64 },
        attention: Demand { bytes: kv, flops: alone * pair },
        prompts: Prompts { rows: prompt_rows, pairs, flops: pair },
        other_bytes: if rows <= FEW_ROWS { 0.0 } else { (rows * other) as f64 },
        kernels: match rows {
            ..=FEW_ROWS => 1,
            _ if prompt_rows > 0 => KERNELS + PROMPT_KERNELS,
            _ => KERNELS,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{decoder::weight_bytes, shapes};

    #[test]
    fn units_make_up_a_stage() {
        let spec = shapes::find("7b").unwrap().unwrap();
        let stages = [0..9, 9..20, 20..28];
        let mut all = Vec::new();
        for layers in &stages {
            let units = units_of(&spec, layers);
            let bytes: usize = units.iter().map(|unit| unit.weight_bytes(&spec, DType::BF16)).sum();
            assert_eq!(bytes, weight_bytes(&spec, DType::BF16, &units));
            all.extend(units);
        }
        assert_eq!((all.len(), all[0], all[1], all[29]), (30, Unit::Embed, Unit::Layer(0), Unit::Head));
        // 466 MB a layer, 1.09 GB the head with its norm.
        assert_eq!(Unit::Layer(3).weight_bytes(&spec, DType::BF16) / 1_000_000, 466);
        assert_eq!(Unit::Head.weight_bytes(&spec, DType::BF16) / 1_000_000, 1090);
        assert_eq!(Unit::Layer(3).kv_bytes_per_token(&spec, DType::BF16), 2048);
        assert_eq!(Unit::Head.kv_bytes_per_token(&spec, DType::BF16), 0);
    }

    #[test]
    fn attention_is_counted_pair_by_pair() {
        let counted = |rows: usize, before: usize, window: usize| {
            (0..rows).map(|i| (before + i + 1).min(window)).sum::<usize>() as f64
        };
        for (rows, before, window) in [(5, 0, 9), (5, 3, 6), (5, 9, 4), (1, 0, 1), (7, 2, 5)] {
            let pass = Pass::Chunk { rows, before };
            assert_eq!(pass.attended(Some(window)), counted(rows, before, window), "{pass:?} {window}");
            assert_eq!(pass.attended(None), counted(rows, before, usize::MAX), "{pass:?}");
        }
        assert_eq!(Pass::Decode { rows: 3, context: 10 }.attended(Some(4)), 12.0);
    }

    #[test]
    fn work_grows_with_rows_and_context() {
        let spec = shapes::find("7b").unwrap().unwrap();
        let work = |unit: Unit, pass| unit.work(&spec, DType::BF16, pass);
        let one = work(Unit::Layer(0), Pass::Decode { rows: 1, context: 100 });
        assert!(one.products.bytes > 4.6e8 && (one.products.flops / 466e6 - 1.0).abs() < 0.01, "{one:?}");
        assert_eq!(one.attention.bytes, 100.0 * 2048.0);
        let many = work(Unit::Layer(0), Pass::Decode { rows: 64, context: 100 });
        assert_eq!(many.products.bytes, one.products.bytes);
        assert_eq!(many.products.flops, 64.0 * one.products.flops);
        // Of a prompt's chunk, one row has logits.
        let head = |pass| work(Unit::Head, pass).products.flops;
        assert_eq!(head(Pass::Chunk { rows: 512, before: 0 }), head(Pass::Decode { rows: 1, context: 9 }));
    }
}
