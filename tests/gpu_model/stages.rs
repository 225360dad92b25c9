//! N stages give the bits of one, for the same micro-batches. All stages may share a GPU; with more GPUs they are spread.

use pipeline_infer::{Engine, backend::DType, engine::WeightSource};

use crate::{
    Shape,
    common::{chat_llama, collect, logprob_bits, request},
    device::{gpus, pipeline, quick},
    on_gpus,
    traffic::{Chain, Traffic},
};

/// Ids, and bits of log-probabilities.
type Answer = (Vec<u32>, Vec<u32>);

#[test]
fn any_split_gives_the_same_bits_for_the_same_batches() {
    if gpus() == 0 {
        return;
    }
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let shape = Shape { layers: 4, ..Shape::SMALL };
        let dir = shape.write(dtype);
        let backends = pipeline(7, dtype, shape.head_dim);
        let of = |range: std::ops::Range<usize>| backends[range].iter().map(|b| &**b).collect::<Vec<_>>();
        let mut chains =
            [of(0..1), of(1..3), of(3..7)].map(|stages| Chain::load(dir.path(), true, dtype, &stages));
        let mut traffic = Traffic::new(3, Shape::VOCAB);
        for i in 0..if quick() { 10 } else { 150 } {
            let batch = traffic.next();
            let [one, two, four] = chains
                .each_mut()
                .map(|chain| chain.logits(&batch).into_iter().map(f32::to_bits).collect::<Vec<_>>());
            assert!(one == two, "{} batch {i}: two stages", dtype.name());
            assert!(one == four, "{} batch {i}: four stages", dtype.name());
        }
    }
}

/// Requests of several lengths, one after another: each is alone, so that its micro-batches are the same every time.
fn one_by_one(engine: &Engine, temperature: f32) -> Vec<Answer> {
    let answer = |i: u32| {
        let ids: Vec<u32> = (0..3 + 17 * i).map(|t| (t * 13 + i * 7) % 200).collect();
        let mut request = request(&ids, 20);
        request.sampling.logprobs = Some(4);
        request.sampling.temperature = temperature;
        request.sampling.seed = Some(u64::from(i));
        logprob_bits(&collect(engine.submit(request).unwrap()))
    };
    (0..5).map(answer).collect()
}

/// Samples of one request, which begin and go on together.
fn together(engine: &Engine) -> Vec<Vec<u32>> {
    let mut request = request(&[5, 6, 7, 8, 9], 30);
    request.n = 12;
    request.sampling.temperature = 0.9;
    request.sampling.seed = Some(40);
    let events = collect(engine.submit(request).unwrap());
    let of = |n: u32| {
        let own = events.iter().filter_map(move |e| match e {
            pipeline_infer::Event::Token { sample, id, .. } if *sample == n => Some(*id),
            _ => None,
        });
        own.collect()
    };
    (0..12).map(of).collect()
}

#[test]
fn engines_of_any_number_of_stages_give_the_same_bits() {
    if gpus() == 0 {
        return;
    }
    for dtype in [DType::F32, DType::BF16] {
        let build = |stages: usize, slots: usize| {
            on_gpus(&chat_llama(), stages, dtype, |b| b.slots(slots).chunk(24).prefix_cache(false))
        };
        let one = build(1, 1);
        let (greedy, drawn) = (one_by_one(&one, 0.0), one_by_one(&one, 0.8));
        assert_eq!(one_by_one(&one, 0.8), drawn, "{}: again", dtype.name());
        for stages in 1..=4 {
            for slots in [1, stages] {
                let engine = build(stages, slots);
                let what = format!("{}, {stages} stages, {slots} slots", dtype.name());
                assert_eq!(one_by_one(&engine, 0.0), greedy, "{what}");
                assert_eq!(one_by_one(&engine, 0.8), drawn, "{what}, sampled");
            }
        }
    }
}

#[test]
fn samples_together_are_the_same_again_and_in_any_number_of_stages() {
    if gpus() == 0 {
        return;
    }
    let dir = Shape { layers: 4, ..Shape::SMALL }.write(DType::F32);
    let build = |stages: usize| {
        on_gpus(dir.path(), stages, DType::F32, |b| {
            b.weights(WeightSource::Dummy).slots(1).chunk(64).prefix_cache(false)
        })
    };
    let one = build(1);
    let want = together(&one);
    assert!((1..12).any(|i| want[i] != want[0]), "the samples differ");
    assert_eq!(together(&one), want, "again");
    for stages in 2..=4 {
        assert_eq!(together(&build(stages)), want, "{stages} stages");
    }
}
