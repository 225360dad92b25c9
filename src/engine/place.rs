//! Which devices stages go to by default, and how much fits there.

mod beside;
mod room;

pub(super) use beside::Free;
pub(super) use room::Room;

use room::aside_bytes;

use std::{collections::BTreeSet, sync::Arc};

use super::vision::{Extent, tower_scratch};
use crate::{
    backend::{
        Backend, DType, Limits,
        cuda::{self, DeviceFacts},
    },
    error::{Error, Result},
    layout::{
        Device, DeviceSpec, ImageLoad, Layout, MemoryLimits, Planner, Stage, VisionStage, Workload,
        planner::{Scratch, Split},
        profile::{self, Profile},
        tower::TowerScratch,
    },
    model::{
        decoder::{buffer_sizes, weight_bytes},
        spec::ModelSpec,
        units::{Unit, units_of},
        vision::VisionSpec,
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
    /// Images of a usual request, and what the vision tower takes, of a model that reads images.
    pub(super) images: Option<Sight>,
}

/// What plans have to know of a vision tower.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sight {
    pub(super) load: ImageLoad,
    pub(super) extent: Extent,
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

    /// The layout with the vision tower, of which nobody says where it goes.
    pub(super) fn tower(&self, layout: &Layout) -> Result<Layout> {
        let mut devices = of_layout(layout, self.threads)?;
        self.memory.apply(&mut devices);
        let mut planner = Planner::new(self.spec, self.dtype, &devices);
        planner.workload = self.workload;
        self.describe(&mut planner);
        // What is free says little beside stages that run; what has no room is told by who takes it.
        let mut all = devices.clone();
        all.iter_mut().for_each(|device| device.free = usize::MAX >> 1);
        let roomy = Planner { devices: &all, ..planner.clone() };
        let layout = planner.with_tower(layout).or_else(|_| roomy.with_tower(layout))?;
        tracing::info!(%layout, "the vision tower is placed");
        Ok(layout)
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
        self.describe(&mut planner);
        planner.split_head = split_head(&devices)?;
        let differ = devices.iter().any(|device| device.device == Device::Cpu);
        let plan = |planner: &Planner<'_>| match count {
            Count::Of(n) if differ => planner.plan_any_order(n),
            Count::Of(n) => planner.plan(n),
            Count::Auto => match planner.plan_auto()? {
                layout if split == Some(Split::Even) => planner.even(layout.stages().len()),
                layout => Ok(layout),
            },
        };
        let mut layout = plan(&planner)?;
        if layout.splits_head() && !self.parts_reach(&layout)? {
            planner.split_head = Some(false);
            layout = plan(&planner)?;
        }
        let measured = planner.profiles.iter().flatten().count();
        tracing::info!(%layout, devices = devices.len(), measured, "planned");
        Ok(layout)
    }

    /// Whether what GPUs with parts of the head write for the last one arrives there: a driver that says that it may does not
    /// always bring it. Where somebody asks for such a layout, that is an error; where plans do, the head stays whole.
    fn parts_reach(&self, layout: &Layout) -> Result<bool> {
        let gpus: Vec<usize> =
            layout.head_stages().iter().filter_map(|&i| layout.stages()[i].device.gpu()).collect();
        let Some((last, others)) = gpus.split_last() else { return Ok(true) };
        let (dtype, head_dim) = (self.dtype, self.spec.heads.head_dim);
        let facts = cuda::PipelineFacts { dtype, head_dim, seats: 1, in_flight: 1 };
        let views = cuda::Cuda::pipeline_with(&[*last], others, facts)?;
        let outcome = views[1..].iter().try_for_each(|view| view.find_way_back(&views[0]));
        if let Err(error) = &outcome {
            tracing::warn!(%error, "the head is not split");
        }
        Ok(outcome.is_ok())
    }

    /// What a planner has to know besides the workload.
    fn describe(&self, planner: &mut Planner<'_>) {
        let workload = planner.workload;
        planner.kv_tokens = self.kv_tokens;
        planner.images = self.images.map(|images| images.load);
        planner.scratch = scratch(self.spec, self.dtype, workload, self.context);
        planner.cpu_scratch = cpu_scratch(self.spec, workload);
        if let (Some(tower), Some(Sight { extent, .. })) = (&self.spec.vision, self.images) {
            planner.scratch.tower = tower_scratch(tower, extent, true);
            planner.cpu_scratch.tower = tower_scratch(tower, extent, false);
        }
        if self.spare {
            planner.scratch = self.with_spare(planner.scratch);
        }
        if self.profiles {
            planner.profiles = profiles(self.spec, self.dtype, planner.devices);
        }
    }
}

/// What plans for these devices of this machine have to know ([`Planner::split_head`]): GPUs that do not reach each other's memory
/// cannot make parts of a head for each other.
pub fn split_head(devices: &[DeviceSpec]) -> Result<Option<bool>> {
    let gpus: Vec<usize> = devices.iter().filter_map(|spec| spec.device.gpu()).collect();
    Ok(if cuda::all_could_reach(&gpus)? { None } else { Some(false) })
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
    match weight_bytes(spec, dtype, &units_of(spec, &(0..spec.layers.len()))) < DeviceSpec::cpu_free() {
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
    let placed = placed.with_split_head(layout.splits_head());
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
    let vision = layout.vision().iter().map(|stage| stage.device);
    let on: BTreeSet<Device> = layout.stages().iter().map(|stage| stage.device).chain(vision).collect();
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
    let layer = cuda::kv_waste(1) + lost(Unit::Layer(0));
    // In two parts, the largest that there are; where the vocabulary is cut, weights do not end with pages.
    let half = Unit::HeadPart { part: 1, parts: 2 };
    let aside = aside_bytes(spec, dtype, running_max, half) + lost(half);
    Scratch { stage, head, aside, layer, tower: usual_tower(spec, dtype, true) }
}

/// What a vision tower takes beside weights with passes and a store of the usual size, on GPUs or on the processor.
fn usual_tower(spec: &ModelSpec, dtype: DType, gpu: bool) -> TowerScratch {
    let of = |tower: &Arc<VisionSpec>| tower_scratch(tower, Extent::usual(dtype), gpu);
    spec.vision.as_ref().map(of).unwrap_or_default()
}

/// What stages on the CPU take beside weights, keys and values for such a workload, at most.
pub fn cpu_scratch(spec: &ModelSpec, workload: Workload) -> Scratch {
    let Workload { running, chunk, .. } = workload;
    let scheduling = SchedulerConfig { slots: SLOTS_PLANNED, ahead: true, ..SchedulerConfig::default() };
    let rows_max = Scheduler::rows_max(SchedulerConfig { chunk, running_max: running, ..scheduling });
    let of = |outputs| cpu_bytes(spec, rows_max, outputs);
    let stage = of(None) + 2 * ring_bytes(scheduling.in_flight_max(), rows_max * spec.dim);
    // Of what matrix products read nothing depends on how weights are kept.
    let tower = usual_tower(spec, DType::F32, false);
    Scratch { stage, head: of(Some(running)) - of(None), aside: 0, layer: 0, tower }
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
