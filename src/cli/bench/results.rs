//! Results as JSON, fresh or from files: what tables of many workloads, comparisons and plots are made of.

use std::{fs::File, io::Read, path::Path};

use serde_json::Value;

use crate::error::{Error, Result, shown};

/// Bytes of a file of results at most.
const BYTES_MAX: u64 = 256 << 20;
/// Results of a file at most.
const RESULTS_MAX: usize = 100_000;

/// What `bench` prints of one workload with `--format json`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Point(pub(super) Value);

/// What an id says: `MODEL/REQUESTSxINPUTxOUTPUT/sSTAGES`, each with what else was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct IdParts {
    pub(super) model: String,
    pub(super) stages: String,
}

impl Point {
    /// A number at `a.b.c`; none if there is none.
    pub(super) fn number(&self, path: &str) -> Option<f64> {
        at(&self.0, path)?.as_f64().filter(|number| number.is_finite())
    }

    /// Text at `a.b.c`, as it can be shown on a line.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        at(&self.0, path)?.as_str().map(shown)
    }

    /// The workload's id.
    pub(super) fn id(&self) -> String {
        self.text("id").unwrap_or_else(|| "-".into())
    }

    /// The number at `path` of each run.
    pub(super) fn runs(&self, path: &str) -> Vec<f64> {
        let runs = self.0.get("runs").and_then(Value::as_array);
        let number = |run: &Value| at(run, path)?.as_f64().filter(|number| number.is_finite());
        runs.into_iter().flatten().filter_map(number).collect()
    }

    /// The id's parts: its model and its stages.
    pub(super) fn parts(&self) -> IdParts {
        let id = self.id();
        let mut parts = id.splitn(3, '/').map(str::to_owned);
        let model = parts.next().unwrap_or_default();
        IdParts { model, stages: parts.nth(1).unwrap_or_default() }
    }

    /// While the pipeline was full, or else over the whole run.
    pub(super) fn bubble(&self) -> Option<f64> {
        self.number("pipeline.steady.bubble").or_else(|| self.number("pipeline.whole.bubble"))
    }

    fn is_result(&self) -> bool {
        self.0.get("workload").is_some_and(Value::is_object)
            && self.number("output_tokens_per_s.median").is_some()
    }
}

/// The results of a file: JSON objects one after another, as `bench` prints them, or a list of them. Those of
/// workloads that failed are left out.
pub(super) fn read(path: &Path) -> Result<Vec<Point>> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    file.take(BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > BYTES_MAX {
        return Err(Error::data(path, format!("it is longer than {} MiB", BYTES_MAX >> 20)));
    }
    let points = parse(&bytes).map_err(|why| Error::data(path, why))?;
    match points.len() {
        0 => Err(Error::data(path, "there is no result of bench in it")),
        n if n > RESULTS_MAX => Err(Error::data(path, format!("{n} results are more than {RESULTS_MAX}"))),
        _ => Ok(points),
    }
}

fn parse(bytes: &[u8]) -> Result<Vec<Point>, String> {
    let mut points = Vec::new();
    for value in serde_json::Deserializer::from_slice(bytes).into_iter::<Value>() {
        match value.map_err(|e| e.to_string())? {
            Value::Array(list) => points.extend(list.into_iter().map(Point)),
            value => points.push(Point(value)),
        }
    }
    points.retain(Point::is_result);
    Ok(points)
}

fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(value, |value, key| value.get(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESULT: &str = r#"{"id": "7b/8x16x4/s2", "workload": {"requests": 8}, "output_tokens_per_s": {"median": 5.5},
        "runs": [{"ttft_ms": 3}, {"ttft_ms": 4.5}, {"ttft_ms": null}]}"#;

    #[test]
    fn objects_one_after_another_and_lists_of_them_are_results() {
        for text in [format!("{RESULT}\n{RESULT}"), format!("[{RESULT}, {RESULT}, {{\"error\": \"x\"}}]")] {
            let points = parse(text.as_bytes()).unwrap();
            assert_eq!(points.len(), 2);
            assert_eq!(
                (points[0].id(), points[0].number("output_tokens_per_s.median")),
                ("7b/8x16x4/s2".into(), Some(5.5))
            );
            assert_eq!(points[1].runs("ttft_ms"), [3.0, 4.5]);
            assert_eq!(points[0].parts(), IdParts { model: "7b".into(), stages: "s2".into() });
        }
    }

    #[test]
    fn what_is_no_result_is_left_out_and_nonsense_is_told() {
        assert_eq!(parse(b"{} [] 3 \"a\" {\"workload\": {}}").unwrap(), []);
        assert!(parse(b"{\"a\": ").unwrap_err().contains("line 1"));
        assert!(parse(&b"[".repeat(10_000)).unwrap_err().contains("recursion"));
        let odd = Point(serde_json::json!({"id": "a\nb", "runs": 3, "ttft_ms": [1]}));
        assert!(!odd.id().contains('\n'));
        assert_eq!((odd.number("ttft_ms.median"), odd.runs("x").len(), odd.bubble()), (None, 0, None));
    }
}
