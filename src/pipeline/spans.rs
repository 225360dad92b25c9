//! When stages worked: moments that a stage marks on its device's clock, and a thread that reads them later.
//!
//! A mark delays a GPU by two or three microseconds, and reading one that has not come would mean to wait. So a stage
//! marks some of its passes only, and hands the marks on; a channel that is full drops them.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use super::{StageMetrics, metrics::Spent};
use crate::{
    backend::Backend,
    batch::{MicroBatch, Step},
    error::{Error, Result},
    sync::{
        channel,
        thread::{self, JoinHandle},
    },
};

/// After so many passes, two neighbours of so many are measured, and stand for the others. The second number is odd, so
/// that every slot comes to be measured where their number is even.
const MEASURED_FIRST: u64 = 32;
const MEASURED_EVERY: u64 = 17;
/// Measured passes that may be on their way to the collector.
const ON_THEIR_WAY: usize = 4096;
/// How long the collector sleeps between two looks. It does not wait for single passes: a stage would have to wake it.
const LOOK: Duration = Duration::from_millis(1);
/// After so many looks at nothing it waits.
const QUIET: u32 = 50;
/// How long passes may take to end after their stage.
const LAST: Duration = Duration::from_secs(1);

/// What a stage did for one step.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct StageSpan {
    /// Which stage.
    pub stage: usize,
    /// Which step.
    pub step: u64,
    /// When what it works on had come: rows of the stage before, or tokens. Since the engine's start, as the others.
    pub began: Duration,
    /// When it had computed.
    pub computed: Duration,
    /// When its rows had gone, too.
    pub ended: Duration,
    /// Copying across boundaries, between beginning and end.
    pub copy: Duration,
    /// Waiting for room at the next stage, between beginning and end.
    pub wait_output: Duration,
    /// From the end of the step before to the beginning, if that step was measured.
    pub wait_input: Option<Duration>,
    /// Steps that it stands for.
    pub weight: f64,
    /// What there was to do.
    #[serde(flatten)]
    pub work: Work,
}

/// What a micro-batch means to a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Work {
    /// Rows (tokens).
    pub rows: usize,
    /// Those of prompts.
    pub prompt_rows: usize,
    /// Rows whose next token is wanted.
    pub outputs: usize,
    /// Sequences.
    pub sequences: usize,
    /// Tokens that each row attends to, in all.
    pub attended: u64,
}

impl StageSpan {
    /// How long the stage could do nothing else: computing and copying.
    pub fn taken(&self) -> Duration {
        (self.ended - self.began).saturating_sub(self.wait_output)
    }

    /// Computing alone.
    pub fn busy(&self) -> Duration {
        self.taken().saturating_sub(self.copy)
    }
}

impl Work {
    /// Of a micro-batch. A sequence's one row whose next token is wanted counts as decoding, be it a prompt's last.
    pub fn of(batch: &MicroBatch) -> Work {
        let mut work = Work {
            rows: batch.rows(),
            outputs: batch.outputs.len(),
            sequences: batch.seqs.len(),
            ..Work::default()
        };
        let mut outputs = batch.outputs.iter().map(|output| output.row).peekable();
        for rows in &batch.seqs {
            let (len, cached) = (rows.len as u64, rows.cached as u64);
            work.attended += len * cached + len * (len + 1) / 2;
            let wanted = outputs.next_if(|&row| row < rows.row + rows.len).is_some();
            if !(wanted && rows.len == 1 && rows.cached > 0) {
                work.prompt_rows += rows.len;
            }
        }
        work
    }
}

/// Moments of a pass, in their order on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    /// What it works on is there.
    Arrived,
    /// Rows have been copied in. Not at the first stage.
    Started,
    /// It has been computed. Not at the last stage, where this is the end.
    Computed,
    /// There is room at the next stage.
    Room,
    /// Nothing is left to be done.
    Ended,
}

/// How many they are.
const MOMENTS: usize = 5;

/// A pass that is measured.
pub(super) struct Pass<B: Backend> {
    number: u64,
    marks: [Option<B::Mark>; MOMENTS],
}

impl<B: Backend> Pass<B> {
    /// Marks a moment: all that has been asked of the device until now.
    pub(super) fn mark(&mut self, moment: Moment, backend: &B) -> Result<()> {
        self.marks[moment as usize] = Some(backend.mark()?);
        Ok(())
    }
}

/// A stage's side.
pub struct Probe<B: Backend> {
    /// Its place among those that the collector reads.
    reader: usize,
    every: bool,
    count: u64,
    /// `None` if nobody wants to know.
    told: Option<channel::Sender<Told<B>>>,
    dropped: Arc<AtomicU64>,
}

/// From a stage to the collector.
struct Told<B: Backend> {
    reader: usize,
    what: What<B>,
}

enum What<B: Backend> {
    /// A moment on both clocks.
    Base(B::Mark, Instant),
    Pass(Box<Pass<B>>, Step),
}

impl<B: Backend> Probe<B> {
    /// One that measures nothing.
    pub fn off() -> Self {
        Probe { reader: 0, every: false, count: 0, told: None, dropped: Arc::default() }
    }

    /// Brings the two clocks together. The device must have nothing to do.
    pub(super) fn start(&mut self, backend: &B) -> Result<()> {
        let Some(told) = &self.told else { return Ok(()) };
        let mark = backend.mark()?;
        while backend.between(&mark, &mark)?.is_none() {
            thread::yield_now();
        }
        let what = What::Base(mark, Instant::now());
        // The collector outlives the stages unless it has panicked.
        let _ = told.send(Told { reader: self.reader, what });
        Ok(())
    }

    /// Counts a pass; gives it if it is to be measured.
    pub(super) fn begin(&mut self) -> Option<Pass<B>> {
        let number = self.count;
        self.count += 1;
        let measured = self.every || number < MEASURED_FIRST || number % MEASURED_EVERY < 2;
        (self.told.is_some() && measured).then(|| Pass { number, marks: [const { None }; MOMENTS] })
    }

    /// Hands a measured pass on.
    pub(super) fn end(&self, pass: Pass<B>, step: &Step) {
        let what = What::Pass(Box::new(pass), step.clone());
        let told = self.told.as_ref().map(|told| told.try_send(Told { reader: self.reader, what }));
        if told.is_some_and(|told| told.is_err()) {
            self.dropped.fetch_add(1, Relaxed);
        }
    }
}

/// How many passes' time a measured one stands for, and how many waits the one before it.
fn weights(every: bool, number: u64) -> (f64, f64) {
    match number % MEASURED_EVERY {
        _ if every || number < MEASURED_FIRST => (1.0, 1.0),
        0 => (MEASURED_EVERY as f64 / 2.0, 0.0),
        _ => (MEASURED_EVERY as f64 / 2.0, MEASURED_EVERY as f64),
    }
}

/// What stages are to be measured, and how.
pub struct Collecting<B: Backend> {
    /// Stages' places, devices, and counters, which the spans are added to where the host's time says nothing.
    pub stages: Vec<(usize, Arc<B>, Arc<StageMetrics>)>,
    /// The moment that spans count from.
    pub start: Instant,
    /// Measures every pass, not only some.
    pub every: bool,
    /// Counts what is dropped.
    pub dropped: Arc<AtomicU64>,
    /// Is told each span, one after another, from a thread of its own.
    pub tell: Box<dyn Fn(StageSpan) + Send>,
}

/// Starts the thread that reads marks. It ends after the last probe.
pub fn collect<B: Backend>(collecting: Collecting<B>) -> Result<(Vec<Probe<B>>, JoinHandle<()>)> {
    let Collecting { stages, start, every, dropped, tell } = collecting;
    // Where the host works itself, marks cost nothing.
    let every = every || !B::ASYNC;
    let (sender, told) = channel::bounded(ON_THEIR_WAY);
    let probe =
        |reader| Probe { reader, every, count: 0, told: Some(sender.clone()), dropped: dropped.clone() };
    let probes = (0..stages.len()).map(probe).collect();
    let reader = |(stage, backend, metrics)| Reader {
        stage,
        backend,
        metrics,
        every,
        last: None,
        open: VecDeque::new(),
    };
    let readers = stages.into_iter().map(reader).collect();
    let collector = Collector { told, readers, start, tell };
    let thread = thread::Builder::new()
        .name("spans".into())
        .spawn(move || collector.run())
        .map_err(|e| Error::Engine(format!("spans: no thread: {e}")))?;
    Ok((probes, thread))
}

struct Collector<B: Backend> {
    told: channel::Receiver<Told<B>>,
    readers: Vec<Reader<B>>,
    start: Instant,
    tell: Box<dyn Fn(StageSpan) + Send>,
}

impl<B: Backend> Collector<B> {
    fn run(mut self) {
        let mut quiet = QUIET;
        loop {
            if quiet >= QUIET {
                let Ok(told) = self.told.recv() else { return };
                self.take(told);
            }
            thread::sleep(LOOK);
            let took = loop {
                match self.told.try_recv() {
                    Ok(told) => self.take(told),
                    Err(why) => break why,
                }
                quiet = 0;
            };
            quiet = if self.read() { quiet + 1 } else { 0 };
            if took == channel::TryRecvError::Disconnected {
                return self.end();
            }
        }
    }

    fn take(&mut self, told: Told<B>) {
        let reader = &mut self.readers[told.reader];
        match told.what {
            What::Base(mark, at) => {
                let at = at.saturating_duration_since(self.start);
                reader.last = Some(Last { mark, at, number: None });
            }
            What::Pass(pass, step) => reader.open.push_back((*pass, step)),
        }
    }

    /// Tells what is over. Whether that is all.
    fn read(&mut self) -> bool {
        for reader in &mut self.readers {
            while let Some(span) = reader.next() {
                (self.tell)(span);
            }
        }
        self.readers.iter().all(|reader| reader.open.is_empty())
    }

    /// The stages have ended; their last passes may not have.
    fn end(mut self) {
        let since = Instant::now();
        while !self.read() && since.elapsed() < LAST {
            thread::sleep(LOOK);
        }
    }
}

/// Reads a stage's marks.
struct Reader<B: Backend> {
    stage: usize,
    backend: Arc<B>,
    metrics: Arc<StageMetrics>,
    every: bool,
    last: Option<Last<B>>,
    /// Passes that may not be over.
    open: VecDeque<(Pass<B>, Step)>,
}

/// The latest moment that was read.
struct Last<B: Backend> {
    mark: B::Mark,
    at: Duration,
    /// The pass that ended here.
    number: Option<u64>,
}

impl<B: Backend> Reader<B> {
    /// The next span, if it is over.
    fn next(&mut self) -> Option<StageSpan> {
        let (pass, step) = self.open.front()?;
        let times = match self.times(pass) {
            Ok(times) => times?,
            // A device that has failed says so to its stage.
            Err(_) => {
                self.open.clear();
                return None;
            }
        };
        let span = self.span(pass.number, step, &times);
        let (mut pass, _) = self.open.pop_front()?;
        let mark = pass.marks[Moment::Ended as usize].take()?;
        self.last = Some(Last { mark, at: span.ended, number: Some(pass.number) });
        Some(span)
    }

    /// When its moments were; `None` if not all have come. Each is read from the one before it: the device tells times
    /// between two marks, the less exactly the longer they are.
    fn times(&self, pass: &Pass<B>) -> Result<Option<[Option<Duration>; MOMENTS]>> {
        let (Some(last), Some(ended)) = (&self.last, &pass.marks[Moment::Ended as usize]) else {
            return Ok(None);
        };
        if self.backend.between(&last.mark, ended)?.is_none() {
            return Ok(None);
        }
        let (mut before, mut at) = (&last.mark, last.at);
        let mut times = [None; MOMENTS];
        for (time, mark) in times.iter_mut().zip(&pass.marks) {
            let Some(mark) = mark else { continue };
            let Some(since) = self.backend.between(before, mark)? else { return Ok(None) };
            (before, at) = (mark, at + since);
            *time = Some(at);
        }
        Ok(Some(times))
    }

    fn span(&self, number: u64, step: &Step, times: &[Option<Duration>; MOMENTS]) -> StageSpan {
        let at = |moment: Moment| times[moment as usize];
        let ended = at(Moment::Ended).expect("a pass without an end; this is a bug");
        let began = at(Moment::Arrived).unwrap_or(ended);
        let started = at(Moment::Started).unwrap_or(began);
        let computed = at(Moment::Computed).unwrap_or(ended);
        let room = at(Moment::Room).unwrap_or(computed);
        let last = self.last.as_ref().filter(|last| last.number.is_some_and(|n| n + 1 == number));
        let (weight, waits) = weights(self.every, number);
        let span = StageSpan {
            stage: self.stage,
            step: step.step,
            began,
            computed,
            ended,
            copy: (started - began) + (ended - room),
            wait_output: room - computed,
            wait_input: last.map(|last| began - last.at),
            weight,
            work: Work::of(&step.batch),
        };
        if B::ASYNC {
            let add = |kind, time: Duration, passes| self.metrics.add(kind, time.mul_f64(passes));
            add(Spent::Busy, span.busy(), weight);
            add(Spent::Copy, span.copy, weight);
            add(Spent::WaitOutput, span.wait_output, weight);
            add(Spent::WaitInput, span.wait_input.unwrap_or_default(), waits);
        }
        span
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::batch::{OutputRow, SeqId, SeqRows};

    /// Of sequences with so many rows after so many tokens; whether their next token is wanted.
    fn batch(seqs: &[(usize, usize, bool)]) -> MicroBatch {
        let mut batch = MicroBatch::default();
        for (i, &(len, cached, wanted)) in seqs.iter().enumerate() {
            let (seq, seat, row) = (SeqId(i as u64), i as u32, batch.rows());
            batch.ids.resize(row + len, 1);
            batch.seqs.push(SeqRows { seq, seat, row, len, cached, blocks: [].into() });
            if wanted {
                batch.outputs.push(OutputRow { row: row + len - 1, seq, seat });
            }
        }
        batch
    }

    #[test]
    fn single_rows_whose_token_is_wanted_are_no_prompts() {
        // A step; a chunk; a chunk of one row; a prompt's last chunk; a prompt of one token.
        let work =
            Work::of(&batch(&[(1, 9, true), (4, 16, false), (1, 3, false), (2, 7, true), (1, 0, true)]));
        let attended = 10 + (17 + 18 + 19 + 20) + 4 + (8 + 9) + 1;
        assert_eq!(work, Work { rows: 9, prompt_rows: 8, outputs: 3, sequences: 5, attended });
    }

    #[test]
    fn measured_passes_stand_for_all() {
        let all = MEASURED_FIRST.next_multiple_of(MEASURED_EVERY) + 100 * MEASURED_EVERY;
        let measured = (MEASURED_FIRST..all).filter(|number| number % MEASURED_EVERY < 2);
        let (passes, waits): (Vec<f64>, Vec<f64>) = measured.map(|number| weights(false, number)).unzip();
        let want = 100.0 * MEASURED_EVERY as f64;
        assert_eq!((passes.iter().sum::<f64>(), waits.iter().sum::<f64>()), (want, want));
        assert_eq!(weights(true, 1000), (1.0, 1.0));
    }

    /// A pass whose moments lie so far apart.
    fn pass(probe: &mut Probe<Cpu>, cpu: &Cpu, step: u64, moments: &[Moment]) {
        let mut pass = probe.begin().unwrap();
        for &moment in moments {
            pass.mark(moment, cpu).unwrap();
            thread::sleep(Duration::from_millis(2));
        }
        pass.mark(Moment::Ended, cpu).unwrap();
        let batch = Arc::new(batch(&[(1, 9, true)]));
        probe.end(pass, &Step { step, after: None, batch });
    }

    #[test]
    fn spans_are_told_in_order_with_what_they_consist_of() {
        use Moment::{Arrived, Computed, Room, Started};
        let cpu = Arc::new(Cpu::new(Some(1)));
        let (sender, spans) = channel::unbounded();
        let (mut probes, collector) = collect(Collecting {
            stages: vec![(0, cpu.clone(), Arc::default()), (1, cpu.clone(), Arc::default())],
            start: Instant::now(),
            every: false,
            dropped: Arc::default(),
            tell: Box::new(move |span| sender.send(span).unwrap()),
        })
        .unwrap();
        probes.iter_mut().for_each(|probe| probe.start(&cpu).unwrap());
        for step in 0..40 {
            pass(&mut probes[0], &cpu, step, &[Arrived, Computed, Room]);
            pass(&mut probes[1], &cpu, step, &[Arrived, Started]);
        }
        drop(probes);
        collector.join().unwrap();
        let [first, last]: [Vec<StageSpan>; 2] = spans.iter().fold([vec![], vec![]], |mut stages, span| {
            stages[span.stage].push(span);
            stages
        });
        for (spans, parts) in [(&first, [2, 2, 2]), (&last, [2, 2, 0])] {
            assert!(spans.iter().map(|span| span.step).eq(0..40), "on the host each pass is measured");
            assert!(spans.windows(2).all(|pair| pair[0].ended <= pair[1].began));
            assert_eq!(spans[0].wait_input, None, "until the first one nobody waits");
            for span in &spans[1..] {
                assert!(span.wait_input.unwrap() >= Duration::from_millis(4), "the other stage's pass");
                let told = [span.busy(), span.copy, span.wait_output];
                let least = parts.map(Duration::from_millis);
                assert!(told.iter().zip(least).all(|(is, least)| *is >= least), "{span:?}");
                assert_eq!(told.iter().sum::<Duration>(), span.ended - span.began);
            }
        }
    }

    #[test]
    fn nothing_is_measured_that_nobody_asks_for() {
        let mut probe = Probe::<Cpu>::off();
        probe.start(&Cpu::new(Some(1))).unwrap();
        assert!(probe.begin().is_none());
    }
}
