//! When requests come.

use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use super::random::Random;
use crate::error::{Error, Result};

/// How long requests may take to come.
const SPAN_MAX_S: f64 = 86_400.0;

/// Requests a second, and how they are spread. In the order of the JSON object.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Arrivals {
    /// None: all at once.
    pub(super) request_rate: Option<f64>,
    pub(super) arrival: Kind,
    /// Requests that come together.
    pub(super) burst_size: u32,
}

/// The order of chance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    /// Each by itself, at random moments
    Poisson,
    /// Each by itself, at equal intervals
    Even,
    /// Several together, at random moments
    Burst,
}

impl Arrivals {
    pub(super) fn at_once() -> Arrivals {
        Arrivals { request_rate: None, arrival: Kind::Poisson, burst_size: 1 }
    }

    /// So many requests must have come within a day.
    pub(super) fn check(&self, requests: u32) -> Result<()> {
        let Some(rate) = self.request_rate else { return Ok(()) };
        let seconds = f64::from(requests) / rate;
        match seconds > SPAN_MAX_S {
            true => {
                let why = format!("{requests} requests would take {:.0} hours to come", seconds / 3600.0);
                Err(Error::usage(format!("--request-rate {rate}"), why))
            }
            false => Ok(()),
        }
    }

    /// When each comes: in order, the first one at once.
    pub(super) fn moments(&self, requests: usize, seed: u64) -> Vec<Duration> {
        let Some(rate) = self.request_rate else { return vec![Duration::ZERO; requests] };
        let together = match self.arrival {
            Kind::Burst => self.burst_size.max(1) as usize,
            Kind::Poisson | Kind::Even => 1,
        };
        let interval = together as f64 / rate;
        let mut random = Random::new(seed);
        let mut at = 0.0;
        let moment = |i: usize| {
            if i > 0 && i.is_multiple_of(together) {
                at += match self.arrival {
                    Kind::Even => interval,
                    Kind::Poisson | Kind::Burst => -random.share().ln() * interval,
                };
            }
            Duration::from_secs_f64(at)
        };
        (0..requests).map(moment).collect()
    }

    /// As in a workload's id: `@8rps`, `@8rps.burst16`; nothing if all come at once.
    pub(super) fn id(&self) -> String {
        let Some(rate) = self.request_rate else { return String::new() };
        match self.arrival {
            Kind::Poisson => format!("@{rate}rps"),
            Kind::Even => format!("@{rate}rps.even"),
            Kind::Burst => format!("@{rate}rps.burst{}", self.burst_size),
        }
    }

    #[cfg(test)]
    pub(super) fn tests_every(interval: Duration) -> Arrivals {
        let request_rate = Some(1.0 / interval.as_secs_f64());
        Arrivals { request_rate, arrival: Kind::Even, burst_size: 1 }
    }
}

/// A number of requests a second; `inf` is all at once.
pub(super) fn rate(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(rate) if rate == f64::INFINITY || (1e-6..=1e9).contains(&rate) => Ok(rate),
        _ => Err("it is neither a rate from 1e-6 to 1e9 nor inf".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrivals(arrival: Kind, burst_size: u32) -> Arrivals {
        Arrivals { request_rate: Some(50.0), arrival, burst_size }
    }

    #[test]
    fn moments_follow_from_the_seed_and_come_at_their_rate() {
        let poisson = arrivals(Kind::Poisson, 1);
        let moments = poisson.moments(4001, 7);
        assert_eq!(moments, poisson.moments(4001, 7));
        assert_ne!(moments, poisson.moments(4001, 8));
        assert!(moments[0] == Duration::ZERO && moments.is_sorted());
        let seconds = moments[4000].as_secs_f64();
        assert!((76.0..84.0).contains(&seconds), "{seconds}");
        // Of exponential times as many are below their mean as 1 - 1/e, and the deviation is the mean.
        let gaps: Vec<f64> = moments.windows(2).map(|two| (two[1] - two[0]).as_secs_f64()).collect();
        let short = gaps.iter().filter(|&&gap| gap < 0.02).count() as f64 / 4000.0;
        assert!((short - 0.632).abs() < 0.02, "{short}");
        let mean = gaps.iter().sum::<f64>() / 4000.0;
        let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / 4000.0).sqrt();
        assert!((deviation / mean - 1.0).abs() < 0.08, "{deviation} {mean}");
    }

    #[test]
    fn bursts_come_together_and_even_ones_at_equal_intervals() {
        let moments = arrivals(Kind::Burst, 8).moments(8001, 1);
        assert!(moments.chunks(8).all(|burst| burst.iter().all(|at| *at == burst[0])));
        assert!(moments[8] > moments[7]);
        let seconds = moments[8000].as_secs_f64();
        assert!((140.0..180.0).contains(&seconds), "{seconds}");
        let even = arrivals(Kind::Even, 1).moments(4, 1);
        assert_eq!(even.iter().map(Duration::as_millis).collect::<Vec<_>>(), [0, 20, 40, 60]);
        assert!(Arrivals::at_once().moments(3, 1).iter().all(Duration::is_zero));
    }

    #[test]
    fn rates_are_bounded() {
        assert_eq!((rate("2.5"), rate("inf"), rate(" 1e3 ")), (Ok(2.5), Ok(f64::INFINITY), Ok(1000.0)));
        for text in ["0", "-1", "nan", "NaN", "-inf", "1e-7", "1e10", "", "many", "1/2"] {
            rate(text).unwrap_err();
        }
        let slow = Arrivals { request_rate: Some(1e-6), ..Arrivals::at_once() };
        let told = slow.check(1).unwrap_err().to_string();
        assert!(told.starts_with("--request-rate 0.000001: 1 requests would take 278 hours"), "{told}");
        arrivals(Kind::Even, 1).check(1_000_000).unwrap();
        assert_eq!(arrivals(Kind::Burst, 16).id(), "@50rps.burst16");
    }
}
