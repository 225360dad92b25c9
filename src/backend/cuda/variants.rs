//! Kernels that a file is compiled to for different definitions, of which a model needs few: they are compiled when one of their
//! kind is first used. That is never while a pass is recorded, since a pass is recorded only after it has run.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

use super::{beside, driver::recording, joined};
use crate::error::Result;

pub(super) struct Variants<K, V>(Mutex<HashMap<K, Arc<V>>>);

impl<K, V> Default for Variants<K, V> {
    fn default() -> Self {
        Variants(Mutex::default())
    }
}

impl<K: Copy + Eq + Hash + Send, V: Send + Sync> Variants<K, V> {
    /// The variant that is wanted. Others will soon be: they are compiled side by side.
    pub(super) fn get(
        &self,
        wanted: K,
        others: impl IntoIterator<Item = K>,
        compile: impl Fn(K) -> Result<V> + Sync,
    ) -> Result<Arc<V>> {
        let mut compiled = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = compiled.get(&wanted) {
            return Ok(found.clone());
        }
        let mut missing: Vec<K> = Vec::new();
        // While a pass is recorded nobody else may load code.
        for other in others.into_iter().filter(|_| !recording()) {
            if other != wanted && !compiled.contains_key(&other) && !missing.contains(&other) {
                missing.push(other);
            }
        }
        let compile = &compile;
        std::thread::scope(|scope| {
            let missing: Vec<_> =
                missing.into_iter().map(|v| (v, beside(scope, move || compile(v)))).collect();
            let made = Arc::new(compile(wanted)?);
            compiled.insert(wanted, made.clone());
            for (variant, thread) in missing {
                // What is wrong is said to whoever wants it.
                if let Ok(other) = thread.and_then(joined) {
                    compiled.insert(variant, Arc::new(other));
                }
            }
            Ok(made)
        })
    }
}
