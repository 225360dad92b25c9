//! What units cost on a device: predicted from bytes and operations, corrected by what has been measured.

use super::{Device, DeviceSpec, devices::Link, profile::Profile};
use crate::{
    backend::{DType, cuda},
    model::{
        spec::ModelSpec,
        units::{Demand, FEW_ROWS, Pass, Prompts, Unit, Work},
        vision::{VisionPass, VisionUnit},
    },
};

/// Attention of a vision tower, of whose heads no tile is as wide as they: its share of a decoder's rate. A frame of 5,476
/// rows takes an H200 554 µs.
const TOWER_ATTENTION: f64 = 0.645;

/// Reading weights and multiplying overlap, but not wholly: where both take as long, a product takes a fifth more than
/// either. cuBLAS on an H200 follows this power mean, mostly within 10%, from 1 to 256 rows.
const OVERLAP_POWER: f64 = 4.0;

/// How much longer a GPU's kernels for a few rows read the weights for each row beyond the first: they multiply on units
/// that are slower than the memory. 7b's weights take an H200 4% longer for 4 rows and 15% for 8; 72b's, whose matrices are
/// larger, 6 to 9% for 4 to 8. This is between them: each is predicted within a tenth.
const FEW_ROWS_READING: f64 = 0.012;

/// Latencies of a link that a split head costs a micro-batch: there, back, and until kernels on the other devices have ended.
const GATHERING_LATENCIES: f64 = 3.0;

/// Rows of prompts at which a GPU's attention runs at half of its rate: fewer tiles than multiprocessors leave some of those
/// idle, or share a tile's tokens out among blocks, in a kernel that is half as fast.
const ATTENTION_HALF_ROWS: f64 = 192.0;

/// A model's units on a device.
///
/// ```
/// use pipeline_infer::{
///     backend::DType,
///     layout::{DeviceSpec, cost::Costs},
///     model::{shapes, units::{Pass, Unit}},
/// };
///
/// let (spec, device) = (shapes::find("7b").unwrap()?, DeviceSpec::known("h200-141g").unwrap());
/// let costs = Costs { spec: &spec, dtype: DType::BF16, device: &device, profile: None };
/// // While an answer is written, the head of 7b weighs more than two layers.
/// let pass = Pass::Decode { rows: 1, context: 640 };
/// assert!(costs.seconds(Unit::Head, pass) > 2.0 * costs.seconds(Unit::Layer(0), pass));
/// # Ok::<(), pipeline_infer::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Costs<'a> {
    /// The model.
    pub spec: &'a ModelSpec,
    /// How weights, keys and values are kept.
    pub dtype: DType,
    /// The device.
    pub device: &'a DeviceSpec,
    /// What has been measured on it.
    pub profile: Option<&'a Profile>,
}

impl Costs<'_> {
    /// Seconds of a unit in a pass.
    pub fn seconds(&self, unit: Unit, pass: Pass) -> f64 {
        self.roofline(unit, pass) * self.profile.map_or(1.0, |profile| profile.factor(self, unit, pass))
    }

    /// The same, predicted alone.
    pub fn roofline(&self, unit: Unit, pass: Pass) -> f64 {
        roofline(self.device, self.dtype, &padded(self.device, unit.work(self.spec, self.dtype, pass)))
    }

    /// Seconds of a unit of the vision tower in a pass. 0 for a model without one.
    pub fn vision(&self, unit: VisionUnit, pass: VisionPass) -> f64 {
        let Some(tower) = &self.spec.vision else { return 0.0 };
        let mut work = unit.work(tower, self.dtype, pass);
        work.attention.flops /= TOWER_ATTENTION;
        let factor = self.profile.map_or(1.0, |profile| profile.tower_factor(self, pass));
        roofline(self.device, self.dtype, &work) * factor
    }

    /// Seconds of a pass, beside its units.
    pub fn pass(&self) -> f64 {
        self.device.pass
    }

    /// Seconds from a micro-batch's last layer to its tokens where the head is split: the parts' work, or crossing if that takes
    /// their logits longer, and until their kernels have found room between those of their devices' stages. No stage is busy with
    /// the next micro-batch for less of it; but none comes round faster.
    pub fn gathering(&self, parts: usize, pass: Pass) -> f64 {
        if parts == 1 || pass.outputs() == 0 {
            return 0.0;
        }
        let last = Unit::HeadPart { part: parts - 1, parts };
        let others = self.spec.vocab - last.tokens(self.spec.vocab).len();
        let Link { latency, bandwidth } = self.device.link;
        let coming = (pass.outputs() * others * DType::F32.size()) as f64 / bandwidth;
        GATHERING_LATENCIES * latency + coming.max(self.seconds(last, pass))
    }

    /// Seconds until a pass's rows have crossed to the next device.
    pub fn boundary(&self, next: &DeviceSpec, pass: Pass) -> f64 {
        self.crossing(next, (pass.rows() * self.spec.dim * DType::F32.size()) as f64)
    }

    /// Seconds until so many bytes have crossed to another device.
    pub(super) fn crossing(&self, next: &DeviceSpec, bytes: f64) -> f64 {
        let over = |link: Link| link.latency + bytes / link.bandwidth;
        over(self.device.link).max(over(next.link))
    }
}

/// What a device does for a decoder's work: a GPU goes over the rows that a pass is padded to, 2,176 for 2,058.
fn padded(device: &DeviceSpec, work: Work) -> Work {
    if device.device == Device::Cpu || work.rows == 0 {
        return work;
    }
    let rows = cuda::pad_rows(work.rows);
    let more = rows as f64 / work.rows as f64;
    let products = Demand { flops: work.products.flops * more, ..work.products };
    Work { rows, products, other_bytes: work.other_bytes * more, ..work }
}

/// Seconds that a device takes for this work: products and attention each by what bounds them, then the rest.
///
/// Of a pass's shape this follows. What does not is the clock: under its limit of power an H200 that multiplies without a
/// pause falls to 1.5 GHz, and a product of 2,048 rows from 790 TFLOP/s to 640; one that rests for a third of the time, or
/// has just begun, does not. So the same 7 layers of 7b take from 10.3 to 12.4 ms for 2,048 rows, and the rate that
/// `DeviceSpec` has is in between.
pub fn roofline(device: &DeviceSpec, dtype: DType, work: &Work) -> f64 {
    let rows = work.rows as f64;
    let full = device.rates.of(dtype);
    let rate = full * rows / (rows + device.half_rate_rows);
    let multiplying = |flops: f64, rate: f64| if flops > 0.0 { flops / rate } else { 0.0 };
    let reading = |bytes: f64| bytes / device.bandwidth;
    let products = match (reading(work.products.bytes), multiplying(work.products.flops, rate)) {
        (reading, _) if device.device != Device::Cpu && (1..=FEW_ROWS).contains(&work.rows) => {
            reading * (1.0 + FEW_ROWS_READING * (rows - 1.0))
        }
        (reading, multiplying) => {
            (reading.powf(OVERLAP_POWER) + multiplying.powf(OVERLAP_POWER)).powf(1.0 / OVERLAP_POWER)
        }
    };
    let rate = full * device.attention;
    let alone = reading(work.attention.bytes).max(multiplying(work.attention.flops, rate));
    let prompts = multiplying(prompts_flops(device, work.prompts), rate);
    products + alone + prompts + reading(work.other_bytes) + work.kernels as f64 * device.launch
}

/// Operations that attention to prompts costs as much as. On GPUs rows go together in tiles, full or not, and of the tokens
/// on its diagonal a tile multiplies those that its rows do not see.
fn prompts_flops(device: &DeviceSpec, prompts: Prompts) -> f64 {
    if device.device == Device::Cpu || prompts.rows == 0 {
        return prompts.pairs * prompts.flops;
    }
    let (rows, tile) = (prompts.rows, cuda::PREFILL_ROWS);
    let tokens = prompts.pairs / rows as f64 + tile as f64 / 2.0;
    tokens * (rows.next_multiple_of(tile) as f64 + ATTENTION_HALF_ROWS) * prompts.flops
}

#[cfg(test)]
mod h200;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shapes;

    /// Milliseconds of a pass over all matrices of the layers, as cuBLAS takes them on an H200.
    #[test]
    fn matrix_products_are_predicted_within_a_fifth_and_mostly_within_a_tenth() {
        let device = DeviceSpec::known("h200-141g").unwrap();
        let measured = [
            ("7b", 28, [(16, 3.79), (64, 3.86), (128, 3.95), (256, 5.32)]),
            ("72b", 20, [(16, 8.97), (64, 9.04), (128, 9.92), (256, 16.9)]),
        ];
        let mut errors = Vec::new();
        for (name, layers, rows) in measured {
            let spec = shapes::find(name).unwrap().unwrap();
            for (rows, ms) in rows {
                let mut work = Unit::Layer(0).work(&spec, DType::BF16, Pass::Decode { rows, context: 0 });
                // The products alone, of which a layer has four.
                (work.other_bytes, work.kernels) = (0.0, 4);
                let said = 1e3 * f64::from(layers) * roofline(&device, DType::BF16, &work);
                errors.push((said / ms - 1.0).abs());
                assert!(errors.iter().all(|e| *e < 0.2), "{name}, {rows} rows: {said:.2} ms, not {ms}");
            }
        }
        assert!(errors.iter().filter(|e| **e < 0.1).count() > 6, "{errors:?}");
    }

    #[test]
    fn one_token_at_a_time_is_predicted() {
        let device = DeviceSpec::known("h200-141g").unwrap();
        let spec = shapes::find("7b").unwrap().unwrap();
        let costs = Costs { spec: &spec, dtype: DType::BF16, device: &device, profile: None };
        let pass = Pass::Decode { rows: 1, context: 576 };
        let layers: f64 = (0..28).map(|i| costs.seconds(Unit::Layer(i), pass)).sum();
        let all = layers + costs.seconds(Unit::Embed, pass) + costs.seconds(Unit::Head, pass) + costs.pass();
        // 270.5 tokens a second on one GPU.
        assert!((all * 270.5 - 1.0).abs() < 0.05, "{all}");
    }
}
