//! What runs used up: tokens, KV blocks, energy, the host's processor.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{record::Queues, session::Run};
use crate::request::Usage;

/// Threads of less use are not told of.
const CORES_MIN: f64 = 0.001;

/// Over runs that all have the same requests, but perhaps not answers of the same lengths.
pub(super) struct Totals {
    /// Of a run, the mean.
    pub(super) requests: f64,
    pub(super) input: f64,
    pub(super) output: f64,
    /// Of all runs together.
    pub(super) seconds: f64,
    output_sum: f64,
    input_sum: f64,
}

impl Totals {
    pub(super) fn of(runs: &[Run]) -> Totals {
        let sum = |of: fn(&Usage) -> f64| {
            runs.iter().flat_map(|run| run.usages.iter().chain(&run.late)).map(of).sum::<f64>()
        };
        let n = runs.len() as f64;
        let (input_sum, output_sum) =
            (sum(|usage| f64::from(usage.prompt_tokens)), sum(|usage| f64::from(usage.completion_tokens)));
        Totals {
            requests: sum(|_| 1.0) / n,
            input: input_sum / n,
            output: output_sum / n,
            seconds: runs.iter().map(|run| run.seconds).sum(),
            output_sum,
            input_sum,
        }
    }
}

/// Share of the KV cache that sequences had, over the steps.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct KvUse {
    pub(super) mean: f64,
    pub(super) max: f64,
}

/// What the GPUs consumed, over all runs.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Energy {
    pub(super) joules_per_output_token: f64,
    pub(super) joules_per_token: f64,
    pub(super) watts: f64,
}

/// Processor seconds a second, over all runs.
#[derive(Debug, Serialize)]
pub(super) struct HostCpu {
    pub(super) cores: f64,
    pub(super) threads: BTreeMap<String, f64>,
}

impl KvUse {
    pub(super) fn of(runs: &[Run]) -> KvUse {
        let queues = Queues::together(runs.iter().map(|run| run.record.queues));
        KvUse { mean: queues.kv_use_mean(), max: queues.kv_use_max() }
    }
}

impl Energy {
    pub(super) fn of(runs: &[Run], totals: &Totals) -> Option<Energy> {
        let joules: f64 = runs.iter().map(|run| run.joules).sum::<Option<f64>>()?;
        Some(Energy {
            joules_per_output_token: joules / totals.output_sum,
            joules_per_token: joules / (totals.input_sum + totals.output_sum),
            watts: joules / totals.seconds,
        })
    }
}

impl HostCpu {
    pub(super) fn of(runs: &[Run], seconds: f64) -> HostCpu {
        let mut threads: BTreeMap<String, f64> = BTreeMap::new();
        for (name, spent) in runs.iter().flat_map(|run| &run.cpu) {
            *threads.entry(name.clone()).or_insert(0.0) += spent / seconds;
        }
        let cores = threads.values().sum();
        threads.retain(|_, cores| *cores >= CORES_MIN);
        HostCpu { cores, threads }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cli::bench::record::Record;

    pub(in crate::cli::bench) fn run(seconds: f64, joules: Option<f64>) -> Run {
        let usage = |prompt_tokens, completion_tokens, total_s| Usage {
            prompt_tokens,
            completion_tokens,
            total_s,
            first_token_s: 0.5,
            ..Usage::default()
        };
        Run {
            seconds,
            usages: vec![usage(10, 5, 2.5), usage(30, 3, 1.5)],
            late: Some(usage(100, 1, 0.7)),
            prepared: Default::default(),
            record: Record::default(),
            joules,
            cpu: [("stage 0".to_owned(), 0.5 * seconds), ("idle".to_owned(), 0.0)].into(),
        }
    }

    #[test]
    fn what_all_requests_had_is_counted() {
        let runs = [run(2.0, Some(90.0)), run(4.0, Some(90.0))];
        let totals = Totals::of(&runs);
        assert_eq!((totals.requests, totals.input, totals.output, totals.seconds), (3.0, 140.0, 9.0, 6.0));
        let energy = Energy::of(&runs, &totals).unwrap();
        assert_eq!((energy.joules_per_output_token, energy.watts), (10.0, 30.0));
        assert!(Energy::of(&[run(2.0, None)], &totals).is_none());
        let host = HostCpu::of(&runs, totals.seconds);
        assert!((host.cores - 0.5).abs() < 1e-12 && host.threads.len() == 1);
    }
}
