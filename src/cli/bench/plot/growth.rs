//! Charts of many workloads: throughput against latency, and anything against what a workload is made of.

use clap::ValueEnum;

use super::chart::{Chart, Mark, Panel, Series};
use crate::cli::bench::results::Point;

/// What goes to the right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in crate::cli::bench) enum X {
    /// Output tokens a second
    Throughput,
    /// Requests at once
    Requests,
    /// Requests a second that are offered
    Rate,
    /// Prompt tokens of each
    InputLen,
    /// Stages
    Stages,
    /// Bytes of the weights
    Weights,
}

/// What goes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in crate::cli::bench) enum Y {
    /// Output tokens a second
    Output,
    /// Prompt tokens a second
    Prompt,
    /// Median milliseconds to the first token
    Ttft,
    /// Median milliseconds per token after it
    Tpot,
    /// Median milliseconds of a request
    E2el,
    /// Idle share of the slowest stage
    Bubble,
    /// Share of what the devices allow
    Limit,
}

/// Throughput against latency: what served workloads do at rates, or all layouts of a sweep with their batches.
pub(in crate::cli::bench) fn latencies(title: &str, points: &[Point]) -> String {
    let panel = |y: &str, path: &str| {
        let mut series = Vec::new();
        for (colour, (name, group)) in groups(points, X::Throughput).into_iter().enumerate() {
            for (which, told, dashed) in [("median", "median", false), ("p99", "p99", true)] {
                let mark = |point: &&Point| {
                    let x = X::Throughput.of(point)?;
                    let y = point.number(&format!("{path}.{which}"))?;
                    Some(Mark { x, y, told: format!("{}: {x:.1} tokens/s, {y:.1} ms ({told})", point.id()) })
                };
                let points = sorted(group.iter().filter_map(mark).collect());
                let name = format!("{name}, {told}");
                series.push(Series { name, colour, dashed, points });
            }
        }
        series.retain(|series| !series.points.is_empty());
        Panel { x: X::Throughput.label().into(), y: y.into(), series }
    };
    let panels = vec![
        panel("time per token (TPOT), ms", "tpot_ms"),
        panel("time to first token (TTFT), ms", "ttft_ms"),
    ];
    let panels = panels.into_iter().filter(|panel| !panel.series.is_empty()).collect();
    Chart { title: title.into(), panels }.draw()
}

/// Any figure against what workloads differ in; those that differ in nothing else are a line.
pub(in crate::cli::bench) fn growth(title: &str, points: &[Point], x: X, y: Y) -> String {
    let series = |(colour, (name, group)): (usize, (String, Vec<&Point>))| {
        let mark = |point: &&Point| {
            let (x, y) = (x.of(point)?, y.of(point)?);
            Some(Mark { x, y, told: format!("{}: {y:.2}", point.id()) })
        };
        Series { name, colour, dashed: false, points: sorted(group.iter().filter_map(mark).collect()) }
    };
    let mut series: Vec<Series> = groups(points, x).into_iter().enumerate().map(series).collect();
    series.retain(|series| !series.points.is_empty());
    let panels = vec![Panel { x: x.label().into(), y: y.label().into(), series }];
    Chart { title: title.into(), panels }.draw()
}

fn sorted(mut marks: Vec<Mark>) -> Vec<Mark> {
    marks.sort_by(|a, b| a.x.total_cmp(&b.x));
    marks
}

/// Points that differ in nothing but what `x` is, or follows from; in the order of their first ones.
fn groups(points: &[Point], x: X) -> Vec<(String, Vec<&Point>)> {
    let mut groups: Vec<(String, Vec<&Point>)> = Vec::new();
    for point in points {
        let key = key(point, x);
        match groups.iter_mut().find(|(of, _)| *of == key) {
            Some((_, group)) => group.push(point),
            None => groups.push((key, vec![point])),
        }
    }
    groups
}

fn key(point: &Point, x: X) -> String {
    let parts = point.parts();
    let number = |path: &str| point.number(path).map_or("?".into(), |number| number.to_string());
    let (requests, input, output) =
        (number("workload.requests"), number("workload.input_len"), number("workload.output_len"));
    let lengths = format!("{input}x{output}");
    let rate = point.number("workload.request_rate").map_or(String::new(), |rate| format!("@{rate}rps"));
    let (model, stages) = (parts.model, parts.stages);
    match x {
        X::Throughput => format!("{model} {lengths} {stages}"),
        X::Requests | X::Rate => format!("{model} {lengths} {stages}"),
        X::InputLen => format!("{model} {requests}x…x{output}{rate} {stages}"),
        X::Stages => format!("{model} {requests}x{lengths}{rate}"),
        X::Weights => format!("{requests}x{lengths}{rate} {stages}"),
    }
}

impl X {
    fn of(self, point: &Point) -> Option<f64> {
        match self {
            X::Throughput => point.number("output_tokens_per_s.median"),
            X::Requests => point.number("workload.requests"),
            X::Rate => point.number("workload.request_rate"),
            X::InputLen => point.number("workload.input_len"),
            X::Stages => point.0.get("stages")?.as_array().map(|stages| stages.len() as f64),
            X::Weights => point.number("weight_bytes").map(|bytes| bytes / 1e9),
        }
    }

    fn label(self) -> &'static str {
        match self {
            X::Throughput => "output tokens/s",
            X::Requests => "requests at once",
            X::Rate => "requests/s, offered",
            X::InputLen => "prompt tokens of each request",
            X::Stages => "stages",
            X::Weights => "weights, GB",
        }
    }
}

impl Y {
    fn of(self, point: &Point) -> Option<f64> {
        match self {
            Y::Output => point.number("output_tokens_per_s.median"),
            Y::Prompt => point.number("prompt_tokens_per_s.median"),
            Y::Ttft => point.number("ttft_ms.median"),
            Y::Tpot => point.number("tpot_ms.median"),
            Y::E2el => point.number("e2el_ms.median"),
            Y::Bubble => point.bubble().map(|share| 100.0 * share),
            Y::Limit => point.number("limit_share").map(|share| 100.0 * share),
        }
    }

    fn label(self) -> &'static str {
        match self {
            Y::Output => "output tokens/s",
            Y::Prompt => "prompt tokens/s",
            Y::Ttft => "time to first token (TTFT), ms",
            Y::Tpot => "time per token (TPOT), ms",
            Y::E2el => "time of a request (E2EL), ms",
            Y::Bubble => "bubble, %",
            Y::Limit => "share of the limit, %",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(requests: u32, stages: usize, output: f64) -> Point {
        Point(serde_json::json!({
            "id": format!("7b/{requests}x8x4/s{stages}"),
            "workload": {"requests": requests, "input_len": 8, "output_len": 4, "request_rate": null},
            "output_tokens_per_s": {"median": output}, "ttft_ms": {"median": 2.0, "p99": 5.0},
            "tpot_ms": {"median": 1.0, "p99": 3.0}, "stages": vec![0; stages]
        }))
    }

    #[test]
    fn points_that_differ_in_one_thing_are_a_line() {
        let points = [point(1, 1, 10.0), point(8, 1, 60.0), point(1, 2, 9.0), point(8, 2, 100.0)];
        let names =
            |x| groups(&points, x).into_iter().map(|(name, group)| (name, group.len())).collect::<Vec<_>>();
        assert_eq!(names(X::Requests), [("7b 8x4 s1".into(), 2), ("7b 8x4 s2".into(), 2)]);
        assert_eq!(names(X::Stages), [("7b 1x8x4".into(), 2), ("7b 8x8x4".into(), 2)]);
        assert_eq!(X::Stages.of(&points[3]), Some(2.0));
        let text = latencies("all", &points);
        // Two panels of two layouts, with medians and p99.
        assert_eq!(text.matches("<circle").count(), 2 * 2 * 2 * 2);
        assert_eq!(growth("all", &points, X::Requests, Y::Output).matches("<circle").count(), 4);
        assert!(!growth("none", &points, X::Rate, Y::Limit).contains("<circle"));
    }
}
