//! What a pass takes on a stage.

use serde::{Deserialize, Serialize};

use crate::batch::MicroBatch;

/// A stage's time for a pass, in seconds: a fixed part (its weights are read), and one for each row, for each token that
/// a row attends to, and for each row whose next token is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StageCost {
    /// Of any pass.
    pub base: f64,
    /// A row.
    pub per_row: f64,
    /// A token that a row attends to, itself included.
    pub per_attended: f64,
    /// A row whose next token is wanted; the last stage's alone.
    pub per_output: f64,
}

/// What of a micro-batch a pass's time follows from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shape {
    /// Rows.
    pub rows: usize,
    /// The tokens that each row attends to, added up.
    pub attended: usize,
    /// Rows whose next token is wanted.
    pub outputs: usize,
}

impl Shape {
    /// A micro-batch's.
    pub fn of(batch: &MicroBatch) -> Shape {
        // The row at position p attends to p + 1 tokens.
        let attended = |part: &crate::batch::SeqRows| part.len * (2 * part.cached + part.len + 1) / 2;
        Shape {
            rows: batch.rows(),
            attended: batch.seqs.iter().map(attended).sum(),
            outputs: batch.outputs.len(),
        }
    }
}

impl StageCost {
    /// Seconds for a pass over a micro-batch of this shape.
    pub fn seconds(&self, shape: Shape) -> f64 {
        self.base
            + shape.rows as f64 * self.per_row
            + shape.attended as f64 * self.per_attended
            + shape.outputs as f64 * self.per_output
    }
}

/// Reads the costs of all stages: a JSON list of [`StageCost`]s, or an object that has one as `costs`. An error says what
/// is wrong with the text.
pub fn read_costs(json: &str) -> Result<Vec<StageCost>, String> {
    let mut value: serde_json::Value = serde_json::from_str(json).map_err(|e| e.to_string())?;
    if let Some(object) = value.as_object_mut() {
        value = object.remove("costs").ok_or("an object without \"costs\"")?;
    }
    let costs: Vec<StageCost> = serde_json::from_value(value).map_err(|e| format!("costs: {e}"))?;
    for (stage, cost) in costs.iter().enumerate() {
        let all = [cost.base, cost.per_row, cost.per_attended, cost.per_output];
        if !all.iter().all(|c| c.is_finite() && *c >= 0.0) {
            return Err(format!("costs: stage {stage}: a time is below 0"));
        }
        if all.iter().all(|&c| c == 0.0) {
            return Err(format!("costs: stage {stage}: all times are 0"));
        }
    }
    match costs.is_empty() {
        true => Err("costs: no stage".into()),
        false => Ok(costs),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{OutputRow, SeqId, SeqRows};

    #[test]
    fn a_shape_counts_what_rows_attend_to() {
        let part = |row, len, cached| SeqRows {
            seq: SeqId(row as u64),
            seat: 0,
            row,
            len,
            cached,
            blocks: [].into(),
        };
        let batch = MicroBatch {
            ids: vec![0; 4],
            seqs: vec![part(0, 3, 5), part(3, 1, 9)],
            outputs: vec![OutputRow { row: 3, seq: SeqId(3), seat: 0 }],
            ..MicroBatch::default()
        };
        let shape = Shape::of(&batch);
        assert_eq!(shape, Shape { rows: 4, attended: 6 + 7 + 8 + 10, outputs: 1 });
        let cost = StageCost { base: 1000.0, per_row: 100.0, per_attended: 1.0, per_output: 0.5 };
        assert_eq!(cost.seconds(shape), 1431.5);
    }

    #[test]
    fn costs_are_a_list_or_the_list_of_an_object() {
        let list = r#"[{"base": 1e-3, "per_row": 2e-6}, {"base": 1e-3, "per_output": 1e-6}]"#;
        let costs = read_costs(list).unwrap();
        assert_eq!(costs[0], StageCost { base: 1e-3, per_row: 2e-6, ..StageCost::default() });
        let object = format!(r#"{{"bubble": 0.1, "costs": {list}}}"#);
        assert_eq!(read_costs(&object).unwrap(), costs);
        assert_eq!(read_costs(&serde_json::to_string(&costs).unwrap()).unwrap(), costs);
        for (json, needle) in [
            ("[", "EOF"),
            ("3", "costs: "),
            ("[]", "no stage"),
            ("{}", "without \"costs\""),
            (r#"[{"base": -1}]"#, "stage 0: a time is below 0"),
            (r#"[{"base": 1}, {}]"#, "stage 1: all times are 0"),
            (r#"[{"base": 1, "rows": 1}]"#, "rows"),
        ] {
            let told = read_costs(json).unwrap_err();
            assert!(told.contains(needle), "{json}: {told}");
        }
    }
}
