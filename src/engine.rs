//! Wires the threads together; the only file that knows every part; the public API.

use std::{path::PathBuf, sync::Arc};

use crate::{
    backend::DType,
    error::Result,
    layout::Layout,
    model::{config::GenerationConfig, spec::ModelSpec},
    request::{Event, Request},
    text::{Template, Tokenizer},
};

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightSource {
    /// The model folder's safetensors.
    #[default]
    Real,
    /// Random numbers of the right shapes, from config.json alone.
    Dummy,
}

/// What an engine is made from. Every value but the model has a default.
#[derive(Debug, Clone, Default)]
pub struct EngineBuilder {
    model: PathBuf,
    layout: Option<Layout>,
    stages: Option<usize>,
    dtype: Option<DType>,
    weights: WeightSource,
    max_context: Option<usize>,
    kv_memory: Option<usize>,
    slots: Option<usize>,
    chunk: Option<usize>,
    threads: Option<usize>,
}

/// A running pipeline.
pub struct Engine {}

/// What happens to a request, in order. Dropping it cancels the request.
pub struct Events {}

/// What one stage did since the engine started.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct StageStats {
    /// Its device.
    pub device: String,
    /// Its layers, as in `--layout`: `0-9`.
    pub layers: String,
    /// Bytes of its weights.
    pub weight_bytes: usize,
    /// Seconds computing.
    pub busy_s: f64,
    /// Seconds waiting for a micro-batch.
    pub wait_input_s: f64,
    /// Seconds waiting for room in the next stage.
    pub wait_output_s: f64,
    /// Seconds waiting for other stages that share the device.
    pub wait_device_s: f64,
    /// Micro-batches done.
    pub batches: u64,
    /// Rows (tokens) done.
    pub rows: u64,
}

impl Engine {
    /// Starts the description of an engine.
    pub fn builder() -> EngineBuilder {
        EngineBuilder::default()
    }
    /// Submits a request.
    pub fn submit(&self, _request: Request) -> Result<Events> {
        todo!()
    }
    /// The model.
    pub fn spec(&self) -> &ModelSpec {
        todo!()
    }
    /// The folder's generation_config.json (end-of-sequence ids, default sampling).
    pub fn generation(&self) -> &GenerationConfig {
        todo!()
    }
    /// The tokenizer; `None` if the folder has none (prompts are ids then).
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        todo!()
    }
    /// The chat template, if the model has one.
    pub fn template(&self) -> Option<&Template> {
        todo!()
    }
    /// The layout it runs in.
    pub fn layout(&self) -> &Layout {
        todo!()
    }
    /// What each stage has done so far.
    pub fn stats(&self) -> Vec<StageStats> {
        todo!()
    }
}

impl Iterator for Events {
    type Item = Event;
    /// Waits for the next event; `None` after the last.
    fn next(&mut self) -> Option<Event> {
        todo!()
    }
}

impl EngineBuilder {
    /// The model folder.
    pub fn model(mut self, path: impl Into<PathBuf>) -> Self {
        self.model = path.into();
        self
    }
    /// Which layers run where.
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = Some(layout);
        self
    }
    /// This many stages of near-equal length, when no layout is given. Default: 1.
    pub fn stages(mut self, stages: usize) -> Self {
        self.stages = Some(stages);
        self
    }
    /// The type that weights are kept in. Default: the checkpoint's.
    pub fn dtype(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }
    /// Where weights come from.
    pub fn weights(mut self, source: WeightSource) -> Self {
        self.weights = source;
        self
    }
    /// The longest sequence, prompt and answer together. Default: the model's, at most 8,192.
    pub fn max_context(mut self, tokens: usize) -> Self {
        self.max_context = Some(tokens);
        self
    }
    /// Bytes for the KV cache, all stages together.
    pub fn kv_memory(mut self, bytes: usize) -> Self {
        self.kv_memory = Some(bytes);
        self
    }
    /// Micro-batches in flight at most. Default: the number of stages.
    pub fn slots(mut self, slots: usize) -> Self {
        self.slots = Some(slots);
        self
    }
    /// Prompt tokens in a micro-batch at most.
    pub fn chunk(mut self, tokens: usize) -> Self {
        self.chunk = Some(tokens);
        self
    }
    /// CPU threads. Default: all cores.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }
    /// Loads the model and starts the stages.
    pub fn build(self) -> Result<Engine> {
        todo!()
    }
}
