//! Several layouts beside each other, the best first.

use serde::Serialize;

use super::tables::{percent, whole};
use crate::{
    cli::{setup::Stages, table::columns},
    error::{Error, Result},
    layout::{Layout, Planner, Prediction},
};

/// Another order of the devices is told of if it makes so many times as many tokens a second.
const WORTH: f64 = 1.001;
/// Rows of a table; JSON has them all.
const ROWS_MAX: usize = 16;

/// Layouts, the one with the most tokens a second first; those that do not fit last.
#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct Ranking(Vec<Ranked>);

#[derive(Serialize)]
struct Ranked {
    stages: usize,
    split: &'static str,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Plan(Box<Prediction>),
    Error(String),
}

/// Compares numbers of stages, or the one that is asked for, cut in several ways, and a given layout with them.
pub(super) fn rank(planner: &Planner<'_>, stages: Option<Stages>, given: Option<&Layout>) -> Result<Ranking> {
    let most = planner.devices.len().min(planner.spec.layers.len());
    let counts = match stages {
        Some(Stages::Of(n)) => n..=n,
        _ => 1..=most,
    };
    let last = *counts.end();
    let mut ranked = Vec::new();
    let mut add = |stages, split, layout: Result<Layout>, shown: &mut Vec<Layout>| {
        let prediction = layout.and_then(|layout| {
            let prediction = planner.predict(&layout)?;
            Ok((!shown.contains(&layout)).then(|| {
                shown.push(layout);
                prediction
            }))
        });
        let outcome = match prediction {
            // The same as another way to cut.
            Ok(None) => return,
            Ok(Some(prediction)) => Outcome::Plan(Box::new(prediction)),
            Err(error) => Outcome::Error(error.to_string()),
        };
        ranked.push(Ranked { stages, split, outcome });
    };
    let mut shown = Vec::new();
    let rate = |layout: &Layout| planner.predict(layout).map_or(0.0, |told| told.new_tokens_per_s);
    if let Some(layout) = given {
        layout.check(planner.spec.layers.len())?;
        add(layout.stages().len(), "given", Ok(layout.clone()), &mut shown);
    }
    for stages in counts {
        let planned = planner.plan(stages);
        if let Err(error @ Error::Usage { .. }) = planned {
            return Err(error);
        }
        let fits = planned.is_ok();
        let given_order = planned.as_ref().map_or(0.0, &rate);
        add(stages, "planned", planned, &mut shown);
        // Another order is told where it is worth it.
        if let Ok(layout) = planner.plan_any_order(stages)
            && rate(&layout) > given_order * WORTH
        {
            add(stages, "any order", Ok(layout), &mut shown);
        }
        if fits {
            add(stages, "even", planner.even(stages), &mut shown);
        }
    }
    ranked.sort_by(|a, b| b.rate().total_cmp(&a.rate()));
    // Where nothing fits, what would make the most stages fit is all that is worth saying.
    if let Some(Ranked { outcome: Outcome::Error(_), .. }) = ranked.first() {
        planner.plan(last)?;
    }
    Ok(Ranking(ranked))
}

impl Ranked {
    fn rate(&self) -> f64 {
        match &self.outcome {
            Outcome::Plan(prediction) => prediction.new_tokens_per_s,
            Outcome::Error(_) => -1.0,
        }
    }
}

impl Ranking {
    pub(super) fn table(&self) -> String {
        let head = [
            "stages",
            "split",
            "new tokens/s, with prompts",
            "1 at once",
            "64",
            "256",
            "prompt tokens/s",
            "KV tokens",
            "imbalance",
            "bubble",
        ];
        let mut rows = vec![head.map(String::from).to_vec()];
        let mut notes = String::new();
        for Ranked { stages, split, outcome } in self.0.iter().take(ROWS_MAX) {
            let mut row = vec![stages.to_string(), (*split).into()];
            match outcome {
                Outcome::Plan(plan) => {
                    row.push(whole(plan.new_tokens_per_s));
                    row.extend(plan.decode.iter().map(|rate| whole(rate.tokens_per_s)));
                    row.extend([whole(plan.prompt_tokens_per_s), plan.kv_tokens.to_string()]);
                    row.extend([percent(plan.imbalance), percent(plan.bubble)]);
                    notes += &format!("{stages} {split}: {}\n", plan.layout);
                }
                Outcome::Error(why) => {
                    row.extend(["-"; 8].map(String::from));
                    notes += &format!("{stages} {split}: {why}\n");
                }
            }
            rows.push(row);
        }
        let more = self.0.len().saturating_sub(ROWS_MAX);
        if more > 0 {
            notes += &format!("{more} more: --format json\n");
        }
        format!("{}\n{notes}", columns(&rows))
    }
}
