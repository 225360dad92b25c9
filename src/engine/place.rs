//! Which devices stages go to by default, and how much fits there.

use std::collections::BTreeMap;

use crate::{
    backend::{
        DType, Limits,
        cuda::{self, DeviceFacts},
    },
    batch::KV_BLOCK,
    error::{Error, Result},
    layout::{
        Device, DeviceSpec, Layout, Planner, Stage, Workload,
        planner::{Scratch, Split},
        profile::{self, Profile},
    },
    model::{
        decoder::{buffer_sizes, weight_sizes},
        spec::ModelSpec,
        units::{Unit, units_of},
    },
    schedule::{Scheduler, SchedulerConfig},
    transport::ring_bytes,
};

/// Of a GPU's free memory, what is left for the driver: code, stacks, recorded passes and what fragments.
const RESERVE_BYTES: usize = 640 << 20;

/// The same while stages of another layout are made ready beside those that run: their recorded passes.
const RESERVE_BESIDE_BYTES: usize = 256 << 20;

/// Micro-batches in flight that plans leave room for: rings of more are small beside what else is estimated.
const SLOTS_PLANNED: usize = 8;

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

/// How many stages, where no layout says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Count {
    /// So many.
    Of(usize),
    /// As many as are worth it.
    Auto,
}

/// A model on its way to a layout.
pub(super) struct Unplaced<'a> {
    pub(super) spec: &'a ModelSpec,
    pub(super) dtype: DType,
    pub(super) place: Place,
    pub(super) workload: Workload,
    /// Tokens whose keys and values must have room, if it is said how many.
    pub(super) kv_tokens: Option<usize>,
    pub(super) context: usize,
    /// As in [`Room`].
    pub(super) spare: bool,
}

impl Unplaced<'_> {
    /// Stages of near-equal length, or, on several GPUs and unless asked otherwise, planned ones.
    pub(super) fn stages(&self, count: Count, split: Option<Split>) -> Result<Layout> {
        let gpus = gpus_of(self.place)?;
        let several = if let Count::Of(n) = count { n > 1 && gpus.len() > 1 } else { gpus.len() > 1 };
        let layers = self.spec.layers.len();
        match count {
            Count::Of(n) if !several || split == Some(Split::Even) => {
                self.place_on(&gpus, &Layout::even(n, layers, Device::Cpu)?)
            }
            Count::Auto if !several => self.place_on(&gpus, &Layout::even(1, layers, Device::Cpu)?),
            Count::Of(n) => self.planned(&gpus, |planner| planner.plan(n)),
            Count::Auto => self.planned(&gpus, |planner| match planner.plan_auto()? {
                layout if split == Some(Split::Even) => planner.even(layout.stages().len()),
                layout => Ok(layout),
            }),
        }
    }

    /// These cuts, on the devices that as many stages would be on.
    pub(super) fn cuts(&self, layout: &Layout) -> Result<Layout> {
        self.place_on(&gpus_of(self.place)?, layout)
    }

    /// Stages on successive GPUs, or on the one device if there are none.
    fn place_on(&self, gpus: &[usize], layout: &Layout) -> Result<Layout> {
        let one = match self.place {
            Place::One(device) => device,
            Place::Auto | Place::Gpus => Device::Cpu,
        };
        let stages = layout.stages().len();
        // Neighbours share a GPU where there are fewer GPUs than stages.
        let on = |i: usize| match gpus.len() {
            0 => one,
            n if stages > n => Device::Cuda(gpus[i * n / stages]),
            _ => Device::Cuda(gpus[i]),
        };
        let cut = layout.stages().iter().enumerate();
        Layout::new(cut.map(|(i, stage)| Stage { device: on(i), ..stage.clone() }).collect())
    }

    fn planned(&self, gpus: &[usize], plan: impl Fn(&Planner) -> Result<Layout>) -> Result<Layout> {
        let devices = specs(gpus)?;
        let mut planner = Planner::new(self.spec, self.dtype, &devices);
        planner.workload = self.workload;
        planner.kv_tokens = self.kv_tokens;
        planner.scratch = scratch(self.spec, self.dtype, self.workload, self.context);
        if self.spare {
            let Scratch { stage, head, layer } = planner.scratch;
            let tokens = self.kv_tokens.unwrap_or_default();
            let one = Unit::Layer(0).weight_bytes(self.spec, self.dtype)
                + tokens * Unit::Layer(0).kv_bytes_per_token(self.spec, self.dtype);
            planner.scratch = Scratch { stage: 2 * stage + one + layer, head: 2 * head, layer };
        }
        planner.profiles = profiles(self.spec, self.dtype, &devices);
        let layout = plan(&planner)?;
        tracing::debug!(%layout, measured = planner.profiles.iter().flatten().count(), "planned");
        Ok(layout)
    }
}

/// The usable GPUs' numbers; none where stages go to one device, or to the CPU.
fn gpus_of(place: Place) -> Result<Vec<usize>> {
    let gpus = match place {
        Place::One(_) => return Ok(Vec::new()),
        Place::Gpus => usable(cuda::devices()?),
        Place::Auto => cuda::devices().map_or_else(cpu_instead, usable),
    };
    if gpus.is_empty() && place == Place::Gpus {
        let why = "none of the GPUs is new enough: compute capability 8.0 is needed".into();
        return Err(Error::Device { device: "cuda".into(), why });
    }
    Ok(gpus)
}

/// The usable GPUs of this machine, as plans see them, with what is free on them now.
pub fn gpus() -> Result<Vec<DeviceSpec>> {
    specs(&gpus_of(Place::Gpus)?)
}

fn specs(gpus: &[usize]) -> Result<Vec<DeviceSpec>> {
    let spec = |gpu: &DeviceFacts| {
        let free = cuda::free_bytes(gpu.ordinal)?.saturating_sub(RESERVE_BYTES);
        let spec = DeviceSpec::of_gpu(&gpu.name, gpu.multiprocessors, gpu.memory_bytes);
        Ok(DeviceSpec { device: Device::Cuda(gpu.ordinal), free, ..spec })
    };
    cuda::devices()?.iter().filter(|gpu| gpus.contains(&gpu.ordinal)).map(spec).collect()
}

/// What has been measured of a model on each of these devices.
pub fn profiles(spec: &ModelSpec, dtype: DType, devices: &[DeviceSpec]) -> Vec<Option<Profile>> {
    let folder = profile::folder();
    let find = |device| Profile::open(folder.as_deref()?, spec, dtype, device);
    devices.iter().map(find).collect()
}

/// What stages on GPUs take beside weights, keys and values for such a workload, at most.
pub fn scratch(spec: &ModelSpec, dtype: DType, workload: Workload, context_max: usize) -> Scratch {
    let Workload { running: running_max, chunk, .. } = workload;
    let scheduling = SchedulerConfig {
        slots: SLOTS_PLANNED,
        chunk,
        running_max,
        ahead: true,
        ..SchedulerConfig::default()
    };
    let rows_max = Scheduler::rows_max(scheduling);
    let limits = Limits { rows_max, seqs_max: running_max, outputs_max: running_max, context_max };
    let of = |outputs: Option<usize>| {
        let sizes = buffer_sizes(spec, dtype, cuda::rows_room(rows_max), outputs.map(cuda::rows_room));
        let vocab = outputs.map(|_| spec.vocab);
        let own = cuda::StageNeeds { limits, dim: spec.dim, head_dim: spec.heads.head_dim, vocab };
        sizes.into_iter().map(cuda::allocated).sum::<usize>() + cuda::stage_bytes(&own)
    };
    let lost = |unit: Unit| {
        let sizes = unit.tensor_sizes(spec, dtype);
        sizes.into_iter().map(|bytes| cuda::allocated(bytes) - bytes).sum::<usize>()
    };
    let ring = cuda::allocated(ring_bytes(scheduling.in_flight_max(), rows_max * spec.dim));
    let stage = of(None) + ring + lost(Unit::Embed);
    let head = of(Some(running_max)) - of(None) + lost(Unit::Head);
    Scratch { stage, head, layer: cuda::kv_waste(1) + lost(Unit::Layer(0)) }
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

/// Says how many bytes of a GPU's memory are free.
pub(super) type Free = fn(usize) -> Result<usize>;

/// What has to find room beside the KV cache.
pub(super) struct Room<'a> {
    pub(super) layout: &'a Layout,
    pub(super) spec: &'a ModelSpec,
    pub(super) dtype: DType,
    pub(super) limits: Limits,
    pub(super) in_flight: usize,
    /// Whether each GPU keeps room for one more layer with its pages, and for stages that are made ready beside those
    /// that run.
    pub(super) spare: bool,
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

    /// An error if stages of this layout have no room beside those of `now`, whose units stay where they are on the same
    /// device. The others come, and go from where they are only when all have come.
    pub(super) fn check_beside(&self, now: &Layout, blocks: usize, free: Free) -> Result<()> {
        let layer_kv = blocks * KV_BLOCK * self.spec.kv_bytes_per_token(self.dtype);
        for (device, stages) in self.by_device() {
            let Some(gpu) = device else { continue };
            let here = |unit: &Unit| {
                now.stages().iter().any(|stage| {
                    stage.device == Device::Cuda(gpu) && units_of(self.spec, &stage.layers).contains(unit)
                })
            };
            let of = |&i: &usize| units_of(self.spec, &self.layout.stages()[i].layers);
            let come: Vec<Unit> = stages.iter().flat_map(of).filter(|unit| !here(unit)).collect();
            let bytes = |unit: &Unit| {
                let sizes = unit.tensor_sizes(self.spec, self.dtype).into_iter();
                let pages = if let Unit::Layer(_) = unit { layer_kv + cuda::kv_waste(1) } else { 0 };
                sizes.map(cuda::allocated).sum::<usize>() + pages
            };
            let working: usize = stages.iter().map(|&i| self.working(i)).sum();
            let need = working + come.iter().map(bytes).sum::<usize>() + RESERVE_BESIDE_BYTES;
            let free = free(gpu)?;
            if need > free {
                let (need, free, units) = (need >> 20, free >> 20, come.len());
                let why = format!(
                    "bringing {units} units there needs {need} MiB of its memory for a while, and {free} MiB are free"
                );
                return Err(Error::Device { device: format!("cuda:{gpu}"), why });
            }
        }
        Ok(())
    }

    /// Bytes of a KV block of these stages' layers, and of one more if there is to be room for it.
    fn block_bytes(&self, stages: &[usize]) -> usize {
        let layers: usize = stages.iter().map(|i| self.layout.stages()[*i].layers.len()).sum();
        self.spec.kv_bytes_per_token(self.dtype) * (layers + usize::from(self.spare)) * KV_BLOCK
    }

    /// Bytes of a GPU that weights and buffers of its stages leave: at least a block.
    fn left(&self, gpu: usize, stages: &[usize]) -> Result<usize> {
        let layers: usize = stages.iter().map(|i| self.layout.stages()[*i].layers.len()).sum();
        let taken: usize = stages.iter().map(|&i| self.bytes(i)).sum();
        let spare = if self.spare { self.spare_bytes(stages) } else { 0 };
        let need = taken + spare + cuda::kv_waste(layers) + RESERVE_BYTES;
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

    /// What is kept for a relayout: the buffers of these stages once more, and a layer's weights; its pages are counted with
    /// the others.
    fn spare_bytes(&self, stages: &[usize]) -> usize {
        let layer = Unit::Layer(0).tensor_sizes(self.spec, self.dtype);
        let layer: usize = layer.into_iter().map(cuda::allocated).sum();
        let working: usize = stages.iter().map(|&i| self.working(i)).sum();
        working + layer + cuda::kv_waste(1)
    }

    /// Weights and buffers of a stage on a GPU, as the driver counts them.
    fn bytes(&self, i: usize) -> usize {
        let weights = weight_sizes(self.spec, self.dtype, &self.layout.stages()[i].layers);
        weights.into_iter().map(cuda::allocated).sum::<usize>() + self.working(i)
    }

    /// The buffers alone.
    fn working(&self, i: usize) -> usize {
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
