//! Which devices stages go to by default, and how much fits there.

use std::collections::BTreeMap;

use crate::{
    backend::{
        DType, Limits,
        cuda::{self, DeviceFacts},
    },
    batch::KV_BLOCK,
    error::{Error, Result},
    layout::{Device, Layout, Stage},
    model::{
        decoder::{buffer_sizes, weight_sizes},
        spec::ModelSpec,
    },
    transport::ring_bytes,
};

/// Of a GPU's free memory, what is left for the driver: code, stacks, recorded passes and what fragments.
const RESERVE_BYTES: usize = 640 << 20;

/// Where stages go that no layout places.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) enum Place {
    /// On successive GPUs, or on the CPU if there are none.
    #[default]
    Auto,
    /// On successive GPUs.
    Gpus,
    /// On one device.
    One(Device),
}

/// Stages of near-equal length.
pub(super) fn even(stages: usize, layers: usize, place: Place) -> Result<Layout> {
    let gpus = match place {
        Place::One(device) => return Layout::even(stages, layers, device),
        Place::Gpus => usable(cuda::devices()?),
        Place::Auto => cuda::devices().map_or_else(cpu_instead, usable),
    };
    let layout = Layout::even(stages, layers, Device::Cpu)?;
    if gpus.is_empty() && place == Place::Gpus {
        let why = "none of the GPUs is new enough: compute capability 8.0 is needed".into();
        return Err(Error::Device { device: "cuda".into(), why });
    }
    if gpus.is_empty() {
        return Ok(layout);
    }
    // Neighbours share a GPU where there are fewer GPUs than stages.
    let on = |i: usize| Device::Cuda(gpus[if stages > gpus.len() { i * gpus.len() / stages } else { i }]);
    let cut = layout.stages().iter().enumerate();
    Layout::new(cut.map(|(i, stage)| Stage { device: on(i), ..stage.clone() }).collect())
}

/// The numbers of the GPUs that kernels can be compiled for.
fn usable(all: &[DeviceFacts]) -> Vec<usize> {
    all.iter().filter(|gpu| gpu.usable()).map(|gpu| gpu.ordinal).collect()
}

/// No GPUs; with a driver that is worth a word.
fn cpu_instead(error: Error) -> Vec<usize> {
    if cuda::driver_present() {
        tracing::warn!(%error, "the GPUs cannot be used: stages run on the CPU");
    }
    Vec::new()
}

/// What has to find room beside the KV cache.
pub(super) struct Room<'a> {
    pub(super) layout: &'a Layout,
    pub(super) spec: &'a ModelSpec,
    pub(super) dtype: DType,
    pub(super) limits: Limits,
    pub(super) in_flight: usize,
}

impl Room<'_> {
    /// KV blocks that fit. On the CPU no more than `wanted`, and a quarter of the free memory; on GPUs all that weights
    /// and buffers leave.
    pub(super) fn blocks(&self, wanted: usize) -> Result<usize> {
        let mut least = usize::MAX;
        for (device, stages) in self.by_device() {
            let blocks = match device {
                None => wanted.min(memory_free() / 4 / self.block_bytes(&stages)),
                Some(gpu) => self.left(gpu, &stages)? / self.block_bytes(&stages),
            };
            least = least.min(blocks);
        }
        Ok(least)
    }

    /// An error if so many KV blocks are more than a GPU has room for. The CPU takes memory as it is used.
    pub(super) fn check(&self, blocks: usize) -> Result<()> {
        for (device, stages) in self.by_device() {
            let Some(gpu) = device else { continue };
            let (need, left) = (blocks.saturating_mul(self.block_bytes(&stages)), self.left(gpu, &stages)?);
            if need > left {
                let (need, left) = (need >> 20, left >> 20);
                let why = format!(
                    "the KV cache needs {need} MiB of its memory, and weights and buffers leave {left} MiB"
                );
                return Err(Error::Device { device: format!("cuda:{gpu}"), why });
            }
        }
        Ok(())
    }

    /// Bytes of a KV block of these stages' layers.
    fn block_bytes(&self, stages: &[usize]) -> usize {
        let layers: usize = stages.iter().map(|i| self.layout.stages()[*i].layers.len()).sum();
        self.spec.kv_bytes_per_token(self.dtype) * layers * KV_BLOCK
    }

    /// Bytes of a GPU that weights and buffers of its stages leave: at least a block.
    fn left(&self, gpu: usize, stages: &[usize]) -> Result<usize> {
        let layers: usize = stages.iter().map(|i| self.layout.stages()[*i].layers.len()).sum();
        let taken: usize = stages.iter().map(|&i| self.bytes(i)).sum();
        let need = taken + cuda::kv_waste(layers) + RESERVE_BYTES;
        let free = cuda::free_bytes(gpu)?;
        if need + self.block_bytes(stages) > free {
            let (need, free) = (need >> 20, free >> 20);
            let why = format!("weights and buffers need {need} MiB of its memory, and {free} MiB are free");
            return Err(Error::Device { device: format!("cuda:{gpu}"), why });
        }
        Ok(free - need)
    }

    /// Stages by GPU; `None` is the CPU.
    fn by_device(&self) -> BTreeMap<Option<usize>, Vec<usize>> {
        let mut by = BTreeMap::<_, Vec<usize>>::new();
        for (i, stage) in self.layout.stages().iter().enumerate() {
            let gpu = match stage.device {
                Device::Cpu => None,
                Device::Cuda(i) => Some(i),
            };
            by.entry(gpu).or_default().push(i);
        }
        by
    }

    /// Weights and buffers of a stage on a GPU, as the driver counts them.
    fn bytes(&self, i: usize) -> usize {
        let (spec, stage) = (self.spec, &self.layout.stages()[i]);
        let last = i + 1 == self.layout.stages().len();
        let Limits { rows_max, outputs_max, .. } = self.limits;
        let outputs = last.then(|| cuda::rows_room(outputs_max));
        let mut sizes = weight_sizes(spec, self.dtype, &stage.layers);
        sizes.extend(buffer_sizes(spec, self.dtype, cuda::rows_room(rows_max), outputs));
        if i > 0 {
            sizes.push(ring_bytes(self.in_flight, rows_max * spec.dim));
        }
        let vocab = last.then_some(spec.vocab);
        let (dim, head_dim) = (spec.dim, spec.heads.head_dim);
        let own = cuda::StageNeeds { limits: self.limits, dim, head_dim, vocab };
        sizes.into_iter().map(cuda::allocated).sum::<usize>() + cuda::stage_bytes(&own)
    }
}

/// Bytes that the system says are available; a guess of 4 GiB where it does not say.
fn memory_free() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<usize>().ok());
    kib.map_or(4 << 30, |kib| kib << 10)
}
