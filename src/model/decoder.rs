//! The one forward pass, over the ops of a backend.

mod aside;
mod held;
mod sizes;

use aside::{Parts, outputs_shape};

pub use aside::Aside;
pub use held::Held;
pub use sizes::{buffer_sizes, weight_bytes, weight_sizes};

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    arch::Arch,
    spec::{ModelSpec, Norm, Role},
    units::{Unit, units_of},
    weights::Weights,
};
use crate::{
    backend::{
        self, AttentionShape, Backend, DType, KvShape, Limits, NormShape, QkNorm, Rotation, Tensor, WarmUp,
    },
    batch::{MicroBatch, Step},
    error::Result,
};

/// What a decoder is loaded from and how large it may grow.
#[derive(Clone)]
pub struct DecoderConfig {
    /// The whole model.
    pub spec: Arc<ModelSpec>,
    /// Its tensors' names.
    pub arch: &'static dyn Arch,
    /// Its tensors.
    pub weights: Arc<Weights>,
    /// The layers that this decoder holds.
    pub layers: Range<usize>,
    /// Whether the head is in parts, which do not belong to the decoder with the last layer: it is given them.
    pub split_head: bool,
    /// How weights, keys and values are kept.
    pub dtype: DType,
    /// The largest micro-batch.
    pub limits: Limits,
    /// KV blocks of each layer.
    pub kv_blocks: usize,
}

/// What a vision tower has made of images, on the device of the embedding: f32 rows of a token's numbers. The tower writes
/// rows that no step in flight reads, so on a device whose ops return early the lock is only held while they are enqueued.
pub type ImageStore<B> = Arc<Mutex<<B as Backend>::Buf>>; // [image rows, dim]

/// A stage's units: consecutive layers, before the first one the embedding, after the last one the head.
pub struct Decoder<B: Backend> {
    spec: Arc<ModelSpec>,
    first: usize,
    embed: Option<Arc<B::Matrix>>, // [vocab, dim]
    images: Option<ImageStore<B>>,
    layers: Vec<Layer<B>>,
    head: Option<Head<B>>,
    batch: B::Batch,
    scratch: Scratch<B>,
    weight_bytes: usize,
    dtype: DType,
    /// Whether pages are in use by another decoder until this one's first step.
    lent: bool,
}

/// A layer as a device holds it. Clones are the same layer: a stage that is to go on with it has it before the one that
/// runs has ended.
struct Layer<B: Backend> {
    weights: Arc<LayerWeights<B>>,
    kv: Arc<Mutex<B::Kv>>,
}

struct LayerWeights<B: Backend> {
    attn_norm: B::Buf,                 // [dim]
    qkv: B::Matrix,                    // [(heads + 2 * kv_heads) * head_dim, dim]
    qk_norm: Option<(B::Buf, B::Buf)>, // [head_dim] each
    out: B::Matrix,                    // [dim, heads * head_dim]
    mlp_norm: B::Buf,                  // [dim]
    gate_up: B::Matrix,                // [2 * ffn, dim]
    down: B::Matrix,                   // [dim, ffn]
    window: Option<usize>,
}

struct HeadWeights<B: Backend> {
    unit: Unit,
    norm: Arc<B::Buf>,      // [dim]
    matrix: Arc<B::Matrix>, // [tokens, dim]
}

/// Parts that other devices work on go first: see there.
struct Head<B: Backend> {
    work: Work<B>,
    sampler: B::Sampler,
    rows: B::Buf,   // [outputs, dim]
    logits: B::Buf, // [outputs, vocab]
}

/// Who makes the logits.
enum Work<B: Backend> {
    Whole {
        weights: HeadWeights<B>,
        normed: B::Buf, // [outputs, dim]
    },
    /// `None` until they are given.
    Parts(Option<Parts<B>>),
}

/// Buffers of a pass, made once.
struct Scratch<B: Backend> {
    hidden: B::Buf,  // [rows, dim]: what crosses boundaries
    normed: B::Buf,  // [rows, dim]
    qkv: B::Buf,     // [rows, (heads + 2 * kv_heads) * head_dim]
    attn: B::Buf,    // [rows, heads * head_dim]
    gate_up: B::Buf, // [rows, 2 * ffn]
    act: B::Buf,     // [rows, ffn]
}

impl DecoderConfig {
    /// The units that the decoder holds.
    pub fn units(&self) -> Vec<Unit> {
        let units = units_of(&self.spec, &self.layers).into_iter();
        units.filter(|unit| !self.split_head || *unit != Unit::Head).collect()
    }
}

impl<B: Backend> Decoder<B> {
    /// Loads the units' weights and makes their KV pages.
    pub fn load(backend: &B, config: &DecoderConfig) -> Result<Self> {
        Decoder::load_told(backend, config, &Held::default(), &|_| ())
    }

    /// The same, without what the device has already; `tell` is called with the bytes of weights that have come, again
    /// and again. Pages that the device has may be in use by another decoder until this one's first step.
    pub fn load_told(
        backend: &B,
        config: &DecoderConfig,
        there: &Held<B>,
        tell: &dyn Fn(usize),
    ) -> Result<Self> {
        let spec = &config.spec;
        let mut loader = Loader { backend, config, there, tell, bytes: 0, told: 0 };
        let embed = match config.layers.start {
            0 => Some(loader.embed()?),
            _ => None,
        };
        let layers = config.layers.clone().map(|i| loader.layer(i)).collect::<Result<_>>()?;
        let last = config.layers.end == spec.layers.len();
        let head = if last { Some(loader.head(embed.as_ref())?) } else { None };
        loader.end()?;
        let weight_bytes = weight_bytes(spec, config.dtype, &config.units());
        let rows_max = backend.rows_room(config.limits.rows_max);
        let working = |dim: usize| backend.working_buf(rows_max * dim);
        let scratch = Scratch {
            hidden: backend.buf(rows_max * spec.dim)?,
            normed: working(spec.dim)?,
            qkv: working(spec.heads.qkv_dim())?,
            attn: working(spec.heads.q_dim())?,
            gate_up: working(2 * spec.ffn)?,
            act: working(spec.ffn)?,
        };
        let batch = backend.batch(config.limits, rotation(spec))?;
        let (spec, first) = (spec.clone(), config.layers.start);
        let (dtype, lent) = (config.dtype, config.layers.clone().any(|i| there.has_layer(i)));
        let images = None;
        Ok(Decoder { spec, first, embed, images, layers, head, batch, scratch, weight_bytes, dtype, lent })
    }

    /// With the rows that ids with [`IMAGE_ROW`](crate::batch::IMAGE_ROW) stand for. Before the first pass: those that are
    /// recorded keep its place.
    pub fn with_images(mut self, store: ImageStore<B>) -> Self {
        assert!(self.embed.is_some(), "images of a stage without the embedding; this is a bug");
        self.images = Some(store);
        self
    }

    /// With the parts of a split head, in their order. Before the first pass.
    pub fn with_parts(mut self, backend: &B, limits: Limits, parts: Vec<Aside<B>>) -> Result<Self> {
        let head = self.head.as_mut().expect("parts of a head in a stage without one; this is a bug");
        head.work = Work::Parts(Some(Parts::new(backend, limits, parts)?));
        Ok(self)
    }

    /// Shows the device what it will be asked for, within the limits that this was loaded with: what it compiles, chooses
    /// or records when it first sees something has been done when this returns. `tell` is called with the passes that
    /// have been made and how many there are. Pages that others use are not touched.
    pub fn warm_up(&mut self, backend: &B, limits: Limits, tell: &dyn Fn(usize, usize)) -> Result<()> {
        let all = backend.warm_ups(limits);
        match self.lent {
            true => self.warm_up_aside(backend, limits, &all, tell)?,
            false => self.try_all(backend, &all, usize::MAX, tell)?,
        }
        backend.loaded()?;
        tell(all.len(), all.len());
        Ok(())
    }

    /// Each of these passes, so many times at most.
    fn try_all(
        &mut self,
        backend: &B,
        all: &[WarmUp],
        passes_max: usize,
        tell: &dyn Fn(usize, usize),
    ) -> Result<()> {
        for (i, WarmUp { batch, layers, passes }) in all.iter().enumerate() {
            tell(i, all.len());
            self.prepare(backend, batch)?;
            for _ in 0..(*passes).min(passes_max) {
                self.forward_through(backend, *layers)?;
            }
            if self.head.is_some() && (!batch.outputs.is_empty() || !batch.ends.is_empty()) {
                let step = Step { step: i as u64, after: None, batch: batch.clone() };
                let pending = self.sample(backend, &step)?;
                backend.collect(pending, batch)?;
                if let Some(pending) = self.sample_plainly(backend, &step)? {
                    backend.collect(pending, batch)?;
                }
            }
        }
        Ok(())
    }

    /// What is tried wants more than most likely tokens. These again by the way that is for them alone, if there is one.
    fn sample_plainly(&mut self, backend: &B, step: &Step) -> Result<Option<B::Pending>> {
        let Decoder { head, spec, batch, scratch, .. } = self;
        let Some(Head { work: Work::Parts(Some(parts)), sampler, rows, logits }) = head else {
            return Ok(None);
        };
        parts.sample(true, backend, spec, (batch, &scratch.hidden), (rows, logits, sampler), step).map(Some)
    }

    /// Bytes of the weights as they are kept.
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// The rows that came from the stage before.
    pub fn hidden_mut(&mut self) -> &mut B::Buf {
        &mut self.scratch.hidden
    }

    /// The rows for the stage after, and how many numbers they are.
    pub fn hidden(&self, rows: usize) -> (&B::Buf, usize) {
        (&self.scratch.hidden, rows * self.spec.dim)
    }

    /// Brings the next micro-batch to the device. The hidden rows of the stage before may come later.
    pub fn prepare(&mut self, backend: &B, batch: &MicroBatch) -> Result<()> {
        backend.set_batch(&mut self.batch, batch)
    }

    /// Takes the micro-batch that has been prepared through the layers: from its ids if the embedding is here, else from the hidden rows;
    /// to its output rows' logits if the head is here.
    pub fn forward(&mut self, backend: &B) -> Result<()> {
        self.forward_through(backend, usize::MAX)
    }

    /// The same, through so many layers at most.
    fn forward_through(&mut self, backend: &B, layers_max: usize) -> Result<()> {
        self.ops(backend, layers_max, |batch, ops| backend.pass(batch, ops))
    }

    /// Gives `run` the ops of a pass.
    fn ops(
        &mut self,
        backend: &B,
        layers_max: usize,
        run: impl FnOnce(&B::Batch, &mut dyn FnMut() -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let Decoder { spec, embed, images, layers, head, batch: on_device, scratch, .. } = self;
        let on_device = &*on_device;
        // All at once, and before the device is asked for anything: whoever records a pass keeps others from asking.
        let mut layers: Vec<(&LayerWeights<B>, MutexGuard<'_, B::Kv>)> =
            layers.iter().take(layers_max).map(|layer| (&*layer.weights, lock(&layer.kv))).collect();
        let images = images.as_ref().map(|images| lock(images));
        run(on_device, &mut || {
            if let Some(embed) = embed {
                backend.embed(&mut scratch.hidden, embed, images.as_deref(), on_device)?;
            }
            for (layer, kv) in &mut layers {
                layer.forward(backend, spec, on_device, (scratch, kv))?;
            }
            match head {
                Some(head) if backend.outputs(on_device) > 0 => {
                    head.forward(backend, spec, on_device, &scratch.hidden)
                }
                _ => Ok(()),
            }
        })
    }

    /// The logits of the micro-batch's output rows, after [`Decoder::forward`]. The head must be here.
    pub fn logits(&self) -> &B::Buf {
        &self.head.as_ref().expect("logits of a stage without the head; this is a bug").logits
    }

    /// Asks for the output rows' tokens, after [`Decoder::forward`]. The head must be here.
    pub fn sample(&mut self, backend: &B, step: &Step) -> Result<B::Pending> {
        let Decoder { head, spec, batch, scratch, .. } = self;
        let head = head.as_mut().expect("sampling in a stage without the head; this is a bug");
        let Head { work, sampler, rows, logits } = head;
        match work {
            Work::Whole { .. } => backend.sample(logits, sampler, step),
            // On several devices: nothing that one of them could repeat.
            Work::Parts(parts) => {
                let parts = parts.as_mut().expect("parts of a head that are missing; this is a bug");
                let plain = parts.is_plain(&step.batch);
                parts.sample(plain, backend, spec, (batch, &scratch.hidden), (rows, logits, sampler), step)
            }
        }
    }
}

/// How positions turn queries and keys.
fn rotation(spec: &ModelSpec) -> Rotation<'_> {
    Rotation { inv_freq: &spec.rope.inv_freq, scale: spec.rope.scale, sections: spec.sections }
}

/// Pages are whole numbers at any moment: a panic elsewhere spoils none.
fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B: Backend> LayerWeights<B> {
    fn forward(
        &self,
        backend: &B,
        spec: &ModelSpec,
        batch: &B::Batch,
        (s, kv): (&mut Scratch<B>, &mut B::Kv),
    ) -> Result<()> {
        let Norm::Rms { eps } = spec.norm;
        let shape = NormShape { rows: backend.rows(batch), dim: spec.dim, eps };
        let norm = backend::Norm { w: &self.attn_norm, shape };
        backend.norm_linear(&mut s.qkv, &mut s.normed, &s.hidden, norm, &self.qkv)?;
        let qk_norm = self.qk_norm.as_ref().map(|(q, k)| QkNorm { q, k, eps });
        backend.rope_kv(&mut s.qkv, kv, batch, spec.heads, qk_norm)?;
        let scale = 1.0 / (spec.heads.head_dim as f32).sqrt();
        let attention = AttentionShape { heads: spec.heads, scale, window: self.window };
        backend.attention(&mut s.attn, &s.qkv, kv, batch, attention)?;
        backend.linear_add(&mut s.hidden, &s.attn, &self.out, shape.rows)?;
        let norm = backend::Norm { w: &self.mlp_norm, shape };
        let scratch = (&mut s.normed, &mut s.gate_up);
        backend.norm_gate_up(&mut s.act, scratch, &s.hidden, norm, &self.gate_up)?;
        backend.linear_add(&mut s.hidden, &s.act, &self.down, shape.rows)
    }
}

impl<B: Backend> Head<B> {
    fn forward(&mut self, backend: &B, spec: &ModelSpec, batch: &B::Batch, hidden: &B::Buf) -> Result<()> {
        let Work::Whole { weights, normed } = &mut self.work else { return Ok(()) };
        backend.gather_outputs(&mut self.rows, hidden, batch, spec.dim)?;
        let shape = outputs_shape(backend, spec, batch);
        let norm = backend::Norm { w: &*weights.norm, shape };
        backend.norm_linear(&mut self.logits, normed, &self.rows, norm, &weights.matrix)
    }
}

/// Brings tensors to the device under their roles' names.
struct Loader<'a, B: Backend> {
    backend: &'a B,
    config: &'a DecoderConfig,
    /// What need not be brought.
    there: &'a Held<B>,
    tell: &'a dyn Fn(usize),
    bytes: usize,
    /// Of them, those that have been told of. The last tensor's are not: they may be on their way yet.
    told: usize,
}

impl<B: Backend> Loader<'_, B> {
    fn embed(&mut self) -> Result<Arc<B::Matrix>> {
        match &self.there.embed {
            Some(embed) => Ok(embed.clone()),
            None => Ok(Arc::new(self.matrix(&[Role::Embed], &[])?)),
        }
    }

    fn layer(&mut self, i: usize) -> Result<Layer<B>> {
        if let Some(layer) = self.there.layers.get(&i) {
            return Ok(layer.clone());
        }
        let spec = self.config.spec.clone();
        let (bias, heads) = (spec.bias, spec.heads);
        let qk_norm = match spec.qk_norm {
            true => Some((self.vector(Role::QNorm(i))?, self.vector(Role::KNorm(i))?)),
            false => None,
        };
        let kv_shape = KvShape {
            blocks: self.config.kv_blocks,
            kv_heads: heads.kv_heads,
            head_dim: heads.head_dim,
            dtype: self.config.dtype,
        };
        let some = |wanted: bool, roles: &[Role]| if wanted { roles.to_vec() } else { Vec::new() };
        let qkv_bias = some(bias.qkv, &[Role::QBias(i), Role::KBias(i), Role::VBias(i)]);
        let gate_up_bias = some(bias.mlp, &[Role::GateBias(i), Role::UpBias(i)]);
        let weights = LayerWeights {
            attn_norm: self.vector(Role::AttnNorm(i))?,
            qkv: self.matrix(&[Role::Q(i), Role::K(i), Role::V(i)], &qkv_bias)?,
            qk_norm,
            out: self.matrix(&[Role::O(i)], &some(bias.out, &[Role::OBias(i)]))?,
            mlp_norm: self.vector(Role::MlpNorm(i))?,
            gate_up: self.matrix(&[Role::Gate(i), Role::Up(i)], &gate_up_bias)?,
            down: self.matrix(&[Role::Down(i)], &some(bias.mlp, &[Role::DownBias(i)]))?,
            window: spec.layers[i].window,
        };
        Ok(Layer { weights: weights.into(), kv: Arc::new(Mutex::new(self.backend.kv(kv_shape)?)) })
    }

    fn head(&mut self, embed: Option<&Arc<B::Matrix>>) -> Result<Head<B>> {
        let spec = self.config.spec.clone();
        let outputs_max = self.backend.rows_room(self.config.limits.outputs_max);
        let work = match self.config.split_head {
            true => Work::Parts(None),
            false => Work::Whole {
                weights: self.head_weights(Unit::Head, embed)?,
                normed: self.backend.working_buf(outputs_max * spec.dim)?,
            },
        };
        Ok(Head {
            work,
            sampler: self.backend.sampler(spec.vocab)?,
            rows: self.backend.buf(outputs_max * spec.dim)?,
            logits: self.backend.buf(outputs_max * spec.vocab)?,
        })
    }

    fn head_weights(&mut self, unit: Unit, embed: Option<&Arc<B::Matrix>>) -> Result<HeadWeights<B>> {
        let spec = self.config.spec.clone();
        let there = self.there.head.clone().filter(|there| there.unit == unit);
        let matrix = match (spec.tied, unit, embed, &there) {
            (true, Unit::Head, Some(embed), _) => embed.clone(),
            (.., Some(there)) => there.matrix.clone(),
            _ => {
                let role = if spec.tied { Role::Embed } else { Role::Head };
                let whole = self.tensor(role)?;
                Arc::new(self.matrix_of(vec![whole.rows(unit.tokens(spec.vocab))], &[])?)
            }
        };
        let norm = match there {
            Some(there) => there.norm,
            None => Arc::new(self.vector(Role::FinalNorm)?),
        };
        Ok(HeadWeights { unit, norm, matrix })
    }

    fn vector(&mut self, role: Role) -> Result<B::Buf> {
        // Norm weights and biases are widened: rounding them would cost bits and save nothing.
        let tensor = self.tensor(role)?;
        self.tell();
        self.bytes += tensor.len() * DType::F32.size();
        self.backend.vector(&tensor)
    }

    /// Tensors `[n, k]` under each other, in the wanted type.
    fn matrix(&mut self, roles: &[Role], biases: &[Role]) -> Result<B::Matrix> {
        self.matrix_of(roles.iter().map(|&role| self.tensor(role)).collect::<Result<_>>()?, biases)
    }

    fn matrix_of(&mut self, parts: Vec<Tensor>, biases: &[Role]) -> Result<B::Matrix> {
        let dtype = self.config.dtype;
        let parts: Vec<Tensor> = parts.iter().map(|part| part.to_dtype(dtype)).collect::<Result<_>>()?;
        let biases: Vec<Tensor> = biases.iter().map(|&role| self.tensor(role)).collect::<Result<_>>()?;
        self.tell();
        self.bytes += parts.iter().map(|part| part.len() * dtype.size()).sum::<usize>();
        self.bytes += biases.iter().map(|bias| bias.len() * DType::F32.size()).sum::<usize>();
        self.backend.matrix(&parts, &biases)
    }

    fn tell(&mut self) {
        if self.bytes > self.told {
            (self.tell)(self.bytes - self.told);
            self.told = self.bytes;
        }
    }

    /// Waits until everything has come.
    fn end(mut self) -> Result<()> {
        self.backend.loaded()?;
        self.tell();
        Ok(())
    }

    fn tensor(&self, role: Role) -> Result<Tensor> {
        let DecoderConfig { arch, spec, weights, .. } = self.config;
        arch.load(weights, spec, role)
    }
}
