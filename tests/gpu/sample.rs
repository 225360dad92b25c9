//! Choosing tokens. Greedy ones are the CPU's; drawn ones are too, but where the last bit of a weight decides.

use std::{ops::Range, slice, sync::Arc};

use pipeline_infer::{
    SamplingParams,
    backend::{Backend, DType},
    batch::{MicroBatch, OutputRow, Sampled, SeqId, SeqStart, Step},
};

use crate::{
    Room,
    common::Random,
    cpu,
    device::{gpu, quick},
    filled, numbers,
};

/// A step's logits, and what it asks.
type Asked = (Vec<f32>, MicroBatch);

fn start(seq: u64, seat: u32, seed: u64, sampling: &SamplingParams, prompt: &[u32]) -> SeqStart {
    SeqStart {
        seq: SeqId(seq),
        seat,
        sampling: Arc::new(sampling.clone()),
        seed,
        prompt: prompt.into(),
        generated: [].into(),
    }
}

fn outputs(seqs: &[u64]) -> Vec<OutputRow> {
    let of = |(row, &seq): (usize, &u64)| OutputRow { row, seq: SeqId(seq), seat: seq as u32 };
    seqs.iter().enumerate().map(of).collect()
}

/// What comes out, step by step.
fn choose<B: Backend>(b: &B, vocab: usize, steps: &[Asked]) -> Vec<Vec<Sampled>> {
    let mut sampler = b.sampler(vocab).unwrap();
    b.loaded().unwrap();
    let step = |(i, (logits, batch)): (usize, &Asked)| {
        let rows = b.rows_room(batch.outputs.len().max(1));
        let logits = filled(b, Room::Wide, rows * vocab, logits);
        let step = Step { step: i as u64, after: None, batch: Arc::new(batch.clone()) };
        let pending = b.sample(&logits, &mut sampler, &step).unwrap();
        b.collect(pending, &step.batch).unwrap()
    };
    steps.iter().enumerate().map(step).collect()
}

/// What comes out where parts of the vocabulary tell their best tokens.
fn choose_in_parts<B: Backend>(
    b: &B,
    vocab: usize,
    cuts: &[Range<usize>],
    (logits, batch): &Asked,
) -> Vec<Sampled> {
    let (rows, mut sampler) = (batch.outputs.len(), b.sampler(vocab).unwrap());
    let pitch = rows + 3;
    let mut found = filled(b, Room::Wide, 2 * cuts.len() * pitch, &[]);
    for (part, tokens) in cuts.iter().enumerate() {
        let own: Vec<f32> = logits.chunks_exact(vocab).flat_map(|row| row[tokens.clone()].to_vec()).collect();
        let own = filled(b, Room::Wide, own.len().max(1), &own);
        b.find_largest((&mut found, part * pitch), &own, tokens, rows).unwrap();
    }
    b.loaded().unwrap();
    let step = Step { step: 0, after: None, batch: Arc::new(batch.clone()) };
    let pending = b.choose_found((&found, cuts.len(), pitch), &mut sampler, &step).unwrap();
    b.collect(pending, &step.batch).unwrap()
}

/// The same tokens, with log-probabilities as near as two orders of summation and exponentials of f32 are.
fn assert_same(what: &str, got: &[Vec<Sampled>], want: &[Vec<Sampled>]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.len(), want.len(), "{what}, step {i}");
        for (row, (g, w)) in got.iter().zip(want).enumerate() {
            let at = format!("{what}, step {i}, row {row}");
            assert_eq!((g.seq, g.id), (w.seq, w.id), "{at}");
            let (Some(g), Some(w)) = (&g.logprobs, &w.logprobs) else {
                assert_eq!(g.logprobs.is_some(), w.logprobs.is_some(), "{at}");
                continue;
            };
            let ids = |top: &[(u32, f32)]| top.iter().map(|t| t.0).collect::<Vec<_>>();
            assert_eq!(ids(&g.top), ids(&w.top), "{at}: the most likely tokens");
            let pairs = g.top.iter().map(|t| t.1).zip(w.top.iter().map(|t| t.1));
            for (g, w) in pairs.chain([(g.chosen, w.chosen)]) {
                let near = g == w || (g - w).abs() <= 1e-5 + 1e-6 * w.abs();
                assert!(near, "{at}: the log-probability {g:e}, not {w:e}");
            }
        }
    }
}

fn both(what: &str, vocab: usize, steps: &[Asked]) {
    let Some(gpu) = gpu(DType::BF16, 64) else { return };
    assert_same(what, &choose(&gpu, vocab, steps), &choose(&cpu(), vocab, steps));
}

fn vocabularies() -> &'static [usize] {
    if quick() { &[131, 1000] } else { &[1, 2, 31, 131, 257, 1000, 49_152, 151_936, 152_064] }
}

#[test]
fn greedy_takes_the_first_of_the_largest() {
    for &vocab in vocabularies() {
        for rows in [1, 2, 5, 8, 9, 64] {
            let mut logits: Vec<f32> = numbers(vocab as u64, rows * vocab).iter().map(|v| v * 9.0).collect();
            for (row, logits) in logits.chunks_exact_mut(vocab).enumerate() {
                let place = |i: usize| (i * 7919 + row * 31) % vocab;
                match row % 8 {
                    1 => [3, 1, 2].iter().for_each(|&i| logits[place(i)] = 9.5),
                    2 => logits.fill(-2.0),
                    3 => logits.fill(f32::NAN),
                    4 => [5, 4].iter().for_each(|&i| logits[place(i)] = f32::NAN),
                    5 => logits.fill(f32::NEG_INFINITY),
                    6 => [9, 8].iter().for_each(|&i| logits[place(i)] = f32::INFINITY),
                    7 => logits.iter_mut().for_each(|l| *l = -0.0 * l.abs()),
                    _ => (),
                }
            }
            let plain = SamplingParams::default();
            let seqs: Vec<u64> = (0..rows as u64).collect();
            let starts = seqs.iter().map(|&s| start(s, s as u32, s, &plain, &[])).collect();
            let batch = MicroBatch { outputs: outputs(&seqs), starts, ..MicroBatch::default() };
            let what = format!("greedy, {vocab} tokens, {rows} rows");
            let asked = [(logits, batch)];
            let (one, cpu) = (gpu(DType::BF16, 64), cpu());
            let want = choose(&cpu, vocab, &asked).remove(0);
            let third = vocab / 3;
            for cuts in [vec![0..third, third..vocab], vec![0..third, third..third, third..vocab]] {
                let what = format!("{what}, in parts {cuts:?}");
                assert_same(&what, &[choose_in_parts(&cpu, vocab, &cuts, &asked[0])], slice::from_ref(&want));
                if let Some(gpu) = &one {
                    assert_same(
                        &what,
                        &[choose_in_parts(gpu, vocab, &cuts, &asked[0])],
                        slice::from_ref(&want),
                    );
                }
            }
            both(&what, vocab, &asked);
        }
    }
}

#[test]
fn logprobs_are_the_cpus() {
    for &vocab in vocabularies() {
        let rows = 6;
        let logits: Vec<f32> = numbers(vocab as u64, rows * vocab).iter().map(|v| v * 20.0).collect();
        let seqs: Vec<u64> = (0..rows as u64).collect();
        let asks = [None, Some(0), Some(1), Some(5), Some(20), Some(20)];
        let with = |s: u64| SamplingParams {
            logprobs: asks[s as usize],
            logit_bias: if s == 5 { vec![(0, 100.0)] } else { Vec::new() },
            ..SamplingParams::default()
        };
        let starts = seqs.iter().map(|&s| start(s, s as u32, s, &with(s), &[])).collect();
        let first = MicroBatch { outputs: outputs(&seqs), starts, ..MicroBatch::default() };
        let second = MicroBatch { outputs: outputs(&[4, 1]), ..MicroBatch::default() };
        let mut odd = logits[..2 * vocab].to_vec();
        odd[0] = f32::NAN;
        odd[vocab / 2] = f32::NEG_INFINITY;
        both(&format!("logprobs, {vocab} tokens"), vocab, &[(logits, first), (odd, second)]);
    }
}

#[test]
fn penalties_and_biases_follow_a_sequence() {
    for &vocab in vocabularies().iter().filter(|&&v| v > 30) {
        let penal = |repetition_penalty, presence_penalty, frequency_penalty| SamplingParams {
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            ..SamplingParams::default()
        };
        let bias = vec![(1, 0.75), (vocab as u32 - 1, -3.0), (7, f32::NEG_INFINITY)];
        let all = [
            penal(1.3, 0.0, 0.0),
            penal(1.0, 0.5, 0.0),
            penal(1.0, 0.0, 0.25),
            penal(0.7, -0.5, 0.125),
            SamplingParams { logit_bias: bias.clone(), ..SamplingParams::default() },
            SamplingParams { logit_bias: bias, ..penal(1.5, 0.25, 0.5) },
        ];
        let prompt: Vec<u32> = (0..40).map(|i| i * 3 % vocab as u32).collect();
        let seqs: Vec<u64> = (0..all.len() as u64).collect();
        let starts: Vec<_> = seqs.iter().map(|&s| start(s, s as u32, s, &all[s as usize], &prompt)).collect();
        // Steps of an eighth of a power of two: sums and quotients are exact on both sides, ties are many.
        let logits: Vec<f32> =
            numbers(3, all.len() * vocab).iter().map(|v| (v * 16.0).round() / 8.0).collect();
        let mut steps: Vec<Asked> = (0..24)
            .map(|_| (logits.clone(), MicroBatch { outputs: outputs(&seqs), ..MicroBatch::default() }))
            .collect();
        steps[0].1.starts = starts.clone();
        // Sequence 2 ends; a new one takes its seat, and begins without its counts.
        steps[12].1.ends = vec![SeqId(2)];
        steps[12].1.starts = vec![SeqStart { seq: SeqId(99), ..starts[2].clone() }];
        for (_, batch) in &mut steps[12..] {
            batch.outputs[2].seq = SeqId(99);
        }
        // Two begin again with what they have chosen so far, some of it from the prompt, some twice.
        steps[18].1.ends = vec![SeqId(3), SeqId(5)];
        let chosen: Vec<u32> = (0..30).map(|i| i * i % vocab as u32).collect();
        let again = |s: usize| SeqStart { generated: chosen.as_slice().into(), ..starts[s].clone() };
        steps[18].1.starts = vec![again(3), again(5)];
        both(&format!("penalties, {vocab} tokens"), vocab, &steps);
    }
}

/// All ways to limit a draw.
fn limits() -> Vec<SamplingParams> {
    let of = |temperature, top_k, top_p, min_p| SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        ..SamplingParams::default()
    };
    vec![
        of(1.0, 0, 1.0, 0.0),
        of(0.3, 0, 1.0, 0.0),
        of(2.5, 0, 1.0, 0.0),
        of(1.0, 1, 1.0, 0.0),
        of(1.0, 20, 1.0, 0.0),
        of(0.7, 500, 0.8, 0.0),
        of(1.0, 0, 0.9, 0.0),
        of(1.0, 0, 0.05, 0.0),
        of(0.8, 0, 0.95, 0.02),
        of(1.0, 0, 1.0, 0.1),
        of(0.9, 40, 0.9, 0.05),
        of(1e-3, 0, 1.0, 0.0),
    ]
}

#[test]
fn draws_are_the_cpus_but_for_last_bits() {
    let Some(gpu) = gpu(DType::BF16, 64) else { return };
    for &vocab in vocabularies() {
        let (params, rows) = (limits(), if quick() { 12 } else { 48 });
        let rounds = match (quick(), vocab > 10_000) {
            (true, _) => 1,
            (false, large) => {
                if large {
                    6
                } else {
                    60
                }
            }
        };
        let logits: Vec<f32> = numbers(11, rows * vocab).iter().map(|v| 4.0 * v - 3.0 * v * v).collect();
        let seqs: Vec<u64> = (0..rows as u64).collect();
        let mut steps: Vec<Asked> = (0..rounds)
            .map(|_| (logits.clone(), MicroBatch { outputs: outputs(&seqs), ..MicroBatch::default() }))
            .collect();
        let with = |s: u64| start(s, s as u32, s * 77, &params[s as usize % params.len()], &[]);
        steps[0].1.starts = seqs.iter().map(|&s| with(s)).collect();
        let (got, want) = (choose(&gpu, vocab, &steps), choose(&cpu(), vocab, &steps));
        assert_eq!(got, choose(&gpu, vocab, &steps), "drawn again, {vocab} tokens");
        let pairs = got.iter().flatten().zip(want.iter().flatten());
        let other: Vec<_> = pairs.filter(|(g, w)| g.id != w.id).map(|(g, w)| (g.seq.0, g.id, w.id)).collect();
        // A border between two tokens moves by some 2^-20 of the whole; there are up to 2^17 of them.
        let most = (rounds * rows / 100).max(1);
        assert!(other.len() <= most, "{vocab} tokens, (sequence, got, not): {other:?}");
    }
}

/// A sequence's tokens are the same alone and among others, in any place.
#[test]
fn the_batch_does_not_matter() {
    let Some(gpu) = gpu(DType::BF16, 64) else { return };
    for &vocab in vocabularies().iter().filter(|&&v| v < 60_000) {
        for params in limits() {
            let params = SamplingParams { repetition_penalty: 1.2, logprobs: Some(2), ..params };
            let row = |step: u64| numbers(step, vocab).iter().map(|v| 5.0 * v).collect::<Vec<f32>>();
            let alone = |step: u64| {
                let batch = MicroBatch { outputs: outputs(&[1]), ..MicroBatch::default() };
                (row(step), batch)
            };
            let among = |step: u64| {
                let other: Vec<f32> = row(step).iter().map(|v| -v).collect();
                let batch = MicroBatch { outputs: outputs(&[3, 2, 1, 4]), ..MicroBatch::default() };
                ([other.clone(), other.clone(), row(step), other].concat(), batch)
            };
            let [mut one, mut many]: [Vec<Asked>; 2] =
                [(0..5).map(alone).collect(), (0..5).map(among).collect()];
            let own = start(1, 1, 9, &params, &[3, 1]);
            let biased = SamplingParams { logit_bias: vec![(0, 50.0)], ..SamplingParams::default() };
            let hot = SamplingParams { temperature: 2.0, ..SamplingParams::default() };
            one[0].1.starts = vec![own.clone()];
            many[0].1.starts = vec![
                start(2, 2, 5, &biased, &[]),
                own,
                start(3, 3, 9, &hot, &[7]),
                start(4, 4, 1, &params, &[]),
            ];
            let (one, many) = (choose(&gpu, vocab, &one), choose(&gpu, vocab, &many));
            for (step, (one, many)) in one.iter().zip(&many).enumerate() {
                assert_eq!(one[0], many[2], "{vocab} tokens, {params:?}, step {step}");
                assert_eq!(many[1].id, 0, "a bias of 50");
            }
        }
    }
}

/// Pearson's statistic of tokens drawn over many seeds against their probabilities.
#[test]
fn many_draws_are_spread_as_their_probabilities() {
    let Some(gpu) = gpu(DType::BF16, 64) else { return };
    let (vocab, rows, rounds) = (40, 64, if quick() { 10 } else { 300 });
    let mut random = Random::new(4);
    let row: Vec<f32> = (0..vocab).map(|_| 2.0 * random.number()).collect();
    let hot = SamplingParams { temperature: 0.8, ..SamplingParams::default() };
    let seqs: Vec<u64> = (0..rows).collect();
    let steps: Vec<Asked> = (0..rounds)
        .map(|round| {
            let starts = match round {
                0 => seqs.iter().map(|&s| start(s, s as u32, s, &hot, &[])).collect(),
                _ => Vec::new(),
            };
            let batch = MicroBatch { outputs: outputs(&seqs), starts, ..MicroBatch::default() };
            (row.repeat(rows as usize), batch)
        })
        .collect();
    let mut counts = vec![0f64; vocab];
    choose(&gpu, vocab, &steps).iter().flatten().for_each(|s| counts[s.id as usize] += 1.0);
    let weights: Vec<f64> = row.iter().map(|&l| (f64::from(l) / 0.8).exp()).collect();
    let (total, n): (f64, f64) = (weights.iter().sum(), counts.iter().sum());
    let statistic: f64 =
        counts.iter().zip(&weights).map(|(c, w)| (c - n * w / total).powi(2) / (n * w / total)).sum();
    // Mean df, variance 2 df: six standard deviations above.
    let df = vocab as f64 - 1.0;
    assert!(statistic < df + 6.0 * (2.0 * df).sqrt(), "chi-square {statistic} of {n}: {counts:?}");
}
