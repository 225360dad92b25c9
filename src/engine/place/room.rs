//! What has to find room on devices beside the KV cache, which gets the rest.

use std::collections::BTreeMap;

use super::{RESERVE_BYTES, beside_cpu_helps, cpu_bytes};
use crate::{
    backend::{DType, Limits, cpu, cuda},
    batch::KV_BLOCK,
    error::{Error, Result},
    layout::{Device, DeviceSpec, Layout, MemoryLimits},
    model::{
        decoder::{buffer_sizes, weight_sizes},
        spec::ModelSpec,
        units::Unit,
    },
    transport::ring_bytes,
};

/// What has to find room beside the KV cache.
pub(in crate::engine) struct Room<'a> {
    pub(in crate::engine) layout: &'a Layout,
    pub(in crate::engine) spec: &'a ModelSpec,
    pub(in crate::engine) dtype: DType,
    pub(in crate::engine) limits: Limits,
    pub(in crate::engine) in_flight: usize,
    /// What the vision tower and the image store take of each device; empty without one.
    pub(in crate::engine) vision: BTreeMap<Device, usize>,
    pub(in crate::engine) memory: &'a MemoryLimits,
    /// Whether each GPU keeps room for one more layer with its pages, and for stages that are made ready beside those
    /// that run.
    pub(in crate::engine) spare: bool,
}

impl Room<'_> {
    /// KV blocks that fit on the tightest device: all that weights and buffers leave. On the CPU alone no more than `wanted`,
    /// and a quarter of the free memory.
    pub(in crate::engine) fn blocks(&self, wanted: usize) -> Result<usize> {
        self.check_tower()?;
        let by_device = self.by_device();
        let alone = by_device.len() == 1;
        let mut least = usize::MAX;
        for (device, stages) in by_device {
            let each = self.block_bytes(&stages);
            let blocks = match device {
                None if alone => wanted.min(self.memory.of(Device::Cpu, cpu::free_bytes() / 4) / each),
                None => self.left_on_host(&stages)? / each,
                Some(gpu) => self.left(gpu, &stages)? / each,
            };
            least = least.min(blocks);
        }
        Ok(least)
    }

    /// An error if so many KV blocks are more than a device has room for. The CPU alone takes memory as it is used.
    pub(in crate::engine) fn check(&self, blocks: usize) -> Result<()> {
        self.check_tower()?;
        let by_device = self.by_device();
        let alone = by_device.len() == 1;
        for (device, stages) in by_device {
            let (device, left) = match device {
                None if alone => continue,
                None => ("cpu".into(), self.left_on_host(&stages)?),
                Some(gpu) => (format!("cuda:{gpu}"), self.left(gpu, &stages)?),
            };
            let need = blocks.saturating_mul(self.block_bytes(&stages));
            if need > left {
                let (need, left) = (need >> 20, left >> 20);
                let why = format!(
                    "the KV cache needs {need} MiB of its memory, and weights and buffers leave {left} MiB"
                );
                return Err(Error::Device { device, why });
            }
        }
        Ok(())
    }

    /// An error if a part of the vision tower has no room on a GPU that has nothing else.
    fn check_tower(&self) -> Result<()> {
        let alone = |device: &Device| self.layout.stages().iter().all(|stage| stage.device != *device);
        for (&device, &need) in self.vision.iter().filter(|(device, _)| alone(device)) {
            let Device::Cuda(gpu) = device else { continue };
            let free = self.memory.of(device, cuda::free_bytes(gpu)?.saturating_sub(RESERVE_BYTES));
            if need > free {
                let (need, free) = (need >> 20, free >> 20);
                let why =
                    format!("the vision tower needs {need} MiB of its memory, and {free} MiB may be taken");
                return Err(Error::Device { device: device.to_string(), why });
            }
        }
        Ok(())
    }

    /// Bytes of a KV block of these stages' layers, and of one more if there is to be room for it.
    pub(super) fn block_bytes(&self, stages: &[usize]) -> usize {
        let layers: usize = stages.iter().map(|i| self.layout.stages()[*i].layers.len()).sum();
        self.spec.kv_bytes_per_token(self.dtype) * (layers + usize::from(self.spare)) * KV_BLOCK
    }

    /// Bytes of a GPU that weights and buffers of its stages leave: at least a block.
    fn left(&self, gpu: usize, stages: &[usize]) -> Result<usize> {
        let layers: usize = stages.iter().map(|i| self.layout.stages()[*i].layers.len()).sum();
        let taken: usize = stages.iter().map(|&i| self.bytes(i)).sum();
        let spare = if self.spare { self.spare_bytes(gpu, stages) } else { 0 };
        let need = taken + self.vision_bytes(Device::Cuda(gpu)) + spare + cuda::kv_waste(layers);
        self.rest(Device::Cuda(gpu), cuda::free_bytes(gpu)?.saturating_sub(RESERVE_BYTES), need, stages)
    }

    /// The same of the host's memory, for stages beside GPUs: weights that have no room there would be read from the disk
    /// in every pass.
    fn left_on_host(&self, stages: &[usize]) -> Result<usize> {
        let need: usize = stages.iter().map(|&i| self.host_bytes(i)).sum();
        self.rest(Device::Cpu, DeviceSpec::cpu_free(), need + self.vision_bytes(Device::Cpu), stages)
    }

    fn rest(&self, device: Device, free: usize, need: usize, stages: &[usize]) -> Result<usize> {
        let free = self.memory.of(device, free);
        if need + self.block_bytes(stages) > free {
            let (need, free) = (need >> 20, free >> 20);
            let way = match device {
                Device::Cuda(_) if self.by_device().len() == 1 => beside_cpu_helps(self.spec, self.dtype),
                _ => "",
            };
            let why = format!(
                "weights and buffers need {need} MiB of its memory, and {free} MiB may be taken{way}"
            );
            return Err(Error::Device { device: device.to_string(), why });
        }
        Ok(free - need)
    }

    /// Stages by GPU; `None` is the CPU.
    pub(super) fn by_device(&self) -> BTreeMap<Option<usize>, Vec<usize>> {
        let mut by = BTreeMap::<_, Vec<usize>>::new();
        for (i, stage) in self.layout.stages().iter().enumerate() {
            by.entry(stage.device.gpu()).or_default().push(i);
        }
        by
    }

    /// Weights, in the mapped file or not, and buffers of a stage on the CPU.
    fn host_bytes(&self, i: usize) -> usize {
        let (spec, stages) = (self.spec, self.layout.stages());
        let Limits { rows_max, outputs_max, .. } = self.limits;
        let outputs = (i + 1 == stages.len()).then_some(outputs_max);
        let buffers = cpu_bytes(spec, rows_max, outputs);
        // Those of both boundaries: between a GPU and the CPU packets lie on the host.
        let rings = 2 * ring_bytes(self.in_flight, rows_max * spec.dim);
        weight_sizes(spec, self.dtype, &self.layout.units(i, spec)).into_iter().sum::<usize>()
            + buffers
            + rings
    }

    /// Weights and buffers of a stage on a GPU, as the driver counts them.
    pub(super) fn bytes(&self, i: usize) -> usize {
        let weights = weight_sizes(self.spec, self.dtype, &self.layout.units(i, self.spec));
        weights.into_iter().map(cuda::allocated).sum::<usize>() + self.working(i)
    }

    /// The buffers alone.
    pub(super) fn working(&self, i: usize) -> usize {
        let spec = self.spec;
        let last = i + 1 == self.layout.stages().len();
        let Limits { rows_max, outputs_max, .. } = self.limits;
        let outputs = last.then(|| cuda::rows_room(outputs_max));
        let mut sizes = buffer_sizes(spec, self.dtype, cuda::rows_room(rows_max), outputs);
        if i > 0 {
            sizes.push(ring_bytes(self.in_flight, rows_max * spec.dim));
        }
        let vocab = last.then_some(spec.vocab);
        let (dim, head_dim) = (spec.dim, spec.heads.head_dim);
        let own = cuda::StageNeeds { limits: self.limits, dim, head_dim, vocab };
        let aside = match self.layout.head_of(i) {
            Some(part @ Unit::HeadPart { .. }) => aside_bytes(spec, self.dtype, outputs_max, part),
            _ => 0,
        };
        sizes.into_iter().map(cuda::allocated).sum::<usize>() + cuda::stage_bytes(&own) + aside
    }
}

/// What a part of the head takes beside its weights, for so many output rows.
pub(super) fn aside_bytes(spec: &ModelSpec, dtype: DType, outputs_max: usize, part: Unit) -> usize {
    let rows = cuda::rows_room(outputs_max);
    // What its rows are before products, its logits, and what all parts have found, which is on the last stage's device.
    let row = [spec.dim * dtype.size(), part.tokens(spec.vocab).len() * DType::F32.size(), 64 * 8];
    row.map(|row| cuda::allocated(rows * row)).iter().sum::<usize>() + cuda::view_bytes()
}
