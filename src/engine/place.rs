//! Which devices stages go to by default, and how much fits there.

mod beside;

pub(super) use beside::Free;

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    backend::{
        DType, Limits, cpu,
        cuda::{self, DeviceFacts},
    },
    batch::KV_BLOCK,
    error::{Error, Result},
    layout::{
        Device, DeviceSpec, Layout, MemoryLimits, Planner, Stage, VisionStage, Workload,
        planner::{Scratch, Split},
        profile::{self, Profile},
    },
    model::{
        decoder::{buffer_sizes, weight_bytes, weight_sizes},
        spec::ModelSpec,
        units::{Unit, units_of},
    },
    schedule::{Scheduler, SchedulerConfig},
    transport::ring_bytes,
};

/// Of a GPU's free memory, what is left for the driver: code, stacks, recorded passes and what fragments.
const RESERVE_BYTES: usize = 640 << 20;

/// Micro-batches in flight that plans leave room for: rings of more are small beside what else is estimated.
const SLOTS_PLANNED: usize = 8;

/// Where stages go that no layout places.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) enum Place {
    /// On successive GPUs, or on the CPU if there are none.
    #[default]
    Auto,
    /// On successive GPUs.
    Gpus,
    /// On one device.
    One(Device),
    /// On any of these. The CPU gets what has no room on the others.
    Among(Vec<Device>),
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
    pub(super) place: &'a Place,
    pub(super) workload: Workload,
    /// What for if stages are on the CPU and on GPUs.
    pub(super) workload_mixed: Workload,
    /// Tokens whose keys and values must have room, if it is said how many.
    pub(super) kv_tokens: Option<usize>,
    pub(super) context: usize,
    /// CPU threads, if it is said how many.
    pub(super) threads: Option<usize>,
    /// What may be taken of devices.
    pub(super) memory: &'a MemoryLimits,
    /// Whether what was measured in earlier runs goes before predictions.
    pub(super) profiles: bool,
    /// As in [`Room`].
    pub(super) spare: bool,
}

impl Unplaced<'_> {
    /// Stages of near-equal length, or, on several devices and unless asked otherwise, planned ones. By default one, or as
    /// many as are worth it on devices that are named.
    pub(super) fn stages(&self, count: Option<Count>, split: Option<Split>) -> Result<Layout> {
        let devices = devices_of(self.place)?;
        let by_default = if let Place::Among(_) = self.place { Count::Auto } else { Count::Of(1) };
        let count = count.unwrap_or(by_default);
        let layers = self.spec.layers.len();
        match count {
            Count::Of(n) if n == 1 || devices.len() == 1 || split == Some(Split::Even) => {
                place_on(&devices, &Layout::even(n, layers, Device::Cpu)?)
            }
            Count::Auto if devices.len() == 1 => place_on(&devices, &Layout::even(1, layers, Device::Cpu)?),
            _ if devices.contains(&Device::Cpu) => self.beside_cpu(&devices, count, split),
            _ => self.planned(&device_specs(&devices, None)?, self.workload, count, split).map_err(|error| {
                match error {
                    Error::Device { device, why } => {
                        Error::Device { device, why: why + beside_cpu_helps(self.spec, self.dtype) }
                    }
                    other => other,
                }
            }),
        }
    }

    /// These cuts, on the devices that as many stages would be on.
    pub(super) fn cuts(&self, layout: &Layout) -> Result<Layout> {
        place_on(&devices_of(self.place)?, layout)
    }

    /// On the GPUs among these devices if they have room for it, and for a request; else with as little as can be on the CPU.
    fn beside_cpu(&self, devices: &[Device], count: Count, split: Option<Split>) -> Result<Layout> {
        let gpus: Vec<Device> = devices.iter().copied().filter(|device| *device != Device::Cpu).collect();
        let request = self.workload.prompt + self.workload.new;
        let alone = Unplaced { kv_tokens: self.kv_tokens.or(Some(request)), ..*self };
        let fits = alone.planned(&device_specs(&gpus, None)?, self.workload, count, split);
        if let Err(Error::Device { .. }) = fits {
            let layout =
                self.planned(&device_specs(devices, self.threads)?, self.workload_mixed, count, split)?;
            tracing::warn!("the model does not fit the GPUs: {}", halves(&layout));
            return Ok(layout);
        }
        // Without a bound on keys and values, which it was only asked for to see whether there is any room.
        self.planned(&device_specs(&gpus, None)?, self.workload, count, split)
    }

    fn planned(
        &self,
        devices: &[DeviceSpec],
        workload: Workload,
        count: Count,
        split: Option<Split>,
    ) -> Result<Layout> {
        let mut devices = devices.to_vec();
        self.memory.apply(&mut devices);
        let mut planner = Planner::new(self.spec, self.dtype, &devices);
        planner.workload = workload;
        planner.kv_tokens = self.kv_tokens;
        planner.scratch = scratch(self.spec, self.dtype, workload, self.context);
        planner.cpu_scratch = cpu_scratch(self.spec, workload);
        if self.spare {
            planner.scratch = self.with_spare(planner.scratch);
        }
        if self.profiles {
            planner.profiles = profiles(self.spec, self.dtype, &devices);
        }
        let differ = devices.iter().any(|device| device.device == Device::Cpu);
        let layout = match count {
            Count::Of(n) if differ => planner.plan_any_order(n)?,
            Count::Of(n) => planner.plan(n)?,
            Count::Auto => match planner.plan_auto()? {
                layout if split == Some(Split::Even) => planner.even(layout.stages().len())?,
                layout => layout,
            },
        };
        let measured = planner.profiles.iter().flatten().count();
        tracing::info!(%layout, devices = devices.len(), measured, "planned");
        Ok(layout)
    }
}

/// `layers 0-3 are on the processor, which is far slower, and 4-27 on cuda:0`.
fn halves(layout: &Layout) -> String {
    let layers = |on_cpu: bool| {
        let stages = layout.stages().iter().filter(|stage| (stage.device == Device::Cpu) == on_cpu);
        let text = |stage: &Stage| match on_cpu {
            true => stage.to_string(),
            false => format!("{stage} on {}", stage.device),
        };
        stages.map(text).collect::<Vec<_>>().join(", ")
    };
    match &*layers(false) {
        "" => "all layers are on the processor, which is far slower".into(),
        gpus => format!("layers {} are on the processor, which is far slower, and {gpus}", layers(true)),
    }
}

/// What is added to an error that says that a GPU has too little room, if the host has enough.
fn beside_cpu_helps(spec: &ModelSpec, dtype: DType) -> &'static str {
    match weight_bytes(spec, dtype, &(0..spec.layers.len())) < DeviceSpec::cpu_free() {
        true => {
            "; --devices cuda,cpu puts on the processor, which is far slower, what has no room on the GPUs"
        }
        false => "",
    }
}

/// A layout's cuts on these devices, of which neighbours share each where there are fewer than stages.
fn place_on(devices: &[Device], layout: &Layout) -> Result<Layout> {
    let (stages, n) = (layout.stages().len(), devices.len());
    let on = |i: usize| if stages > n { devices[i * n / stages] } else { devices[i] };
    let cut = layout.stages().iter().enumerate();
    let placed = Layout::new(cut.map(|(i, stage)| Stage { device: on(i), ..stage.clone() }).collect())?;
    // Nobody has said where they go either.
    let first = |stage: &VisionStage| VisionStage { device: on(0), ..stage.clone() };
    placed.with_vision(layout.vision().iter().map(first).collect())
}

/// The devices that stages can be on, at least one.
fn devices_of(place: &Place) -> Result<Vec<Device>> {
    let gpus = match place {
        Place::One(device) => return Ok(vec![*device]),
        Place::Among(devices) => return named(devices),
        Place::Gpus => usable(cuda::devices()?),
        Place::Auto => cuda::devices().map_or_else(cpu_instead, usable),
    };
    if gpus.is_empty() && *place == Place::Gpus {
        let why = "none of the GPUs is new enough: compute capability 8.0 is needed".into();
        return Err(Error::Device { device: "cuda".into(), why });
    }
    Ok(if gpus.is_empty() { vec![Device::Cpu] } else { gpus })
}

/// Devices that a user names, if they are there.
fn named(devices: &[Device]) -> Result<Vec<Device>> {
    let gpus = match devices.iter().all(|device| *device == Device::Cpu) {
        true => Vec::new(),
        false => usable(cuda::devices()?),
    };
    for (i, device) in devices.iter().enumerate() {
        if devices[..i].contains(device) {
            return Err(Error::usage("--devices", format!("{device} is named twice")));
        }
        if *device != Device::Cpu && !gpus.contains(device) {
            let why = format!("there is no such GPU that can be used: {} found", gpus.len());
            return Err(Error::Device { device: device.to_string(), why });
        }
    }
    match devices {
        [] => Err(Error::usage("--devices", "there are none")),
        devices => Ok(devices.to_vec()),
    }
}

/// The usable GPUs of this machine, as plans see them, with what is free on them now.
pub fn gpus() -> Result<Vec<DeviceSpec>> {
    device_specs(&devices_of(&Place::Gpus)?, None)
}

/// These devices of this machine, as plans see them, with what is free on them now. Processors are measured, on so many
/// threads.
pub fn device_specs(devices: &[Device], threads: Option<usize>) -> Result<Vec<DeviceSpec>> {
    let spec = |device: &Device| {
        let Device::Cuda(ordinal) = *device else { return DeviceSpec::of_cpu(threads) };
        let missing = || Error::Device { device: device.to_string(), why: "there is no such GPU".into() };
        let gpu = cuda::devices()?.iter().find(|gpu| gpu.ordinal == ordinal).ok_or_else(missing)?;
        let free = cuda::free_bytes(gpu.ordinal)?.saturating_sub(RESERVE_BYTES);
        let spec = DeviceSpec::of_gpu(&gpu.name, gpu.multiprocessors, gpu.memory_bytes);
        Ok(DeviceSpec { device: *device, free, ..spec })
    };
    devices.iter().map(spec).collect()
}

/// The devices that a layout's stages are on, each once.
pub(super) fn of_layout(layout: &Layout, threads: Option<usize>) -> Result<Vec<DeviceSpec>> {
    let on: BTreeSet<Device> = layout.stages().iter().map(|stage| stage.device).collect();
    device_specs(&Vec::from_iter(on), threads)
}

/// An error if there is a limit for a GPU that is not there.
pub(super) fn check_limits(memory: &MemoryLimits) -> Result<()> {
    for device in memory.devices() {
        let Device::Cuda(ordinal) = device else { continue };
        let wrong = |why| Error::usage(format!("--device-memory {device}"), why);
        let found = cuda::devices().map_err(|error| wrong(error.to_string()))?.len();
        if ordinal >= found {
            return Err(wrong(format!("there is no such GPU: {found} found")));
        }
    }
    Ok(())
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

/// What stages on the CPU take beside weights, keys and values for such a workload, at most.
pub fn cpu_scratch(spec: &ModelSpec, workload: Workload) -> Scratch {
    let Workload { running, chunk, .. } = workload;
    let scheduling = SchedulerConfig { slots: SLOTS_PLANNED, ahead: true, ..SchedulerConfig::default() };
    let rows_max = Scheduler::rows_max(SchedulerConfig { chunk, running_max: running, ..scheduling });
    let of = |outputs| cpu_bytes(spec, rows_max, outputs);
    let stage = of(None) + 2 * ring_bytes(scheduling.in_flight_max(), rows_max * spec.dim);
    Scratch { stage, head: of(Some(running)) - of(None), layer: 0 }
}

/// Bytes of a stage's buffers on the CPU, where what matrix products read is f32.
fn cpu_bytes(spec: &ModelSpec, rows: usize, outputs: Option<usize>) -> usize {
    buffer_sizes(spec, DType::F32, rows, outputs).into_iter().sum()
}

/// The GPUs that kernels can be compiled for.
fn usable(all: &[DeviceFacts]) -> Vec<Device> {
    all.iter().filter(|gpu| gpu.usable()).map(|gpu| Device::Cuda(gpu.ordinal)).collect()
}

/// No GPUs; with a driver that is worth a word.
fn cpu_instead(error: Error) -> Vec<Device> {
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
    /// What the vision tower and the image store take of each GPU.
    pub(super) vision: Option<BTreeMap<usize, usize>>,
    pub(super) memory: &'a MemoryLimits,
    /// Whether each GPU keeps room for one more layer with its pages, and for stages that are made ready beside those
    /// that run.
    pub(super) spare: bool,
}

impl Room<'_> {
    /// KV blocks that fit on the tightest device: all that weights and buffers leave. On the CPU alone no more than `wanted`,
    /// and a quarter of the free memory.
    pub(super) fn blocks(&self, wanted: usize) -> Result<usize> {
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
    pub(super) fn check(&self, blocks: usize) -> Result<()> {
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

    /// Bytes of a KV block of these stages' layers, and of one more if there is to be room for it.
    fn block_bytes(&self, stages: &[usize]) -> usize {
        let layers: usize = stages.iter().map(|i| self.layout.stages()[*i].layers.len()).sum();
        self.spec.kv_bytes_per_token(self.dtype) * (layers + usize::from(self.spare)) * KV_BLOCK
    }

    /// Bytes of a GPU that weights and buffers of its stages leave: at least a block.
    fn left(&self, gpu: usize, stages: &[usize]) -> Result<usize> {
        let layers: usize = stages.iter().map(|i| self.layout.stages()[*i].layers.len()).sum();
        let taken: usize = stages.iter().map(|&i| self.bytes(i)).sum();
        let spare = if self.spare { self.spare_bytes(gpu, stages) } else { 0 };
        let need = taken + self.vision_bytes(gpu) + spare + cuda::kv_waste(layers);
        self.rest(Device::Cuda(gpu), cuda::free_bytes(gpu)?.saturating_sub(RESERVE_BYTES), need, stages)
    }

    /// The same of the host's memory, for stages beside GPUs: weights that have no room there would be read from the disk
    /// in every pass.
    fn left_on_host(&self, stages: &[usize]) -> Result<usize> {
        let need = stages.iter().map(|&i| self.host_bytes(i)).sum();
        self.rest(Device::Cpu, DeviceSpec::cpu_free(), need, stages)
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

    /// Weights, in the mapped file or not, and buffers of a stage on the CPU.
    fn host_bytes(&self, i: usize) -> usize {
        let (spec, stages) = (self.spec, self.layout.stages());
        let Limits { rows_max, outputs_max, .. } = self.limits;
        let outputs = (i + 1 == stages.len()).then_some(outputs_max);
        let buffers = cpu_bytes(spec, rows_max, outputs);
        // Those of both boundaries: between a GPU and the CPU packets lie on the host.
        let rings = 2 * ring_bytes(self.in_flight, rows_max * spec.dim);
        weight_sizes(spec, self.dtype, &stages[i].layers).into_iter().sum::<usize>() + buffers + rings
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_the_processor_is_said_in_a_line() {
        let said = |layout: &str| halves(&layout.parse().unwrap());
        let beside = "layers 0-3, 21-27 are on the processor, which is far slower, and 4-20 on cuda:0";
        assert_eq!(said("0-3@cpu,4-20@cuda:0,21-27@cpu"), beside);
        assert_eq!(said("0-27@cpu"), "all layers are on the processor, which is far slower");
    }

    #[test]
    fn cuts_go_to_named_devices_in_their_order() {
        let (cpu, gpu) = (Device::Cpu, Device::Cuda(1));
        let placed = |devices: &[Device]| place_on(devices, &"0,1,2-3".parse().unwrap()).unwrap().to_string();
        assert_eq!(placed(&[gpu, cpu]), "0@cuda:1,1@cuda:1,2-3@cpu");
        assert_eq!(placed(&[cpu, gpu, cpu]), "0@cpu,1@cuda:1,2-3@cpu");
        assert_eq!(named(&[cpu]), Ok(vec![cpu]));
        assert!(named(&[cpu, cpu]).is_err() && named(&[]).is_err());
    }
}
