//! Choosing tokens: bias, penalties, temperature, top-k, top-p, min-p, and log-probabilities.
//!
//! A token depends on its own row of logits and its own sequence alone: sums run in the order of ids or
//! ranks, and random numbers are a function of the seed and of how many tokens the answer has.
//! A NaN among the logits is never chosen unless all are; then it is token 0.

use std::{
    cmp::Ordering,
    collections::{HashMap, hash_map::Entry},
    ops::Range,
    sync::Arc,
};

use crate::{
    backend::mix,
    batch::{MicroBatch, OutputRow, Sampled, SeqId, SeqStart},
    request::{Logprobs, SamplingParams},
};

/// Candidates ranked at first when top-p alone limits them; multiplied by `RANKED_GROWTH` while too few.
const RANKED_FIRST: usize = 256;
const RANKED_GROWTH: usize = 8;

/// Chooses tokens for the sequences that it has been told about.
pub struct Sampler {
    vocab: usize,
    seqs: HashMap<SeqId, SeqState>,
    logits: Vec<f32>, // [vocab]: of one row, after bias and penalties
    scratch: Scratch,
}

#[derive(Default)]
struct Scratch {
    candidates: Vec<Candidate>, // at most [vocab]
    maxima: Vec<f32>,           // at most [vocab / 4]
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
        Sampler { vocab, seqs: HashMap::new(), logits: vec![0.0; vocab], scratch: Scratch::default() }
    }

    /// Takes note of the sequences that end and start with this micro-batch, and chooses a token for each
    /// of its output rows from `logits`, which are `[outputs, vocab]`.
    pub fn sample(&mut self, logits: &[f32], batch: &MicroBatch) -> Vec<Sampled> {
        self.start_and_end(batch);
        let rows = logits.chunks_exact(self.vocab);
        batch.outputs.iter().zip(rows).map(|(output, row)| self.sample_row(output.seq, row)).collect()
    }

    /// The same where each output row wants its most likely token alone, of which each part of the vocabulary has found one, or none,
    /// for each of `pitch` rows.
    pub fn choose_found(
        &mut self,
        found: &[f32],
        (parts, pitch): (usize, usize),
        batch: &MicroBatch,
    ) -> Vec<Sampled> {
        self.start_and_end(batch);
        let (pairs, _) = found.as_chunks::<2>();
        let choose = |(row, output): (usize, &OutputRow)| {
            let of_parts = (0..parts).map(|part| pairs[part * pitch + row]);
            let offered = of_parts.filter(|[logit, _]| !logit.is_nan());
            let best = offered.reduce(|best, next| if next[0] > best[0] { next } else { best });
            let id = best.map_or(0, |[_, id]| id.to_bits());
            state_of(&mut self.seqs, output.seq).record(id);
            Sampled { seq: output.seq, id, logprobs: None }
        };
        batch.outputs.iter().enumerate().map(choose).collect()
    }

    fn start_and_end(&mut self, batch: &MicroBatch) {
        for seq in &batch.ends {
            self.seqs.remove(seq);
        }
        for start in &batch.starts {
            self.seqs.insert(start.seq, SeqState::new(start));
        }
    }

    fn sample_row(&mut self, seq: SeqId, row: &[f32]) -> Sampled {
        let state = state_of(&mut self.seqs, seq);
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
                draw(&self.logits, &mut self.scratch, &params, uniform(state.seed, state.answered))
            }
        };
        state.record(id);
        Sampled { seq, id, logprobs: params.logprobs.map(|top| logprobs(row, id, top as usize)) }
    }
}

fn state_of(seqs: &mut HashMap<SeqId, SeqState>, seq: SeqId) -> &mut SeqState {
    seqs.get_mut(&seq).expect("an output row of a sequence that never started; this is a bug")
}

impl SeqState {
    fn new(start: &SeqStart) -> Self {
        let mut counts = HashMap::new();
        if start.sampling.repetition_penalty != 1.0 {
            counts.extend(start.prompt.iter().map(|&id| (id, 0)));
        }
        let mut state =
            SeqState { sampling: Arc::clone(&start.sampling), seed: start.seed, answered: 0, counts };
        start.generated.iter().for_each(|&id| state.record(id));
        state
    }

    fn changes_logits(&self) -> bool {
        self.sampling.penalizes() || !self.sampling.logit_bias.is_empty()
    }

    /// Bias, then penalties. Each token's number depends on no other, so the map's order does not matter.
    fn adjust(&self, logits: &mut [f32]) {
        let p = &self.sampling;
        for &(id, bias) in &p.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        if !self.sampling.penalizes() {
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
        if self.sampling.penalizes() {
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

/// The largest of each row's logits and its token, as `Sampler::choose_found` reads them. NaN where all are.
pub(super) fn find_largest(found: &mut [f32], logits: &[f32], tokens: &Range<usize>, rows: usize) {
    let (pairs, _) = found.as_chunks_mut::<2>();
    for (row, pair) in pairs[..rows].iter_mut().enumerate() {
        let of_row = &logits[row * tokens.len()..][..tokens.len()];
        let best = argmax(of_row);
        let logit = of_row.get(best as usize).copied().unwrap_or(f32::NAN);
        *pair = [logit, f32::from_bits(tokens.start as u32 + best)];
    }
}

/// Draws a token; `u` is from `0.0..1.0`.
fn draw(logits: &[f32], scratch: &mut Scratch, params: &SamplingParams, u: f64) -> u32 {
    let best = argmax(logits);
    let most = logits[best as usize];
    if !most.is_finite() {
        return best; // all banned, or one infinitely likely
    }
    let scale = Scale { most, temperature: params.temperature };
    if params.top_k > 0 {
        scratch.rank_best(logits, params.top_k as usize, scale);
    }
    if params.top_p < 1.0 {
        scratch.keep_top_p(logits, params, scale);
    } else if params.top_k == 0 {
        scratch.fill(logits, f32::NEG_INFINITY, scale);
    }
    let kept = scratch.candidates.iter().filter(|c| c.weight > 0.0 && c.weight >= params.min_p);
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

/// What makes weights of logits.
#[derive(Clone, Copy)]
struct Scale {
    most: f32,
    temperature: f32,
}

impl Scale {
    /// The most likely token weighs 1 at any temperature.
    fn weight(self, logit: f32) -> f32 {
        ((logit - self.most) / self.temperature).exp()
    }
}

impl Scratch {
    /// The tokens with at least this logit, by id; NaN and -inf are never among them.
    fn fill(&mut self, logits: &[f32], least: f32, scale: Scale) {
        let possible = |&(_, &logit): &(usize, &f32)| logit >= least && logit > f32::NEG_INFINITY;
        let all = logits.iter().enumerate().filter(possible);
        self.candidates.clear();
        self.candidates.extend(all.map(|(id, &logit)| Candidate {
            id: id as u32,
            logit,
            weight: scale.weight(logit),
        }));
    }

    /// The `k` most likely tokens, ranked.
    fn rank_best(&mut self, logits: &[f32], k: usize, scale: Scale) {
        let least = self.least_of_best(logits, k);
        self.fill(logits, least, scale);
        if k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k, by_rank);
            self.candidates.truncate(k);
        }
        self.candidates.sort_unstable_by(by_rank);
    }

    /// A logit that at least `k` tokens reach, and few more: the k-th largest of the maxima of short runs.
    /// With it the best 50 of 151,936 tokens take 0.2 ms; selecting among all takes 4 ms.
    fn least_of_best(&mut self, logits: &[f32], k: usize) -> f32 {
        let run = logits.len() / (4 * k).max(1);
        if run < 4 {
            return f32::NEG_INFINITY;
        }
        self.maxima.clear();
        self.maxima
            .extend(logits.chunks(run).map(|run| run.iter().copied().fold(f32::NEG_INFINITY, f32::max)));
        let (_, kth, _) = self.maxima.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        *kth
    }

    /// Keeps the smallest set of the most likely tokens that holds the share `top_p` of all weight, or of the weight
    /// of the tokens that top-k has left.
    fn keep_top_p(&mut self, logits: &[f32], params: &SamplingParams, scale: Scale) {
        let share = params.top_p as f64;
        if params.top_k > 0 {
            let total: f64 = self.candidates.iter().map(|c| c.weight as f64).sum();
            self.cut(share * total);
            return;
        }
        let possible = logits.iter().filter(|&&logit| logit > f32::NEG_INFINITY);
        let enough = share * possible.map(|&logit| scale.weight(logit) as f64).sum::<f64>();
        let mut k = RANKED_FIRST;
        loop {
            self.rank_best(logits, k, scale);
            if self.cut(enough) || k >= logits.len() {
                return;
            }
            k *= RANKED_GROWTH;
        }
    }

    /// Drops the ranked tokens after those that weigh enough together; whether they do.
    fn cut(&mut self, enough: f64) -> bool {
        let mut sum = 0.0;
        for place in 0..self.candidates.len() {
            sum += self.candidates[place].weight as f64;
            if sum >= enough {
                self.candidates.truncate(place + 1);
                return true;
            }
        }
        false
    }
}

/// Best first, equals by id.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    // No candidate is NaN; 0.0 and -0.0 are equals.
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

/// A number of `0.0..1.0` that depends on the seed and the place in the answer alone.
fn uniform(seed: u64, place: u64) -> f64 {
    let word = next(next(seed).wrapping_add(place.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    (word >> 11) as f64 / (1u64 << 53) as f64
}

/// SplitMix64's output function.
fn next(word: u64) -> u64 {
    mix(word.wrapping_add(0x9e37_79b9_7f4a_7c15))
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The same by sorting everything.
    fn sorted_draw(logits: &[f32], p: &SamplingParams, u: f64) -> u32 {
        let most = logits[argmax(logits) as usize];
        let mut all: Vec<(u32, f32, f64)> = logits
            .iter()
            .enumerate()
            .filter(|(_, l)| !l.is_nan())
            .map(|(id, &l)| (id as u32, l, ((l - most) / p.temperature).exp() as f64))
            .collect();
        let mut total: f64 = all.iter().map(|c| c.2).sum();
        if p.top_k > 0 || p.top_p < 1.0 {
            all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
        }
        if p.top_k > 0 {
            all.truncate(p.top_k as usize);
            total = all.iter().map(|c| c.2).sum();
        }
        if p.top_p < 1.0 {
            let mut before = 0.0;
            all.retain(|c| {
                let kept = before < p.top_p as f64 * total;
                before += c.2;
                kept
            });
        }
        all.retain(|c| c.2 as f32 >= p.min_p && c.2 > 0.0);
        let total: f64 = all.iter().map(|c| c.2).sum();
        let mut sum = 0.0;
        let reached = |c: &&(u32, f32, f64)| {
            sum += c.2;
            sum > u * total
        };
        all.iter().find(reached).or(all.last()).unwrap().0
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Logits in steps of a quarter, so that many are equal.
        #[test]
        fn selecting_gives_what_sorting_gives(
            steps in prop::collection::vec(prop_oneof![50 => (-30i8..30).prop_map(|s| s as f32 / 4.0), 1 => Just(f32::NAN),
                1 => Just(f32::NEG_INFINITY)], 1..6000),
            temperature in 0.05f32..4.0,
            top_k in prop_oneof![Just(0u32), 1..100u32, 1..7000u32],
            top_p in prop_oneof![Just(1f32), 0.01f32..1.0],
            min_p in prop_oneof![Just(0f32), 0f32..1.0],
            u in 0f64..1.0,
        ) {
            prop_assume!(steps.iter().any(|l| l.is_finite()));
            let params = SamplingParams { temperature, top_k, top_p, min_p, ..SamplingParams::default() };
            prop_assert_eq!(draw(&steps, &mut Scratch::default(), &params, u), sorted_draw(&steps, &params, u));
        }
    }
}
