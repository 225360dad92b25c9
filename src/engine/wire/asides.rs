//! Parts of a split head: which devices they are on, and who counts what they take.

use std::sync::Arc;

use super::{Either, Wired};
use crate::{
    backend::{Backend, DeviceMemory},
    layout::{Device, Layout},
    model::{decoder::DecoderConfig, units::Unit},
};

/// A part of the head, which the last stage asks for its logits.
pub(super) struct PartOn<B: Backend> {
    pub(super) device: Device,
    pub(super) backend: Arc<B>,
    pub(super) unit: Unit,
}

/// Those on devices of one kind, of which `pick` gives the backend.
pub(super) fn parts<E: Clone, B: Backend>(
    layout: &Layout,
    backends: &[E],
    pick: impl Fn(E) -> Option<Arc<B>>,
) -> Vec<PartOn<B>> {
    let of = |(backend, stage): (&E, usize)| {
        let (device, unit) = (layout.stages()[stage].device, layout.head_of(stage)?);
        Some(PartOn { device, backend: pick(backend.clone())?, unit })
    };
    backends.iter().zip(layout.part_stages()).filter_map(of).collect()
}

impl Wired {
    /// What parts of the head take belongs to the stages on whose devices they are.
    pub(super) fn count_asides<A: Backend, B: Backend>(
        &mut self,
        layout: &Layout,
        config: &DecoderConfig,
        backends: &[Either<Arc<A>, Arc<B>>],
    ) {
        let mut facts: Vec<_> = self.stages.iter_mut().flat_map(|(facts, _)| facts).collect();
        for (stage, backend) in layout.part_stages().into_iter().zip(backends) {
            let bytes = layout.head_of(stage).map_or(0, |unit| unit.weight_bytes(&config.spec, config.dtype));
            let (taken, idle) = match backend {
                Either::One(backend) => watched(backend),
                Either::Two(backend) => watched(backend),
            };
            facts[stage].weight_bytes += bytes;
            let own = facts[stage].idle.clone();
            facts[stage].idle = Arc::new(move || Some(own()? && idle()?));
            let own = std::mem::replace(&mut facts[stage].memory, Box::new(|| None));
            facts[stage].memory = Box::new(move || {
                let memory = own()?;
                Some(DeviceMemory { taken: memory.taken + taken().unwrap_or(0), ..memory })
            });
        }
    }
}

/// Something that a backend says for as long as it is there.
type Says<T> = Box<dyn Fn() -> Option<T> + Send + Sync>;

/// The bytes that it has taken, and whether it is idle. Whoever asks must not keep the device's memory from being given back.
fn watched<B: Backend>(backend: &Arc<B>) -> (Says<usize>, Says<bool>) {
    let (of, same) = (Arc::downgrade(backend), Arc::downgrade(backend));
    (Box::new(move || Some(of.upgrade()?.memory()?.taken)), Box::new(move || same.upgrade()?.is_idle()))
}
