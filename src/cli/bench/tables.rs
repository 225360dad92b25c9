//! One workload's figures as tables, for people.

use super::{
    figures::{Figures, Named, Rate},
    limits::Shares,
    phases::Phase,
    pictures::Pictures,
    session::Measured,
    spread::Spread,
};
use crate::cli::{
    compared,
    table::{columns, seconds, stages},
};

type Rows = Vec<Vec<String>>;

impl Figures {
    /// For people.
    pub(super) fn table(&self, measured: &Measured) -> String {
        let mut tables = vec![self.what(), self.rates(), self.latencies()];
        tables.extend(self.late_prompt.map(|late| late.rows()));
        tables.extend(self.phases());
        tables.push(self.uses());
        if self.stages.iter().any(|stage| stage.device_bytes_peak.is_some()) {
            tables.push(self.memory());
        }
        tables.extend(self.of_limits());
        tables.push(stages(&measured.before.stages, &measured.after.stages));
        tables.extend(self.images.iter().flat_map(|images| [images.rows(), images.sums()]));
        let mut tables: Vec<String> = tables.iter().map(|rows| columns(rows)).collect();
        tables.extend(Some(compared::table(&self.compared)).filter(|table| !table.is_empty()));
        tables.join("\n")
    }

    fn what(&self) -> Rows {
        let device = |named: &Named| vec![named.device.clone(), named.name.clone()];
        let lengths = self.workload.lengths;
        let of_file = self.workload.prompt_file.is_some();
        let mut what = vec![row("workload", self.id.clone())];
        what.extend(self.devices.iter().map(device));
        what.push(row("requests", self.workload.requests.to_string()));
        what.extend(
            self.workload.arrivals.request_rate.map(|rate| row("requests/s, offered", rate.to_string())),
        );
        what.extend([
            row(
                if of_file { "prompt tokens, mean" } else { "prompt tokens, each" },
                lengths.input_len.to_string(),
            ),
            row("new tokens, each", lengths.output_len.to_string()),
        ]);
        what.extend(self.workload.images.map(|images| {
            let Pictures { per_request, width, height, tokens, .. } = images;
            row("images, each", format!("{per_request} of {width}x{height}, {tokens} tokens"))
        }));
        what.extend([
            row("type", self.dtype.into()),
            row("weights MB", megabytes(Some(self.weight_bytes))),
            row("KV cache, tokens", self.kv_tokens.to_string()),
            row("loading", seconds(self.load_seconds)),
        ]);
        what.extend(self.load_gb_per_s.map(|rate| row("weights, GB/s", format!("{rate:.1}"))));
        what
    }

    fn rates(&self) -> Rows {
        let runs = match self.seconds.len() {
            1 => "1 run".into(),
            n => format!("{n} runs"),
        };
        let least = self.seconds.iter().copied().fold(f64::INFINITY, f64::min);
        let rate = |name: &str, rate: Rate| {
            vec![name.into(), format!("{:.1}", rate.median), format!("{:.1}", rate.best)]
        };
        let mut rows = vec![
            vec![runs, "median".into(), "best".into()],
            vec!["time".into(), seconds(self.batch_ms.median / 1e3), seconds(least)],
            rate("output tokens/s", self.output_tokens_per_s),
            rate("prompt tokens/s", self.prompt_tokens_per_s),
            rate("total tokens/s", self.total_tokens_per_s),
            rate("requests/s", self.requests_per_s),
        ];
        rows.extend(self.images.as_ref().map(|images| rate("images/s", images.images_per_s)));
        if let Some(goodput) = &self.goodput {
            let name = format!("goodput, requests/s ({})", goodput.limits());
            let good = format!("{:.1}", goodput.requests_per_s);
            rows.push(vec![name, good, format!("{:.1}% good", 100.0 * goodput.share)]);
        }
        rows
    }

    fn latencies(&self) -> Rows {
        let head = ["a request", "mean", "median", "p90", "p99", "max"];
        let mut rows = vec![head.map(String::from).to_vec()];
        let named = [
            ("TTFT, to the first token", Some(self.ttft_ms)),
            ("TPOT, per token after it", self.tpot_ms),
            ("ITL, between two tokens", self.itl_ms),
            ("E2EL, all of it", Some(self.e2el_ms)),
            ("the whole batch", Some(self.batch_ms).filter(|_| self.seconds.len() > 1)),
        ];
        rows.extend(named.into_iter().filter_map(|(name, spread)| Some(Spread::row(&spread?, name))));
        rows
    }

    fn phases(&self) -> Option<Rows> {
        let head = ["pipeline", "bubble", "imbalance", "slowest", "steps", "measured"];
        let rows: Rows = self.pipeline.phases().map(Phase::row).collect();
        (!rows.is_empty()).then(|| std::iter::once(head.map(String::from).to_vec()).chain(rows).collect())
    }

    /// What was used up.
    fn uses(&self) -> Rows {
        let percent = |share: f64| format!("{:.1}%", 100.0 * share);
        let scheduler = &self.scheduler;
        let (running, waiting) = (scheduler.queues.running_max, scheduler.queues.waiting_max);
        let mut rows = vec![
            row("share of the limit", self.limit_share.map_or("-".into(), percent)),
            row("KV cache in use, mean", percent(self.kv_use.mean)),
            row("KV cache in use, at most", percent(self.kv_use.max)),
            row("prompt tokens found in it", scheduler.prefix_hits().map_or("-".into(), percent)),
            row("sequences that lost their blocks", scheduler.preemptions.to_string()),
            row("running and waiting, at most", format!("{running}, {waiting}")),
            row("steps in flight, mean", format!("{:.1}", scheduler.in_flight_mean)),
            row("process memory, at most, MB", megabytes(self.host_bytes_peak)),
            row("host cores", format!("{:.2}", self.host_cpu.cores)),
        ];
        if let Some(energy) = &self.energy {
            rows.push(row("joules/output token", format!("{:.3}", energy.joules_per_output_token)));
            rows.push(row("watts", format!("{:.0}", energy.watts)));
        }
        rows
    }

    /// What each stage takes of its GPU's memory.
    fn memory(&self) -> Rows {
        let head = ["memory, MB", "device", "weights", "KV cache", "buffers", "device in use"];
        let mut rows = vec![head.map(String::from).to_vec()];
        for (i, s) in self.stages.iter().enumerate() {
            let taken = [Some(s.weight_bytes), Some(s.kv_bytes), s.buffer_bytes, s.device_bytes_peak];
            let mut row = vec![format!("stage {i}"), s.device.clone()];
            row.extend(taken.map(megabytes));
            rows.push(row);
        }
        let tower = self.images.iter().flat_map(|images| &images.stages);
        for (i, s) in tower.enumerate() {
            let taken = [Some(s.weight_bytes), None, s.buffer_bytes, s.device_bytes_peak];
            let mut row = vec![format!("vision {i}"), s.device.clone()];
            row.extend(taken.map(megabytes));
            rows.push(row);
        }
        rows
    }

    /// Where something is known of the devices.
    fn of_limits(&self) -> Option<Rows> {
        let head = ["of the limits", "bandwidth", "matmul", "larger", "host cores"];
        let mut rows = vec![head.map(String::from).to_vec()];
        let mut add = |name: String, shares: Shares, cores: Option<f64>| {
            let shares = [shares.bandwidth, shares.matmul, shares.roofline];
            let mut row = vec![name];
            row.extend(shares.map(|share| format!("{:.1}%", 100.0 * share)));
            row.push(cores.map_or("-".into(), |cores| format!("{cores:.2}")));
            rows.push(row);
        };
        for (i, stage) in self.stages.iter().enumerate() {
            add(format!("stage {i}"), stage.of_limits?, stage.host_cores);
        }
        for (i, stage) in self.images.iter().flat_map(|images| &images.stages).enumerate() {
            if let Some(shares) = stage.of_limits {
                add(format!("vision {i}"), shares, None);
            }
        }
        Some(rows)
    }
}

fn row(name: &str, value: String) -> Vec<String> {
    vec![name.into(), value]
}

fn megabytes(bytes: Option<usize>) -> String {
    bytes.map_or("-".into(), |bytes| format!("{:.1}", bytes as f64 / 1e6))
}
