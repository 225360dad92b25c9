//! What a stage does with its time.

use std::{
    sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use crate::backend::Backend;

/// Counters that a stage's thread writes and anyone reads.
#[derive(Debug, Default)]
pub struct StageMetrics {
    busy_ns: AtomicU64,
    wait_input_ns: AtomicU64,
    wait_output_ns: AtomicU64,
    wait_device_ns: AtomicU64,
    copy_ns: AtomicU64,
    batches: AtomicU64,
    rows: AtomicU64,
    /// What its thread does now, as a number of [`DOING`].
    doing: AtomicU8,
}

/// What a stage's thread does, by kinds of time.
const DOING: [&str; 5] = [
    "works or gives its device work",
    "waits for a micro-batch",
    "waits for room at the next stage",
    "waits for a stage that shares its device",
    "hands a micro-batch on",
];

/// What a stage has done since it started.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct StageTimes {
    /// Computing.
    pub busy: Duration,
    /// Waiting for a micro-batch.
    pub wait_input: Duration,
    /// Waiting for room at the next stage.
    pub wait_output: Duration,
    /// Waiting for other stages that share the device.
    pub wait_device: Duration,
    /// Copying across boundaries.
    pub copy: Duration,
    /// Micro-batches done.
    pub batches: u64,
    /// Rows (tokens) done.
    pub rows: u64,
}

/// One kind of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spent {
    Busy,
    WaitInput,
    WaitOutput,
    WaitDevice,
    Copy,
}

impl StageMetrics {
    /// Adds the host's time since `*since` to a kind and starts the next span; for a device that works on its own the
    /// host's time says nothing.
    pub(super) fn spent<B: Backend>(&self, kind: Spent, since: &mut Instant) {
        let now = Instant::now();
        if !B::ASYNC {
            self.add(kind, now - *since);
        }
        *since = now;
    }

    /// From now on the stage's thread spends this kind of time.
    pub(super) fn begins(&self, kind: Spent) {
        let number = match kind {
            Spent::Busy => 0,
            Spent::WaitInput => 1,
            Spent::WaitOutput => 2,
            Spent::WaitDevice => 3,
            Spent::Copy => 4,
        };
        self.doing.store(number, Relaxed);
    }

    /// What the stage's thread does now, in words.
    pub fn doing(&self) -> &'static str {
        DOING[usize::from(self.doing.load(Relaxed))]
    }

    /// Adds to a kind.
    pub(super) fn add(&self, kind: Spent, time: Duration) {
        let counter = match kind {
            Spent::Busy => &self.busy_ns,
            Spent::WaitInput => &self.wait_input_ns,
            Spent::WaitOutput => &self.wait_output_ns,
            Spent::WaitDevice => &self.wait_device_ns,
            Spent::Copy => &self.copy_ns,
        };
        counter.fetch_add(time.as_nanos() as u64, Relaxed);
    }

    /// Adds a pass of the vision tower.
    pub fn add_pass(&self, busy: Duration) {
        self.add(Spent::Busy, busy);
    }

    /// Counts a pass of the vision tower that has been waited for.
    pub fn add_waited(&self, waited: Duration, rows: usize) {
        self.add(Spent::WaitInput, waited);
        self.count(rows);
    }

    /// Counts a micro-batch.
    pub(super) fn count(&self, rows: usize) {
        self.batches.fetch_add(1, Relaxed);
        self.rows.fetch_add(rows as u64, Relaxed);
    }

    /// The counters now.
    pub fn times(&self) -> StageTimes {
        let ns = |counter: &AtomicU64| Duration::from_nanos(counter.load(Relaxed));
        StageTimes {
            busy: ns(&self.busy_ns),
            wait_input: ns(&self.wait_input_ns),
            wait_output: ns(&self.wait_output_ns),
            wait_device: ns(&self.wait_device_ns),
            copy: ns(&self.copy_ns),
            batches: self.batches.load(Relaxed),
            rows: self.rows.load(Relaxed),
        }
    }
}
