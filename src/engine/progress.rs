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
    /// Passes that devices are warmed up with, of the stages that have come so far; none on the CPU.
    pub passes_total: usize,
    /// Of them, those that have been made.
    pub passes_done: usize,
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
    bytes_total: usize,
    /// What has been told; `None` before the first stage has begun.
    told: Mutex<Option<LoadProgress>>,
}

impl Progress {
    pub(super) fn new(observer: Option<Observer>, bytes_total: usize) -> Self {
        Progress(observer.map(|observer| Arc::new(Count { observer, bytes_total, told: Mutex::default() })))
    }

    /// Nobody is told.
    pub(super) fn untold() -> Self {
        Progress(None)
    }

    /// A stage begins.
    pub(super) fn begin(&self) {
        self.update(|told, first| first.then_some(told));
    }

    /// A stage has so many bytes more.
    pub(super) fn add(&self, bytes: usize) {
        self.update(|told, _| Some(LoadProgress { bytes_done: told.bytes_done + bytes, ..told }));
    }

    /// A stage has so many passes to make more, and has made so many more.
    pub(super) fn add_passes(&self, total: usize, done: usize) {
        self.update(|told, _| {
            let (passes_total, passes_done) = (told.passes_total + total, told.passes_done + done);
            Some(LoadProgress { passes_total, passes_done, ..told })
        });
    }

    /// The observer is called under the lock: it sees the counts in order.
    fn update(&self, next: impl FnOnce(LoadProgress, bool) -> Option<LoadProgress>) {
        let Some(count) = &self.0 else { return };
        let mut told = count.told.lock().unwrap_or_else(PoisonError::into_inner);
        let nothing =
            LoadProgress { bytes_total: count.bytes_total, bytes_done: 0, passes_total: 0, passes_done: 0 };
        if let Some(progress) = next(told.unwrap_or(nothing), told.is_none()) {
            *told = Some(progress);
            (count.observer.0)(progress);
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
        let progress = Progress::untold();
        progress.begin();
        progress.add(1);
        progress.add_passes(2, 1);
    }

    #[test]
    fn passes_of_several_stages_are_added_up() {
        let all: Arc<Mutex<Vec<LoadProgress>>> = Arc::default();
        let to = all.clone();
        let progress = Progress::new(Some(Observer::new(move |told| to.lock().unwrap().push(told))), 9);
        progress.begin();
        progress.begin();
        progress.add(9);
        for (total, done) in [(5, 0), (7, 0), (0, 4)] {
            progress.add_passes(total, done);
        }
        let told = |p: &LoadProgress| (p.bytes_total, p.bytes_done, p.passes_total, p.passes_done);
        let all: Vec<_> = all.lock().unwrap().iter().map(told).collect();
        assert_eq!(all, [(9, 0, 0, 0), (9, 9, 0, 0), (9, 9, 5, 0), (9, 9, 12, 0), (9, 9, 12, 4)]);
    }
}
