//! Tokens that the host does not know: what a step chose, the next one's embedding takes from the device.

use std::sync::Arc;

use pipeline_infer::{
    SamplingParams,
    backend::{Backend, Limits, Rotation},
    batch::{MicroBatch, ON_DEVICE, OutputRow, SeqId, SeqRows, SeqStart, Step},
};

use crate::{
    DTYPES, Room, assert_bits,
    common::Random,
    device::{Cuda, SEATS, gpu, quick},
    fill, numbers, poisoned, read, tensor,
};

const VOCAB: usize = 500;
const DIM: usize = 48;
const LIMITS: Limits = Limits { rows_max: 128, seqs_max: 128, outputs_max: 128, context_max: 64 };

/// One row for each of these seats, whose token only the device knows.
fn singles(seats: &[u32]) -> MicroBatch {
    let seq = |(row, &seat): (usize, &u32)| SeqRows {
        seq: SeqId(seat.into()),
        seat,
        row,
        len: 1,
        cached: 0,
        blocks: [seat].into(),
    };
    let output = |(row, &seat): (usize, &u32)| OutputRow { row, seq: SeqId(seat.into()), seat };
    MicroBatch {
        ids: vec![ON_DEVICE; seats.len()],
        positions: vec![0; seats.len()],
        seqs: seats.iter().enumerate().map(seq).collect(),
        outputs: seats.iter().enumerate().map(output).collect(),
        ..MicroBatch::default()
    }
}

/// What a step embeds, and what it chooses.
struct Edge<'a> {
    gpu: &'a Cuda,
    table: <Cuda as Backend>::Matrix,
    batch: <Cuda as Backend>::Batch,
    sampler: <Cuda as Backend>::Sampler,
    hidden: <Cuda as Backend>::Buf,
    logits: <Cuda as Backend>::Buf,
}

#[test]
fn the_next_row_is_the_token_that_was_chosen() {
    for dtype in DTYPES {
        let Some(gpu) = gpu(dtype, 64) else { return };
        let table = tensor(&[VOCAB, DIM], dtype, &numbers(1, VOCAB * DIM));
        let rows = gpu.rows_room(LIMITS.rows_max);
        let mut edge = Edge {
            table: gpu.matrix(std::slice::from_ref(&table), &[]).unwrap(),
            batch: gpu.batch(LIMITS, Rotation::plain(&[1.0; 32], 1.0)).unwrap(),
            sampler: gpu.sampler(VOCAB).unwrap(),
            hidden: poisoned(&gpu, Room::Wide, rows * DIM),
            logits: poisoned(&gpu, Room::Wide, rows * VOCAB),
            gpu: &gpu,
        };
        gpu.loaded().unwrap();
        let numbers = table.to_f32();
        let row = |id: u32| numbers[id as usize * DIM..][..DIM].to_vec();
        let mut last = vec![0; SEATS];
        let mut random = Random::new(2);
        // More steps than a table of events may have.
        let steps = if quick() { 20 } else { 3000 };
        for step in 0..steps {
            let seats: Vec<u32> = match step {
                0 => (0..SEATS as u32).collect(),
                _ => {
                    let (first, by) = (random.below(SEATS), [1, 3, 5, 127][random.below(4)]);
                    (0..1 + random.below(70)).map(|i| ((first + i * by) % SEATS) as u32).collect()
                }
            };
            let embedded = edge.step(step, &seats, &mut last);
            if step == 0 {
                continue;
            }
            let want: Vec<f32> = embedded.1.iter().flat_map(|&id| row(id)).collect();
            assert_bits(
                &format!("step {step} in {}, seats {seats:?}", dtype.name()),
                DIM,
                &embedded.0,
                &want,
            );
        }
    }
}

impl Edge<'_> {
    /// Embeds the seats' last tokens, chooses new ones. What was embedded, and the tokens that should have been.
    fn step(&mut self, number: u64, seats: &[u32], last: &mut [u32]) -> (Vec<f32>, Vec<u32>) {
        let mut micro = singles(seats);
        if number == 0 {
            // Nothing has been chosen yet: the host names the tokens.
            micro.ids.fill(0);
            micro.starts = seats.iter().map(|&seat| greedy(seat)).collect();
        }
        let expected: Vec<u32> = seats.iter().map(|&seat| last[seat as usize]).collect();
        fill(self.gpu, &mut self.hidden, seats.len() * DIM, &[]);
        let mut logits = vec![0.0; seats.len() * VOCAB];
        for (i, (row, &seat)) in logits.chunks_exact_mut(VOCAB).zip(seats).enumerate() {
            let id = (number as usize * 31 + i * 7 + seat as usize) % VOCAB;
            row[id] = 1.0;
            last[seat as usize] = id as u32;
        }
        self.gpu.write(&mut self.logits, &logits).unwrap();
        if number > 0 {
            self.gpu.await_tokens(number - 1).unwrap();
        }
        self.gpu.set_batch(&mut self.batch, &micro).unwrap();
        let (hidden, table, batch) = (&mut self.hidden, &self.table, &self.batch);
        self.gpu.pass(batch, &mut || self.gpu.embed(hidden, table, None, batch)).unwrap();
        let step = Step { step: number, after: number.checked_sub(1), batch: Arc::new(micro) };
        let pending = self.gpu.sample(&self.logits, &mut self.sampler, &step).unwrap();
        let embedded = read(self.gpu, &self.hidden, seats.len() * DIM);
        let chosen = self.gpu.collect(pending, &step.batch).unwrap();
        let ids: Vec<u32> = chosen.iter().map(|s| s.id).collect();
        assert_eq!(ids, seats.iter().map(|&s| last[s as usize]).collect::<Vec<_>>(), "step {number}");
        (embedded, expected)
    }
}

fn greedy(seat: u32) -> SeqStart {
    SeqStart {
        seq: SeqId(seat.into()),
        seat,
        sampling: Arc::new(SamplingParams::default()),
        seed: 0,
        prompt: [1].into(),
        generated: [].into(),
    }
}
