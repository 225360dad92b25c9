//! What stages do over time: their bars in a short while, and how busy they are over a whole run.

use super::{
    chart::nice,
    svg::{Anchor, Svg},
};
use crate::{cli::bench::session::Measured, pipeline::StageSpan};

const WIDTH: f64 = 1100.0;
const LEFT: f64 = 130.0;
const RIGHT: f64 = 24.0;
const ROW: f64 = 26.0;
const BAR: f64 = 20.0;
const TITLE: f64 = 62.0;
/// Above and below the rows of a part.
const ABOVE: f64 = 30.0;
const BELOW: f64 = 44.0;
/// Bars of a stage in the short while.
const BARS: usize = 40;
const TICKS: f64 = 8.0;
/// Parts of the whole run.
const BINS: usize = 240;
/// What bars are called, by their colour.
const KINDS: [&str; 3] = ["decode", "prompt", "mixed"];

/// Of the last run: its steady phase, or its middle, bar by bar; and all of it.
pub(in crate::cli::bench) fn timeline(title: &str, measured: &Measured) -> String {
    let run = measured.runs.last().expect("a run at least; this is a bug");
    let names: Vec<String> =
        measured.after.stages.iter().map(|stage| format!("{} {}", stage.device, stage.layers)).collect();
    draw(title, &names, &run.record.spans)
}

fn draw(title: &str, names: &[String], spans: &[StageSpan]) -> String {
    let part = ABOVE + names.len() as f64 * ROW + BELOW;
    let mut svg = Svg::new(WIDTH, TITLE + 2.0 * part);
    svg.text("title", (LEFT, 28.0), Anchor::Start, title);
    for (i, kind) in KINDS.iter().enumerate() {
        let x = LEFT + 90.0 * i as f64;
        svg.rect(&format!("s{i} bar"), (x, 42.0), (12.0, 12.0), None);
        svg.text("small", (x + 18.0, 52.0), Anchor::Start, kind);
    }
    let seconds = |span: &StageSpan| (span.began.as_secs_f64(), span.ended.as_secs_f64());
    let first = spans.iter().map(|s| seconds(s).0).fold(f64::INFINITY, f64::min);
    let last = spans.iter().map(|s| seconds(s).1).fold(0.0, f64::max);
    if first >= last {
        svg.text("", (LEFT, TITLE + 20.0), Anchor::Start, "no pass was measured");
        return svg.finish();
    }
    let (from, to) = short_while(spans, (first, last));
    let near = Frame { top: TITLE, from, to, zero: first };
    near.axes(&mut svg, names, "some passes: time since the run's first one, ms");
    for span in spans.iter().filter(|span| seconds(span).1 > from && seconds(span).0 < to) {
        let (began, ended) = seconds(span);
        let (left, right) = (near.x(began.max(from)), near.x(ended.min(to)));
        let class = format!("s{} bar", kind(span));
        svg.rect(&class, (left, near.row(span.stage)), ((right - left).max(0.6), BAR), None);
    }
    let far = Frame { top: TITLE + part, from: first, to: last, zero: first };
    far.axes(&mut svg, names, "the whole run: the fuller the colour, the busier; ms");
    for (stage, _) in names.iter().enumerate() {
        for (bin, busy) in
            bins(spans, stage, (first, last)).into_iter().enumerate().filter(|(_, busy)| *busy > 0.0)
        {
            let width = (far.x(last) - far.x(first)) / BINS as f64;
            let at = far.x(first) + bin as f64 * width;
            svg.rect("s0 bar", (at, far.row(stage)), (width, BAR), Some(busy));
        }
    }
    svg.finish()
}

/// Rows of stages over a stretch of time.
struct Frame {
    top: f64,
    from: f64,
    to: f64,
    /// When the axis has 0.
    zero: f64,
}

impl Frame {
    fn x(&self, at: f64) -> f64 {
        LEFT + (at - self.from) / (self.to - self.from) * (WIDTH - LEFT - RIGHT)
    }

    fn row(&self, stage: usize) -> f64 {
        self.top + ABOVE + stage as f64 * ROW
    }

    fn axes(&self, svg: &mut Svg, names: &[String], label: &str) {
        let below = self.row(names.len());
        for (i, name) in names.iter().enumerate() {
            svg.text("", (LEFT - 10.0, self.row(i) + 15.0), Anchor::End, name);
        }
        let step = nice(1e3 * (self.to - self.from) / TICKS);
        let digits = if step < 1.0 { 2 } else { 0 };
        let first = (1e3 * (self.from - self.zero) / step).ceil();
        let ticks = (0..=2 * TICKS as u32).map(|i| (first + f64::from(i)) * step);
        for (ms, x) in ticks.map(|ms| (ms, self.x(self.zero + ms / 1e3))).filter(|(_, x)| *x <= WIDTH - RIGHT)
        {
            svg.line("grid", (x, self.row(0) - 4.0), (x, below));
            svg.text("small", (x, below + 14.0), Anchor::Middle, &format!("{ms:.digits$}"));
        }
        svg.line("axis", (LEFT, below), (WIDTH - RIGHT, below));
        svg.text("", ((LEFT + WIDTH - RIGHT) / 2.0, below + 32.0), Anchor::Middle, label);
    }
}

/// So long that a stage has some bars in it: from the middle of the spans on.
fn short_while(spans: &[StageSpan], (first, last): (f64, f64)) -> (f64, f64) {
    let of_first: Vec<&StageSpan> = spans.iter().filter(|span| span.stage == spans[0].stage).collect();
    let from = of_first.len().saturating_sub(BARS) / 2;
    let to = (from + BARS).min(of_first.len()) - 1;
    let (from, to) = (of_first[from].began.as_secs_f64(), of_first[to].ended.as_secs_f64());
    if from < to { (from, to) } else { (first, last) }
}

/// The share of each part of the time that a stage was busy in.
fn bins(spans: &[StageSpan], stage: usize, (first, last): (f64, f64)) -> Vec<f64> {
    let mut bins = vec![0.0; BINS];
    let width = (last - first) / BINS as f64;
    for span in spans.iter().filter(|span| span.stage == stage) {
        let (began, ended) = (span.began.as_secs_f64() - first, span.ended.as_secs_f64() - first);
        let (from, to) = ((began / width) as usize, (ended / width).ceil() as usize);
        for (bin, busy) in bins.iter_mut().enumerate().take(to.min(BINS)).skip(from.min(BINS)) {
            let (left, right) = (bin as f64 * width, (bin + 1) as f64 * width);
            *busy += (ended.min(right) - began.max(left)).max(0.0) / width;
        }
    }
    bins.into_iter().map(|busy: f64| busy.min(1.0)).collect()
}

fn kind(span: &StageSpan) -> usize {
    match span.work.prompt_rows {
        0 => 0,
        rows if rows == span.work.rows => 1,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::pipeline::Work;

    fn span(stage: usize, step: u64, (from, to): (u64, u64), work: (usize, usize)) -> StageSpan {
        let ms = Duration::from_millis;
        StageSpan {
            stage,
            step,
            began: ms(from),
            computed: ms(to),
            ended: ms(to),
            copy: Duration::ZERO,
            wait_output: Duration::ZERO,
            wait_input: None,
            weight: 1.0,
            work: Work { rows: work.0, prompt_rows: work.1, ..Work::default() },
        }
    }

    #[test]
    fn stages_have_bars_and_shares_of_time() {
        let spans = [
            span(0, 0, (0, 120), (8, 8)),
            span(1, 0, (120, 240), (8, 8)),
            span(0, 1, (120, 180), (9, 8)),
            span(1, 1, (240, 300), (1, 0)),
        ];
        assert_eq!(spans.each_ref().map(kind), [1, 1, 2, 0]);
        let busy = bins(&spans, 0, (0.0, 0.3));
        let sum: f64 = busy.iter().sum();
        assert!((sum / BINS as f64 - 0.6).abs() < 1e-9, "{sum}");
        let text = draw("two stages", &["cpu 0-1".into(), "cpu 2-3".into()], &spans);
        assert!(text.contains("cpu 2-3") && text.contains("the whole run"), "{text}");
        assert!(text.matches("<rect").count() > 4);
        assert!(draw("none", &["cpu 0".into()], &[]).contains("no pass was measured"));
    }
}
