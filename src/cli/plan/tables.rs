//! A prediction as tables.

use super::Told;
use crate::{
    cli::table::{columns, seconds},
    layout::{Prediction, predict::StagePrediction},
    model::units::Pass,
};

/// Letters of a device's name that there is room for.
const NAME_MAX: usize = 14;

/// What is planned for what.
pub(super) fn heading(told: &Told) -> String {
    let Told { model, layers, dtype, workload, devices, measured, images, .. } = told;
    let measured = match measured.iter().filter(|measured| **measured).count() {
        0 => "predicted from device data",
        n if n == devices.len() => "predicted from earlier runs",
        _ => "predicted from earlier runs and device data",
    };
    let images = images.filter(|images| images.per_request > 0).map_or(String::new(), |images| {
        let (n, tokens) = (images.per_request, images.tokens);
        format!("\n{n} image{} of {tokens} tokens in each", if n == 1 { "" } else { "s" })
    });
    format!(
        "{model}: {layers} layers, {}; {} device{}, {measured}\n{} requests at once of {} prompt and {} new tokens{images}\n\n",
        dtype.name(),
        devices.len(),
        if devices.len() == 1 { "" } else { "s" },
        workload.running,
        workload.prompt,
        workload.new
    )
}

/// What each stage is, how long it takes, then what they do together. In 80 columns, but for a layout of many stages.
pub(super) fn plan(plan: &Prediction, wanted: usize) -> String {
    let head = ["stage", "device", "", "units", "weights GB", "KV tokens", "share"];
    let mut rows = vec![head.map(String::from).to_vec()];
    for (i, stage) in plan.stages.iter().enumerate() {
        let gigabytes = stage.weight_bytes as f64 / 1e9;
        let gigabytes = if gigabytes < 0.1 { format!("{gigabytes:.4}") } else { format!("{gigabytes:.1}") };
        let (device, name, kv_tokens) =
            (stage.device.clone(), name(&stage.name), stage.kv_tokens.to_string());
        rows.push(vec![
            i.to_string(),
            device,
            name,
            units(stage),
            gigabytes,
            kv_tokens,
            percent(stage.share),
        ]);
    }
    let mut sums = vec![
        vec!["layout".into(), plan.layout.clone()],
        vec!["KV tokens".into(), plan.kv_tokens.to_string()],
        vec!["requests at once".into(), running(plan, wanted)],
        vec!["bubble of the slowest".into(), percent(plan.bubble)],
        vec!["imbalance".into(), percent(plan.imbalance)],
    ];
    for rate in &plan.decode {
        sums.push(vec![format!("new tokens/s, {} at once", rate.requests), whole(rate.tokens_per_s)]);
    }
    sums.push(vec!["prompt tokens/s".into(), whole(plan.prompt_tokens_per_s)]);
    sums.push(vec!["new tokens/s, with prompts".into(), whole(plan.new_tokens_per_s)]);
    sums.extend(plan.images_per_s.map(|rate| vec!["images/s, with prompts".into(), whole(rate)]));
    format!("{}\n{}\n{}{}\n", columns(&rows), times(plan), tower(plan), pairs(&sums))
}

/// How long each stage takes for each pass.
fn times(plan: &Prediction) -> String {
    let mut head = vec!["stage".to_owned()];
    head.extend(plan.stages[0].times.iter().map(|time| match time.pass {
        Pass::Decode { rows: 1, .. } => "1 row".into(),
        Pass::Decode { rows, .. } => format!("{rows} rows"),
        Pass::Chunk { rows, .. } => format!("chunk of {rows}"),
        Pass::Batch(_) => time.pass.to_string(),
    }));
    let mut rows = vec![head];
    for (i, stage) in plan.stages.iter().enumerate() {
        let times = stage.times.iter().map(|time| seconds(time.seconds));
        rows.push(std::iter::once(i.to_string()).chain(times).collect());
    }
    columns(&rows)
}

/// A device's name, which drivers may make long.
fn name(name: &str) -> String {
    name.chars().take(NAME_MAX).collect()
}

/// A row for each stage of the vision tower; empty without one.
fn tower(plan: &Prediction) -> String {
    if plan.vision.is_empty() {
        return String::new();
    }
    let head = ["vision", "device", "", "units", "weights GB", "an image", "share"];
    let mut rows = vec![head.map(String::from).to_vec()];
    for (i, stage) in plan.vision.iter().enumerate() {
        let patches = if stage.patches { "patches, " } else { "" };
        let merger = if stage.merger { ", merger" } else { "" };
        rows.push(vec![
            i.to_string(),
            stage.device.clone(),
            name(&stage.name),
            format!("{patches}{}{merger}", stage.blocks),
            format!("{:.2}", stage.weight_bytes as f64 / 1e9),
            seconds(stage.image_seconds),
            percent(stage.share),
        ]);
    }
    columns(&rows) + "\n"
}

/// How many requests run at once, and where others would have no room.
fn running(plan: &Prediction, wanted: usize) -> String {
    let tightest = plan.stages.iter().min_by_key(|stage| stage.kv_tokens);
    match tightest {
        Some(stage) if plan.running < wanted => {
            format!("{} of {wanted}: {} has no room for more KV tokens", plan.running, stage.device)
        }
        _ => plan.running.to_string(),
    }
}

/// `embed, 0-7`.
pub(super) fn units(stage: &StagePrediction) -> String {
    let embed = if stage.embed { "embed, " } else { "" };
    let head = match stage.head_share {
        0.0 => String::new(),
        1.0 => ", head".into(),
        share => format!(", head/{:.0}", 1.0 / share),
    };
    format!("{embed}{}{head}", stage.layers)
}

/// `97%`, `0.4%`.
pub(super) fn percent(share: f64) -> String {
    let percent = 100.0 * share;
    if percent.abs() < 9.95 { format!("{percent:.1}%") } else { format!("{percent:.0}%") }
}

/// `12345`, `12.3`.
pub(super) fn whole(rate: f64) -> String {
    if rate < 100.0 { format!("{rate:.1}") } else { format!("{rate:.0}") }
}

/// Names to the left, values beside them.
fn pairs(rows: &[Vec<String>]) -> String {
    let width = rows.iter().map(|row| row[0].len()).max().unwrap_or(0);
    rows.iter().map(|row| format!("{:<width$}  {}\n", row[0], row[1])).collect()
}
