//! Layouts for a model on devices: how many stages, in which order, cut where.

mod refusal;

use std::{collections::HashMap, ops::Range};

use serde::Serialize;

use super::{
    Device, DeviceSpec, Layout, Stage, VisionStage,
    cost::Costs,
    joint::{self, Cuts, Tower},
    plan::{self, Problem, Sizes, Slot},
    predict::{self, Prediction},
    profile::Profile,
    tower::{ImageLoad, TowerScratch},
};
use crate::{
    backend::DType,
    error::{Error, Result},
    model::{
        spec::ModelSpec,
        units::{Pass, Unit},
    },
};

/// Of fewer stages that reach as many tokens a second within this share, the fewest are taken.
const STAGE_WORTH: f64 = 0.01;
/// A split head has to reach so much more than a whole one: devices wait for each other.
const SPLIT_WORTH: f64 = 0.01;
/// Orders of devices that are tried; of more, the given one and its reverse alone.
const ORDERS_MAX: usize = 1000;
/// Of more, the best without a vision tower is taken.
const ORDERS_WITH_TOWER_MAX: usize = 24;
/// Layers and a vision tower are cut together where that makes the slowest device faster by more than this share.
const TOGETHER_WORTH: f64 = 0.03;
/// KV tokens come in blocks.
const KV_STEP: usize = crate::batch::KV_BLOCK;
const KV_TOKENS_MAX: usize = 1 << 40;

/// How the layers are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Into stages of near-equal length.
    Even,
    /// So that the slowest stage is as fast as can be.
    Planned,
}

/// What a plan is for. A stage's cost is the time that it spends on one of these requests, its share of passes that it
/// has in common with others included.
///
/// ```
/// use pipeline_infer::{layout::Workload, model::units::Pass};
///
/// let workload = Workload { running: 256, prompt: 512, new: 256, chunk: 2048 };
/// let [(decode, steps), (chunk, parts)] = workload.passes(4);
/// // It is one of 64 in each of its 256 steps, which makes four of its own; and a quarter of a chunk.
/// assert_eq!((decode, steps), (Pass::Decode { rows: 64, context: 640 }, 4.0));
/// assert_eq!((chunk, parts), (Pass::Chunk { rows: 2048, before: 0 }, 0.25));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Workload {
    /// Requests that run at once, spread over as many micro-batches as there are devices.
    pub running: usize,
    /// Prompt tokens of each.
    pub prompt: usize,
    /// New tokens of each.
    pub new: usize,
    /// Prompt tokens in a micro-batch.
    pub chunk: usize,
}

impl Default for Workload {
    fn default() -> Self {
        Workload { running: 256, prompt: 512, new: 256, chunk: 2048 }
    }
}

impl Workload {
    /// What a device of so many sees of a request: passes, and how many of them are its own.
    pub fn passes(&self, devices: usize) -> [(Pass, f64); 2] {
        let rows = self.running.div_ceil(devices.max(1)).max(1);
        let decode = Pass::Decode { rows, context: self.context() };
        let chunk = Pass::Chunk { rows: self.chunk.max(1), before: 0 };
        [(decode, self.new as f64 / rows as f64), (chunk, self.prompt as f64 / self.chunk.max(1) as f64)]
    }

    /// Tokens that a sequence has in the middle of its answer.
    pub fn context(&self) -> usize {
        self.prompt + self.new / 2
    }

    /// Tokens of all that run at once, at their ends.
    pub fn kv_tokens(&self) -> usize {
        self.running.saturating_mul(self.prompt.saturating_add(self.new))
    }
}

/// Bytes of a stage beside weights, keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Scratch {
    /// Of every stage.
    pub stage: usize,
    /// Of the last one besides: logits, sampling.
    pub head: usize,
    /// Of every one with a part of a split head besides.
    pub aside: usize,
    /// Of every layer: what is lost where its pages end.
    pub layer: usize,
    /// Of a vision tower.
    pub tower: TowerScratch,
}

/// Plans a model on devices.
///
/// ```
/// use pipeline_infer::{backend::DType, layout::{DeviceSpec, Planner}, model::shapes};
///
/// let spec = shapes::find("7b").unwrap()?;
/// let devices = DeviceSpec::list("4xh200-141g")?;
/// let mut planner = Planner::new(&spec, DType::BF16, &devices);
/// // All four devices have a part of the head. Where the last stage has all of it, it has fewer layers.
/// assert!(planner.plan(4)?.splits_head());
/// planner.split_head = Some(false);
/// assert!(planner.plan(4)?.stages()[3].layers.len() < 7);
/// # Ok::<(), pipeline_infer::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Planner<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// How weights, keys and values are kept.
    pub dtype: DType,
    /// Where stages can be, in the order of the data.
    pub devices: &'a [DeviceSpec],
    /// What has been measured, for each device.
    pub profiles: Vec<Option<Profile>>,
    /// What for. Tokens of images are among its prompts'.
    pub workload: Workload,
    /// Images of its requests. `None` for a model that reads none, or for one whose vision tower is not to be placed.
    pub images: Option<ImageLoad>,
    /// Tokens whose keys and values must have room. `None`: those of the workload, or as many as there is room for.
    pub kv_tokens: Option<usize>,
    /// Whether the head is split over the devices ([`Layout::with_split_head`]), as far as they are GPUs. `None`: if that
    /// reaches more requests a second, or as many and more tokens while answers are written.
    pub split_head: Option<bool>,
    /// What stages take besides, on GPUs.
    pub scratch: Scratch,
    /// The same on a processor.
    pub cpu_scratch: Scratch,
}

impl<'a> Planner<'a> {
    /// Without profiles, for the default workload; with an image a request if the model reads images.
    pub fn new(spec: &'a ModelSpec, dtype: DType, devices: &'a [DeviceSpec]) -> Self {
        let profiles = vec![None; devices.len()];
        let images = spec.vision.as_deref().map(ImageLoad::usual);
        let usual = Workload::default();
        let prompt = usual.prompt + images.map_or(0, |images| images.prompt_tokens());
        let (workload, scratch) = (Workload { prompt, ..usual }, Scratch::default());
        Planner {
            spec,
            dtype,
            devices,
            profiles,
            workload,
            images,
            kv_tokens: None,
            split_head: None,
            scratch,
            cpu_scratch: scratch,
        }
    }

    /// The best cut into `stages` stages on the first devices. Where there are fewer devices, neighbours share them.
    pub fn plan(&self, stages: usize) -> Result<Layout> {
        self.check(stages)?;
        let order = range(self.devices.len().min(stages));
        self.fitted(&order, stages).ok_or_else(|| self.refusal(stages))
    }

    /// The same, on any of the devices, in any order.
    pub fn plan_any_order(&self, stages: usize) -> Result<Layout> {
        self.check(stages)?;
        if stages > self.devices.len() {
            return self.plan(stages);
        }
        let (orders, without) = (self.orders(stages), Planner { images: None, ..self.clone() });
        let by = if orders.len() > ORDERS_WITH_TOWER_MAX { &without } else { self };
        let rated = orders.into_iter().filter_map(|order| {
            let layout = by.fitted(&order, stages)?;
            Some((by.rate(&layout), order, layout))
        });
        let best =
            rated.max_by(|(a, ..), (b, ..)| a.partial_cmp(b).expect("rates are numbers; this is a bug"));
        let layout = match best {
            Some((_, order, _)) if by.images != self.images => self.fitted(&order, stages),
            best => best.map(|(.., layout)| layout),
        };
        layout.ok_or_else(|| self.refusal(stages))
    }

    /// The best number of stages, at most one a device, in any order of the devices: that with the most tokens a second,
    /// or fewer that reach as many within one percent.
    pub fn plan_auto(&self) -> Result<Layout> {
        let most = self.devices.len().min(self.spec.layers.len());
        self.check(most)?;
        let layouts: Vec<Layout> = (1..=most).filter_map(|stages| self.plan_any_order(stages).ok()).collect();
        let rates: Vec<f64> = layouts.iter().map(|layout| self.rate(layout)).collect();
        let best = rates.iter().copied().fold(0.0, f64::max);
        let first = rates.iter().position(|&rate| rate >= best * (1.0 - STAGE_WORTH));
        first.map(|i| layouts[i].clone()).ok_or_else(|| self.refusal(most))
    }

    /// Stages of near-equal length on the first devices.
    pub fn even(&self, stages: usize) -> Result<Layout> {
        self.check(stages)?;
        self.place(&Layout::even(stages, self.spec.layers.len(), Device::Cpu)?)
    }

    /// These cuts, on the first devices, of which neighbours share each if there are fewer.
    pub fn place(&self, layout: &Layout) -> Result<Layout> {
        let stages = layout.stages().len();
        let devices = self.devices.len().min(stages);
        let on = |i: usize| self.devices[i * devices / stages].device;
        let cut = layout.stages().iter().enumerate();
        let placed = Layout::new(cut.map(|(i, stage)| Stage { device: on(i), ..stage.clone() }).collect())?;
        let placed = placed.with_split_head(layout.splits_head());
        let (vision, tower) = (layout.vision().iter().enumerate(), layout.vision().len().max(1));
        let on = |i: usize| self.devices[i * devices / tower].device;
        placed.with_vision(vision.map(|(i, stage)| VisionStage { device: on(i), ..stage.clone() }).collect())
    }

    /// What a layout will do.
    pub fn predict(&self, layout: &Layout) -> Result<Prediction> {
        predict::predict(self, layout)
    }

    /// Costs on a device, by its place among them.
    pub fn costs(&self, device: usize) -> Costs<'_> {
        let profile = self.profiles.get(device).and_then(Option::as_ref);
        Costs { spec: self.spec, dtype: self.dtype, device: &self.devices[device], profile }
    }

    /// What stages on a device take besides.
    pub(super) fn scratch_of(&self, device: usize) -> Scratch {
        match self.devices[device].device {
            Device::Cpu => self.cpu_scratch,
            Device::Cuda(_) => self.scratch,
        }
    }

    /// The best layout on these devices for the wanted KV tokens, or, where nobody says how many, for as many as fit.
    fn fitted(&self, order: &[usize], stages: usize) -> Option<Layout> {
        if self.split_head.is_none() {
            let with = |split| Planner { split_head: Some(split), ..self.clone() }.fitted(order, stages);
            let whole = with(false);
            let split = if self.can_split(order) { with(true) } else { None };
            return match (whole, split) {
                (Some(whole), Some(split)) => {
                    Some(if self.is_worth_it(&split, &whole) { split } else { whole })
                }
                (whole, split) => whole.or(split),
            };
        }
        let of = |kv_tokens| self.solved(order, stages, kv_tokens);
        let on_cpu = |&device: &usize| self.devices[device].device == Device::Cpu;
        match self.kv_tokens {
            Some(tokens) => of(tokens),
            None if order.iter().any(on_cpu) && order.len() > 1 => self.fitted_beside_cpu(order, stages),
            None => of(self.workload.kv_tokens()).or_else(|| of(self.kv_most(order, stages)?)),
        }
    }

    /// Whether a split head is: for more requests a second, or for as many and more tokens while answers alone are written, when
    /// there is nothing beside layers that could make up for a whole head.
    fn is_worth_it(&self, split: &Layout, whole: &Layout) -> bool {
        let rates = |layout| {
            let told = self.predict(layout).ok()?;
            Some((told.requests_per_s, told.decode_tokens_per_s))
        };
        let (Some(split), Some(whole)) = (rates(split), rates(whole)) else { return false };
        let more = |(split, whole): (f64, f64), worth: f64| split > whole * (1.0 + worth);
        let requests = (split.0, whole.0);
        more(requests, SPLIT_WORTH)
            || more(requests, -SPLIT_WORTH) && more((split.1, whole.1), 2.0 * SPLIT_WORTH)
    }

    /// Room for KV tokens on GPUs costs layers, which a processor takes its time for: as many as bring the most tokens a second.
    fn fitted_beside_cpu(&self, order: &[usize], stages: usize) -> Option<Layout> {
        let Workload { prompt, new, .. } = self.workload;
        let (most, least) = (self.workload.kv_tokens(), prompt.saturating_add(new));
        let fewer = std::iter::successors(Some(most), |tokens| Some(tokens / 2).filter(|t| *t >= least));
        let layouts = fewer.filter_map(|kv_tokens| self.solved(order, stages, kv_tokens));
        let rated = layouts.map(|layout| (self.rate(&layout), layout));
        // Of equally good ones the first, with the most room.
        let best = rated.reduce(|best, next| if next.0 > best.0 { next } else { best });
        best.map(|(_, layout)| layout)
            .or_else(|| self.solved(order, stages, self.kv_most(order, stages)?.min(least)))
    }

    fn solved(&self, order: &[usize], stages: usize, kv_tokens: usize) -> Option<Layout> {
        let problem = self.problem(order, stages, kv_tokens);
        let cuts = match self.tower(order) {
            Some(tower) => cut_both(&problem, &tower)?,
            None => Cuts { layers: plan::solve(&problem)?, blocks: Vec::new() },
        };
        let mut all = Vec::new();
        for (i, (run, &device)) in cuts.layers.into_iter().zip(order).enumerate() {
            let own = shared(i, order.len(), stages).len();
            let (start, len) = (run.start, run.len());
            let cut = |k: usize| start + k * len / own;
            all.extend(
                (0..own).map(|k| Stage { device: self.devices[device].device, layers: cut(k)..cut(k + 1) }),
            );
        }
        let covers = "a cut covers all in order; this is a bug";
        let layout = Layout::new(all).expect(covers).with_split_head(self.splits(order));
        Some(layout.with_vision(self.vision_stages(order, cuts.blocks)).expect(covers))
    }

    /// The most KV tokens that fit these devices; `None` if not even a block does.
    fn kv_most(&self, order: &[usize], stages: usize) -> Option<usize> {
        let tower = self.tower(order);
        let fits = |blocks: usize| {
            let problem = self.problem(order, stages, blocks * KV_STEP);
            tower
                .as_ref()
                .map_or_else(|| plan::solve(&problem).is_some(), |tower| joint::fits(&problem, tower))
        };
        let (mut good, mut bad) = (1, KV_TOKENS_MAX / KV_STEP);
        if !fits(good) {
            return None;
        }
        while bad - good > 1 {
            let middle = good + (bad - good) / 2;
            if fits(middle) { good = middle } else { bad = middle }
        }
        Some(good * KV_STEP)
    }

    fn problem(&self, order: &[usize], stages: usize, kv_tokens: usize) -> Problem {
        let passes = self.workload.passes(order.len());
        let layers = self.spec.layers.len();
        let parts = if self.splits(order) { order.len() } else { 1 };
        let store = |i: usize, device| match self.seen() {
            Some(_) if i == 0 => self.tower_scratch_of(device).store,
            _ => 0,
        };
        let slot = |(i, &device): (usize, &usize)| {
            let costs = self.costs(device);
            let own = shared(i, order.len(), stages).len();
            let next = order.get(i + 1).map(|&next| &self.devices[next]);
            let weighted = |of: &dyn Fn(Pass) -> f64| {
                let seconds: f64 = passes.iter().map(|&(pass, weight)| weight * of(pass)).sum();
                (seconds * 1e12) as u64
            };
            // A part of the head beside the layers, where the last slot has not all of it.
            let unit = Unit::HeadPart { part: i, parts };
            let aside = Some(unit).filter(|_| i + 1 < parts);
            let of_aside = |pass| aside.map_or(0.0, |unit| costs.seconds(unit, pass));
            let last = Unit::head(parts - 1, parts);
            let aside_bytes = aside.map_or(0, |unit| unit.weight_bytes(self.spec, self.dtype))
                + if parts > 1 { self.scratch.aside } else { 0 };
            let mut by_window = HashMap::new();
            let mut layer = |i: usize| {
                let window = self.spec.layers[i].window;
                *by_window
                    .entry(window)
                    .or_insert_with(|| weighted(&|pass| costs.seconds(Unit::Layer(i), pass)))
            };
            Slot {
                layers: (0..layers).map(&mut layer).collect(),
                embed: weighted(&|pass| costs.seconds(Unit::Embed, pass)),
                head: weighted(&|pass| costs.seconds(last, pass)),
                pass: own as u64 * weighted(&|_| costs.pass()) + weighted(&of_aside),
                boundary: weighted(&|pass| next.map_or(0.0, |next| costs.boundary(next, pass))),
                room: costs
                    .device
                    .free
                    .saturating_sub(own * self.scratch_of(device).stage + store(i, device) + aside_bytes)
                    as u64,
                layers_min: own,
            }
        };
        Problem { sizes: self.sizes(kv_tokens, parts), slots: order.iter().enumerate().map(slot).collect() }
    }

    /// Whether the head is split over devices in this order.
    fn splits(&self, order: &[usize]) -> bool {
        self.split_head == Some(true) && self.can_split(order)
    }

    fn can_split(&self, order: &[usize]) -> bool {
        order.len() > 1 && order.iter().all(|&device| self.devices[device].device != Device::Cpu)
    }

    fn sizes(&self, kv_tokens: usize, parts: usize) -> Sizes {
        let (spec, dtype) = (self.spec, self.dtype);
        let bytes = |unit: Unit| unit.weight_bytes(spec, dtype) as u64;
        // Where they differ, of the one that takes more.
        let most = |of: fn(&Scratch) -> usize| of(&self.scratch).max(of(&self.cpu_scratch)) as u64;
        let (layer_scratch, head_scratch) = (most(|s| s.layer), most(|s| s.head));
        let layer = |i: usize| {
            let kv = (Unit::Layer(i).kv_bytes_per_token(spec, dtype) as u64).saturating_mul(kv_tokens as u64);
            kv.saturating_add(bytes(Unit::Layer(i)) + layer_scratch)
        };
        let (embed, head) = (bytes(Unit::Embed), bytes(Unit::head(parts - 1, parts)) + head_scratch);
        let head_tied = (spec.tied && parts == 1).then(|| head - embed);
        Sizes { layers: (0..spec.layers.len()).map(layer).collect(), embed, head, head_tied }
    }

    /// Requests a second, prompts included, as far as the slowest device goes.
    fn rate(&self, layout: &Layout) -> f64 {
        self.predict(layout).map_or(0.0, |prediction| prediction.requests_per_s)
    }

    fn check(&self, stages: usize) -> Result<()> {
        if self.devices.is_empty() {
            return Err(Error::usage("--devices", "there are none"));
        }
        Layout::even(stages, self.spec.layers.len(), Device::Cpu).map(|_| ())
    }

    /// Orders of `count` of the devices in which kinds differ somewhere.
    fn orders(&self, count: usize) -> Vec<Vec<usize>> {
        let mut kinds: Vec<Vec<usize>> = Vec::new();
        for (i, device) in self.devices.iter().enumerate() {
            let same = |kind: &&mut Vec<usize>| alike(&self.devices[kind[0]], device);
            match kinds.iter_mut().find(same) {
                Some(kind) => kind.push(i),
                None => kinds.push(vec![i]),
            }
        }
        let mut all = Vec::new();
        arrange(&kinds, &mut vec![0; kinds.len()], count, &mut Vec::new(), &mut all);
        if all.len() > ORDERS_MAX {
            let given = range(count);
            let back = (0..self.devices.len()).rev().take(count).collect();
            return vec![given, back];
        }
        // Of equally good ones the last is taken, which should be the given one.
        all.reverse();
        all
    }
}

/// Layers and a tower, cut together, or one after the other where that is hardly slower: then layers alone keep all devices
/// equally busy too, when images have all been seen.
fn cut_both(problem: &Problem, tower: &Tower) -> Option<Cuts> {
    let together = joint::solve(problem, tower)?;
    let apart = plan::solve(problem).and_then(|layers| joint::beside(problem, &layers, tower));
    let slowest = |cuts: &Cuts| joint::costs(problem, tower, cuts).into_iter().max().unwrap_or(0) as f64;
    let as_good = |apart: &Cuts| slowest(apart) <= slowest(&together) * (1.0 + TOGETHER_WORTH);
    Some(apart.filter(as_good).unwrap_or(together))
}

fn range(count: usize) -> Vec<usize> {
    (0..count).collect()
}

/// Stages that the device number `i` of `devices` has: neighbours share it.
fn shared(i: usize, devices: usize, stages: usize) -> Range<usize> {
    let first = |i: usize| (i * stages).div_ceil(devices);
    first(i)..first(i + 1)
}

/// Whether two devices are of a kind: GPUs of one name differ by little in what is free.
fn alike(a: &DeviceSpec, b: &DeviceSpec) -> bool {
    const FREE_DIFFERS_BYTES: usize = 2 << 30;
    let place = |d: &DeviceSpec| d.device == Device::Cpu;
    let speed = |d: &DeviceSpec| (d.bandwidth, d.rates, d.link);
    place(a) == place(b) && speed(a) == speed(b) && a.free.abs_diff(b.free) < FREE_DIFFERS_BYTES
}

/// Every sequence of `count` kinds, each standing for its next device.
fn arrange(
    kinds: &[Vec<usize>],
    used: &mut Vec<usize>,
    count: usize,
    begun: &mut Vec<usize>,
    all: &mut Vec<Vec<usize>>,
) {
    if begun.len() == count {
        return all.push(begun.clone());
    }
    for kind in 0..kinds.len() {
        if used[kind] == kinds[kind].len() || all.len() > ORDERS_MAX {
            continue;
        }
        begun.push(kinds[kind][used[kind]]);
        used[kind] += 1;
        arrange(kinds, used, count, begun, all);
        used[kind] -= 1;
        begun.pop();
    }
}
