//! How far the stages are with loading, all together.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

/// How far loading has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes of the weights of all stages, as they are kept.
    pub bytes_total: usize,
    /// Of them, those that are on their devices. Weights that are used where the file has them count at once.
    pub bytes_done: usize,
}

/// Whom to tell.
#[derive(Clone)]
pub(super) struct Observer(Arc<dyn Fn(LoadProgress) + Send + Sync>);

impl Observer {
    pub(super) fn new(tell: impl Fn(LoadProgress) + Send + Sync + 'static) -> Self {
        Observer(Arc::new(tell))
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

/// The stages' common count.
#[derive(Clone)]
pub(super) struct Progress(Option<Arc<Count>>);

struct Count {
    observer: Observer,
    total: usize,
    /// Bytes that have been told; `None` before the first stage has begun.
    done: Mutex<Option<usize>>,
}

impl Progress {
    pub(super) fn new(observer: Option<Observer>, total: usize) -> Self {
        Progress(observer.map(|observer| Arc::new(Count { observer, total, done: Mutex::default() })))
    }

    /// A stage begins.
    pub(super) fn begin(&self) {
        self.update(|done| done.is_none().then_some(0));
    }

    /// A stage has so many bytes more.
    pub(super) fn add(&self, bytes: usize) {
        self.update(|done| Some(done.unwrap_or(0) + bytes));
    }

    /// The observer is called under the lock: it sees the counts in order.
    fn update(&self, next: impl FnOnce(Option<usize>) -> Option<usize>) {
        let Some(count) = &self.0 else { return };
        let mut done = count.done.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = next(*done) {
            *done = Some(bytes);
            (count.observer.0)(LoadProgress { bytes_total: count.total, bytes_done: bytes });
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{Engine, engine::WeightSource};

    use super::*;

    /// What is told while a small model loads.
    fn told(model: &str, stages: usize, weights: WeightSource) -> Vec<LoadProgress> {
        let all: Arc<Mutex<Vec<LoadProgress>>> = Arc::default();
        let to = all.clone();
        let engine = Engine::builder()
            .model(format!("tests/data/{model}"))
            .device(crate::layout::Device::Cpu)
            .stages(stages)
            .weights(weights)
            .on_load(move |progress| to.lock().unwrap().push(progress))
            .build()
            .unwrap();
        let bytes: usize = engine.stats().stages.iter().map(|s| s.weight_bytes).sum();
        let all = all.lock().unwrap().clone();
        assert!(all.iter().all(|p| p.bytes_total == bytes), "{all:?}, not {bytes}");
        all
    }

    #[test]
    fn it_begins_with_nothing_and_ends_with_everything() {
        // With and without biases, norms of heads, a head of its own, several files.
        for model in ["chat-llama", "llama-bias", "llama3-tied", "mistral-sharded", "qwen2-window", "qwen3"] {
            for (stages, weights) in
                [(1, WeightSource::Real), (2, WeightSource::Real), (2, WeightSource::Dummy)]
            {
                let all = told(model, stages, weights);
                assert!(all.len() > 4 && all.is_sorted_by(|a, b| a.bytes_done <= b.bytes_done), "{all:?}");
                assert_eq!(all[0].bytes_done, 0);
                let last = all[all.len() - 1];
                assert_eq!(last.bytes_done, last.bytes_total);
            }
        }
    }

    #[test]
    fn nobody_is_told_where_nobody_asks() {
        let progress = Progress::new(None, 1);
        progress.begin();
        progress.add(1);
    }
}
