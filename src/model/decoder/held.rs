//! Units that a device holds, on their way from one decoder to the next.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use super::{Decoder, HeadWeights, Layer, Work, rotation};
use crate::{
    backend::{Backend, KvShape, Limits, WarmUp},
    error::Result,
    model::units::Unit,
};

/// Units as a device holds them. Clones are the same units, in the same memory.
///
/// Weights never change. Pages belong to one decoder at a time: to the one whose steps run.
pub struct Held<B: Backend> {
    pub(super) embed: Option<Arc<B::Matrix>>,
    pub(super) head: Option<HeadWeights<B>>,
    pub(super) layers: BTreeMap<usize, Layer<B>>,
}

impl<B: Backend> Default for Held<B> {
    fn default() -> Self {
        Held { embed: None, head: None, layers: BTreeMap::new() }
    }
}

impl<B: Backend> Clone for Held<B> {
    fn clone(&self) -> Self {
        let Held { embed, head, layers } = self;
        Held { embed: embed.clone(), head: head.clone(), layers: layers.clone() }
    }
}

impl<B: Backend> Clone for Layer<B> {
    fn clone(&self) -> Self {
        Layer { weights: self.weights.clone(), kv: self.kv.clone() }
    }
}

impl<B: Backend> Clone for HeadWeights<B> {
    fn clone(&self) -> Self {
        HeadWeights { unit: self.unit, norm: self.norm.clone(), matrix: self.matrix.clone() }
    }
}

impl<B: Backend> Held<B> {
    /// Whether this layer is among them.
    pub fn has_layer(&self, layer: usize) -> bool {
        self.layers.contains_key(&layer)
    }

    /// Whether the embedding is, and the head, or the part of it that is where tokens are chosen.
    pub fn has_ends(&self) -> (bool, bool) {
        let is_last = |unit| match unit {
            Unit::HeadPart { part, parts } => part + 1 == parts,
            _ => true,
        };
        (self.embed.is_some(), self.head.as_ref().is_some_and(|head| is_last(head.unit)))
    }

    /// A layer's pages.
    pub fn pages(&self, layer: usize) -> Option<Arc<Mutex<B::Kv>>> {
        self.layers.get(&layer).map(|layer| layer.kv.clone())
    }

    /// Those of these units that are here, and which they are.
    pub fn part(&self, units: &[Unit]) -> (Held<B>, Vec<Unit>) {
        let (mut part, mut which) = (Held::default(), Vec::new());
        for &unit in units {
            let found = match unit {
                Unit::Embed => {
                    part.embed = self.embed.clone();
                    part.embed.is_some()
                }
                Unit::Head | Unit::HeadPart { .. } => {
                    let same = self.head.as_ref().filter(|head| head.unit == unit).cloned();
                    let found = same.is_some();
                    part.head = same.or(part.head);
                    found
                }
                Unit::Layer(i) => {
                    let layer = self.layers.get(&i).map(|layer| part.layers.insert(i, layer.clone()));
                    layer.is_some()
                }
            };
            which.extend(found.then_some(unit));
        }
        (part, which)
    }

    /// All of these and of those.
    pub fn extend(&mut self, more: Held<B>) {
        self.embed = more.embed.or(self.embed.take());
        self.head = more.head.or(self.head.take());
        self.layers.extend(more.layers);
    }
}

impl<B: Backend> Decoder<B> {
    /// Its units.
    pub fn held(&self) -> Held<B> {
        Held {
            embed: self.embed.clone(),
            head: self.head.as_ref().and_then(|head| match &head.work {
                Work::Whole { weights, .. } => Some(weights.clone()),
                Work::Parts(_) => None,
            }),
            layers: (self.first..).zip(self.layers.iter().cloned()).collect(),
        }
    }

    /// Tries everything with other pages in place of those that are in use, and then lets the device record its passes over
    /// the right ones without carrying them out.
    pub(super) fn warm_up_aside(
        &mut self,
        backend: &B,
        limits: Limits,
        all: &[WarmUp],
        tell: &dyn Fn(usize, usize),
    ) -> Result<()> {
        let (heads, layers) = (self.spec.heads, self.layers.clone());
        let shape =
            KvShape { blocks: 1, kv_heads: heads.kv_heads, head_dim: heads.head_dim, dtype: self.dtype };
        // What is tried goes to the first block alone.
        for layer in &mut self.layers {
            layer.kv = Arc::new(Mutex::new(backend.kv(shape)?));
        }
        self.try_all(backend, all, 1, tell)?;
        backend.loaded()?;
        self.layers = layers;
        // The old one remembers how small those pages were.
        self.batch = backend.batch(limits, rotation(&self.spec))?;
        for WarmUp { batch, .. } in all.iter().filter(|warm_up| warm_up.passes > 1) {
            self.prepare(backend, batch)?;
            self.ops(backend, usize::MAX, |batch, ops| backend.record(batch, ops))?;
        }
        Ok(())
    }
}
