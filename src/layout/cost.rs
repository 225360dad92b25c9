//! What units cost on a device: predicted from bytes and operations, corrected by what has been measured.

use super::{DeviceSpec, devices::Link, profile::Profile};
use crate::{
    backend::DType,
    model::{
        spec::ModelSpec,
        units::{Demand, Pass, Unit, Work},
        vision::{VisionPass, VisionUnit},
    },
};

/// Attention of a vision tower, of whose heads no tile is as wide as they: its share of a decoder's rate. A frame of 5,476
/// rows takes an H200 554 µs.
const TOWER_ATTENTION: f64 = 0.87;

/// Reading weights and multiplying overlap, but not wholly: where both take as long, a product takes a fifth more than
/// either. cuBLAS on an H200 follows this power mean, mostly within 10%, from 1 to 256 rows.
const OVERLAP_POWER: f64 = 4.0;

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
        roofline(self.device, self.dtype, &unit.work(self.spec, self.dtype, pass))
    }

    /// Seconds of a unit of the vision tower in a pass, predicted. 0 for a model without one.
    pub fn vision(&self, unit: VisionUnit, pass: VisionPass) -> f64 {
        let Some(tower) = &self.spec.vision else { return 0.0 };
        let mut work = unit.work(tower, self.dtype, pass);
        work.attention.flops /= TOWER_ATTENTION;
        roofline(self.device, self.dtype, &work)
    }

    /// Seconds of a pass, beside its units.
    pub fn pass(&self) -> f64 {
        self.device.pass
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

/// Seconds that a device takes for this work: products and attention each by what bounds them, then the rest.
pub fn roofline(device: &DeviceSpec, dtype: DType, work: &Work) -> f64 {
    let rows = work.rows as f64;
    let full = device.rates.of(dtype);
    let rate = full * rows / (rows + device.half_rate_rows);
    let time = |demand: Demand, rate: f64| {
        let compute = if demand.flops > 0.0 { demand.flops / rate } else { 0.0 };
        (demand.bytes / device.bandwidth, compute)
    };
    let (reading, multiplying) = time(work.products, rate);
    let products = (reading.powf(OVERLAP_POWER) + multiplying.powf(OVERLAP_POWER)).powf(1.0 / OVERLAP_POWER);
    let (reading, multiplying) = time(work.attention, full * device.attention);
    let rest = work.other_bytes / device.bandwidth + work.kernels as f64 * device.launch;
    products + reading.max(multiplying) + rest
}

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
