//! Rotation by time, place down and place across.

use pipeline_infer::backend::{Backend, DType, KvShape, Rotation, cpu::Cpu, cpu::reference};

use crate::{BLOCKS, HEADS, LIMITS, Sequences, assert_bits, assert_near, buf, devices, read};

const LEN: usize = 60;

fn inv_freq() -> Vec<f32> {
    (0..HEADS.head_dim / 2).map(|i| 10f32.powf(-(i as f32) / 4.0)).collect()
}

/// Of a row: not in the order of the rows, and far apart.
fn turn(row: usize) -> [u32; 3] {
    [row / 3, row * 7 % 50, 900 + row * 5 % 40].map(|n| n as u32)
}

/// Rotated rows of a sequence, in two chunks.
fn rotated(cpu: &Cpu, sections: Option<[usize; 3]>, turn: Option<fn(usize) -> [u32; 3]>) -> Vec<f32> {
    let mut sequences = Sequences::new(HEADS);
    let kv =
        KvShape { blocks: BLOCKS, kv_heads: HEADS.kv_heads, head_dim: HEADS.head_dim, dtype: DType::F32 };
    let (mut kv, inv_freq) = (cpu.kv(kv).unwrap(), inv_freq());
    let mut batch = cpu.batch(LIMITS, Rotation { inv_freq: &inv_freq, scale: 1.0, sections }).unwrap();
    let mut all = Vec::new();
    for len in [LEN - 9, 9] {
        let mut micro = sequences.step(&[(0, len)]);
        micro.turns =
            turn.iter().flat_map(|turn| micro.positions.iter().map(|&p| turn(p as usize))).collect();
        cpu.set_batch(&mut batch, &micro).unwrap();
        let at = micro.seqs[0].cached;
        let mut qkv = buf(cpu, &sequences.qkv(0, at..at + len));
        cpu.rope_kv(&mut qkv, &mut kv, &batch, HEADS, None).unwrap();
        all.extend(read(cpu, &qkv, len * HEADS.qkv_dim()));
    }
    all
}

#[test]
fn each_section_turns_by_its_own_number() {
    let half = HEADS.head_dim / 2;
    let sections = [1, half - 3, 2];
    let mut want = Sequences::new(HEADS).qkv(0, 0..LEN);
    for (row, numbers) in want.chunks_exact_mut(HEADS.qkv_dim()).enumerate() {
        let mut first = 0;
        for (len, turn) in sections.into_iter().zip(turn(row)) {
            // Frequencies of others rest meanwhile.
            let mut own = vec![0.0; half];
            own[first..first + len].copy_from_slice(&inv_freq()[first..first + len]);
            for head in numbers.chunks_exact_mut(HEADS.head_dim).take(HEADS.heads + HEADS.kv_heads) {
                reference::rotate(head, turn as usize, &own, 1.0);
            }
            first += len;
        }
    }
    for cpu in devices(2) {
        assert_near("turns", &rotated(&cpu, Some(sections), Some(turn)), &want, 2.0);
    }
}

#[test]
fn text_turns_as_it_does_without_sections() {
    for cpu in devices(2) {
        let plain = rotated(&cpu, None, None);
        for sections in [[2, 2, 1], [0, 0, 5]] {
            assert_bits("no turns", &rotated(&cpu, Some(sections), None), &plain);
            assert_bits("places", &rotated(&cpu, Some(sections), Some(|p| [p as u32; 3])), &plain);
        }
    }
}
