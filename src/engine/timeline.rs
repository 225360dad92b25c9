//! A trace of what the stages do, as Perfetto and chrome://tracing open it: stages are rows, micro-batches bars, transfers
//! arrows, queues curves. It is JSON's array format, whose closing bracket may be missing: a process that was killed leaves
//! a file that opens, too.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    fs::File,
    io::Write,
    path::PathBuf,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crossbeam_channel as channel;

use super::meter::{Measurement, Meter, VisionSpan};
use crate::{
    batch::{SeqId, Step},
    error::{Error, Result},
    layout::Layout,
    pipeline::{StageSpan, Work},
    schedule::SchedulerStats,
};

/// Measurements that wait to be written; more are dropped.
const ROOM: usize = 1 << 16;
/// Bytes that are written at once, and how long fewer wait.
const BYTES: usize = 1 << 16;
const PATIENCE: Duration = Duration::from_millis(100);
/// Steps that are kept until all their bars have come, or for arrows from them. Those of dropped measurements stay so long.
const STEPS_MAX: usize = 4096;

/// A file for a trace.
pub(super) struct Timeline {
    path: PathBuf,
    file: File,
}

impl Timeline {
    /// Makes the file.
    pub(super) fn open(path: PathBuf) -> Result<Timeline> {
        let file = File::create(&path).map_err(|e| Error::io(&path, e))?;
        Ok(Timeline { path, file })
    }

    /// Starts the thread that writes, with a row for each of these stages. It ends when the meter does, or when the file takes
    /// no more, and says which.
    pub(super) fn start(self, meter: &Meter, rows: Rows) -> Result<JoinHandle<Result<()>>> {
        let measurements = meter.listen(ROOM);
        let Timeline { path, mut file } = self;
        let write = move || {
            let written = write_all(&mut file, &measurements, &rows);
            written.map_err(|e| Error::io(&path, format!("the timeline could not be written: {e}")))
        };
        std::thread::Builder::new()
            .name("timeline".into())
            .spawn(write)
            .map_err(|e| Error::Engine(format!("timeline: no thread: {e}")))
    }
}

fn write_all(
    file: &mut File,
    measurements: &channel::Receiver<Measurement>,
    rows: &Rows,
) -> std::io::Result<()> {
    let mut trace = Trace::new(rows);
    let mut written = Instant::now();
    loop {
        let measurement = match trace.text.is_empty() {
            true => measurements.recv().map_err(|_| channel::RecvTimeoutError::Disconnected),
            false => measurements.recv_timeout(PATIENCE),
        };
        match measurement {
            Ok(measurement) => trace.take(measurement),
            Err(channel::RecvTimeoutError::Timeout) => (),
            Err(channel::RecvTimeoutError::Disconnected) => break,
        }
        if trace.text.len() >= BYTES || written.elapsed() >= PATIENCE {
            // Whole events alone: a process may be killed between any two writes.
            file.write_all(trace.text.as_bytes())?;
            trace.text.clear();
            written = Instant::now();
        }
    }
    trace.end();
    file.write_all(trace.text.as_bytes())
}

/// What rows are called: of stages, then of the vision tower's.
pub(super) struct Rows {
    stages: Vec<String>,
    vision: Vec<String>,
}

/// Those of a layout.
pub(super) fn rows(layout: &Layout) -> Rows {
    let (stages, vision) = (layout.stages().iter().enumerate(), layout.vision().iter().enumerate());
    Rows {
        stages: stages.map(|(i, stage)| format!("stage {i}: {}, layers {stage}", stage.device)).collect(),
        vision: vision.map(|(i, stage)| format!("vision {i}: {}, blocks {stage}", stage.device)).collect(),
    }
}

/// The text of a trace.
struct Trace {
    text: String,
    stages: usize,
    /// Steps that have been planned, and not all of whose bars have come.
    open: BTreeMap<u64, Bars>,
    /// When tokens left the last stage, of steps that may be waited for.
    left: BTreeMap<u64, Duration>,
    /// The latest step that brought a sequence's token.
    tokens: HashMap<SeqId, u64>,
    queues: Option<SchedulerStats>,
}

/// A step's bars.
struct Bars {
    /// The latest step whose tokens it begins with.
    after: Option<u64>,
    spans: Vec<Option<StageSpan>>, // [stages]
}

impl Trace {
    fn new(rows: &Rows) -> Trace {
        let mut trace = Trace {
            text: String::from("["),
            stages: rows.stages.len(),
            open: BTreeMap::new(),
            left: BTreeMap::new(),
            tokens: HashMap::new(),
            queues: None,
        };
        trace.text += r#"
{"ph":"M","pid":1,"tid":0,"name":"process_name","args":{"name":"pipeline-infer"}}"#;
        trace.name_rows(rows);
        trace
    }

    fn name_rows(&mut self, rows: &Rows) {
        for (stage, name) in rows.stages.iter().chain(&rows.vision).enumerate() {
            let name = serde_json::Value::from(name.as_str());
            self.event(format_args!(
                r#""ph":"M","pid":1,"tid":{stage},"name":"thread_name","args":{{"name":{name}}}"#
            ));
            self.event(format_args!(
                r#""ph":"M","pid":1,"tid":{stage},"name":"thread_sort_index","args":{{"sort_index":{stage}}}"#
            ));
        }
    }

    /// Rows are named after the stages of the latest layout.
    fn relaid(&mut self, at: Duration, layout: &Layout) {
        let ts = Micros(at);
        self.event(format_args!(
            r#""ph":"i","s":"p","pid":1,"tid":0,"ts":{ts},"name":"layout {layout}","cat":"layout""#
        ));
        self.name_rows(&rows(layout));
        self.stages = layout.stages().len();
        self.open.clear();
    }

    fn take(&mut self, measurement: Measurement) {
        match measurement {
            Measurement::Planned { at, step, queues } => {
                self.planned(&step);
                self.curves(at, queues);
            }
            Measurement::Applied { at, queues, .. } => self.curves(at, queues),
            Measurement::Span(span) => self.span(span),
            Measurement::Vision(span) => self.images(&span),
            Measurement::Relaid { at, layout } => self.relaid(at, &layout),
        }
    }

    fn planned(&mut self, step: &Step) {
        if step.step == 0 {
            // Stages that have been built anew count from there again, and what was in the old ones never comes.
            self.open.clear();
            self.left.clear();
            self.tokens.clear();
        }
        let batch = &step.batch;
        batch.ends.iter().for_each(|seq| _ = self.tokens.remove(seq));
        let after = batch.seqs.iter().filter_map(|rows| self.tokens.get(&rows.seq)).max().copied();
        self.tokens.extend(batch.outputs.iter().map(|output| (output.seq, step.step)));
        self.open.insert(step.step, Bars { after, spans: vec![None; self.stages] });
        if self.open.len() > STEPS_MAX {
            self.open.pop_first();
        }
    }

    fn span(&mut self, span: StageSpan) {
        self.bar(&span);
        let Some(bars) = self.open.get_mut(&span.step) else { return };
        bars.spans[span.stage] = Some(span);
        if bars.spans.iter().all(Option::is_some) {
            let bars = self.open.remove(&span.step).expect("a step that is gone; this is a bug");
            self.arrows(bars);
        }
    }

    fn bar(&mut self, span: &StageSpan) {
        let work = span.work;
        let (kind, colour) = match work.prompt_rows {
            0 => ("decode", "good"),
            n if n == work.rows => ("prompt", "rail_load"),
            _ => ("mixed", "rail_animation"),
        };
        let (stage, step) = (span.stage, span.step);
        let (ts, dur) = (Micros(span.began), Micros(span.ended - span.began));
        let (copy, room) = (Micros(span.copy), Micros(span.wait_output));
        let Work { rows, prompt_rows, outputs, sequences, attended } = work;
        // Perfetto chooses colours by the name without its digits, chrome://tracing by `cname`.
        self.event(format_args!(
            r#""ph":"X","pid":1,"tid":{stage},"ts":{ts},"dur":{dur},"name":"{kind} {step}","cat":"{kind}","cname":"{colour}","args":{{"step":{step},"rows":{rows},"prompt_rows":{prompt_rows},"sequences":{sequences},"outputs":{outputs},"attended":{attended},"copying_us":{copy},"waiting_for_room_us":{room}}}"#
        ));
    }

    /// A pass of the vision tower on one of its stages.
    fn images(&mut self, span: &VisionSpan) {
        let VisionSpan { stage, pass, images, cost, .. } = *span;
        let (ts, dur) = (Micros(span.began), Micros(span.ended - span.began));
        let (row, patches) = (self.stages + stage, cost.rows);
        self.event(format_args!(
            r#""ph":"X","pid":1,"tid":{row},"ts":{ts},"dur":{dur},"name":"images {pass}","cat":"vision","cname":"thread_state_iowait","args":{{"pass":{pass},"images":{images},"patches":{patches}}}"#
        ));
    }

    /// From stage to stage, and from the last stage of an earlier step to the first of this one.
    fn arrows(&mut self, bars: Bars) {
        let spans: Vec<StageSpan> = bars.spans.into_iter().flatten().collect();
        for pair in spans.windows(2) {
            self.arrow("rows", (pair[0].stage, leaves(&pair[0])), &pair[1]);
        }
        let (Some(first), Some(last)) = (spans.first(), spans.last()) else { return };
        if let Some(&left) = bars.after.and_then(|step| self.left.get(&step)) {
            self.arrow("tokens", (last.stage, left), first);
        }
        if last.work.outputs > 0 {
            self.left.insert(last.step, within(last, last.ended));
        }
        if self.left.len() > STEPS_MAX {
            self.left.pop_first();
        }
    }

    fn arrow(&mut self, name: &str, (stage, at): (usize, Duration), to: &StageSpan) {
        // Clocks of two devices may differ by some microseconds; an arrow must not point back.
        let (ts, arrives) = (Micros(at), Micros(within(to, to.began.max(at))));
        let (step, end) = (to.step, to.stage);
        self.event(format_args!(
            r#""ph":"s","pid":1,"tid":{stage},"ts":{ts},"name":"{name}","cat":"transfer","id":"{step}.{end}""#
        ));
        self.event(format_args!(
            r#""ph":"f","bp":"e","pid":1,"tid":{end},"ts":{arrives},"name":"{name}","cat":"transfer","id":"{step}.{end}""#
        ));
    }

    fn curves(&mut self, at: Duration, now: SchedulerStats) {
        let was = self.queues.replace(now);
        let ts = Micros(at);
        if was.is_none_or(|was| (was.waiting, was.running) != (now.waiting, now.running)) {
            let (waiting, running) = (now.waiting, now.running);
            self.event(format_args!(
                r#""ph":"C","pid":1,"ts":{ts},"name":"sequences","args":{{"running":{running},"waiting":{waiting}}}"#
            ));
        }
        let used = |of: &SchedulerStats| of.kv_blocks_total - of.kv_blocks_free - of.kv_blocks_cached;
        let blocks = |of: &SchedulerStats| (used(of), of.kv_blocks_cached);
        if was.is_none_or(|was| blocks(&was) != blocks(&now)) {
            let (used, cached) = blocks(&now);
            self.event(format_args!(
                r#""ph":"C","pid":1,"ts":{ts},"name":"KV blocks","args":{{"used":{used},"cached":{cached}}}"#
            ));
        }
        if was.is_none_or(|was| was.in_flight != now.in_flight) {
            let steps = now.in_flight;
            self.event(format_args!(
                r#""ph":"C","pid":1,"ts":{ts},"name":"steps in flight","args":{{"steps":{steps}}}"#
            ));
        }
    }

    fn end(&mut self) {
        self.text += "\n]\n";
    }

    fn event(&mut self, fields: std::fmt::Arguments<'_>) {
        write!(self.text, ",\n{{{fields}}}").expect("text grows; this is a bug");
    }
}

/// When a span's rows begin to leave it.
fn leaves(span: &StageSpan) -> Duration {
    within(span, span.computed)
}

/// A moment that lies in a span's bar: an arrow's end elsewhere belongs to none.
fn within(span: &StageSpan, at: Duration) -> Duration {
    at.min(span.ended.saturating_sub(Duration::from_nanos(1))).max(span.began)
}

/// A time in microseconds, to the nanosecond.
struct Micros(Duration);

impl std::fmt::Display for Micros {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ns = self.0.as_nanos();
        write!(f, "{}.{:03}", ns / 1000, ns % 1000)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::batch::{MicroBatch, OutputRow, SeqRows};

    /// A single step of a sequence; whether it comes through both stages.
    fn run(trace: &mut Trace, number: u64, seq: u64, comes: bool) {
        let seq = SeqId(seq);
        let mut batch = MicroBatch::default();
        batch.seqs.push(SeqRows { seq, seat: 0, row: 0, len: 1, cached: 9, blocks: [0].into() });
        batch.outputs.push(OutputRow { row: 0, seq, seat: 0 });
        trace.planned(&Step { step: number, after: None, batch: Arc::new(batch) });
        for stage in (0..2).filter(|_| comes) {
            let at = |ms: u64| Duration::from_millis(10 * number + 3 * stage as u64 + ms);
            trace.span(StageSpan {
                stage,
                step: number,
                began: at(0),
                computed: at(2),
                ended: at(2),
                copy: Duration::ZERO,
                wait_output: Duration::ZERO,
                wait_input: None,
                weight: 1.0,
                work: Work { rows: 1, outputs: 1, sequences: 1, ..Work::default() },
            });
        }
    }

    #[test]
    fn stages_that_are_built_anew_have_arrows_again() {
        let rows = Rows { stages: vec!["stage 0".into(), "stage 1".into()], vision: Vec::new() };
        let mut trace = Trace::new(&rows);
        let steps = STEPS_MAX as u64 + 9;
        (0..steps).for_each(|number| run(&mut trace, number, 1, true));
        run(&mut trace, steps, 1, false);
        trace.text.clear();
        (0..3).for_each(|number| run(&mut trace, number, 2, true));
        let arrows = |name: &str| trace.text.matches(&format!(r#""name":"{name}""#)).count();
        // Each has a beginning and an end.
        assert_eq!((arrows("rows"), arrows("tokens")), (2 * 3, 2 * 2));
        assert_eq!((trace.open.len(), trace.tokens.len()), (0, 1), "nothing is left of the old ones");
    }
}
