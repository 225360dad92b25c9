//! Layers that move while requests run: the tokens that they have when none moves. All stages may share a GPU; with more
//! GPUs they are spread.

use pipeline_infer::{
    Engine,
    backend::DType,
    engine::WeightSource,
    layout::{Device, Layout, Stage},
};

use crate::{
    Shape,
    common::{Random, collect, logprob_bits, request},
    device::{gpus, quick},
    on_gpus,
};

type Answer = (Vec<u32>, Vec<u32>);

/// Requests one at a time, so that micro-batches are the same every time.
fn answer(engine: &Engine, i: u32) -> Answer {
    let ids: Vec<u32> = (0..5 + 17 * (i % 7)).map(|t| (t * 13 + i * 7) % 200).collect();
    let mut request = request(&ids, 80);
    let sampling = &mut request.sampling;
    sampling.logprobs = Some(4);
    (sampling.seed, sampling.temperature) = (Some(u64::from(i)), [0.0, 0.8][i as usize % 2]);
    if i.is_multiple_of(3) {
        (sampling.repetition_penalty, sampling.frequency_penalty) = (1.2, 0.2);
    }
    logprob_bits(&collect(engine.submit(request).unwrap()))
}

fn random_layout(random: &mut Random, layers: usize) -> Layout {
    let mut starts = vec![0];
    starts.extend((1..layers).filter(|_| random.below(2) == 0));
    let ends = starts.iter().skip(1).copied().chain([layers]);
    let on = |(&start, end)| Stage { device: Device::Cuda(random.below(gpus())), layers: start..end };
    Layout::new(starts.iter().zip(ends).map(on).collect()).unwrap()
}

#[test]
fn no_bit_changes_when_layers_move() {
    if gpus() == 0 {
        return;
    }
    for dtype in [DType::F32, DType::BF16] {
        let dir = Shape { layers: 4, ..Shape::SMALL }.write(dtype);
        let token = 4 * 2 * 64 * 4 * 4;
        let build = || {
            on_gpus(dir.path(), 2, dtype, |b| {
                b.weights(WeightSource::Dummy).slots(2).chunk(24).kv_memory(token * 4096).prefix_cache(false)
            })
        };
        let (plain, engine, count) = (build(), build(), if quick() { 3 } else { 12 });
        let mut random = Random::new(7);
        for i in 0..count {
            let want = answer(&plain, i);
            let got = std::thread::scope(|scope| {
                let answer = scope.spawn(|| answer(&engine, i));
                for _ in 0..3 {
                    let to = random_layout(&mut random, 4);
                    let report = engine.relayout(to.clone()).unwrap();
                    assert_eq!((&report.to, &engine.layout()), (&to, &to));
                }
                answer.join().unwrap()
            });
            assert!(got == want, "{}, request {i}, in the end {}", dtype.name(), engine.layout());
        }
        let stats = engine.stats();
        assert_eq!((stats.rebuilds, stats.scheduler.running), (0, 0));
        // What the old stages took has been given back.
        let taken: usize = stats.stages.iter().filter_map(|stage| stage.memory).map(|m| m.taken).sum();
        assert!(taken > 0, "{stats:?}");
    }
}

/// Of several at once some draw, some are penalized, some want log-probabilities, and some their most likely tokens alone: with
/// these by themselves parts tell their best ones. Sums may be rounded otherwise, but hardly ever so that a token changes.
#[test]
fn a_split_head_chooses_the_tokens_of_a_whole_one() {
    if gpus() < 2 {
        return;
    }
    let dir = Shape { layers: 4, ..Shape::SMALL }.write(DType::F32);
    let tokens = |split: bool, all: &[u32]| {
        let of = crate::device::layout(gpus().min(4), 4).with_split_head(split);
        let engine = on_gpus(dir.path(), 4, DType::F32, |b| {
            b.weights(WeightSource::Dummy).layout(of).kv_memory(64 << 20).running(32)
        });
        let ask = |&i: &u32| {
            let ids: Vec<u32> = (0..5 + 17 * (i % 7)).map(|t| (t * 13 + i * 7) % 200).collect();
            let mut request = request(&ids, 60);
            request.stop.ignore_eos = true;
            let sampling = &mut request.sampling;
            sampling.logprobs = (i % 4 == 3).then_some(2);
            (sampling.seed, sampling.temperature) = (Some(u64::from(i)), [0.0, 0.8][i as usize % 2]);
            if i.is_multiple_of(3) {
                (sampling.repetition_penalty, sampling.frequency_penalty) = (1.2, 0.2);
            }
            engine.submit(request).unwrap()
        };
        let open: Vec<_> = all.iter().map(ask).collect();
        open.into_iter().map(|events| logprob_bits(&collect(events)).0).collect::<Vec<_>>()
    };
    for all in [&[2, 4, 8, 10, 14][..], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]] {
        assert_eq!(tokens(true, all), tokens(false, all), "requests {all:?}");
    }
}

/// Memory does not grow with relayouts, and passes are repeated as ever.
#[test]
fn there_and_back_again_leaves_nothing_behind() {
    if gpus() == 0 {
        return;
    }
    let dir = Shape { layers: 4, ..Shape::SMALL }.write(DType::BF16);
    let engine = on_gpus(dir.path(), 2, DType::BF16, |b| {
        b.weights(WeightSource::Dummy).kv_memory(64 << 20).running(32)
    });
    let there = engine.layout();
    let other: Layout = format!("0@cuda:{0},1-3@cuda:0", gpus() - 1).parse().unwrap();
    let free = || pipeline_infer::backend::cuda::free_bytes(0).unwrap();
    let mut before = None;
    for _ in 0..6 {
        engine.relayout(other.clone()).unwrap();
        let _ = answer(&engine, 1);
        engine.relayout(there.clone()).unwrap();
        let _ = answer(&engine, 1);
        let least = *before.get_or_insert(free());
        // Other tests may run beside it, and the driver keeps some pages.
        assert!(free() + (512 << 20) > least, "{} bytes were free, and {} are", least, free());
    }
}

#[test]
fn a_gpu_that_is_not_there_is_refused() {
    if gpus() == 0 {
        return;
    }
    let dir = Shape { layers: 4, ..Shape::SMALL }.write(DType::BF16);
    let engine = on_gpus(dir.path(), 2, DType::BF16, |b| b.weights(WeightSource::Dummy).kv_memory(64 << 20));
    let told = engine.relayout("0-1@cuda:0,2-3@cuda:99".parse().unwrap()).unwrap_err().to_string();
    assert!(told.contains("cuda:99") && !told.contains('\n'), "{told}");
    let _ = answer(&engine, 0);
}
