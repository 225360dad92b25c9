//! A layer in parts, each on a GPU of its own where there are several: all read their rows from the first one, and write their
//! columns there.

use std::{iter, ops::Range, slice, sync::Arc};

use pipeline_infer::backend::{
    Backend, Columns, DType, Norm, NormShape, Tensor,
    cpu::Cpu,
    cuda::{Cuda, PipelineFacts},
};

use crate::{
    DTYPES, Room, assert_near, cpu,
    device::{SEATS, gpus, quick},
    filled, numbers, poisoned, read, tensor, unit,
};

/// Columns that belong to nobody, before and behind those of the parts.
const MARGIN: usize = 64;

/// A layer's weights and those of its norm.
struct Layer {
    weights: Tensor,
    norm: Tensor,
}

impl Layer {
    fn new(dtype: DType, n: usize, k: usize) -> Layer {
        let size = (3.0 / k as f32).sqrt();
        let weights: Vec<f32> = numbers(3, n * k).iter().map(|v| v * size).collect();
        let around_1: Vec<f32> = numbers(5, k).iter().map(|v| 1.0 + 0.5 * v).collect();
        Layer { weights: tensor(&[n, k], dtype, &weights), norm: tensor(&[k], DType::F32, &around_1) }
    }

    /// Part by part on devices of the same kind, of which the first has the rows and gets the results.
    fn run<B: Backend>(&self, on: &[Arc<B>], parts: &[Range<usize>], x: &[f32]) -> Vec<f32> {
        let (k, width) = (self.weights.shape[1], self.weights.shape[0] + 2 * MARGIN);
        let (rows, first) = (x.len() / k, &on[0]);
        let room = first.rows_room(rows);
        let x = filled(&**first, Room::Wide, room * k, x);
        let mut out = poisoned(&**first, Room::Wide, room * width);
        let mut kept = Vec::new();
        for (b, part) in on.iter().zip(parts) {
            b.find_way_back(first).unwrap();
            let w = b.matrix(&[self.weights.rows(part.clone())], &[]).unwrap();
            let norm = b.vector(&self.norm).unwrap();
            b.loaded().unwrap();
            kept.push((b, part.start, w, norm, poisoned(&**b, Room::Working, room * k)));
        }
        for _ in 0..2 {
            for (b, start, w, norm, normed) in &mut kept {
                b.await_all(first).unwrap();
                let norm = Norm { w: norm, shape: NormShape { rows: room, dim: k, eps: 1e-5 } };
                let columns = Columns { first: MARGIN + *start, width };
                b.norm_linear_columns((&mut out, columns), normed, &x, norm, w).unwrap();
            }
            kept.iter().for_each(|(b, ..)| first.await_all(b).unwrap());
        }
        read(&**first, &out, rows * width)
    }
}

fn views(dtype: DType, count: usize) -> Vec<Arc<Cuda>> {
    let facts = PipelineFacts { dtype, head_dim: 64, seats: SEATS, in_flight: 4 };
    let others: Vec<usize> = (1..count).map(|i| i % gpus()).collect();
    Cuda::pipeline_with(&[0], &others, facts).unwrap_or_else(|e| panic!("opening {others:?}: {e}"))
}

#[test]
fn parts_on_several_gpus_make_up_the_whole() {
    if gpus() == 0 {
        return;
    }
    let one: Arc<Cpu> = Arc::new(cpu());
    let (n, k) = if quick() { (448, 64) } else { (4096, 896) };
    for dtype in DTYPES {
        let (layer, width) = (Layer::new(dtype, n, k), n + 2 * MARGIN);
        for cuts in
            [iter::once(0..n).collect(), vec![0..192, 192..256, 256..n], vec![0..64, 64..64, 64..128, 128..n]]
        {
            let on = views(dtype, cuts.len());
            for rows in [1, 3, 8, 9, 64, 130] {
                let x: Vec<f32> = numbers(rows as u64, rows * k).iter().map(|v| 3.0 * v).collect();
                let want = layer.run(slice::from_ref(&one), slice::from_ref(&(0..n)), &x);
                let got = layer.run(&on, &cuts, &x);
                let what = format!("{} {cuts:?}, {rows} rows", dtype.name());
                let near = |i: usize| unit(dtype) * (3.0 + want[i].abs()) + 2e-5;
                // What is nobody's is still what it was: nothing.
                assert_near(&what, width, &got, &want, near);
                assert_eq!(got.iter().filter(|v| v.is_nan()).count(), rows * 2 * MARGIN, "{what}");
            }
        }
    }
}

/// On the processor they have the same bits.
#[test]
fn parts_on_the_processor_are_the_whole_bit_by_bit() {
    let on: Vec<Arc<Cpu>> = (0..3).map(|_| Arc::new(cpu())).collect();
    let (n, k) = (448, 72);
    for dtype in DTYPES {
        let layer = Layer::new(dtype, n, k);
        for rows in [1, 4, 5, 33] {
            let x = numbers(rows as u64, rows * k);
            let (whole, parts) = (
                layer.run(&on[..1], slice::from_ref(&(0..n)), &x),
                layer.run(&on, &[0..128, 128..128, 128..n], &x),
            );
            crate::assert_bits(&format!("{}, {rows} rows", dtype.name()), n + 2 * MARGIN, &parts, &whole);
            assert_eq!(whole.iter().filter(|v| v.is_nan()).count(), rows * 2 * MARGIN);
        }
    }
}
