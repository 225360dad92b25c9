//! `pipeline-infer bench compare`: results of two files side by side, with how far their runs are apart.

use std::path::PathBuf;

use clap::{ArgMatches, Args, Command, FromArgMatches};
use serde::Serialize;

use super::{
    output::Format,
    results::{self, Point},
    summary::{csv_line, markdown},
};
use crate::{
    cli::{EXIT_WORSE, Subcommand, table::columns},
    error::{Error, Result},
};

pub(super) const SUBCOMMAND: Subcommand =
    Subcommand { name: "compare", about: "Ratios of two files of results", flags, run };

/// What is compared.
struct Metric {
    name: &'static str,
    path: &'static str,
    /// Of each run; empty where runs do not tell it.
    of_run: &'static str,
    more_is_better: bool,
}

const fn metric(
    name: &'static str,
    path: &'static str,
    of_run: &'static str,
    more_is_better: bool,
) -> Metric {
    Metric { name, path, of_run, more_is_better }
}

const METRICS: &[Metric] = &[
    metric("requests/s", "requests_per_s.median", "requests_per_s", true),
    metric("images/s", "images.images_per_s.median", "images_per_s", true),
    metric("output tokens/s", "output_tokens_per_s.median", "output_tokens_per_s", true),
    metric("total tokens/s", "total_tokens_per_s.median", "total_tokens_per_s", true),
    metric("goodput, requests/s", "goodput.requests_per_s", "", true),
    metric("TTFT ms, median", "ttft_ms.median", "ttft_ms", false),
    metric("TTFT ms, p99", "ttft_ms.p99", "", false),
    metric("TPOT ms, median", "tpot_ms.median", "tpot_ms", false),
    metric("TPOT ms, p99", "tpot_ms.p99", "", false),
    metric("ITL ms, median", "itl_ms.median", "itl_ms", false),
    metric("ITL ms, p99", "itl_ms.p99", "", false),
    metric("E2EL ms, median", "e2el_ms.median", "e2el_ms", false),
    metric("E2EL ms, p99", "e2el_ms.p99", "", false),
    metric("J/output token", "energy.joules_per_output_token", "", false),
];

#[derive(Debug, Clone, Args)]
struct CompareArgs {
    /// What was before
    #[arg(value_name = "A.json")]
    a: PathBuf,
    /// What is now
    #[arg(value_name = "B.json")]
    b: PathBuf,
    /// Ends with exit code 3 if a median is worse by more than this, and the runs do not overlap
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    max_regression: Option<f64>,
    /// table is for people; json is one object; md and csv have a row for each figure
    #[arg(long, value_name = "FORMAT", default_value = "table", help_heading = "Output")]
    format: Format,
}

/// A workload in both files. In the order of the JSON object.
#[derive(Debug, Serialize)]
struct Pair {
    id: String,
    figures: Vec<Ratio>,
}

/// A figure in both.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Ratio {
    name: &'static str,
    a: f64,
    b: f64,
    /// `b` over `a`.
    ratio: f64,
    /// The least and the most that two runs of them give; none where runs do not tell.
    low: Option<f64>,
    high: Option<f64>,
    verdict: Verdict,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Better,
    Worse,
    /// As far apart as runs of one of them are.
    Alike,
    /// Nobody knows how far runs are apart.
    Unknown,
}

#[derive(Debug, Serialize)]
struct Comparison {
    pairs: Vec<Pair>,
    only_a: Vec<String>,
    only_b: Vec<String>,
    regressions: Vec<String>,
}

fn flags(command: Command) -> Command {
    CompareArgs::augment_args(command)
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let args = CompareArgs::from_arg_matches(matches).expect("clap has parsed these flags; this is a bug");
    let (a, b) = (results::read(&args.a)?, results::read(&args.b)?);
    let mut comparison = Comparison::of(&a, &b);
    if comparison.pairs.is_empty() {
        let why = format!("it has no workload in common with {}", args.a.display());
        return Err(Error::data(&args.b, why));
    }
    comparison.judge(args.max_regression);
    let code = crate::cli::print(comparison.text(args.format).as_bytes())?;
    match &comparison.regressions[..] {
        [] => Ok(code),
        worse => {
            crate::cli::complain(&format!("worse: {}", worse.join("; ")));
            Ok(EXIT_WORSE)
        }
    }
}

/// `5`, `2.5%`.
fn percent(text: &str) -> Result<f64, String> {
    let number = text.trim().trim_end_matches('%').parse::<f64>();
    number
        .ok()
        .filter(|n| (0.0..=1000.0).contains(n))
        .ok_or_else(|| "it is not a percentage from 0 to 1000".into())
}

impl Comparison {
    /// Workloads of one id are compared, the first of each file, then the second. Where each file has one alone, these are.
    fn of(a: &[Point], b: &[Point]) -> Comparison {
        let mut comparison =
            Comparison { pairs: Vec::new(), only_a: Vec::new(), only_b: Vec::new(), regressions: Vec::new() };
        if let ([a], [b]) = (a, b) {
            let id = if a.id() == b.id() { a.id() } else { format!("{} → {}", a.id(), b.id()) };
            comparison.pairs.push(Pair::of(id, a, b));
            return comparison;
        }
        let mut left: Vec<&Point> = b.iter().collect();
        for a in a {
            match left.iter().position(|b| b.id() == a.id()) {
                Some(i) => comparison.pairs.push(Pair::of(a.id(), a, left.remove(i))),
                None => comparison.only_a.push(a.id()),
            }
        }
        comparison.only_b = left.into_iter().map(Point::id).collect();
        comparison
    }

    /// Finds what is worse by more than so many percent.
    fn judge(&mut self, max_percent: Option<f64>) {
        let Some(max) = max_percent else { return };
        for pair in &self.pairs {
            for (ratio, metric) in pair.figures.iter().filter_map(|ratio| Some((ratio, ratio.metric()?))) {
                let by = 100.0 * if metric.more_is_better { 1.0 - ratio.ratio } else { ratio.ratio - 1.0 };
                // A p99 of a few requests says little. Of single runs nobody knows how far others would be apart: they count.
                let judged = !metric.of_run.is_empty() && ratio.verdict != Verdict::Alike;
                if judged && by > max {
                    self.regressions.push(format!("{}: {} by {by:.1}%", pair.id, ratio.name));
                }
            }
        }
    }

    fn text(&self, format: Format) -> String {
        match format {
            Format::Json => {
                serde_json::to_string(self).expect("plain data becomes JSON; this is a bug") + "\n"
            }
            Format::Table => {
                let mut tables: Vec<String> = self.pairs.iter().map(|pair| columns(&pair.rows())).collect();
                let only = [("only in A", &self.only_a), ("only in B", &self.only_b)];
                let rows = only.iter().filter(|(_, ids)| !ids.is_empty());
                let rows: Vec<Vec<String>> = rows
                    .flat_map(|(name, ids)| ids.iter().map(|id| vec![(*name).to_owned(), id.clone()]))
                    .collect();
                tables.extend((!rows.is_empty()).then(|| columns(&rows)));
                tables.join("\n")
            }
            Format::Md => self.pairs.iter().map(|pair| markdown(&pair.rows())).collect::<Vec<_>>().join("\n"),
            Format::Csv => self.csv(),
        }
    }

    fn csv(&self) -> String {
        let head = ["id", "figure", "a", "b", "ratio", "low", "high", "verdict"].map(String::from);
        let mut text = csv_line(&head);
        for pair in &self.pairs {
            for ratio in &pair.figures {
                let number = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
                let numbers = [Some(ratio.a), Some(ratio.b), Some(ratio.ratio), ratio.low, ratio.high];
                let mut cells = vec![pair.id.clone(), ratio.name.to_owned()];
                cells.extend(numbers.map(number));
                cells.push(ratio.verdict.name().into());
                text += &csv_line(&cells);
            }
        }
        text
    }
}

impl Pair {
    fn of(id: String, a: &Point, b: &Point) -> Pair {
        Pair { id, figures: METRICS.iter().filter_map(|metric| Ratio::of(metric, a, b)).collect() }
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let head = [&self.id[..], "A", "B", "B/A", "of runs", ""].map(String::from).to_vec();
        let row = |ratio: &Ratio| {
            let spread = match (ratio.low, ratio.high) {
                (Some(low), Some(high)) => format!("{low:.3} - {high:.3}"),
                _ => "-".into(),
            };
            let number =
                |value: f64| if value < 10.0 { format!("{value:.3}") } else { format!("{value:.1}") };
            let (a, b, by) = (number(ratio.a), number(ratio.b), format!("{:.3}", ratio.ratio));
            vec![ratio.name.into(), a, b, by, spread, ratio.verdict.name().into()]
        };
        std::iter::once(head).chain(self.figures.iter().map(row)).collect()
    }
}

impl Ratio {
    /// None where one of them has no such figure, or none that can be compared.
    fn of(metric: &Metric, a: &Point, b: &Point) -> Option<Ratio> {
        let (was, is) = (a.number(metric.path)?, b.number(metric.path)?);
        if was <= 0.0 || is < 0.0 {
            return None;
        }
        let (of_a, of_b) = (a.runs(metric.of_run), b.runs(metric.of_run));
        let least = |values: &[f64]| values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
        let told = of_a.len() > 1 && of_b.len() > 1 && least(&of_a) > 0.0;
        let (low, high) = (least(&of_b) / most(&of_a), most(&of_b) / least(&of_a));
        let verdict = match told {
            false => Verdict::Unknown,
            true if low <= 1.0 && 1.0 <= high => Verdict::Alike,
            true if (low > 1.0) == metric.more_is_better => Verdict::Better,
            true => Verdict::Worse,
        };
        let (low, high) = (told.then_some(low), told.then_some(high));
        Some(Ratio { name: metric.name, a: was, b: is, ratio: is / was, low, high, verdict })
    }

    fn metric(&self) -> Option<&'static Metric> {
        METRICS.iter().find(|metric| metric.name == self.name)
    }
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Verdict::Better => "better",
            Verdict::Worse => "worse",
            Verdict::Alike => "alike",
            Verdict::Unknown => "",
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn point(id: &str, rates: &[f64], ttft: &[f64]) -> Point {
        let runs: Vec<_> =
            rates.iter().zip(ttft).map(|(r, t)| json!({"output_tokens_per_s": r, "ttft_ms": t})).collect();
        let middle = |values: &[f64]| values[values.len() / 2];
        Point(json!({"id": id, "runs": runs, "output_tokens_per_s": {"median": middle(rates)},
            "ttft_ms": {"median": middle(ttft), "p99": 50.0}}))
    }

    fn ratio<'a>(pair: &'a Pair, name: &str) -> &'a Ratio {
        pair.figures.iter().find(|ratio| ratio.name == name).unwrap()
    }

    #[test]
    fn ratios_have_the_spread_of_the_runs() {
        let (a, b) = (
            point("x", &[99.0, 100.0, 102.0], &[10.0, 10.5, 12.0]),
            point("x", &[80.0, 85.0, 90.0], &[9.0, 10.0, 13.0]),
        );
        let mut comparison = Comparison::of(&[a], &[b]);
        let pair = &comparison.pairs[0];
        let rate = ratio(pair, "output tokens/s");
        assert_eq!((rate.ratio, rate.verdict), (0.85, Verdict::Worse));
        assert_eq!((rate.low, rate.high), (Some(80.0 / 102.0), Some(90.0 / 99.0)));
        assert_eq!(ratio(pair, "TTFT ms, median").verdict, Verdict::Alike);
        assert_eq!(ratio(pair, "TTFT ms, p99").verdict, Verdict::Unknown);
        assert!(pair.figures.iter().all(|ratio| ratio.name != "TPOT ms, median"));
        comparison.judge(Some(20.0));
        assert!(comparison.regressions.is_empty());
        comparison.judge(Some(5.0));
        assert_eq!(comparison.regressions, ["x: output tokens/s by 15.0%"]);
    }

    #[test]
    fn workloads_of_one_id_are_compared() {
        let of = |id: &str, rate| point(id, &[rate], &[1.0]);
        let comparison = Comparison::of(
            &[of("x", 1.0), of("y", 2.0), of("x", 3.0)],
            &[of("x", 2.0), of("x", 6.0), of("z", 1.0)],
        );
        let ids: Vec<(&str, f64)> =
            comparison.pairs.iter().map(|p| (&p.id[..], p.figures[0].ratio)).collect();
        assert_eq!(ids, [("x", 2.0), ("x", 2.0)]);
        assert_eq!((comparison.only_a, comparison.only_b), (vec!["y".to_owned()], vec!["z".to_owned()]));
        let one = Comparison::of(&[of("x", 1.0)], &[of("z", 0.5)]);
        assert_eq!(one.pairs[0].id, "x → z");
        // Of one run nobody knows how far others would be from it.
        assert_eq!(one.pairs[0].figures[0].verdict, Verdict::Unknown);
        let none = Comparison::of(&[of("x", 0.0), of("y", 1.0)], &[of("x", 1.0), of("q", 1.0)]);
        assert!(none.pairs[0].figures.iter().all(|ratio| ratio.name != "output tokens/s"));
    }

    #[test]
    fn percentages_are_checked() {
        assert_eq!((percent("5"), percent("2.5%")), (Ok(5.0), Ok(2.5)));
        for text in ["", "-1", "nan", "inf", "5%%x", "1e9"] {
            percent(text).unwrap_err();
        }
    }
}
