//! What devices allow: the bytes that passes must move and the operations that they must do, at the devices' rates.

use std::{ops::Range, sync::Arc};

use serde::Serialize;

use crate::{
    backend::DType,
    batch::MicroBatch,
    engine::Engine,
    error::Result,
    layout::{Device, DeviceSpec},
    model::{
        spec::ModelSpec,
        units::{Pass, Unit},
        vision::{VisionPass, VisionSpec, vision_units},
    },
};

/// What each stage has to do in a pass.
#[derive(Debug, Clone, Default)]
pub(super) struct Demands {
    stages: Vec<Demand>,
    /// Of the vision tower.
    vision: Vec<VisionDemand>,
}

/// What a stage of the vision tower has to do.
#[derive(Debug, Clone)]
struct VisionDemand {
    /// Where it runs.
    device: Option<DeviceSpec>,
    dtype_rate: f64,
    dtype: DType,
    tower: Arc<VisionSpec>,
    blocks: Range<usize>,
}

#[derive(Debug, Clone, Default)]
struct Demand {
    /// Where it runs.
    device: Option<DeviceSpec>,
    dtype_rate: f64,
    /// Of weights that every pass reads.
    bytes: f64,
    row_flops: f64,
    /// Of the head, for passes of which tokens are wanted.
    head_bytes: f64,
    output_flops: f64,
    /// Layers that see as far as each other.
    attention: Vec<Attention>,
}

/// Of layers with one window.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Attention {
    window: Option<usize>,
    /// For a token whose keys and values are read.
    bytes: f64,
    /// For a row and a token that it attends to.
    flops: f64,
}

/// What a stage had to do in several passes.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Done {
    pub(super) bytes: f64,
    pub(super) flops: f64,
    /// Seconds that its device needs at least: of each pass the larger of reading and computing.
    pub(super) least_s: f64,
}

/// The same of all stages.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct AllDone {
    pub(super) stages: Vec<Done>,
    /// Of the vision tower.
    pub(super) vision: Vec<Done>,
}

/// Shares of what devices allow, in a time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Shares {
    /// Of the bandwidth.
    pub(super) bandwidth: f64,
    /// Of the rate of matrix products.
    pub(super) matmul: f64,
    /// Of the larger of both, pass by pass.
    pub(super) roofline: f64,
}

impl Demands {
    /// Of an engine's stages. `described` are devices as `plan --devices` describes them; else those that are known.
    pub(super) fn of(engine: &Engine, described: Option<&[DeviceSpec]>) -> Result<Demands> {
        let (layout, spec, dtype) = (engine.layout(), engine.spec(), engine.dtype());
        let tower = layout.tower(spec.vision.as_ref().map(|tower| tower.full.len()))?;
        let devices = layout.stages().iter().map(|stage| stage.device);
        let known = match described {
            Some(described) => described.to_vec(),
            None if devices.chain(tower.iter().map(|(device, _)| *device)).all(|d| d == Device::Cpu) => {
                Vec::new()
            }
            None => crate::engine::gpus()?,
        };
        let on = |device: Device| known.iter().find(|spec| spec.device == device).cloned();
        let stages = layout.stages().iter().enumerate();
        let vision = tower.into_iter().zip(spec.vision.iter().cycle());
        let of_tower = |((device, blocks), tower): ((Device, Range<usize>), &Arc<VisionSpec>)| {
            VisionDemand::of(tower, dtype, blocks, on(device))
        };
        Ok(Demands {
            stages: stages
                .map(|(i, s)| Demand::of(spec, dtype, &layout.units(i, spec), on(s.device)))
                .collect(),
            vision: vision.map(of_tower).collect(),
        })
    }

    /// Adds a pass to what each stage has done.
    pub(super) fn add(&self, batch: &MicroBatch, done: &mut AllDone) {
        done.stages.resize(self.stages.len(), Done::default());
        for (demand, done) in self.stages.iter().zip(&mut done.stages) {
            demand.add(batch, done);
        }
    }

    /// Adds a pass to what a stage of the vision tower has done.
    pub(super) fn add_vision(&self, stage: usize, pass: VisionPass, done: &mut AllDone) {
        done.vision.resize(self.vision.len(), Done::default());
        if let (Some(demand), Some(done)) = (self.vision.get(stage), done.vision.get_mut(stage)) {
            demand.add(pass, done);
        }
    }

    /// A stage's shares in so many seconds; none where its device is not known.
    pub(super) fn shares(&self, stage: usize, done: &AllDone, seconds: f64) -> Option<Shares> {
        let demand = self.stages.get(stage)?;
        Some(done.stages.get(stage)?.shares(demand.device.as_ref()?, demand.dtype_rate, seconds))
    }

    /// The same of a stage of the vision tower.
    pub(super) fn vision_shares(&self, stage: usize, done: &AllDone, seconds: f64) -> Option<Shares> {
        let demand = self.vision.get(stage)?;
        Some(done.vision.get(stage)?.shares(demand.device.as_ref()?, demand.dtype_rate, seconds))
    }

    /// Seconds that the passes of all stages need at least: those of the slowest device; and no more stages work at once than
    /// there are requests, or images of theirs (`images` each). None where a device that did something is not known.
    pub(super) fn least_s(&self, done: &AllDone, (requests, images): (usize, usize)) -> Option<f64> {
        let mut devices: Vec<(Device, f64)> = Vec::new();
        let add = |devices: &mut Vec<(Device, f64)>, device: Option<&DeviceSpec>, done: &Done| {
            let device = device?.device;
            match devices.iter_mut().find(|(of, _)| *of == device) {
                Some((_, sum)) => *sum += done.least_s,
                None => devices.push((device, done.least_s)),
            }
            Some(done.least_s)
        };
        let mut layers = 0.0;
        for (demand, done) in self.stages.iter().zip(&done.stages) {
            layers += add(&mut devices, demand.device.as_ref(), done)?;
        }
        let (of_layers, mut all) = (devices.len(), layers);
        for (demand, done) in self.vision.iter().zip(&done.vision).filter(|(_, done)| done.flops > 0.0) {
            all += add(&mut devices, demand.device.as_ref(), done)?;
        }
        let slowest = devices.iter().map(|(_, sum)| *sum).fold(0.0, f64::max);
        let in_turns = |sum: f64, devices: usize, most: usize| sum / devices.min(most).max(1) as f64;
        let layers = in_turns(layers, of_layers, requests);
        let all_of_it = in_turns(all, devices.len(), requests * images.max(1));
        (all > 0.0).then(|| slowest.max(layers).max(all_of_it))
    }
}

/// Operations a second; 0 of a device that is not known.
fn rate_of(device: Option<&DeviceSpec>, dtype: DType) -> f64 {
    device.map_or(0.0, |device| device.rates.of(dtype))
}

impl VisionDemand {
    fn of(
        tower: &Arc<VisionSpec>,
        dtype: DType,
        blocks: Range<usize>,
        device: Option<DeviceSpec>,
    ) -> VisionDemand {
        let dtype_rate = rate_of(device.as_ref(), dtype);
        VisionDemand { device, dtype_rate, dtype, tower: tower.clone(), blocks }
    }

    /// Of the weights and the operations; what its rows are is little beside them.
    fn add(&self, pass: VisionPass, done: &mut Done) {
        let units = vision_units(&self.tower, &self.blocks);
        let works = units.into_iter().map(|unit| unit.work(&self.tower, self.dtype, pass));
        let (bytes, flops) = works.fold((0.0, 0.0), |(bytes, flops), work| {
            (bytes + work.products.bytes, flops + work.products.flops + work.attention.flops)
        });
        done.add(bytes, flops, self.device.as_ref(), self.dtype_rate);
    }
}

impl Done {
    /// A pass on a device, if it is known.
    fn add(&mut self, bytes: f64, flops: f64, device: Option<&DeviceSpec>, rate: f64) {
        let least = |device: &DeviceSpec| (bytes / device.bandwidth).max(flops / rate);
        *self += Done { bytes, flops, least_s: device.map_or(0.0, least) };
    }

    fn shares(&self, device: &DeviceSpec, rate: f64, seconds: f64) -> Shares {
        Shares {
            bandwidth: self.bytes / device.bandwidth / seconds,
            matmul: self.flops / rate / seconds,
            roofline: self.least_s / seconds,
        }
    }
}

impl Demand {
    fn of(spec: &ModelSpec, dtype: DType, units: &[Unit], device: Option<DeviceSpec>) -> Demand {
        let dtype_rate = rate_of(device.as_ref(), dtype);
        let mut demand = Demand { device, dtype_rate, ..Demand::default() };
        for &unit in units {
            let work = unit.work(spec, dtype, Pass::Decode { rows: 1, context: 1 });
            match unit {
                // A row of it is little beside everything else.
                Unit::Embed => (),
                Unit::Head | Unit::HeadPart { .. } => {
                    demand.head_bytes = work.products.bytes;
                    demand.output_flops = work.products.flops;
                }
                Unit::Layer(i) => {
                    demand.bytes += work.products.bytes;
                    demand.row_flops += work.products.flops;
                    demand.see(spec.layers[i].window, work.attention.bytes, work.attention.flops);
                }
            }
        }
        demand
    }

    fn see(&mut self, window: Option<usize>, bytes: f64, flops: f64) {
        match self.attention.iter_mut().find(|attention| attention.window == window) {
            Some(attention) => {
                attention.bytes += bytes;
                attention.flops += flops;
            }
            None => self.attention.push(Attention { window, bytes, flops }),
        }
    }

    fn add(&self, batch: &MicroBatch, done: &mut Done) {
        let (rows, outputs) = (batch.rows() as f64, batch.outputs.len() as f64);
        let mut bytes = self.bytes + if outputs > 0.0 { self.head_bytes } else { 0.0 };
        let mut flops = rows * self.row_flops + outputs * self.output_flops;
        for attention in &self.attention {
            for part in &batch.seqs {
                let pass = Pass::Chunk { rows: part.len, before: part.cached };
                bytes += pass.cached(attention.window) * attention.bytes;
                flops += pass.attended(attention.window) * attention.flops;
            }
        }
        done.add(bytes, flops, self.device.as_ref(), self.dtype_rate);
    }
}

impl std::ops::AddAssign<&AllDone> for AllDone {
    fn add_assign(&mut self, more: &AllDone) {
        let add = |sums: &mut Vec<Done>, more: &[Done]| {
            sums.resize(more.len().max(sums.len()), Done::default());
            sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += *more);
        };
        add(&mut self.stages, &more.stages);
        add(&mut self.vision, &more.vision);
    }
}

impl std::ops::AddAssign for Done {
    fn add_assign(&mut self, more: Done) {
        self.bytes += more.bytes;
        self.flops += more.flops;
        self.least_s += more.least_s;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        batch::{OutputRow, SeqId, SeqRows},
        grid::Grid,
        model::{shapes, units::units_of},
    };

    fn batch(sequences: usize, rows: usize, cached: usize) -> MicroBatch {
        let seq = |i: usize| SeqRows {
            seq: SeqId(i as u64),
            seat: 0,
            row: i * rows,
            len: rows,
            cached,
            blocks: Vec::new().into(),
        };
        let output = |i: usize| OutputRow { row: (i + 1) * rows - 1, seq: SeqId(i as u64), seat: 0 };
        MicroBatch {
            ids: vec![0; sequences * rows],
            seqs: (0..sequences).map(seq).collect(),
            outputs: (0..sequences).map(output).collect(),
            ..MicroBatch::default()
        }
    }

    /// So many stages of as many layers.
    fn demands(stages: usize) -> Demands {
        let spec = shapes::find("7b").unwrap().unwrap();
        let devices = DeviceSpec::list("4xmine:mem=100g,bw=4t,bf16=700t").unwrap();
        let each = spec.layers.len() / stages;
        let stage = |(i, device): (usize, DeviceSpec)| {
            Demand::of(&spec, DType::BF16, &units_of(&spec, &(i * each..(i + 1) * each)), Some(device))
        };
        Demands {
            stages: devices.into_iter().take(stages).enumerate().map(stage).collect(),
            vision: Vec::new(),
        }
    }

    #[test]
    fn one_row_reads_all_weights_and_many_rows_compute() {
        let one = demands(1);
        let mut done = AllDone::default();
        one.add(&batch(1, 1, 0), &mut done);
        // 28 layers of 466 MB, and a head of 1.09 GB.
        assert!((done.stages[0].bytes / 14.14e9 - 1.0).abs() < 0.01, "{done:?}");
        assert_eq!(done.stages[0].least_s, done.stages[0].bytes / 4e12);
        let shares = one.shares(0, &done, 2.0 * done.stages[0].least_s).unwrap();
        assert!((shares.bandwidth - 0.5).abs() < 1e-9 && shares.roofline == shares.bandwidth, "{shares:?}");
        let mut long = AllDone::default();
        one.add(&batch(1, 4096, 0), &mut long);
        assert_eq!(long.stages[0].least_s, long.stages[0].flops / 700e12);
        // Twice the layers' 6.5e9 numbers for each row, and attention.
        assert!(long.stages[0].flops > 4096.0 * 13e9 && long.stages[0].flops < 4096.0 * 15e9, "{long:?}");
    }

    #[test]
    fn no_more_stages_work_at_once_than_there_are_requests() {
        let four = demands(4);
        let mut done = AllDone::default();
        four.add(&batch(1, 1, 10), &mut done);
        let all: f64 = done.stages.iter().map(|d| d.least_s).sum();
        assert!((four.least_s(&done, (1, 0)).unwrap() / all - 1.0).abs() < 1e-12);
        // The last one has the head.
        assert_eq!(four.least_s(&done, (64, 0)), Some(done.stages[3].least_s));
        let stages = vec![Demand { device: None, ..four.stages[0].clone() }];
        let unknown = Demands { stages, ..Demands::default() };
        assert_eq!((unknown.least_s(&done, (1, 0)), unknown.shares(0, &done, 1.0)), (None, None));
    }

    #[test]
    fn images_are_what_devices_do_as_well() {
        let spec = shapes::find("vl-7b").unwrap().unwrap();
        let tower = spec.vision.as_ref().unwrap();
        let device = demands(1).stages[0].device.clone().unwrap();
        let on = |device| vec![VisionDemand::of(tower, DType::BF16, 0..32, device)];
        let mut both = Demands { vision: on(Some(device)), ..demands(1) };
        let mut done = AllDone::default();
        both.add(&batch(1, 1, 0), &mut done);
        let text = both.least_s(&done, (1, 1)).unwrap();
        // 1024x1024 pixels, resized to 1036x1036: 7.7e12 operations, and a GB of weights that take less.
        both.add_vision(0, VisionPass::new(tower, &[Grid { t: 1, h: 74, w: 74 }]), &mut done);
        let image = done.vision[0].least_s;
        assert!((image * 700e12 / 7.68e12 - 1.0).abs() < 0.01, "{done:?}");
        assert!((both.least_s(&done, (1, 1)).unwrap() / (text + image) - 1.0).abs() < 1e-12);
        assert!((both.vision_shares(0, &done, 2.0 * image).unwrap().matmul - 0.5).abs() < 1e-9);
        // On another device they wait for each other if there is one request with one image, or else not.
        both.vision[0].device.as_mut().unwrap().device = Device::Cuda(1);
        assert!((both.least_s(&done, (1, 1)).unwrap() / (text + image) - 1.0).abs() < 1e-12);
        assert_eq!(both.least_s(&done, (2, 1)), Some(text.max(image)));
        // Of a device that is not known nothing is said, unless it has done nothing.
        both.vision = on(None);
        assert_eq!(both.least_s(&done, (1, 1)), None);
        done.vision.clear();
        assert_eq!(both.least_s(&done, (1, 1)), Some(text));
    }
}
