//! Numbers that follow from a seed.

use crate::{backend::mix, model::spec::ModelSpec};

/// What tokens are drawn from: all but those that stand for images.
#[derive(Debug, Clone, Copy)]
pub(super) struct Vocab {
    size: usize,
    never: [Option<u32>; 2],
}

impl Vocab {
    pub(super) fn of(spec: &ModelSpec) -> Vocab {
        Vocab { size: spec.vocab, never: [spec.pads.map(|p| p.image), spec.pads.map(|p| p.video)] }
    }

    #[cfg(test)]
    pub(super) fn tests_of(size: usize) -> Vocab {
        Vocab { size, never: [None; 2] }
    }
}

/// SplitMix64.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(mix(seed))
    }

    /// One whose seed is mixed already.
    pub(super) fn from_state(state: u64) -> Random {
        Random(state)
    }

    /// 64 random bits.
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// In (0, 1], so that its logarithm is finite.
    pub(super) fn share(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// So many tokens.
    pub(super) fn ids(mut self, n: u32, vocab: Vocab) -> Vec<u32> {
        let drawn = std::iter::repeat_with(|| self.below(vocab.size));
        drawn.filter(|&id| !vocab.never.contains(&Some(id))).take(n as usize).collect()
    }

    fn below(&mut self, n: usize) -> u32 {
        // The upper half of a product with 64 random bits: a vocabulary has far fewer than 2^32 tokens.
        ((u128::from(self.next()) * n as u128) >> 64) as u32
    }
}
