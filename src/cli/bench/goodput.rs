//! Requests that were served well: within limits that somebody gives.

use std::str::FromStr;

use serde::Serialize;

use crate::request::Usage;

/// One limit, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Limit {
    of: Of,
    ms: f64,
}

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    FirstToken,
    PerToken,
    Whole,
}

/// Limits, and what kept them. In the order of the JSON object.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub(super) struct Goodput {
    ttft_limit_ms: Option<f64>,
    tpot_limit_ms: Option<f64>,
    e2el_limit_ms: Option<f64>,
    /// Requests that kept all of them.
    pub(super) requests_per_s: f64,
    /// Their share.
    pub(super) share: f64,
}

impl FromStr for Limit {
    type Err = String;

    /// `ttft:500`.
    fn from_str(text: &str) -> Result<Limit, String> {
        const WANTED: &str = "expected ttft:MS, tpot:MS or e2el:MS";
        let (name, ms) = text.trim().split_once(':').ok_or(WANTED)?;
        let of = match name.trim() {
            "ttft" => Of::FirstToken,
            "tpot" => Of::PerToken,
            "e2el" => Of::Whole,
            _ => return Err(WANTED.into()),
        };
        let ms = ms.trim().parse::<f64>().ok().filter(|ms| (1e-6..=1e12).contains(ms));
        Ok(Limit { of, ms: ms.ok_or("milliseconds are a number from 1e-6 to 1e12")? })
    }
}

impl Goodput {
    /// Of all requests of runs that took so long together; none without a limit.
    pub(super) fn of<'a>(
        limits: &[Limit],
        usages: impl IntoIterator<Item = &'a Usage>,
        seconds: f64,
    ) -> Option<Goodput> {
        if limits.is_empty() {
            return None;
        }
        let mut goodput = Goodput::default();
        for limit in limits {
            let tightest = match limit.of {
                Of::FirstToken => &mut goodput.ttft_limit_ms,
                Of::PerToken => &mut goodput.tpot_limit_ms,
                Of::Whole => &mut goodput.e2el_limit_ms,
            };
            *tightest = Some(tightest.map_or(limit.ms, |ms: f64| ms.min(limit.ms)));
        }
        let (mut all, mut good) = (0u64, 0u64);
        for usage in usages {
            all += 1;
            good += u64::from(goodput.kept_by(usage));
        }
        goodput.requests_per_s = good as f64 / seconds;
        goodput.share = good as f64 / all.max(1) as f64;
        Some(goodput)
    }

    /// As a table's row says it: `TTFT 500 ms, TPOT 50 ms`.
    pub(super) fn limits(&self) -> String {
        let named =
            [("TTFT", self.ttft_limit_ms), ("TPOT", self.tpot_limit_ms), ("E2EL", self.e2el_limit_ms)];
        let told = named.iter().filter_map(|(name, ms)| ms.map(|ms| format!("{name} {ms} ms")));
        told.collect::<Vec<_>>().join(", ")
    }

    fn kept_by(&self, usage: &Usage) -> bool {
        let within = |limit: Option<f64>, ms: Option<f64>| match (limit, ms) {
            (Some(limit), Some(ms)) => ms <= limit,
            _ => true,
        };
        within(self.ttft_limit_ms, Some(1e3 * usage.first_token_s))
            && within(self.tpot_limit_ms, per_token_ms(usage))
            && within(self.e2el_limit_ms, Some(1e3 * usage.total_s))
    }
}

/// The mean time between tokens; none if there is one alone.
pub(super) fn per_token_ms(usage: &Usage) -> Option<f64> {
    let after_first = usage.completion_tokens.checked_sub(1).filter(|&n| n > 0)?;
    Some(1e3 * (usage.total_s - usage.first_token_s) / f64::from(after_first))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(completion_tokens: u32, first_token_s: f64, total_s: f64) -> Usage {
        Usage { completion_tokens, first_token_s, total_s, ..Usage::default() }
    }

    #[test]
    fn the_time_per_token_leaves_the_first_out() {
        assert_eq!(per_token_ms(&usage(5, 1.0, 3.0)), Some(500.0));
        assert_eq!((per_token_ms(&usage(1, 1.0, 1.0)), per_token_ms(&usage(0, 0.0, 1.0))), (None, None));
    }

    #[test]
    fn good_requests_keep_every_limit() {
        let limits = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect::<Vec<Limit>>();
        // 500 ms a token; 100 ms; 100 ms but late; one token.
        let usages = [usage(5, 1.0, 3.0), usage(11, 0.2, 1.2), usage(11, 0.6, 1.6), usage(1, 0.3, 0.3)];
        let good = |texts: &[&str]| Goodput::of(&limits(texts), &usages, 2.0).unwrap();
        assert_eq!((good(&["ttft:500"]).share, good(&["ttft:500"]).requests_per_s), (0.5, 1.0));
        assert_eq!(good(&["tpot:100.001"]).share, 0.75);
        assert_eq!(good(&["ttft:500", "tpot:100.001", "e2el:1000"]).share, 0.25);
        assert_eq!(good(&["ttft:900", "ttft:500"]).ttft_limit_ms, Some(500.0));
        assert_eq!(Goodput::of(&[], &usages, 2.0), None);
        assert_eq!(good(&["tpot:50", "ttft:500"]).limits(), "TTFT 500 ms, TPOT 50 ms");
    }

    #[test]
    fn limits_are_checked() {
        for text in ["", "ttft", "ttft:", "ttft:x", "itl:5", "ttft:-1", "ttft:0", "tpot:nan", "e2el:inf"] {
            text.parse::<Limit>().unwrap_err();
        }
    }
}
