//! Weights on their way to the GPU: all of them arrive, whatever becomes of their sources and of what they were for.

use std::sync::Arc;

use pipeline_infer::{
    backend::{Backend, Bytes, DType, Store, Tensor},
    error::{Error, Result},
};

use crate::{
    device::{Cuda, gpu, gpus, pipeline},
    numbers, tensor,
};

#[test]
fn pieces_of_many_sizes_arrive_whole() {
    let Some(gpu) = gpu(DType::BF16, 64) else { return };
    arrive_whole(&gpu);
}

/// A stage of several has smaller pieces, and more lanes.
#[test]
fn pieces_of_many_sizes_arrive_whole_at_each_of_three_stages() {
    if gpus() == 0 {
        return;
    }
    let stages = pipeline(3, DType::BF16, 64);
    std::thread::scope(|scope| stages.iter().for_each(|gpu| _ = scope.spawn(|| arrive_whole(gpu))));
}

fn arrive_whole(gpu: &Cuda) {
    // A piece has 2^20 numbers, or 2^18.
    let lens = [1, 7, 1 << 18, (1 << 18) + 1, 1 << 20, (1 << 20) + 1, 5_000_003, 64, 3 << 20];
    // Twice: what is loaded later finds the first loading ended.
    for round in 0..2 {
        let values: Vec<Vec<f32>> =
            lens.iter().enumerate().map(|(i, &len)| numbers(round + i as u64, len)).collect();
        let bufs: Vec<_> = values
            .iter()
            .map(|values| gpu.vector(&tensor(&[values.len()], DType::F32, values)).unwrap())
            .collect();
        gpu.loaded().unwrap();
        for (buf, values) in bufs.iter().zip(&values) {
            let mut came = vec![f32::NAN; values.len()];
            gpu.read(&mut came, buf).unwrap();
            let wrong = came.iter().zip(values).position(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(wrong, None, "of {} numbers, round {round}", values.len());
        }
    }
}

#[test]
fn what_is_dropped_on_its_way_does_no_harm() {
    let Some(gpu) = gpu(DType::BF16, 64) else { return };
    for seed in 0..8 {
        let values = numbers(seed, 9 << 20);
        drop(gpu.vector(&tensor(&[values.len()], DType::F32, &values)).unwrap());
    }
    gpu.loaded().unwrap();
}

/// A file that ends too early.
struct Cut;

const ROWS: usize = 4096;
const LEN: usize = 2 * ROWS * ROWS;
static NOTHING: [u8; LEN] = [0; LEN];

impl Store for Cut {
    fn bytes(&self) -> &[u8] {
        &NOTHING
    }

    fn copy(&self, at: usize, to: &mut [u8]) -> Result<()> {
        match at + to.len() > LEN / 2 {
            true => Err(Error::io("cut.safetensors", "it ends too early")),
            false => {
                to.fill(0);
                Ok(())
            }
        }
    }
}

#[test]
fn a_file_that_cannot_be_read_is_an_error_and_no_hang() {
    let Some(gpu) = gpu(DType::BF16, 64) else { return };
    let weights = Tensor::new("w", vec![ROWS, ROWS], DType::BF16, Bytes::new(Arc::new(Cut), 0..LEN)).unwrap();
    // More than a queue holds.
    let kept: Vec<_> = (0..40).map(|_| gpu.matrix(std::slice::from_ref(&weights), &[]).unwrap()).collect();
    let told = gpu.loaded().unwrap_err().to_string();
    assert_eq!(told, "cut.safetensors: it ends too early");
    drop(kept);
    // The next loading knows nothing of it.
    gpu.vector(&tensor(&[3], DType::F32, &[1.0, 2.0, 3.0])).unwrap();
    gpu.loaded().unwrap();
}
