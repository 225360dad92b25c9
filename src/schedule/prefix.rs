//! What blocks are found by: their tokens, and all tokens before them.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    sync::Arc,
};

use super::images::PromptImages;
use crate::batch::KV_BLOCK;

/// Stands for a full block's tokens and all tokens before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct BlockKey(u128);

impl BlockKey {
    /// One of so many equally likely numbers.
    pub(super) fn of(self, numbers: usize) -> usize {
        ((u128::from(self.0 as u64) * numbers as u128) >> 64) as usize
    }

    /// A part of it that does not follow from [`BlockKey::of`].
    pub(super) fn tag(self) -> u32 {
        (self.0 >> 64) as u32
    }
}

/// Makes keys. They are keyed hashes of 128 bits, with random numbers of this process: nobody outside can choose tokens
/// whose key is that of others, so equal keys are equal tokens. Clones make the same keys.
#[derive(Debug, Clone, Default)]
pub struct Keys {
    low: RandomState,
    high: RandomState,
}

/// The keys of a prompt's full blocks.
#[derive(Debug, Clone, Default)]
pub struct PromptKeys(pub(super) Arc<[BlockKey]>);

impl Keys {
    /// Of a prompt. It takes some 100 ns a block, which whoever has made the prompt has rather than who schedules it.
    pub fn of_prompt(&self, prompt: &[u32], images: Option<&PromptImages>) -> PromptKeys {
        let mut before = None;
        let next = |(block, tokens): (usize, &[u32; KV_BLOCK])| {
            let images = images.map_or_else(Vec::new, |images| images.block_bytes(block));
            let key = self.after(before, tokens, &images);
            before = Some(key);
            key
        };
        PromptKeys(prompt.as_chunks().0.iter().enumerate().map(next).collect())
    }

    /// The key of a block after another, or of a sequence's first one. Of tokens that are parts of images `images` has
    /// what their ids do not tell.
    pub(super) fn after(
        &self,
        before: Option<BlockKey>,
        tokens: &[u32; KV_BLOCK],
        images: &[u8],
    ) -> BlockKey {
        let mut bytes = [0; 1 + 16 + 4 * KV_BLOCK];
        bytes[0] = u8::from(before.is_some());
        bytes[1..17].copy_from_slice(&before.map_or(0, |key| key.0).to_le_bytes());
        for (to, token) in bytes[17..].chunks_exact_mut(4).zip(tokens) {
            to.copy_from_slice(&token.to_le_bytes());
        }
        let hash = |state: &RandomState| {
            let mut hasher = state.build_hasher();
            hasher.write(&bytes);
            hasher.write(images);
            u128::from(hasher.finish())
        };
        BlockKey(hash(&self.low) | hash(&self.high) << 64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_stands_for_the_tokens_and_for_all_before_them() {
        let keys = Keys::default();
        let (a, b) = ([1; KV_BLOCK], [2; KV_BLOCK]);
        let first = keys.after(None, &a, &[]);
        assert_eq!(first, keys.after(None, &a, &[]));
        assert_ne!(first, keys.after(None, &b, &[]));
        assert_ne!(keys.after(Some(first), &a, &[]), first);
        assert_ne!(keys.after(Some(first), &b, &[]), keys.after(Some(keys.after(None, &b, &[])), &b, &[]));
        assert_ne!(first, Keys::default().after(None, &a, &[]), "others have other keys");
        let prompt: Vec<u32> = [&a[..], &b, &[3; KV_BLOCK - 1]].concat();
        let of_prompt = keys.clone().of_prompt(&prompt, None).0;
        assert_eq!(of_prompt[..], [first, keys.after(Some(first), &b, &[])]);
    }
}
