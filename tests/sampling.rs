//! Sampling on the CPU: each parameter does what `SamplingParams` says, and nothing else in the batch matters.

use std::sync::Arc;

use pipeline_infer::{
    SamplingParams,
    backend::cpu::sample::Sampler,
    batch::{MicroBatch, OutputRow, Sampled, SeqId, SeqStart},
};
use proptest::prelude::*;

fn start(seq: u64, seed: u64, sampling: &SamplingParams, prompt: &[u32]) -> SeqStart {
    SeqStart {
        seq: SeqId(seq),
        seat: seq as u32,
        sampling: Arc::new(sampling.clone()),
        seed,
        prompt: prompt.into(),
        generated: [].into(),
    }
}

fn outputs(seqs: &[u64]) -> Vec<OutputRow> {
    seqs.iter().enumerate().map(|(row, &seq)| OutputRow { row, seq: SeqId(seq), seat: seq as u32 }).collect()
}

/// A sampler that knows one sequence, 1.
fn sampler(vocab: usize, seed: u64, params: &SamplingParams, prompt: &[u32]) -> Sampler {
    let mut sampler = Sampler::new(vocab);
    let starts = vec![start(1, seed, params, prompt)];
    assert!(sampler.sample(&[], &MicroBatch { starts, ..MicroBatch::default() }).is_empty());
    sampler
}

fn next(sampler: &mut Sampler, logits: &[f32]) -> Sampled {
    let batch = MicroBatch { outputs: outputs(&[1]), ..MicroBatch::default() };
    sampler.sample(logits, &batch).remove(0)
}

fn first(logits: &[f32], params: &SamplingParams, seed: u64) -> u32 {
    next(&mut sampler(logits.len(), seed, params, &[]), logits).id
}

/// The tokens that ever come out over many seeds.
fn support(logits: &[f32], params: &SamplingParams) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..400).map(|seed| first(logits, params, seed)).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn hot() -> SamplingParams {
    SamplingParams { temperature: 1.0, ..SamplingParams::default() }
}

/// Pearson's statistic of drawn tokens against the probabilities expected; a token of probability 0 must not come.
fn assert_distribution(drawn: impl Iterator<Item = u32>, expected: &[f64]) {
    let mut counts = vec![0u32; expected.len()];
    drawn.for_each(|id| counts[id as usize] += 1);
    let n: u32 = counts.iter().sum();
    let mut statistic = 0.0;
    for (id, (&count, &p)) in counts.iter().zip(expected).enumerate() {
        if p == 0.0 {
            assert_eq!(count, 0, "token {id} has probability 0 and came {count} times");
        } else {
            statistic += (count as f64 - n as f64 * p).powi(2) / (n as f64 * p);
        }
    }
    // Mean df, variance 2 df: six standard deviations above.
    let df = expected.iter().filter(|&&p| p > 0.0).count() as f64 - 1.0;
    assert!(statistic < df + 6.0 * (2.0 * df).sqrt() + 1.0, "chi-square {statistic}: {counts:?} of {n}");
}

fn softmax(logits: &[f32], temperature: f32) -> Vec<f64> {
    let weights: Vec<f64> = logits.iter().map(|&l| (l as f64 / temperature as f64).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

const LOGITS: [f32; 6] = [0.5, 2.0, -1.0, 1.0, 0.0, 1.5];

#[test]
fn distribution_over_seeds_is_the_softmax() {
    for temperature in [0.5, 1.0, 2.0] {
        let params = SamplingParams { temperature, ..hot() };
        let drawn = (0..20_000).map(|seed| first(&LOGITS, &params, seed));
        assert_distribution(drawn, &softmax(&LOGITS, temperature));
    }
}

#[test]
fn distribution_along_an_answer_is_the_softmax() {
    let mut sampler = sampler(6, 7, &hot(), &[]);
    let drawn = (0..20_000).map(|_| next(&mut sampler, &LOGITS).id);
    assert_distribution(drawn, &softmax(&LOGITS, 1.0));
}

#[test]
fn successive_tokens_are_independent() {
    // Two tokens of one answer, over seeds: the pairs are uniform over 3 x 3.
    let pairs = (0..18_000).map(|seed| {
        let mut sampler = sampler(3, seed, &hot(), &[]);
        let a = next(&mut sampler, &[0.0; 3]).id;
        a * 3 + next(&mut sampler, &[0.0; 3]).id
    });
    assert_distribution(pairs, &[1.0 / 9.0; 9]);
}

#[test]
fn top_k_keeps_k_of_the_renormalised_distribution() {
    let params = SamplingParams { top_k: 3, ..hot() };
    let mut kept = LOGITS;
    for id in [0, 2, 4] {
        kept[id] = f32::NEG_INFINITY;
    }
    assert_distribution((0..20_000).map(|seed| first(&LOGITS, &params, seed)), &softmax(&kept, 1.0));
}

#[test]
fn top_k_breaks_ties_by_id_and_may_exceed_the_vocabulary() {
    let params = |top_k| SamplingParams { top_k, ..hot() };
    assert_eq!(support(&[1.0, 2.0, 1.0, 1.0], &params(2)), [0, 1]);
    assert_eq!(support(&[0.0; 5], &params(3)), [0, 1, 2]);
    assert_eq!(support(&[-0.0, 0.0, 0.0, -0.0], &params(2)), [0, 1]);
    assert_eq!(support(&[0.0; 5], &params(u32::MAX)), [0, 1, 2, 3, 4]);
    assert_eq!(support(&LOGITS, &params(1)), [1]);
    // At a high temperature the weights are equal, but the ranks are not.
    let flat = SamplingParams { temperature: 1e30, ..params(2) };
    assert_eq!(support(&LOGITS, &flat), [1, 5]);
}

#[test]
fn top_p_keeps_the_smallest_set_that_reaches_it() {
    // Probabilities 1/2, 1/4, 1/8, 1/16, 1/16, in another order.
    let logits = [4.0f32, 16.0, 2.0, 8.0, 2.0].map(f32::ln);
    let params = |top_p| SamplingParams { top_p, ..hot() };
    assert_eq!(support(&logits, &params(1e-30)), [1]);
    assert_eq!(support(&logits, &params(0.49)), [1]);
    assert_eq!(support(&logits, &params(0.51)), [1, 3]);
    assert_eq!(support(&logits, &params(0.74)), [1, 3]);
    assert_eq!(support(&logits, &params(0.76)), [0, 1, 3]);
    assert_eq!(support(&logits, &params(0.9)), [0, 1, 2, 3]);
    assert_eq!(support(&logits, &params(0.99)), [0, 1, 2, 3, 4]);
    assert_eq!(support(&logits, &params(1.0)), [0, 1, 2, 3, 4]);
    // Of equals, the lowest ids.
    assert_eq!(support(&[0.0; 4], &params(0.4)), [0, 1]);
    // Of top-k's tokens: 1/2 and 1/4 become 2/3 and 1/3.
    assert_eq!(support(&logits, &SamplingParams { top_k: 2, ..params(0.6) }), [1]);
}

#[test]
fn top_p_reaches_far_down_a_large_vocabulary() {
    // 5000 tokens of equal weight: the ranking has to be extended several times.
    let params = SamplingParams { top_p: 0.5, ..hot() };
    let ids: Vec<u32> = (0..2000).map(|seed| first(&[1.0; 5000], &params, seed)).collect();
    let most = *ids.iter().max().unwrap();
    assert!((2400..2500).contains(&most), "largest id {most}");
}

#[test]
fn min_p_is_relative_to_the_most_likely_token() {
    let logits = [4.0f32, 16.0, 2.0, 8.0, 2.0].map(f32::ln);
    let params = |min_p| SamplingParams { min_p, ..hot() };
    assert_eq!(support(&logits, &params(0.0)), [0, 1, 2, 3, 4]);
    assert_eq!(support(&logits, &params(0.2)), [0, 1, 3]);
    assert_eq!(support(&logits, &params(0.4)), [1, 3]);
    assert_eq!(support(&logits, &params(1.0)), [1]);
    assert_eq!(support(&[3.0, 3.0, 1.0], &params(1.0)), [0, 1]);
    // After the temperature: at 2, 1/4 of the most likely becomes 1/2.
    assert_eq!(support(&logits, &SamplingParams { temperature: 2.0, ..params(0.45) }), [0, 1, 3]);
}

#[test]
fn tiny_temperatures_take_the_most_likely_token() {
    for temperature in [1e-45, 1e-38, 1e-10, 1e-4] {
        let params = SamplingParams { temperature, ..hot() };
        assert_eq!(support(&LOGITS, &params), [1]);
        assert_eq!(support(&[-1e30, 1e30, 3.0], &params), [1]);
    }
}

#[test]
fn greedy_takes_the_lowest_id_of_equals_and_never_nan() {
    let greedy = SamplingParams::default();
    assert_eq!(first(&[1.0, 3.0, 3.0, 2.0], &greedy, 0), 1);
    assert_eq!(first(&[f32::NAN, -5.0, f32::NAN, -4.0, f32::NAN], &greedy, 0), 3);
    assert_eq!(first(&[f32::NEG_INFINITY, f32::NAN, -1e38], &greedy, 0), 2);
    assert_eq!(first(&[f32::NAN; 3], &greedy, 0), 0);
    assert_eq!(first(&[f32::NAN, f32::NEG_INFINITY], &greedy, 0), 1);
    assert_eq!(first(&[0.0, f32::INFINITY, f32::INFINITY], &greedy, 0), 1);
}

#[test]
fn sampling_never_takes_nan_and_survives_infinities() {
    assert_eq!(support(&[f32::NAN, 1.0, f32::NAN, 1.0], &hot()), [1, 3]);
    assert_eq!(support(&[f32::NAN; 3], &hot()), [0]);
    assert_eq!(support(&[f32::NAN, f32::NEG_INFINITY], &hot()), [1]);
    assert_eq!(support(&[0.0, f32::INFINITY, 9.0], &hot()), [1]);
    let filtered = SamplingParams { top_k: 3, top_p: 0.9, min_p: 0.1, ..hot() };
    assert_eq!(support(&[f32::NAN, 1.0, f32::NEG_INFINITY, 1.0], &filtered), [1, 3]);
}

#[test]
fn logit_bias_bans_forces_and_shifts() {
    let bias =
        |pairs: &[(u32, f32)], base: SamplingParams| SamplingParams { logit_bias: pairs.to_vec(), ..base };
    let ban = [(1, f32::NEG_INFINITY), (5, f32::NEG_INFINITY)];
    assert_eq!(first(&LOGITS, &bias(&ban, SamplingParams::default()), 0), 3);
    assert_eq!(support(&LOGITS, &bias(&ban, hot())), [0, 2, 3, 4]);
    assert_eq!(support(&LOGITS, &bias(&[(2, 1e30)], hot())), [2]);
    assert_eq!(support(&LOGITS, &bias(&[(2, f32::MAX)], hot())), [2]);
    assert_eq!(first(&LOGITS, &bias(&[(2, 3.5)], SamplingParams::default()), 0), 2);
    let shifted = [0.5, 2.0, 1.0, 1.0, -3.0, 1.5];
    let params = bias(&[(2, 2.0), (4, -3.0)], hot());
    assert_distribution((0..20_000).map(|seed| first(&LOGITS, &params, seed)), &softmax(&shifted, 1.0));
    // Ids beyond the vocabulary are the request check's to refuse.
    assert_eq!(first(&LOGITS, &bias(&[(1000, 9.0)], SamplingParams::default()), 0), 1);
}

#[test]
fn repetition_penalty_divides_positive_and_multiplies_negative_logits_once() {
    // Prompt 0, 0, 1 and 99 (beyond the vocabulary), penalty 2: [3, -1, 1.6, -1.5] becomes [1.5, -2, 1.6, -1.5].
    let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
    let logits = [3.0, -1.0, 1.6, -1.5];
    let mut sampler = sampler(4, 0, &params, &[0, 0, 1, 99]);
    assert_eq!(next(&mut sampler, &logits).id, 2);
    // Token 2 is in the answer now: 0.8, and 0 (1.5) is the best again, however often it comes.
    assert_eq!(next(&mut sampler, &logits).id, 0);
    assert_eq!(next(&mut sampler, &logits).id, 0);
    assert_eq!(next(&mut sampler, &[3.0, -1.0, 1.6, 1.4]).id, 0);
    assert_eq!(next(&mut sampler, &[-1.0, -9.0, -9.0, -1.9]).id, 3, "-1 becomes -2");
}

#[test]
fn presence_and_frequency_penalties_count_the_answer_alone() {
    let logits = [2.0, 1.5, 1.2];
    let presence = SamplingParams { presence_penalty: 1.0, ..SamplingParams::default() };
    let mut s = sampler(3, 0, &presence, &[0, 0, 0]);
    // 2.0, 1.5, 1.2; then 1.0, 1.5, 1.2; then 1.0, 0.5, 1.2; then 1.0, 0.5, 0.2, and so on.
    let ids: Vec<u32> = (0..6).map(|_| next(&mut s, &logits).id).collect();
    assert_eq!(ids, [0, 1, 2, 0, 0, 0]);
    let frequency = SamplingParams { frequency_penalty: 0.3, ..SamplingParams::default() };
    let mut s = sampler(3, 0, &frequency, &[0, 0, 0]);
    // 2.0; 1.7; then 1.4, 1.5, 1.2; then 1.4, 1.2, 1.2; then 1.1, 1.2, 1.2 (equals); then 1.1, 0.9, 1.2.
    let ids: Vec<u32> = (0..6).map(|_| next(&mut s, &logits).id).collect();
    assert_eq!(ids, [0, 0, 1, 0, 1, 2]);
}

#[test]
fn bias_comes_before_penalties() {
    // 1 + 3 = 4, halved: 2 < 2.5. The other way round it would be 3.5.
    let params =
        SamplingParams { logit_bias: vec![(0, 3.0)], repetition_penalty: 2.0, ..SamplingParams::default() };
    assert_eq!(next(&mut sampler(2, 0, &params, &[0]), &[1.0, 2.5]).id, 1);
}

#[test]
fn logprobs_are_of_the_raw_logits() {
    let params = SamplingParams {
        logit_bias: vec![(2, 100.0)],
        temperature: 3.0,
        logprobs: Some(3),
        ..SamplingParams::default()
    };
    let logits = [1.0f32, 0.0, -1.0, 1.0, f32::NAN];
    let sampled = next(&mut sampler(5, 0, &params, &[]), &logits);
    assert_eq!(sampled.id, 2);
    let sum = (2.0 * 1f64.exp() + 1.0 + (-1f64).exp()).ln();
    let got = sampled.logprobs.unwrap();
    assert!((got.chosen as f64 - (-1.0 - sum)).abs() < 1e-6);
    assert_eq!(got.top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 3, 1]);
    assert!((got.top[0].1 as f64 - (1.0 - sum)).abs() < 1e-6);
    assert_eq!(got.top[0].1, got.top[1].1);
    assert!((got.top[2].1 as f64 + sum).abs() < 1e-6);
}

#[test]
fn logprobs_can_ask_for_none_or_for_more_than_the_vocabulary() {
    let with = |k| SamplingParams { logprobs: Some(k), ..SamplingParams::default() };
    let none = next(&mut sampler(2, 0, &with(0), &[]), &[0.0, 0.0]).logprobs.unwrap();
    assert!(none.top.is_empty() && (none.chosen - 0.5f32.ln()).abs() < 1e-6);
    let all = next(&mut sampler(2, 0, &with(20), &[]), &[0.0, 1.0]).logprobs.unwrap();
    assert_eq!(all.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 0]);
    assert_eq!(next(&mut sampler(2, 0, &SamplingParams::default(), &[]), &[0.0, 1.0]).logprobs, None);
    let nan = next(&mut sampler(2, 0, &with(1), &[]), &[f32::NAN; 2]).logprobs.unwrap();
    assert_eq!((nan.chosen, nan.top.len()), (f32::NEG_INFINITY, 0));
}

#[test]
fn ends_come_before_starts_and_unknown_ends_are_ignored() {
    let greedy = SamplingParams::default();
    let mut sampler = sampler(2, 0, &SamplingParams { logit_bias: vec![(1, 9.0)], ..greedy.clone() }, &[]);
    assert_eq!(next(&mut sampler, &[1.0, 0.0]).id, 1);
    let batch = MicroBatch {
        ends: vec![SeqId(77), SeqId(1)],
        starts: vec![start(1, 0, &greedy, &[])],
        outputs: outputs(&[1]),
        ..MicroBatch::default()
    };
    assert_eq!(sampler.sample(&[1.0, 0.0], &batch)[0].id, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A sequence's tokens are the same alone and among others, whatever those ask for.
    #[test]
    fn the_batch_does_not_matter(
        seed in any::<u64>(),
        logits in prop::collection::vec(-8f32..8.0, 40),
        temperature in prop_oneof![Just(0f32), 0.1f32..3.0],
        top_k in 0u32..50,
        top_p in 0.05f32..1.1,
        penalty in prop_oneof![Just(1f32), 0.5f32..2.0],
        steps in 1usize..8,
    ) {
        let params = SamplingParams {
            temperature, top_k, top_p: top_p.min(1.0), repetition_penalty: penalty,
            frequency_penalty: 0.3, logprobs: Some(2), ..SamplingParams::default()
        };
        let mut chosen = Vec::new();
        let other = SamplingParams { logit_bias: vec![(3, 50.0)], ..hot() };
        let mut alone = sampler(40, seed, &params, &[1, 2]);
        let mut among = sampler(40, seed, &params, &[1, 2]);
        let starts = vec![start(2, 5, &other, &[]), start(3, seed, &hot(), &[7])];
        among.sample(&[], &MicroBatch { starts, ..MicroBatch::default() });
        for step in 0..steps {
            let row: Vec<f32> = (0..40).map(|i| logits[(i * 7 + step) % 40]).collect();
            let want = next(&mut alone, &row);
            let noise: Vec<f32> = row.iter().map(|l| -l).collect();
            let rows = [noise.clone(), row, noise].concat();
            let batch = MicroBatch { outputs: outputs(&[3, 1, 2]), ..MicroBatch::default() };
            let got = among.sample(&rows, &batch);
            prop_assert_eq!(&got[1], &want);
            // One that begins again, with what it has chosen so far, goes on as if it had not been interrupted.
            let again = SeqStart { generated: chosen.as_slice().into(), ..start(1, seed, &params, &[1, 2]) };
            let batch = MicroBatch { starts: vec![again], outputs: outputs(&[1]), ..MicroBatch::default() };
            prop_assert_eq!(&Sampler::new(40).sample(&rows[40..80], &batch)[0], &want);
            chosen.push(want.id);
            prop_assert_eq!(got[2].id, 3);
        }
    }
}
