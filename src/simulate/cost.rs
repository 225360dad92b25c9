//! What passes take, as a file says it.

use crate::schedule::StageCost;

/// Reads the costs of all stages: a JSON list of [`StageCost`]s, or an object that has one as `costs`. An error says what
/// is wrong with the text.
pub fn read_costs(json: &str) -> Result<Vec<StageCost>, String> {
    let mut value: serde_json::Value = serde_json::from_str(json).map_err(|e| e.to_string())?;
    if let Some(object) = value.as_object_mut() {
        value = object.remove("costs").ok_or("an object without \"costs\"")?;
    }
    let costs: Vec<StageCost> = serde_json::from_value(value).map_err(|e| format!("costs: {e}"))?;
    for (stage, cost) in costs.iter().enumerate() {
        let all = [cost.base, cost.row, cost.attended, cost.read, cost.output];
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

    #[test]
    fn costs_are_a_list_or_the_list_of_an_object() {
        let costs = vec![
            StageCost { base: 1e-3, row: 2e-6, ..StageCost::default() },
            StageCost { base: 1e-3, output: 1e-6, ..StageCost::default() },
        ];
        let list = serde_json::to_string(&costs).unwrap();
        assert_eq!(read_costs(&list).unwrap(), costs);
        let object = format!(r#"{{"bubble": 0.1, "costs": {list}}}"#);
        assert_eq!(read_costs(&object).unwrap(), costs);
        let none = serde_json::to_string(&[StageCost::default()]).unwrap();
        let less = list.replacen("0.001", "-0.001", 1);
        for (json, needle) in [
            ("[", "EOF"),
            ("3", "costs: "),
            ("[]", "no stage"),
            ("{}", "without \"costs\""),
            (&less, "stage 0: a time is below 0"),
            (&none, "stage 0: all times are 0"),
            (r#"[{"base": "1"}]"#, "costs: "),
        ] {
            let told = read_costs(json).unwrap_err();
            assert!(told.contains(needle), "{json}: {told}");
        }
    }
}
