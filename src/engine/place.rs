//! Which devices stages go to by default, and how much fits there.

use std::collections::BTreeMap;

use crate::{
    backend::{DType, Limits, cuda},
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
    let (device, gpus) = match place {
        Place::One(device) => (device, 0),
        Place::Gpus => (Device::Cpu, cuda::devices()?.len()),
        Place::Auto => (Device::Cpu, cuda::devices().map_or(0, <[_]>::len)),
    };
    let layout = Layout::even(stages, layers, device)?;
    if gpus == 0 {
        return Ok(layout);
    }
    // Neighbours share a GPU where there are fewer GPUs than stages.
    let on = |i: usize| Device::Cuda(if stages > gpus { i * gpus / stages } else { i });
    let cut = layout.stages().iter().enumerate();
    Layout::new(cut.map(|(i, stage)| Stage { device: on(i), ..stage.clone() }).collect())
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
            let layers: usize = stages.iter().map(|i| self.layout.stages()[*i].layers.len()).sum();
            let block_bytes = self.spec.kv_bytes_per_token(self.dtype) * layers * KV_BLOCK;
            let blocks = match device {
                None => wanted.min(memory_free() / 4 / block_bytes),
                Some(gpu) => {
                    let taken: usize = stages.iter().map(|&i| self.bytes(i)).sum();
                    let need = taken + cuda::kv_waste(layers) + RESERVE_BYTES;
                    let free = cuda::free_bytes(gpu)?;
                    if need + block_bytes > free {
                        let why = format!(
                            "weights and buffers need {} MiB of its memory, and {} MiB are free",
                            need >> 20,
                            free >> 20
                        );
                        return Err(Error::Device { device: format!("cuda:{gpu}"), why });
                    }
                    (free - need) / block_bytes
                }
            };
            least = least.min(blocks);
        }
        Ok(least)
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
