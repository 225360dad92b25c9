//! What an engine tells of itself in a run: spans, the phases that they fall into, the gaps between tokens.

use std::{collections::HashMap, sync::Arc, time::Duration};

use super::limits::{AllDone, Demands};
use crate::{
    batch::{MicroBatch, SeqId},
    engine::{Engine, Measurement, Measurements},
    layout::Measured,
    pipeline::{StageSpan, Work},
    schedule::{CostModel, PassShape, SchedulerStats},
};

/// Measurements that wait to be read, at most.
const ROOM: usize = 1 << 16;
/// Spans of a run that are kept, at most: their bytes would grow with the run.
const SPANS_MAX: usize = 1 << 19;
/// How long spans may take to come after the last token.
const LATE: Duration = Duration::from_millis(20);

/// Listens to an engine.
pub(super) struct Recorder {
    measurements: Measurements,
    demands: Demands,
    requests: usize,
    record: Record,
    /// Steps that have not come back.
    open: HashMap<u64, Arc<MicroBatch>>,
    /// When each sequence got its last token.
    last: HashMap<SeqId, Duration>,
}

/// A run.
#[derive(Debug, Default)]
pub(super) struct Record {
    /// In the order of each stage's steps.
    pub(super) spans: Vec<StageSpan>,
    /// The first and the last step.
    pub(super) steps: Option<(u64, u64)>,
    /// The last one with rows of a prompt.
    pub(super) last_prompt: Option<u64>,
    /// The first one that a sequence ended with, other than the one that came later.
    pub(super) first_end: Option<u64>,
    /// Between a sequence's tokens.
    pub(super) gaps: Vec<Gap>,
    /// When each sequence's first rows were planned.
    pub(super) planned: HashMap<SeqId, Duration>,
    /// When each sequence's first token came.
    pub(super) first_tokens: HashMap<SeqId, Duration>,
    pub(super) queues: Queues,
    /// What each stage had to do.
    pub(super) done: AllDone,
    /// What the steps were that spans may come for.
    pub(super) shapes: HashMap<u64, PassShape>,
    /// What the stages' times are made of.
    pub(super) costs: CostModel,
    /// What they took, by kinds of passes.
    pub(super) measured: Measured,
}

/// So many sequences had a token at each of these moments and none in between.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Gap {
    pub(super) from: Duration,
    pub(super) to: Duration,
    pub(super) sequences: u64,
}

/// Queues and blocks, over the steps that were planned.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub(super) struct Queues {
    #[serde(skip)]
    planned: u64,
    #[serde(skip)]
    in_flight_sum: u64,
    in_flight_max: usize,
    pub(super) waiting_max: usize,
    pub(super) running_max: usize,
    kv_blocks_total: usize,
    kv_blocks_used_max: usize,
    #[serde(skip)]
    kv_blocks_used_sum: u64,
}

impl Recorder {
    pub(super) fn new(engine: &Engine, demands: Demands) -> Recorder {
        Recorder {
            measurements: engine.measurements(ROOM),
            demands,
            requests: 0,
            record: Record::default(),
            open: HashMap::new(),
            last: HashMap::new(),
        }
    }

    /// A run of so many requests begins, perhaps with one more that comes later and ends with its first token. Nothing of
    /// an earlier run is kept.
    pub(super) fn begin(&mut self, requests: usize) {
        self.requests = requests;
        self.measurements.try_iter().for_each(drop);
        // What stages cost is the same in each run.
        let Record { costs, measured, .. } = std::mem::take(&mut self.record);
        self.record = Record { costs, measured, ..Record::default() };
        self.open.clear();
        self.last.clear();
    }

    /// Takes note of what has come.
    pub(super) fn read(&mut self) {
        for measurement in self.measurements.try_iter() {
            match measurement {
                Measurement::Span(span) => self.record.span(span),
                Measurement::Vision(span) => {
                    self.demands.add_vision(span.stage, span.cost, &mut self.record.done);
                    let seconds = (span.ended - span.began).as_secs_f64();
                    self.record.measured.add_vision(span.stage, span.cost, seconds);
                }
                Measurement::Planned { at, step, queues } => {
                    self.record.planned(at, step.step, &step.batch, &queues);
                    self.demands.add(&step.batch, &mut self.record.done);
                    self.open.insert(step.step, step.batch);
                }
                Measurement::Applied { at, step, ended, .. } => {
                    let Some(batch) = self.open.remove(&step) else { continue };
                    let late = self.record.late(self.requests);
                    let late_ended = batch.outputs.iter().any(|output| Some(output.seq) == late);
                    if ended > usize::from(late_ended) {
                        self.record.first_end.get_or_insert(step);
                    }
                    self.record.tokens(at, &batch, &mut self.last);
                }
                // What was told of other stages says nothing of these.
                Measurement::Relaid { .. } => {
                    self.record.spans.clear();
                    self.record.measured = Measured::default();
                }
            }
        }
    }

    /// The run has ended.
    pub(super) fn end(&mut self) -> Record {
        std::thread::sleep(LATE);
        self.read();
        let (costs, measured) = (self.record.costs.clone(), self.record.measured.clone());
        std::mem::replace(&mut self.record, Record { costs, measured, ..Record::default() })
    }
}

impl Record {
    /// The sequence that came after so many requests.
    fn late(&self, requests: usize) -> Option<SeqId> {
        self.planned.keys().max().copied().filter(|_| self.planned.len() > requests)
    }

    fn span(&mut self, span: StageSpan) {
        let of_this_run = self.steps.is_some_and(|(first, _)| first <= span.step);
        if of_this_run && self.spans.len() < SPANS_MAX {
            self.spans.push(span);
        }
        if let Some(shape) = self.shapes.get(&span.step) {
            self.costs.fit(span.stage, shape, span.taken());
            self.measured.add(span.stage, *shape, span.taken().as_secs_f64());
        }
    }

    fn planned(&mut self, at: Duration, step: u64, batch: &MicroBatch, queues: &SchedulerStats) {
        self.steps = Some((self.steps.map_or(step, |(first, _)| first), step));
        if Work::of(batch).prompt_rows > 0 {
            self.last_prompt = Some(step);
        }
        for start in &batch.starts {
            self.planned.entry(start.seq).or_insert(at);
        }
        self.queues.add(queues);
        if self.shapes.len() < SPANS_MAX {
            self.shapes.insert(step, PassShape::of(batch));
        }
    }

    fn tokens(&mut self, at: Duration, batch: &MicroBatch, last: &mut HashMap<SeqId, Duration>) {
        // Sequences that went together before have the same gap.
        let mut gaps: Vec<Gap> = Vec::new();
        for output in &batch.outputs {
            let Some(from) = last.insert(output.seq, at) else {
                self.first_tokens.insert(output.seq, at);
                continue;
            };
            match gaps.iter_mut().find(|gap| gap.from == from) {
                Some(gap) => gap.sequences += 1,
                None => gaps.push(Gap { from, to: at, sequences: 1 }),
            }
        }
        self.gaps.append(&mut gaps);
    }
}

impl Gap {
    /// In milliseconds, with how many sequences had it.
    pub(super) fn ms(&self) -> (f64, u64) {
        (1e3 * (self.to - self.from).as_secs_f64(), self.sequences)
    }
}

impl Queues {
    fn add(&mut self, now: &SchedulerStats) {
        self.planned += 1;
        self.in_flight_sum += now.in_flight as u64;
        self.in_flight_max = self.in_flight_max.max(now.in_flight);
        self.waiting_max = self.waiting_max.max(now.waiting);
        self.running_max = self.running_max.max(now.running);
        self.kv_blocks_total = now.kv_blocks_total;
        let used = now.kv_blocks_total - now.kv_blocks_free - now.kv_blocks_cached;
        self.kv_blocks_used_max = self.kv_blocks_used_max.max(used);
        self.kv_blocks_used_sum += used as u64;
    }

    /// Of several runs.
    pub(super) fn together(runs: impl IntoIterator<Item = Queues>) -> Queues {
        let join = |a: Queues, b: Queues| Queues {
            planned: a.planned + b.planned,
            in_flight_sum: a.in_flight_sum + b.in_flight_sum,
            in_flight_max: a.in_flight_max.max(b.in_flight_max),
            waiting_max: a.waiting_max.max(b.waiting_max),
            running_max: a.running_max.max(b.running_max),
            kv_blocks_total: a.kv_blocks_total.max(b.kv_blocks_total),
            kv_blocks_used_max: a.kv_blocks_used_max.max(b.kv_blocks_used_max),
            kv_blocks_used_sum: a.kv_blocks_used_sum + b.kv_blocks_used_sum,
        };
        runs.into_iter().fold(Queues::default(), join)
    }

    /// Steps in flight, the mean over the steps that were planned.
    pub(super) fn in_flight_mean(&self) -> f64 {
        self.in_flight_sum as f64 / self.planned.max(1) as f64
    }

    /// Share of the KV blocks that sequences have, the mean over the steps that were planned.
    pub(super) fn kv_use_mean(&self) -> f64 {
        self.kv_blocks_used_sum as f64 / (self.planned * self.kv_blocks_total as u64).max(1) as f64
    }

    /// The same, at most.
    pub(super) fn kv_use_max(&self) -> f64 {
        self.kv_blocks_used_max as f64 / self.kv_blocks_total.max(1) as f64
    }
}
