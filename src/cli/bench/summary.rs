//! Many workloads' figures, a row each: as a table, as Markdown, as CSV.

use super::{output::Format, results::Point};
use crate::cli::table::{columns, seconds};

/// A column: how it is called in CSV and by people, where it comes from, how it is shown.
struct Column {
    key: &'static str,
    head: &'static str,
    path: &'static str,
    show: Show,
}

#[derive(Clone, Copy, PartialEq)]
enum Show {
    Text,
    /// So many digits after the point.
    Number(usize),
    Milliseconds,
    Percent,
}

const fn column(key: &'static str, head: &'static str, path: &'static str, show: Show) -> Column {
    Column { key, head, path, show }
}

/// All of them. Those without a heading for people are in CSV alone.
const COLUMNS: &[Column] = &[
    column("rank", "rank", "rank", Show::Number(0)),
    column("bench", "", "bench", Show::Text),
    column("id", "workload", "id", Show::Text),
    column("layout", "", "layout", Show::Text),
    column("dtype", "", "dtype", Show::Text),
    column("requests", "", "workload.requests", Show::Number(0)),
    column("input_len", "", "workload.input_len", Show::Number(0)),
    column("output_len", "", "workload.output_len", Show::Number(0)),
    column("request_rate", "", "workload.request_rate", Show::Number(3)),
    column("requests_per_s", "requests/s", "requests_per_s.median", Show::Number(2)),
    column("images", "", "workload.images.per_request", Show::Number(0)),
    column("images_per_s", "images/s", "images.images_per_s.median", Show::Number(2)),
    column("goodput_requests_per_s", "goodput/s", "goodput.requests_per_s", Show::Number(2)),
    column("goodput_share", "", "goodput.share", Show::Percent),
    column("output_tokens_per_s", "output tok/s", "output_tokens_per_s.median", Show::Number(1)),
    column("prompt_tokens_per_s", "", "prompt_tokens_per_s.median", Show::Number(1)),
    column("total_tokens_per_s", "total tok/s", "total_tokens_per_s.median", Show::Number(1)),
    column("mean_ttft_ms", "", "ttft_ms.mean", Show::Milliseconds),
    column("median_ttft_ms", "TTFT", "ttft_ms.median", Show::Milliseconds),
    column("p90_ttft_ms", "", "ttft_ms.p90", Show::Milliseconds),
    column("p99_ttft_ms", "p99", "ttft_ms.p99", Show::Milliseconds),
    column("mean_tpot_ms", "", "tpot_ms.mean", Show::Milliseconds),
    column("median_tpot_ms", "TPOT", "tpot_ms.median", Show::Milliseconds),
    column("p90_tpot_ms", "", "tpot_ms.p90", Show::Milliseconds),
    column("p99_tpot_ms", "p99", "tpot_ms.p99", Show::Milliseconds),
    column("mean_itl_ms", "", "itl_ms.mean", Show::Milliseconds),
    column("median_itl_ms", "", "itl_ms.median", Show::Milliseconds),
    column("p90_itl_ms", "", "itl_ms.p90", Show::Milliseconds),
    column("p99_itl_ms", "ITL p99", "itl_ms.p99", Show::Milliseconds),
    column("mean_e2el_ms", "", "e2el_ms.mean", Show::Milliseconds),
    column("median_e2el_ms", "E2EL", "e2el_ms.median", Show::Milliseconds),
    column("p90_e2el_ms", "", "e2el_ms.p90", Show::Milliseconds),
    column("p99_e2el_ms", "", "e2el_ms.p99", Show::Milliseconds),
    column("bubble", "bubble", "bubble", Show::Percent),
    column("limit_share", "of limit", "limit_share", Show::Percent),
    column("kv_use_max", "", "kv_use.max", Show::Percent),
    column("joules_per_output_token", "J/token", "energy.joules_per_output_token", Show::Number(3)),
    column("host_cores", "host cores", "host_cpu.cores", Show::Number(2)),
    column("host_bytes_peak", "", "host_bytes_peak", Show::Number(0)),
    column("weight_bytes", "", "weight_bytes", Show::Number(0)),
];

/// Rows of all points, in a format that has rows. Tables and Markdown leave out what no point has.
pub(super) fn text(points: &[Point], format: Format) -> String {
    match format {
        Format::Json => points.iter().map(|point| format!("{}\n", point.0)).collect(),
        Format::Csv => csv(points),
        Format::Md => markdown(&rows(points)),
        Format::Table => columns(&rows(points)),
    }
}

/// A table in Markdown, of rows of which the first is the heading. Numbers stand to the right.
pub(super) fn markdown(rows: &[Vec<String>]) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let escaped = |row: &Vec<String>| line(row.iter().map(|cell| cell.replace('|', "\\|")).collect());
    let Some((head, rest)) = rows.split_first() else { return String::new() };
    let rule = (0..head.len()).map(|i| if i == 0 { "---" } else { "---:" }.to_owned()).collect();
    let mut text = escaped(head) + &line(rule);
    text.extend(rest.iter().map(escaped));
    text
}

/// Fields with commas, quotes or line ends are quoted.
pub(super) fn csv_line(cells: &[String]) -> String {
    let cell = |cell: &String| match cell.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell.clone(),
    };
    cells.iter().map(cell).collect::<Vec<_>>().join(",") + "\n"
}

fn csv(points: &[Point]) -> String {
    let mut text = csv_line(&COLUMNS.iter().map(|c| c.key.to_owned()).collect::<Vec<_>>());
    for point in points {
        let plain = |column: &Column| match column.show {
            Show::Text => point.text(column.path).unwrap_or_default(),
            _ => column.number(point).map_or(String::new(), |number| number.to_string()),
        };
        text += &csv_line(&COLUMNS.iter().map(plain).collect::<Vec<_>>());
    }
    text
}

fn rows(points: &[Point]) -> Vec<Vec<String>> {
    let has = |column: &&Column| points.iter().any(|point| column.cell(point).is_some());
    let shown: Vec<&Column> = COLUMNS.iter().filter(|column| !column.head.is_empty()).filter(has).collect();
    let head = shown.iter().map(|column| column.head.to_owned()).collect();
    let row =
        |point: &Point| shown.iter().map(|column| column.cell(point).unwrap_or_else(|| "-".into())).collect();
    std::iter::once(head).chain(points.iter().map(row)).collect()
}

impl Column {
    fn number(&self, point: &Point) -> Option<f64> {
        match self.path {
            "bubble" => point.bubble(),
            path => point.number(path),
        }
    }

    fn cell(&self, point: &Point) -> Option<String> {
        match self.show {
            Show::Text => point.text(self.path),
            Show::Number(digits) => self.number(point).map(|number| format!("{number:.digits$}")),
            Show::Milliseconds => self.number(point).map(|ms| seconds(ms / 1e3)),
            Show::Percent => self.number(point).map(|share| format!("{:.1}%", 100.0 * share)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points() -> Vec<Point> {
        let one = serde_json::json!({"id": "a,b|c", "workload": {"requests": 3}, "output_tokens_per_s": {"median": 2.5},
            "ttft_ms": {"median": 1500.0}, "pipeline": {"steady": null, "whole": {"bubble": 0.125}}});
        vec![Point(one), Point(serde_json::json!({"id": "d", "limit_share": 0.5}))]
    }

    #[test]
    fn markdown_has_what_some_point_has() {
        let text = text(&points(), Format::Md);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "| workload | output tok/s | TTFT | bubble | of limit |");
        assert_eq!(lines[1], "| --- | ---: | ---: | ---: | ---: |");
        assert_eq!(lines[2], "| a,b\\|c | 2.5 | 1.50 s | 12.5% | - |");
        assert_eq!(lines[3], "| d | - | - | - | 50.0% |");
    }

    #[test]
    fn csv_has_every_column_and_quotes() {
        let text = text(&points(), Format::Csv);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].starts_with("rank,bench,id,layout,") && lines[1].starts_with(",,\"a,b|c\",,"),
            "{text}"
        );
        assert_eq!(lines[0].split(',').count(), lines[2].split(',').count());
        assert_eq!(csv_line(&["a\"b".into(), "c".into()]), "\"a\"\"b\",c\n");
    }
}
