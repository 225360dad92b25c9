//! What a layout will do: times, memory, tokens a second.

use std::{collections::BTreeMap, ops::Range};

use serde::Serialize;

use super::{Device, DeviceSpec, Layout, Planner, Stage, Workload, tower::HARDLY_ANY};
use crate::{
    batch::KV_BLOCK,
    error::{Error, Result},
    model::{
        units::{Pass, Unit},
        vision::VisionPass,
    },
};

/// Rows of the passes whose times are told.
const ROWS: [usize; 3] = [1, 32, 256];
/// Requests at once whose tokens a second are told.
const BATCHES: [usize; 3] = [1, 64, 256];

/// What a layout will do.
///
/// ```
/// use pipeline_infer::{backend::DType, layout::{DeviceSpec, Planner}, model::shapes};
///
/// let (spec, devices) = (shapes::find("72b").unwrap()?, DeviceSpec::list("4xh200-141g")?);
/// let planner = Planner::new(&spec, DType::BF16, &devices);
/// let told = planner.predict(&planner.plan(4)?)?;
/// assert_eq!((told.stages.len(), told.running), (4, 256));
/// // Of the stages one is the slowest; 145 GB of weights leave room for a million tokens and more.
/// assert!(told.stages.iter().any(|stage| stage.share == 1.0) && told.kv_tokens > 1_000_000);
/// # Ok::<(), pipeline_infer::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prediction {
    /// As in `--layout`.
    pub layout: String,
    /// In the order of the data.
    pub stages: Vec<StagePrediction>,
    /// Those of the vision tower.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vision: Vec<VisionPrediction>,
    /// Tokens whose keys and values fit: the tightest device's.
    pub kv_tokens: usize,
    /// Requests of the workload that run at once: as many as are asked for, or as have room.
    pub running: usize,
    /// Share of time in which the slowest device does no unit's work while answers are written, with all requests running:
    /// it waits, takes rows across, or begins a pass.
    pub bubble: f64,
    /// How much longer the slowest device is busy than all of them on average, less one.
    pub imbalance: f64,
    /// While answers are written.
    pub decode: Vec<DecodeRate>,
    /// The same with as many requests as run at once.
    pub decode_tokens_per_s: f64,
    /// While prompts are read.
    pub prompt_tokens_per_s: f64,
    /// Of the workload, prompts and images included.
    pub requests_per_s: f64,
    /// The same, counted in images.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub images_per_s: Option<f64>,
    /// Of the workload, prompts included.
    pub new_tokens_per_s: f64,
}

/// A stage of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StagePrediction {
    /// As in `--layout`.
    pub device: String,
    /// What it is.
    pub name: String,
    /// As in `--layout`.
    pub layers: String,
    /// Whether it has the embedding.
    pub embed: bool,
    /// Whether it has the head, or a part of it.
    pub head: bool,
    /// How much of it.
    pub head_share: f64,
    /// Bytes of its weights.
    pub weight_bytes: usize,
    /// Bytes of keys and values of a token.
    pub kv_bytes_per_token: usize,
    /// Bytes beside them.
    pub scratch_bytes: usize,
    /// Bytes of its device that a pipeline may take, for all its stages there.
    pub room_bytes: usize,
    /// Tokens whose keys and values its device has room for.
    pub kv_tokens: usize,
    /// How long it takes.
    pub times: Vec<PassTime>,
    /// The time that its device spends on a request of the workload, to that of the slowest device.
    pub share: f64,
}

/// A stage of the vision tower.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VisionPrediction {
    /// As in `--layout`.
    pub device: String,
    /// What it is.
    pub name: String,
    /// As in `--layout`.
    pub blocks: String,
    /// Whether it has what is before the first block.
    pub patches: bool,
    /// Whether it has what is behind the last one.
    pub merger: bool,
    /// Bytes of its weights.
    pub weight_bytes: usize,
    /// Bytes beside them.
    pub scratch_bytes: usize,
    /// How long it takes for an image of the workload, until its rows have left it.
    pub image_seconds: f64,
    /// As a decoder's stage has it: its device's time, for all its stages, to that of the slowest one.
    pub share: f64,
}

/// How long a stage takes for a pass.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PassTime {
    /// Which.
    pub pass: Pass,
    /// How long.
    pub seconds: f64,
}

/// New tokens of so many requests at once.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct DecodeRate {
    /// Requests.
    pub requests: usize,
    /// Of all together.
    pub tokens_per_s: f64,
}

/// Predicts a layout, whose devices must be among the planner's.
pub(super) fn predict(planner: &Planner<'_>, layout: &Layout) -> Result<Prediction> {
    layout.check(planner.spec.layers.len())?;
    let layout = &planner.with_tower(layout)?;
    let pipeline = Pipeline::new(planner, layout)?;
    let kv: Vec<usize> = (0..pipeline.places.len()).map(|i| pipeline.kv_tokens(i)).collect::<Result<_>>()?;
    let kv_tokens = kv.iter().copied().min().unwrap_or(0);
    // No more run at once than have room.
    let asked = planner.workload;
    let room = (kv_tokens / (asked.prompt + asked.new).max(1)).max(1);
    let workload = Workload { running: asked.running.min(room), ..asked };
    let pipeline = Pipeline { workload, ..pipeline };
    let busy = pipeline.by_device(&pipeline.request_seconds());
    let busy = pipeline.with_tower(busy);
    let slowest = busy.values().copied().fold(0.0, f64::max);
    let mean = busy.values().sum::<f64>() / busy.len() as f64;
    let share = |place: usize| busy[&place] / slowest;
    let running = pipeline.cycle(workload.running);
    let decode = BATCHES.map(|requests| {
        let cycle = pipeline.cycle(requests.min(room));
        DecodeRate { requests, tokens_per_s: requests.min(room) as f64 / cycle.seconds }
    });
    let [_, (chunk, _)] = workload.passes(pipeline.devices().len());
    let of_chunk: Vec<f64> = (0..kv.len()).map(|i| pipeline.seconds(i, chunk)).collect();
    let chunk_s = pipeline.by_device(&of_chunk).into_values().fold(0.0, f64::max);
    // What few requests wait for each other, decoding pays.
    let waits = (running.seconds - running.taken) * workload.new as f64 / workload.running.max(1) as f64;
    let request_s = slowest + waits;
    let stage = |(i, &kv): (usize, &usize)| pipeline.stage(i, kv, share(pipeline.places[i]));
    let vision = |i| pipeline.vision_stage(i, share(pipeline.vision[i].0));
    Ok(Prediction {
        layout: layout.to_string(),
        stages: kv.iter().enumerate().map(stage).collect(),
        vision: (0..pipeline.vision.len()).map(vision).collect(),
        kv_tokens,
        running: workload.running,
        bubble: 1.0 - running.working / running.seconds,
        imbalance: slowest / mean - 1.0,
        decode: decode.to_vec(),
        decode_tokens_per_s: workload.running as f64 / running.seconds,
        prompt_tokens_per_s: chunk.rows() as f64 / chunk_s,
        requests_per_s: 1.0 / request_s,
        images_per_s: planner.seen().map(|(_, images)| images.per_request as f64 / request_s),
        new_tokens_per_s: workload.new as f64 / request_s,
    })
}

/// A layout on its devices.
pub(super) struct Pipeline<'a> {
    planner: &'a Planner<'a>,
    layout: &'a Layout,
    /// What it is to do: what is asked for, or as much of it as has room.
    workload: Workload,
    /// Each stage's device, by its place among the planner's.
    places: Vec<usize>,
    /// The same of the vision tower's stages, with their blocks.
    vision: Vec<(usize, Range<usize>)>,
}

/// The time in which every running sequence gets a token.
struct Cycle {
    seconds: f64,
    /// Of them, those that the slowest device's passes take, boundaries included.
    taken: f64,
    /// Of these, those that its units take.
    working: f64,
}

impl<'a> Pipeline<'a> {
    pub(super) fn new(planner: &'a Planner<'a>, layout: &'a Layout) -> Result<Self> {
        let place = |kind: &str, i: usize, device: Device| {
            planner.devices.iter().position(|spec| spec.device == device).ok_or_else(|| {
                let why = format!("{kind}stage {i} is on {device}, which is not among the devices");
                Error::usage(format!("--layout {}", crate::error::shown(&layout.to_string())), why)
            })
        };
        let stages = layout.stages().iter().enumerate();
        let places = stages.map(|(i, stage)| place("", i, stage.device)).collect::<Result<_>>()?;
        let tower = match layout.vision().is_empty() {
            true => Vec::new(),
            false => layout.tower(planner.spec.vision.as_ref().map(|tower| tower.full.len()))?,
        };
        let vision = tower.into_iter().enumerate();
        let vision = vision.map(|(i, (device, blocks))| Ok((place("vision ", i, device)?, blocks)));
        Ok(Pipeline {
            planner,
            layout,
            workload: planner.workload,
            places,
            vision: vision.collect::<Result<_>>()?,
        })
    }

    /// Each stage's seconds for a request of the workload.
    pub(super) fn request_seconds(&self) -> Vec<f64> {
        let passes = self.workload.passes(self.devices().len());
        let of = |i| passes.iter().map(|&(pass, weight)| weight * self.seconds(i, pass)).sum();
        (0..self.places.len()).map(of).collect()
    }

    /// Devices that have stages, in the order in which they come first.
    pub(super) fn places_in_order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = Vec::new();
        for &place in &self.places {
            if !order.contains(&place) {
                order.push(place);
            }
        }
        order
    }

    /// Bytes that a pipeline may take of a device for stages, beside the image store.
    pub(super) fn room_of(&self, place: usize) -> usize {
        let store = match self.planner.seen() {
            Some(_) if self.places.first() == Some(&place) => self.planner.tower_scratch_of(place).store,
            _ => 0,
        };
        self.planner.devices[place].free.saturating_sub(store)
    }

    /// Bytes that the decoder's stages of a device take with so many KV tokens.
    pub(super) fn bytes_on(&self, place: usize, kv_tokens: usize) -> usize {
        let own = (0..self.places.len()).filter(|&i| self.places[i] == place);
        let of = |i| {
            self.weight_bytes(i)
                + self.scratch_bytes(i)
                + self.kv_bytes_per_token(i).saturating_mul(kv_tokens)
        };
        own.map(of).fold(0, usize::saturating_add)
    }

    /// Where what a stage of the tower makes goes to.
    fn behind(&self, i: usize) -> &DeviceSpec {
        let next = self.vision.get(i + 1).map_or(self.places[0], |(place, _)| *place);
        &self.planner.devices[next]
    }

    /// Devices' seconds for a request, with those of the tower's stages.
    fn with_tower(&self, mut busy: BTreeMap<usize, f64>) -> BTreeMap<usize, f64> {
        for (i, (place, blocks)) in self.vision.iter().enumerate() {
            *busy.entry(*place).or_insert(0.0) +=
                self.planner.tower_request_seconds(*place, blocks, self.behind(i));
        }
        busy
    }

    /// Seconds of a pass of a stage of the tower, until its rows have left it.
    pub(super) fn vision_seconds(&self, i: usize, pass: VisionPass) -> f64 {
        let (place, blocks) = &self.vision[i];
        self.planner.tower_seconds(*place, blocks, (self.behind(i), pass))
    }

    /// Bytes of a stage of the tower beside its weights.
    fn vision_scratch(&self, i: usize) -> usize {
        let (place, blocks) = &self.vision[i];
        let scratch = self.planner.tower_scratch_of(*place);
        scratch.stage + scratch.block * blocks.len()
    }

    fn vision_stage(&self, i: usize, share: f64) -> VisionPrediction {
        let (place, blocks) = self.vision[i].clone();
        let device = &self.planner.devices[place];
        let images = self.planner.images.map_or(1.0, |images| (images.per_request as f64).max(HARDLY_ANY));
        let stage = Stage { device: device.device, layers: blocks.clone() };
        VisionPrediction {
            device: device.device.to_string(),
            name: device.name.clone(),
            blocks: format!("v{stage}"),
            patches: blocks.start == 0,
            merger: i + 1 == self.vision.len(),
            weight_bytes: self.planner.tower_weight_bytes(&blocks),
            scratch_bytes: self.vision_scratch(i),
            image_seconds: self.planner.tower_request_seconds(place, &blocks, self.behind(i)) / images,
            share,
        }
    }

    /// Devices that have stages.
    fn devices(&self) -> Vec<usize> {
        let mut devices = self.places.clone();
        devices.sort_unstable();
        devices.dedup();
        devices
    }

    fn units(&self, stage: usize) -> Vec<Unit> {
        self.layout.units(stage, self.planner.spec)
    }

    /// Seconds of a stage's pass, until its rows have left it.
    pub(super) fn seconds(&self, stage: usize, pass: Pass) -> f64 {
        let costs = self.planner.costs(self.places[stage]);
        let next = self.places.get(stage + 1).map(|&place| &self.planner.devices[place]);
        let boundary = next.map_or(0.0, |next| costs.boundary(next, pass));
        self.units_seconds(stage, pass) + costs.pass() + boundary
    }

    /// Of them, those of its units.
    fn units_seconds(&self, stage: usize, pass: Pass) -> f64 {
        let costs = self.planner.costs(self.places[stage]);
        self.units(stage).into_iter().map(|unit| costs.seconds(unit, pass)).sum()
    }

    /// Sums over the stages of each device.
    pub(super) fn by_device(&self, per_stage: &[f64]) -> BTreeMap<usize, f64> {
        let mut sums = BTreeMap::new();
        for (&place, seconds) in self.places.iter().zip(per_stage) {
            *sums.entry(place).or_insert(0.0) += seconds;
        }
        sums
    }

    /// Sequences are spread over as many micro-batches as there are devices. In a cycle each device takes every one of them;
    /// and no micro-batch comes round faster than it passes through all stages.
    fn cycle(&self, requests: usize) -> Cycle {
        let slots = self.devices().len().min(requests).max(1);
        let pass =
            Pass::Decode { rows: requests.div_ceil(slots).max(1), context: self.planner.workload.context() };
        let times: Vec<f64> = (0..self.places.len()).map(|i| self.seconds(i, pass)).collect();
        let working: Vec<f64> = (0..self.places.len()).map(|i| self.units_seconds(i, pass)).collect();
        let round = times.iter().sum::<f64>() + self.gathering(slots, pass);
        let by_device = self.by_device(&times);
        let (slowest, taken) =
            by_device.iter().fold((0, 0.0), |a, (&i, &b)| if b > a.1 { (i, b) } else { a });
        let (taken, working) = (slots as f64 * taken, slots as f64 * self.by_device(&working)[&slowest]);
        Cycle { seconds: taken.max(round), taken, working }
    }

    /// What a split head adds to a round through all stages, whose times have its parts' in them. A micro-batch waits for its own
    /// logits, and stages wait while they do the parts of the others that are on their way.
    fn gathering(&self, slots: usize, pass: Pass) -> f64 {
        let stages = self.layout.head_stages();
        let (parts, last) = (stages.len(), self.places[self.places.len() - 1]);
        let part = |&i: &usize| {
            let costs = self.planner.costs(self.places[i]);
            self.layout.head_of(i).map_or(0.0, |unit| costs.seconds(unit, pass))
        };
        if parts == 1 {
            return 0.0;
        }
        let own = stages.iter().map(part).sum::<f64>() / parts as f64;
        let others = (slots as f64 - 1.0 - parts as f64) * own;
        self.planner.costs(last).gathering(parts, pass) + others
    }

    /// Tokens whose keys and values a stage's device has room for, beside those of its other stages.
    fn kv_tokens(&self, i: usize) -> Result<usize> {
        let (planner, place) = (self.planner, self.places[i]);
        let device = &planner.devices[place];
        let on_device = || (0..self.places.len()).filter(|&k| self.places[k] == place);
        let tower = (0..self.vision.len()).filter(|&k| self.vision[k].0 == place);
        let tower = tower.map(|k| planner.tower_weight_bytes(&self.vision[k].1) + self.vision_scratch(k));
        let store = device.free - self.room_of(place).min(device.free);
        let taken = self.bytes_on(place, 0) + tower.sum::<usize>() + store;
        let each: usize = on_device().map(|k| self.kv_bytes_per_token(k)).sum();
        let tokens = device.free.saturating_sub(taken) / each.max(1) / KV_BLOCK * KV_BLOCK;
        let wanted = planner.kv_tokens.unwrap_or(KV_BLOCK);
        if tokens >= wanted {
            return Ok(tokens);
        }
        let gigabytes = |bytes: usize| bytes as f64 / 1e9;
        let (name, taken, free) = (&device.name, gigabytes(taken), gigabytes(device.free));
        let why = format!(
            "{name} has room for {free:.1} GB; weights and buffers of its stages take {taken:.1} GB, which leaves room \
             for {tokens} KV tokens of {wanted}"
        );
        Err(Error::Device { device: device.device.to_string(), why })
    }

    fn stage(&self, i: usize, kv_tokens: usize, share: f64) -> StagePrediction {
        let (planner, stage) = (self.planner, &self.layout.stages()[i]);
        let device = &planner.devices[self.places[i]];
        let units = self.units(i);
        let passes = ROWS.map(|rows| Pass::Decode { rows, context: planner.workload.context() });
        let chunk = planner.workload.passes(1)[1].0;
        let times = passes.into_iter().chain([chunk]);
        StagePrediction {
            device: device.device.to_string(),
            name: device.name.clone(),
            layers: stage.to_string(),
            embed: units.contains(&Unit::Embed),
            head: self.layout.head_of(i).is_some(),
            head_share: self.layout.head_share(i),
            weight_bytes: self.weight_bytes(i),
            kv_bytes_per_token: self.kv_bytes_per_token(i),
            scratch_bytes: self.scratch_bytes(i),
            room_bytes: device.free,
            kv_tokens,
            times: times.map(|pass| PassTime { pass, seconds: self.seconds(i, pass) }).collect(),
            share,
        }
    }

    fn kv_bytes_per_token(&self, stage: usize) -> usize {
        let bytes = |unit: Unit| unit.kv_bytes_per_token(self.planner.spec, self.planner.dtype);
        self.units(stage).into_iter().map(bytes).sum()
    }

    fn weight_bytes(&self, stage: usize) -> usize {
        crate::model::decoder::weight_bytes(self.planner.spec, self.planner.dtype, &self.units(stage))
    }

    fn scratch_bytes(&self, stage: usize) -> usize {
        let scratch = self.planner.scratch_of(self.places[stage]);
        let head = if stage + 1 == self.places.len() { scratch.head } else { 0 };
        let split = matches!(self.layout.head_of(stage), Some(Unit::HeadPart { .. }));
        let head = head + if split { scratch.aside } else { 0 };
        scratch.stage + head + scratch.layer * self.layout.stages()[stage].layers.len()
    }
}
