//! What the CPU refuses, and how it says so.

use pipeline_infer::{
    backend::{
        Backend, DType, KvShape, Limits, Rotation, Tensor,
        cpu::{Cpu, Simd},
    },
    batch::{KV_BLOCK, MicroBatch, OutputRow, SeqId},
};

use crate::{HEADS, LIMITS, Sequences, blocks};

#[test]
fn tensors_that_do_not_fit_together_are_named() {
    let cpu = Cpu::new(Some(1));
    let t = |name: &str, shape: &[usize]| {
        let len = shape.iter().product();
        Tensor::from_f32(name, shape.to_vec(), DType::F32, &vec![0.0; len]).unwrap()
    };
    let refused = |parts: &[Tensor], biases: &[Tensor], why: &str| match cpu.matrix(parts, biases) {
        Ok(_) => panic!("accepted, in spite of: {why}"),
        Err(e) => assert!(e.to_string().contains(why), "{e}, not: {why}"),
    };
    let q = t("q", &[2, 4]);
    refused(&[q.clone(), t("k", &[2, 5])], &[], "tensor k: rows of 5");
    refused(&[t("q", &[8])], &[], "tensor q: shape [8]");
    refused(&[q.clone(), t("k", &[2, 4])], &[t("q.bias", &[2])], "tensor q.bias: one of 1");
    refused(&[q], &[t("q.bias", &[3])], "tensor q.bias: shape [3]");
    refused(&[], &[], "no tensors");
}

#[test]
fn a_wrong_micro_batch_is_refused() {
    let cpu = Cpu::new(Some(1));
    let mut batch = cpu.batch(LIMITS, Rotation::plain(&[1.0; 5], 1.0)).unwrap();
    let good = Sequences::new(HEADS).step(&[(0, 20), (1, 3)]);
    cpu.set_batch(&mut batch, &good).unwrap();
    let mut refused = |what: &str, change: &dyn Fn(&mut MicroBatch)| {
        let mut bad = good.clone();
        change(&mut bad);
        let error = cpu.set_batch(&mut batch, &bad).expect_err(what).to_string();
        assert!(error.starts_with("device cpu: micro-batch: "), "{what}: {error}");
        assert!(!error.contains('\n'), "{what}: {error}");
    };
    refused("too few blocks", &|b| b.seqs[0].blocks = vec![0].into());
    refused("a gap", &|b| b.seqs[1].row = 21);
    refused("an overlap", &|b| b.seqs[1].row = 19);
    refused("rows of nobody", &|b| b.seqs.truncate(1));
    refused("an empty sequence", &|b| b.seqs[1].len = 0);
    refused("more rows than there are", &|b| b.seqs[1].len = usize::MAX);
    refused("other positions", &|b| b.positions[3] = 0);
    refused("too few positions", &|b| b.positions.truncate(5));
    refused("an unknown row", &|b| b.outputs = vec![OutputRow { row: 23, seq: SeqId(0), seat: 0 }]);
    refused("a block of two sequences", &|b| b.seqs[1].blocks = blocks(0).into());
    refused("too long", &|b| b.seqs[0].cached = 250);
    refused("too many rows", &|b| b.ids = vec![0; 513]);
    cpu.set_batch(&mut batch, &good).unwrap();
}

#[test]
fn pages_that_a_micro_batch_does_not_fit_are_refused() {
    let cpu = Cpu::new(Some(1));
    let shape = KvShape { blocks: 60, kv_heads: 2, head_dim: 10, dtype: DType::F16 };
    let mut batch = cpu.batch(LIMITS, Rotation::plain(&[1.0; 5], 1.0)).unwrap();
    cpu.set_batch(&mut batch, &Sequences::new(HEADS).step(&[(0, 20)])).unwrap();
    let mut qkv = cpu.buf(20 * HEADS.qkv_dim()).unwrap();
    let mut rope = |shape: KvShape| {
        let mut kv = cpu.kv(shape).unwrap();
        cpu.rope_kv(&mut qkv, &mut kv, &batch, HEADS, None)
    };
    assert!(rope(shape).unwrap_err().to_string().contains("KV block 60 of 60"));
    rope(KvShape { blocks: 61, ..shape }).unwrap();
    rope(KvShape { blocks: 61, head_dim: 12, ..shape }).unwrap_err();
    rope(KvShape { blocks: 61, kv_heads: 4, ..shape }).unwrap_err();
}

#[test]
fn memory_that_there_is_not_is_an_error() {
    let cpu = Cpu::new(Some(1));
    for len in [usize::MAX, usize::MAX / 4, 1 << 58] {
        assert!(cpu.buf(len).is_err(), "{len}");
        let shape = KvShape { blocks: len / KV_BLOCK, kv_heads: 8, head_dim: 128, dtype: DType::F16 };
        assert!(cpu.kv(shape).is_err(), "{len}");
        assert!(
            cpu.batch(Limits { rows_max: len, ..LIMITS }, Rotation::plain(&[1.0; 64], 1.0)).is_err(),
            "{len}"
        );
    }
}

#[test]
fn instructions_that_the_machine_has_not_are_an_error() {
    for simd in Simd::ALL {
        match Cpu::with_simd(Some(1), simd) {
            Ok(cpu) => assert_eq!(cpu.simd(), simd),
            Err(e) => assert!(e.to_string().contains(simd.name()) && !simd.available(), "{e}"),
        }
    }
    assert!(Simd::best().available());
}
