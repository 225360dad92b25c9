//! What blocks are found by: their tokens, and all tokens before them.

use std::{
    collections::HashMap,
    hash::{BuildHasher, BuildHasherDefault, Hasher, RandomState},
    sync::Arc,
};

use super::images::PromptImages;
use crate::batch::KV_BLOCK;

/// Stands for a full block's tokens and all tokens before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct BlockKey(u128);

/// What is found by keys.
pub(super) type ByKey<T> = HashMap<BlockKey, T, BuildHasherDefault<Low>>;

/// An empty table for so many keys. It never has to grow while somebody waits, and all of its memory has been written to: a system
/// gives memory page by page when that happens first, which would take longer than to put something into it.
pub(super) fn table<T: Default>(keys: usize) -> ByKey<T> {
    let mut table = ByKey::with_capacity_and_hasher(keys, Default::default());
    // Of 16 places 7 to 14 are taken: with every third one none is far from one that has been.
    table.extend((0..keys as u128).map(|i| (BlockKey(3 * i), T::default())));
    table.clear();
    table
}

/// Half of a key. A table needs no hash of a hash.
#[derive(Debug, Default)]
pub(super) struct Low(u64);

impl Hasher for Low {
    fn write_u128(&mut self, key: u128) {
        self.0 = key as u64;
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("a key is one number; this is a bug");
    }

    fn finish(&self) -> u64 {
        self.0
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
