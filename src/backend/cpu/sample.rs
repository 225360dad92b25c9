//! Choosing tokens: bias, penalties, temperature, top-k, top-p, min-p, and log-probabilities.
//!
//! A token depends on its own row of logits and its own sequence alone: sums run in the order of ids or
//! ranks, and random numbers are a function of the seed and of how many tokens the answer has.
//! A NaN among the logits is never chosen unless all are; then it is token 0.

use std::{
    cmp::Ordering,
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use crate::{
    batch::{MicroBatch, Sampled, SeqId, SeqStart},
    request::{Logprobs, SamplingParams},
};

/// Candidates ranked at first when top-p alone limits them; multiplied by `RANKED_GROWTH` while too few.
const RANKED_FIRST: usize = 256;
const RANKED_GROWTH: usize = 8;

/// Chooses tokens for the sequences that it has been told about.
pub struct Sampler {
    vocab: usize,
    seqs: HashMap<SeqId, SeqState>,
    logits: Vec<f32>,           // [vocab]: of one row, after bias and penalties
    candidates: Vec<Candidate>, // at most [vocab]
}

/// What is kept of a sequence from its start to its end.
struct SeqState {
    sampling: Arc<SamplingParams>,
    seed: u64,
    /// Tokens of the answer so far.
    answered: u64,
    /// How often each token is in the answer; tokens of the prompt alone are there with 0.
    /// Empty if no penalty needs it.
    counts: HashMap<u32, u32>,
}

#[derive(Clone, Copy)]
struct Candidate {
    id: u32,
    logit: f32,
    weight: f32,
}

impl Sampler {
    /// A sampler from `vocab` logits, without sequences.
    pub fn new(vocab: usize) -> Self {
        Sampler { vocab, seqs: HashMap::new(), logits: vec![0.0; vocab], candidates: Vec::new() }
    }

    /// Takes note of the sequences that end and start with this micro-batch, and chooses a token for each
    /// of its output rows from `logits`, which are `[outputs, vocab]`.
    pub fn sample(&mut self, logits: &[f32], batch: &MicroBatch) -> Vec<Sampled> {
        for seq in &batch.ends {
            self.seqs.remove(seq);
        }
        for start in &batch.starts {
            self.seqs.insert(start.seq, SeqState::new(start));
        }
        let rows = logits.chunks_exact(self.vocab);
        batch.outputs.iter().zip(rows).map(|(output, row)| self.sample_row(output.seq, row)).collect()
    }

    fn sample_row(&mut self, seq: SeqId, row: &[f32]) -> Sampled {
        let state =
            self.seqs.get_mut(&seq).expect("an output row of a sequence that never started; this is a bug");
        let params = Arc::clone(&state.sampling);
        let greedy = params.temperature == 0.0;
        let id = if greedy && !state.changes_logits() {
            argmax(row)
        } else {
            self.logits.copy_from_slice(row);
            state.adjust(&mut self.logits);
            if greedy {
                argmax(&self.logits)
            } else {
                draw(&self.logits, &mut self.candidates, &params, uniform(state.seed, state.answered))
            }
        };
        state.record(id);
        Sampled { seq, id, logprobs: params.logprobs.map(|top| logprobs(row, id, top as usize)) }
    }
}

impl SeqState {
    fn new(start: &SeqStart) -> Self {
        let mut counts = HashMap::new();
        if start.sampling.repetition_penalty != 1.0 {
            counts.extend(start.prompt.iter().map(|&id| (id, 0)));
        }
        SeqState { sampling: Arc::clone(&start.sampling), seed: start.seed, answered: 0, counts }
    }

    fn penalizes(&self) -> bool {
        let p = &self.sampling;
        p.repetition_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0
    }

    fn changes_logits(&self) -> bool {
        self.penalizes() || !self.sampling.logit_bias.is_empty()
    }

    /// Bias, then penalties. Each token's number depends on no other, so the map's order does not matter.
    fn adjust(&self, logits: &mut [f32]) {
        let p = &self.sampling;
        for &(id, bias) in &p.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        if !self.penalizes() {
            return;
        }
        for (&id, &count) in &self.counts {
            let Some(logit) = logits.get_mut(id as usize) else { continue };
            if p.repetition_penalty != 1.0 {
                *logit =
                    if *logit > 0.0 { *logit / p.repetition_penalty } else { *logit * p.repetition_penalty };
            }
            if count > 0 {
                *logit -= p.presence_penalty + p.frequency_penalty * count as f32;
            }
        }
    }

    fn record(&mut self, id: u32) {
        self.answered += 1;
        if self.penalizes() {
            match self.counts.entry(id) {
                Entry::Occupied(mut count) => *count.get_mut() += 1,
                Entry::Vacant(none) => _ = none.insert(1),
            }
        }
    }
}

/// The largest number's place, the lowest of equals; 0 if all are NaN.
fn argmax(row: &[f32]) -> u32 {
    let mut best = None;
    for (id, &logit) in row.iter().enumerate() {
        match best {
            Some((_, most)) if logit <= most => {}
            _ if logit.is_nan() => {}
            _ => best = Some((id, logit)),
        }
    }
    best.map_or(0, |(id, _)| id as u32)
}

/// Draws a token; `u` is from `0.0..1.0`.
fn draw(logits: &[f32], candidates: &mut Vec<Candidate>, params: &SamplingParams, u: f64) -> u32 {
    let best = argmax(logits);
    let most = logits[best as usize];
    if !most.is_finite() {
        return best; // all banned, or one infinitely likely
    }
    candidates.clear();
    for (id, &logit) in logits.iter().enumerate() {
        if logit > f32::NEG_INFINITY {
            // The most likely token weighs 1 at any temperature.
            let weight = ((logit - most) / params.temperature).exp();
            candidates.push(Candidate { id: id as u32, logit, weight });
        }
    }
    keep_top_k(candidates, params.top_k as usize);
    keep_top_p(candidates, params.top_p as f64);
    let kept = candidates.iter().filter(|c| c.weight > 0.0 && c.weight >= params.min_p);
    let total: f64 = kept.clone().map(|c| c.weight as f64).sum();
    let (mut sum, mut last) = (0.0, best);
    for candidate in kept {
        sum += candidate.weight as f64;
        last = candidate.id;
        if sum > u * total {
            break;
        }
    }
    last
}

/// Keeps the `k` most likely tokens, ranked; all, by id, if `k` is 0 or no fewer.
fn keep_top_k(candidates: &mut Vec<Candidate>, k: usize) {
    if k > 0 && k < candidates.len() {
        candidates.select_nth_unstable_by(k, by_rank);
        candidates.truncate(k);
        candidates.sort_unstable_by(by_rank);
    }
}

/// Keeps the smallest set of the most likely tokens that holds the share `top_p` of all weight, ranked.
fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f64) {
    if top_p >= 1.0 {
        return;
    }
    let enough = top_p * candidates.iter().map(|c| c.weight as f64).sum::<f64>();
    let (mut ranked, mut sum) = (0, 0.0);
    let mut next = RANKED_FIRST;
    while ranked < candidates.len() {
        let end = next.min(candidates.len());
        if end < candidates.len() {
            candidates[ranked..].select_nth_unstable_by(end - ranked, by_rank);
        }
        candidates[ranked..end].sort_unstable_by(by_rank);
        for place in ranked..end {
            sum += candidates[place].weight as f64;
            if sum >= enough {
                candidates.truncate(place + 1);
                return;
            }
        }
        ranked = end;
        next *= RANKED_GROWTH;
    }
}

/// Best first, equals by id.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    // No candidate is NaN; 0.0 and -0.0 are equals.
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

/// A number of `0.0..1.0` that depends on the seed and the place in the answer alone.
fn uniform(seed: u64, place: u64) -> f64 {
    let word = mix(mix(seed).wrapping_add(place.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    (word >> 11) as f64 / (1u64 << 53) as f64
}

/// SplitMix64's output function.
fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Log-probabilities of the chosen and the `top` most likely tokens, by the logits as the model gave them.
fn logprobs(row: &[f32], chosen: u32, top: usize) -> Logprobs {
    let most = row[argmax(row) as usize];
    let weights = row.iter().filter(|logit| !logit.is_nan()).map(|&logit| (logit as f64 - most as f64).exp());
    let log_sum = most as f64 + weights.sum::<f64>().ln();
    let of = |logit: f32| {
        if log_sum.is_finite() && !logit.is_nan() {
            (logit as f64 - log_sum) as f32
        } else if logit == f32::INFINITY {
            0.0
        } else {
            f32::NEG_INFINITY
        }
    };
    let best = most_likely(row, top);
    Logprobs { chosen: of(row[chosen as usize]), top: best.into_iter().map(|(id, l)| (id, of(l))).collect() }
}

/// The `top` largest logits, best first, equals by id: one pass, since `top` is at most `LOGPROBS_MAX`.
fn most_likely(row: &[f32], top: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(top.min(row.len()) + 1);
    for (id, &logit) in row.iter().enumerate() {
        let full = best.len() == top;
        if logit.is_nan() || (full && best.last().is_none_or(|&(_, least)| logit <= least)) {
            continue;
        }
        let place = best.partition_point(|&(_, other)| other >= logit);
        best.insert(place, (id as u32, logit));
        best.truncate(top);
    }
    best
}
