//! What follows from an engine's description: layout, sizes of micro-batches, KV blocks.

use std::sync::{Arc, Mutex};

use super::{EngineBuilder, Wire};
use crate::{
    backend::{DType, Limits, cuda},
    batch::KV_BLOCK,
    engine::{
        meter::Meter,
        place::{Count, Room, Unplaced},
        recipe::{Runs, slots_of},
    },
    error::{Error, Result},
    layout::{Device, Layout, Stage, Workload},
    model::{Model, decoder::DecoderConfig, spec::ModelSpec},
    schedule::{BlockPool, Keys, Scheduler, SchedulerConfig},
};

/// Tokens of a sequence at most, unless asked otherwise: long contexts cost memory whether used or not.
const CONTEXT_DEFAULT: usize = 8192;
/// Prompt tokens in a micro-batch. Beyond this the CPU's matrix products gain nothing and buffers grow.
const CHUNK_CPU: usize = 256;
/// A GPU's matrix units want more rows, and the more there are, the less power goes into reading weights: on an H200, whose clock
/// falls to 1.5 GHz under its limit of power, 8,192 bring 7b 6% more than 2,048.
const CHUNK_GPU: usize = 8192;
/// But the last of N stages has nothing to do until a chunk has gone through the others. What more rows bring by then depends on
/// the product that has the fewest numbers, rows by the model's width: so many are 2.6 tiles of 128x256 for each of an H200's
/// multiprocessors. By what one H200 takes for 1,024 to 4,096 rows and the filling of four stages, with 131,072 tokens in all, 3,072
/// are best for 7b (2% better than 2,048) and 1,536 for 72b (1%).
const CHUNK_NUMBERS: usize = 11_250_000;
const CHUNK_STEP: usize = 512;
const CHUNK_STAGE: std::ops::RangeInclusive<usize> = 1024..=4096;
/// With fewer a pass takes as long, since it reads all weights.
const CHUNK_MIN_GPU: usize = 128;
/// Passes over the CPU's weights are cheap against so many rows.
const CHUNK_MIN_CPU: usize = 32;
/// Sequences that run at once, unless asked otherwise.
const RUNNING_CPU: usize = 64;
const RUNNING_GPU: usize = 256;
/// Sequences of the longest context that the KV cache holds, where nobody says how many run at once.
const KV_SEQUENCES_DEFAULT: usize = 8;

/// Prompt tokens in a micro-batch on GPUs.
fn chunk_gpu(stages: usize, spec: &ModelSpec) -> usize {
    let steps = (CHUNK_NUMBERS + CHUNK_STEP * spec.dim / 2) / (CHUNK_STEP * spec.dim);
    match stages {
        0 | 1 => CHUNK_GPU,
        _ => (CHUNK_STEP * steps).clamp(*CHUNK_STAGE.start(), *CHUNK_STAGE.end()),
    }
}

impl EngineBuilder {
    /// What follows from the description: the layout, and how the model runs in any.
    pub(super) fn plan(
        &self,
        model: Model,
        (ahead, wire): (Option<bool>, Arc<Wire>),
        meter: Arc<Meter>,
    ) -> Result<(Layout, Runs)> {
        let spec = Arc::new(model.spec);
        let dtype = self.dtype.unwrap_or(model.dtype);
        let context = self.plan_context(&spec)?;
        let towers = self.towers(&spec, dtype, context)?;
        let layout = (towers)(&self.plan_layout(&spec, dtype, context)?)?;
        let weights = Arc::new(model.weights);
        let vision = self.plan_vision(&layout, &spec, (&weights, dtype, &meter))?;
        let mut scheduling = self.scheduling(&spec, &layout, context, ahead);
        let limits = |scheduling: SchedulerConfig, context_max| Limits {
            rows_max: Scheduler::rows_max(scheduling),
            seqs_max: scheduling.running_max,
            outputs_max: scheduling.running_max,
            context_max,
        };
        let (in_flight, spare) = (scheduling.in_flight_max(), self.movable || self.balance.is_some());
        let room = Room {
            layout: &layout,
            spec: &spec,
            dtype,
            limits: limits(scheduling, context),
            in_flight,
            vision: vision.as_ref().map(|of| of.bytes(layout.stages()[0].device)).unwrap_or_default(),
            memory: &self.device_memory,
            spare,
        };
        let (context_max, blocks) = self.plan_kv(&room, context)?;
        scheduling.running_max = scheduling.running_max.min(blocks);
        let config = DecoderConfig {
            split_head: false,
            layers: 0..spec.layers.len(),
            spec,
            arch: model.arch,
            weights,
            dtype,
            limits: limits(scheduling, context_max),
            kv_blocks: blocks,
        };
        let runs = Runs {
            wire,
            config,
            scheduling,
            keys: Keys::default(),
            slots: self.slots,
            ahead,
            threads: self.threads,
            vision,
            towers,
            memory: self.device_memory.clone(),
            spare,
            free: self.free.unwrap_or(cuda::free_bytes),
            meter,
            stall: self.stall,
            metrics: Mutex::default(),
        };
        Ok((layout, runs))
    }

    /// How much runs at once.
    fn scheduling(
        &self,
        spec: &ModelSpec,
        layout: &Layout,
        context: usize,
        ahead: Option<bool>,
    ) -> SchedulerConfig {
        let on_gpu = |stage: &Stage| stage.device != Device::Cpu;
        // Beside GPUs it is the processor whose time counts.
        let gpus = layout.stages().iter().all(on_gpu);
        let running = self.running.unwrap_or(if gpus { RUNNING_GPU } else { RUNNING_CPU });
        // Several short prompts share a chunk; more than all sequences together hold never comes.
        let chunk =
            self.chunk.unwrap_or(if gpus { chunk_gpu(layout.stages().len(), spec) } else { CHUNK_CPU });
        let chunk = chunk.min(context.saturating_mul(running));
        let chunk_min = match (self.chunk, gpus) {
            (Some(_), _) => chunk,
            (None, true) => CHUNK_MIN_GPU.min(chunk),
            (None, false) => CHUNK_MIN_CPU.min(chunk),
        };
        let (slots, steps_ahead) = slots_of(layout, self.slots, ahead);
        SchedulerConfig {
            slots,
            chunk,
            chunk_min,
            running_max: running,
            ahead: steps_ahead,
            prefix_reuse: !self.no_prefix_cache,
        }
    }

    fn plan_layout(&self, spec: &ModelSpec, dtype: DType, context: usize) -> Result<Layout> {
        let layers = spec.layers.len();
        let given = self.layout.as_ref().or(self.cuts.as_ref());
        let refused = [("--stages", self.stages.is_some()), ("--split", self.split.is_some())];
        if let (Some(_), Some((flag, _))) = (given, refused.iter().find(|(_, given)| *given)) {
            return Err(Error::usage(*flag, "it cannot be used with --layout"));
        }
        if let Some(layout) = given {
            layout.check(layers)?;
        }
        if let Some(layout) = &self.layout {
            return Ok(layout.clone());
        }
        let unplaced = self.unplaced(spec, dtype, context)?;
        match &self.cuts {
            Some(layout) => unplaced.cuts(layout),
            None => unplaced.stages(self.stages, self.split),
        }
    }

    /// What is known of the model and of what it is for, before there is a layout.
    pub(super) fn unplaced<'a>(
        &'a self,
        spec: &'a ModelSpec,
        dtype: DType,
        context: usize,
    ) -> Result<Unplaced<'a>> {
        let chunk = match self.stages {
            Some(Count::Of(n)) => chunk_gpu(n, spec),
            Some(Count::Auto) | None => CHUNK_GPU,
        };
        let all_layers = spec.kv_bytes_per_token(dtype) * spec.layers.len();
        let images = self.sight(spec, dtype)?;
        let of_images = images.map_or(0, |images| images.load.prompt_tokens());
        Ok(Unplaced {
            spec,
            dtype,
            place: &self.place,
            workload: self.workload((context, of_images), RUNNING_GPU, chunk),
            workload_mixed: self.workload((context, of_images), RUNNING_CPU, CHUNK_CPU),
            kv_tokens: self.kv_memory.map(|bytes| bytes / all_layers),
            context,
            threads: self.threads,
            memory: &self.device_memory,
            profiles: !self.no_profiles,
            spare: self.movable || self.balance.is_some(),
            images,
        })
    }

    /// What a layout is planned for, with what runs at once by default.
    fn workload(&self, (context, of_images): (usize, usize), running: usize, chunk: usize) -> Workload {
        let usual = Workload::default();
        let running = self.running.unwrap_or(running);
        // Sequences with a third of them new, as usual, where contexts are short.
        let short = ((usual.prompt + of_images).min(context * 2 / 3), usual.new.min(context / 3).max(1));
        let (prompt, new) = self.expected.unwrap_or(short);
        let chunk = self.chunk.unwrap_or(chunk).min(context.saturating_mul(running));
        Workload { running, prompt, new, chunk }
    }

    /// The longest sequence and the number of KV blocks.
    fn plan_kv(&self, place: &Room, context: usize) -> Result<(usize, usize)> {
        let block_bytes = place.spec.kv_bytes_per_token(place.dtype) * place.spec.layers.len() * KV_BLOCK;
        let wanted = self.running.unwrap_or(KV_SEQUENCES_DEFAULT) * BlockPool::blocks_for(context);
        let blocks = match self.kv_memory {
            Some(bytes) => bytes / block_bytes,
            None => place.blocks(wanted)?,
        };
        // More could never be leased.
        let blocks = blocks.min(place.limits.seqs_max * BlockPool::blocks_for(context));
        if self.kv_memory.is_some() {
            place.check(blocks)?;
        }
        let room = blocks * KV_BLOCK;
        if room < context && (self.kv_memory.is_some() && self.max_context.is_some() || room < 2) {
            let (need, have) = (BlockPool::blocks_for(context) * block_bytes, blocks * block_bytes);
            let why = format!("a sequence of {context} tokens needs {need} bytes, and there are {have}");
            return Err(Error::usage("--kv-memory", why));
        }
        if room < context {
            tracing::warn!(
                tokens = room,
                "the KV cache is smaller than the longest context, which it limits"
            );
        }
        Ok((context.min(room), blocks))
    }

    pub(super) fn plan_context(&self, spec: &ModelSpec) -> Result<usize> {
        let made_for = spec.context_max;
        match self.max_context {
            None => Ok(made_for.min(CONTEXT_DEFAULT)),
            Some(tokens) if tokens < 2 => {
                Err(Error::usage("--max-context", "a prompt and an answer need at least 2 tokens"))
            }
            Some(tokens) if tokens > made_for => {
                let why = format!("{tokens} tokens are more than the {made_for} that the model was made for");
                Err(Error::usage("--max-context", why))
            }
            Some(tokens) => Ok(tokens),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shapes;

    #[test]
    fn chunks_fill_the_multiprocessors_and_not_the_pipeline() {
        let of = |model, stages| chunk_gpu(stages, &shapes::find(model).unwrap().unwrap());
        assert_eq!([0, 1, 2, 4, 64].map(|n| of("7b", n)), [8192, 8192, 3072, 3072, 3072]);
        assert_eq!([1, 4].map(|n| of("72b", n)), [8192, 1536]);
        let with = |dim| ModelSpec { dim, ..shapes::find("7b").unwrap().unwrap() };
        assert_eq!(
            [1, 64, 2048, 5120, 16_384].map(|dim| chunk_gpu(4, &with(dim))),
            [4096, 4096, 4096, 2048, 1024]
        );
    }
}
