//! Made-up work.

use std::sync::Arc;

use super::{Nanos, nanos};

/// A request that comes at its time.
#[derive(Debug, Clone, PartialEq)]
pub struct Arrival {
    /// When.
    pub at: Nanos,
    /// Its prompt; not empty.
    pub prompt: Arc<[u32]>,
    /// New tokens at most, as it says; at least 1.
    pub answer_max: usize,
    /// The new token with which it ends, which nobody knows before; from 1 to `answer_max`.
    pub answer: usize,
    /// When its client goes away, if it has not ended before.
    pub cancelled: Option<Nanos>,
    /// For the sampler.
    pub seed: u64,
    /// Higher ones come first.
    pub priority: i32,
}

/// Requests, all alike.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Workload {
    /// How many.
    pub requests: usize,
    /// Prompt tokens of each.
    pub input_len: usize,
    /// New tokens of each.
    pub output_len: usize,
    /// Requests a second, at random moments (Poisson); none: all at once.
    pub arrivals: Option<f64>,
    /// So many tokens are the same at the beginning of every prompt.
    pub shared_prefix: usize,
}

impl Workload {
    /// The requests. `random` gives 64 random bits at a time.
    pub fn arrivals(&self, mut random: impl FnMut() -> u64) -> Vec<Arrival> {
        let shared: Vec<u32> = (0..self.shared_prefix).map(|_| token(random())).collect();
        let mut at = 0.0;
        let mut arrival = |i: usize| {
            let own = self.input_len.saturating_sub(shared.len());
            let prompt = shared.iter().copied().take(self.input_len);
            let prompt = prompt.chain((0..own).map(|_| token(random()))).collect();
            if let Some(rate) = self.arrivals.filter(|_| i > 0) {
                // In (0, 1], so that the logarithm is finite.
                let share = ((random() >> 11) + 1) as f64 / (1u64 << 53) as f64;
                at -= share.ln() / rate;
            }
            Arrival {
                at: nanos(at),
                prompt,
                answer_max: self.output_len,
                answer: self.output_len,
                cancelled: None,
                seed: i as u64,
                priority: 0,
            }
        };
        (0..self.requests).map(&mut arrival).collect()
    }
}

/// Any token but the mark of one that only the device knows.
fn token(random: u64) -> u32 {
    (random >> 33) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrivals(work: &Workload) -> Vec<Arrival> {
        let mut state = 1u64;
        work.arrivals(|| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            state
        })
    }

    #[test]
    fn prompts_share_what_they_should_and_no_more() {
        let work = Workload { requests: 5, input_len: 40, output_len: 3, shared_prefix: 32, arrivals: None };
        let all = arrivals(&work);
        assert!(all.iter().all(|a| (a.at, a.prompt.len(), a.answer_max, a.answer) == (0, 40, 3, 3)));
        assert!(all.iter().all(|a| a.prompt[..32] == all[0].prompt[..32]));
        assert_ne!(all[0].prompt[32..], all[1].prompt[32..]);
        let longer = Workload { shared_prefix: 50, ..work };
        assert!(arrivals(&longer).iter().all(|a| a.prompt == arrivals(&longer)[0].prompt));
    }

    #[test]
    fn arrivals_come_at_their_rate() {
        let work =
            Workload { requests: 4001, input_len: 1, output_len: 1, arrivals: Some(50.0), shared_prefix: 0 };
        let all = arrivals(&work);
        assert!(all[0].at == 0 && all.is_sorted_by_key(|a| a.at));
        let seconds = all[4000].at as f64 / 1e9;
        assert!((76.0..84.0).contains(&seconds), "{seconds}");
    }
}
