//! Why a model does not fit devices, and what would make it fit.

use super::{KV_STEP, Planner, range};
use crate::{
    backend::DType,
    error::Error,
    layout::{Device, plan::Problem},
};

/// Further devices that are tried where those at hand are too few.
const MORE_MAX: usize = 64;

impl Planner<'_> {
    /// Why it does not fit, and what would make it fit.
    pub(super) fn refusal(&self, stages: usize) -> Error {
        let devices = self.devices.len().min(stages);
        let order = range(devices);
        let gigabytes = |bytes: u64| format!("{:.1} GB", bytes as f64 / 1e9);
        let wanted = self.kv_tokens.unwrap_or(KV_STEP);
        let Problem { sizes, slots } = self.problem(&order, stages, wanted);
        let sum = |of: &mut dyn Iterator<Item = u64>| of.fold(0u64, u64::saturating_add);
        // The tower is on one device at least.
        let tower = self.tower(&order).unwrap_or_default();
        let beside = tower.slots.iter().map(|slot| slot.buffers).min().unwrap_or(0);
        let units = sizes.layers.iter().chain(&tower.blocks).copied();
        let ends = [sizes.embed, sizes.head_tied.unwrap_or(sizes.head), beside];
        let need = sum(&mut units.chain(ends));
        let have = sum(&mut slots.iter().map(|slot| slot.room));
        let mut ways = Vec::new();
        if self.kv_tokens.is_some()
            && let Some(most) = self.kv_most(&order, stages)
        {
            ways.push(format!("--kv-tokens {most} or fewer"));
        }
        if self.dtype == DType::F32
            && (Planner { dtype: DType::BF16, ..self.clone() }).fitted(&order, stages).is_some()
        {
            ways.push("--dtype bf16".into());
        }
        if let Some(more) = (stages + 1..=self.devices.len()).find(|&n| self.fitted(&range(n), n).is_some()) {
            ways.push(format!("{more} stages"));
        } else if let Some(way) = self.more_devices() {
            ways.push(way);
        }
        let units = if have >= need { ", but layers are not divided" } else { "" };
        let advice = match &ways[..] {
            [] => "neither fewer KV tokens nor more of these devices make it fit".into(),
            ways => format!("it fits with {}", ways.join(", or with ")),
        };
        let why = format!(
            "the model does not fit: weights in {} and {wanted} KV tokens take {}, and there is room for {}{units}; {advice}",
            self.dtype.name(),
            gigabytes(need),
            gigabytes(have),
        );
        Error::Device { device: self.named(devices), why }
    }

    /// `2 x h100-80g, 1 x l4`.
    fn named(&self, devices: usize) -> String {
        let runs = self.devices[..devices].chunk_by(|a, b| a.name == b.name);
        runs.map(|run| format!("{} x {}", run.len(), run[0].name)).collect::<Vec<_>>().join(", ")
    }

    /// How many more devices like the last GPU it takes, if it is not many: `2 more h100-80g`.
    fn more_devices(&self) -> Option<String> {
        let like = self.devices.iter().rfind(|device| device.device != Device::Cpu)?;
        let have = self.devices.len();
        let most = MORE_MAX.min(self.spec.layers.len().saturating_sub(have));
        let fits = |more: &usize| {
            let mut devices = self.devices.to_vec();
            devices.extend(std::iter::repeat_n(like.clone(), *more));
            let profiles = vec![None; devices.len()];
            let planner = Planner { devices: &devices, profiles, ..self.clone() };
            planner.fitted(&range(devices.len()), devices.len()).is_some()
        };
        let more = (1..=most).find(fits)?;
        Some(format!("{more} more {}", like.name))
    }
}
