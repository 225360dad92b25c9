//! What devices allow: the bytes that passes must move and the operations that they must do, at the devices' rates.

use serde::Serialize;

use crate::{
    backend::DType,
    batch::MicroBatch,
    engine::Engine,
    error::Result,
    layout::{Device, DeviceSpec},
    model::{
        spec::ModelSpec,
        units::{Pass, Unit, units_of},
    },
};

/// What each stage has to do in a pass.
#[derive(Debug, Clone, Default)]
pub(super) struct Demands {
    stages: Vec<Demand>,
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
        let layout = engine.layout();
        let known = match described {
            Some(described) => described.to_vec(),
            None if layout.stages().iter().all(|stage| stage.device == Device::Cpu) => Vec::new(),
            None => crate::engine::gpus()?,
        };
        let demand = |stage: &crate::layout::Stage| {
            let device = known.iter().find(|spec| spec.device == stage.device).cloned();
            Demand::of(engine.spec(), engine.dtype(), &stage.layers, device)
        };
        Ok(Demands { stages: layout.stages().iter().map(demand).collect() })
    }

    /// Adds a pass to what each stage has done.
    pub(super) fn add(&self, batch: &MicroBatch, done: &mut Vec<Done>) {
        done.resize(self.stages.len(), Done::default());
        for (demand, done) in self.stages.iter().zip(done) {
            demand.add(batch, done);
        }
    }

    /// A stage's shares in so many seconds; none where its device is not known.
    pub(super) fn shares(&self, stage: usize, done: &Done, seconds: f64) -> Option<Shares> {
        let demand = self.stages.get(stage)?;
        let device = demand.device.as_ref()?;
        Some(Shares {
            bandwidth: done.bytes / device.bandwidth / seconds,
            matmul: done.flops / demand.dtype_rate / seconds,
            roofline: done.least_s / seconds,
        })
    }

    /// Seconds that the passes of all stages need at least: those of the slowest device; and no more stages work at once than
    /// there are requests. None where a device is not known.
    pub(super) fn least_s(&self, done: &[Done], requests: usize) -> Option<f64> {
        let mut devices: Vec<(Device, f64)> = Vec::new();
        for (demand, done) in self.stages.iter().zip(done) {
            let device = demand.device.as_ref()?.device;
            match devices.iter_mut().find(|(of, _)| *of == device) {
                Some((_, sum)) => *sum += done.least_s,
                None => devices.push((device, done.least_s)),
            }
        }
        let all: f64 = devices.iter().map(|(_, sum)| sum).sum();
        let slowest = devices.iter().map(|(_, sum)| *sum).fold(0.0, f64::max);
        let at_once = devices.len().min(requests).max(1);
        (all > 0.0).then(|| slowest.max(all / at_once as f64))
    }
}

impl Demand {
    fn of(
        spec: &ModelSpec,
        dtype: DType,
        layers: &std::ops::Range<usize>,
        device: Option<DeviceSpec>,
    ) -> Demand {
        let dtype_rate = device.as_ref().map_or(0.0, |device| device.rates.of(dtype));
        let mut demand = Demand { device, dtype_rate, ..Demand::default() };
        for unit in units_of(spec, layers) {
            let work = unit.work(spec, dtype, Pass::Decode { rows: 1, context: 1 });
            match unit {
                // A row of it is little beside everything else.
                Unit::Embed => (),
                Unit::Head => {
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
        done.bytes += bytes;
        done.flops += flops;
        if let Some(device) = &self.device {
            done.least_s += (bytes / device.bandwidth).max(flops / self.dtype_rate);
        }
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
        model::shapes,
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
            Demand::of(&spec, DType::BF16, &(i * each..(i + 1) * each), Some(device))
        };
        Demands { stages: devices.into_iter().take(stages).enumerate().map(stage).collect() }
    }

    #[test]
    fn one_row_reads_all_weights_and_many_rows_compute() {
        let one = demands(1);
        let mut done = Vec::new();
        one.add(&batch(1, 1, 0), &mut done);
        // 28 layers of 466 MB, and a head of 1.09 GB.
        assert!((done[0].bytes / 14.14e9 - 1.0).abs() < 0.01, "{done:?}");
        assert_eq!(done[0].least_s, done[0].bytes / 4e12);
        let shares = one.shares(0, &done[0], 2.0 * done[0].least_s).unwrap();
        assert!((shares.bandwidth - 0.5).abs() < 1e-9 && shares.roofline == shares.bandwidth, "{shares:?}");
        let mut long = Vec::new();
        one.add(&batch(1, 4096, 0), &mut long);
        assert_eq!(long[0].least_s, long[0].flops / 700e12);
        // Twice the layers' 6.5e9 numbers for each row, and attention.
        assert!(long[0].flops > 4096.0 * 13e9 && long[0].flops < 4096.0 * 15e9, "{long:?}");
    }

    #[test]
    fn no_more_stages_work_at_once_than_there_are_requests() {
        let four = demands(4);
        let mut done = Vec::new();
        four.add(&batch(1, 1, 10), &mut done);
        let all: f64 = done.iter().map(|d| d.least_s).sum();
        assert!((four.least_s(&done, 1).unwrap() / all - 1.0).abs() < 1e-12);
        // The last one has the head.
        assert_eq!(four.least_s(&done, 64), Some(done[3].least_s));
        let unknown = Demands { stages: vec![Demand { device: None, ..four.stages[0].clone() }] };
        assert_eq!((unknown.least_s(&done, 1), unknown.shares(0, &done[0], 1.0)), (None, None));
    }
}
