//! What stages hold of the model, for the stages that come after them.

use std::{
    any::Any,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    backend::Backend,
    error::Result,
    layout::Device,
    model::{
        decoder::{Aside, Decoder, DecoderConfig, Held},
        units::Unit,
    },
};

/// Units by stage. Whoever has it keeps them in memory.
#[derive(Default)]
pub(super) struct Stock(Mutex<Vec<Arc<dyn Place>>>);

/// A stage's units, with its device.
struct Units<B: Backend> {
    device: Device,
    backend: Arc<B>,
    held: Held<B>,
}

/// The same of any kind of device.
trait Place: Any + Send + Sync {
    fn device(&self) -> Device;
    fn has_layer(&self, layer: usize) -> bool;
    /// Whether the embedding is here, and the head.
    fn has_ends(&self) -> (bool, bool);
    fn find_way(&self, from: &dyn Place) -> Result<()>;
    fn fetch(&self, layer: usize, from: &dyn Place, runs: &[Range<usize>]) -> Result<()>;
    /// Waits for all that has been fetched.
    fn finish(&self) -> Result<()>;
    /// A run of a layer's pages, as every device has it on the host.
    fn read(&self, layer: usize, run: Range<usize>) -> Result<Vec<u8>>;
    fn as_any(&self) -> &dyn Any;
}

/// A unit that goes from a device to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) unit: Unit,
    pub(super) from: Device,
    pub(super) to: Device,
}

impl Stock {
    /// Loads a stage, but for what is on its device already, which the stages `before` hold. Its units are here then.
    pub(super) fn load<B: Backend>(
        &self,
        before: Option<&Stock>,
        (device, backend): (Device, &Arc<B>),
        config: &DecoderConfig,
        tell: &dyn Fn(usize),
    ) -> Result<Decoder<B>> {
        let units = config.units();
        let found =
            before.map(|before| before.take::<B>((device, backend), config, &units)).unwrap_or_default();
        let decoder = Decoder::load_told(&**backend, config, &found, tell)?;
        let units = Units { device, backend: backend.clone(), held: decoder.held() };
        self.lock().push(Arc::new(units));
        Ok(decoder)
    }

    /// The same of a part of the head, for the last stage on the device `of`.
    pub(super) fn load_aside<B: Backend>(
        &self,
        before: Option<&Stock>,
        (device, backend, of): (Device, &Arc<B>, &B),
        config: &DecoderConfig,
        unit: Unit,
        tell: &dyn Fn(usize),
    ) -> Result<Aside<B>> {
        let found = before.map(|before| before.take::<B>((device, backend), config, &[unit]));
        let aside = Aside::load((backend, of), config, unit, &found.unwrap_or_default(), tell)?;
        let units = Units { device, backend: backend.clone(), held: aside.held() };
        self.lock().push(Arc::new(units));
        Ok(aside)
    }

    /// Of these units those that are on a device already. The backend counts them as its own from now on.
    fn take<B: Backend>(
        &self,
        (device, backend): (Device, &Arc<B>),
        config: &DecoderConfig,
        units: &[Unit],
    ) -> Held<B> {
        let kv_bytes = config.kv_blocks * crate::batch::KV_BLOCK;
        let mut found = Held::default();
        for place in self.lock().iter().filter(|place| place.device() == device) {
            let Some(there) = place.as_any().downcast_ref::<Units<B>>() else { continue };
            let (part, taken) = there.held.part(units);
            let of = |unit: &Unit| {
                unit.weight_bytes(&config.spec, config.dtype)
                    + kv_bytes * unit.kv_bytes_per_token(&config.spec, config.dtype)
            };
            backend.succeed(&there.backend, taken.iter().map(of).sum());
            found.extend(part);
        }
        found
    }

    /// What is on another device in these stages than in those before.
    pub(super) fn moves(&self, before: &Stock, layers: usize) -> Vec<Move> {
        let all = [Unit::Embed].into_iter().chain((0..layers).map(Unit::Layer)).chain([Unit::Head]);
        let moved = |unit: Unit| {
            let (from, to) = (before.place(unit)?.device(), self.place(unit)?.device());
            (from != to).then_some(Move { unit, from, to })
        };
        all.filter_map(moved).collect()
    }

    /// Finds the ways by which pages will come.
    pub(super) fn find_ways(&self, before: &Stock, moves: &[Move]) -> Result<()> {
        moves.iter().try_for_each(|moved| match (self.place(moved.unit), before.place(moved.unit)) {
            (Some(to), Some(from)) if matches!(moved.unit, Unit::Layer(_)) => to.find_way(&*from),
            _ => Ok(()),
        })
    }

    /// Brings the pages of the layers that have moved: these runs of their blocks.
    pub(super) fn fetch(&self, before: &Stock, moves: &[Move], runs: &[Range<usize>]) -> Result<()> {
        let mut places = Vec::new();
        for moved in moves {
            let Unit::Layer(layer) = moved.unit else { continue };
            if let (Some(to), Some(from)) = (self.place(moved.unit), before.place(moved.unit)) {
                to.fetch(layer, &*from, runs)?;
                places.push(to);
            }
        }
        places.iter().try_for_each(|place| place.finish())
    }

    /// Where a unit is.
    fn place(&self, unit: Unit) -> Option<Arc<dyn Place>> {
        let here = |place: &&Arc<dyn Place>| match unit {
            Unit::Embed => place.has_ends().0,
            // Whichever part goes where tokens are chosen.
            Unit::Head | Unit::HeadPart { .. } => place.has_ends().1,
            Unit::Layer(layer) => place.has_layer(layer),
        };
        self.lock().iter().find(here).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<dyn Place>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Backend> Units<B> {
    fn pages(&self, layer: usize) -> Arc<Mutex<B::Kv>> {
        self.held.pages(layer).expect("a layer that is elsewhere; this is a bug")
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B: Backend> Place for Units<B> {
    fn device(&self) -> Device {
        self.device
    }

    fn has_layer(&self, layer: usize) -> bool {
        self.held.has_layer(layer)
    }

    fn has_ends(&self) -> (bool, bool) {
        self.held.has_ends()
    }

    fn find_way(&self, from: &dyn Place) -> Result<()> {
        let alike = from.as_any().downcast_ref::<Units<B>>();
        // Devices of two kinds meet on the host.
        alike.map_or(Ok(()), |from| self.backend.find_way(&from.backend))
    }

    fn fetch(&self, layer: usize, from: &dyn Place, runs: &[Range<usize>]) -> Result<()> {
        let to = self.pages(layer);
        let mut to = lock(&to);
        match from.as_any().downcast_ref::<Units<B>>() {
            Some(there) => {
                let pages = there.pages(layer);
                self.backend.fetch_pages(&mut to, (&there.backend, &lock(&pages)), runs)
            }
            None => runs.iter().try_for_each(|run| {
                self.backend.write_pages(&mut to, run.clone(), &from.read(layer, run.clone())?)
            }),
        }
    }

    fn finish(&self) -> Result<()> {
        self.backend.loaded()
    }

    fn read(&self, layer: usize, run: Range<usize>) -> Result<Vec<u8>> {
        let pages = self.pages(layer);
        self.backend.read_pages(&lock(&pages), run)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
