//! What a split costs: the same work through one stage, even splits and uneven ones.
//!
//! On SmolLM2-135M where PIPELINE_INFER_SMOLLM2 names its folder, else on random weights of a small shape. All
//! stages share the host's cores, so what differs between the rows is what the boundaries cost.

use std::{hint::black_box, path::PathBuf, time::Duration};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pipeline_infer::{Engine, Layout, Prompt, Request, engine::WeightSource};

const SPLITS: &[&str] = &["1", "2", "4", "uneven"];

fn engine(split: &str) -> Engine {
    let real = std::env::var_os("PIPELINE_INFER_SMOLLM2")
        .map(PathBuf::from)
        .filter(|dir| dir.join("model.safetensors").exists());
    let small = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/small-llama");
    let builder = match &real {
        Some(dir) => Engine::builder().model(dir),
        None => Engine::builder().model(&small).weights(WeightSource::Dummy),
    };
    // The same micro-batches in every split.
    let builder = builder.slots(1).chunk(128);
    let builder = match split {
        "uneven" => {
            let layers = if real.is_some() { 30 } else { 8 };
            let layout = format!("0-{},{}-{}", layers - 3, layers - 2, layers - 1);
            builder.layout(layout.parse::<Layout>().expect("a layout of this file's own"))
        }
        stages => builder.stages(stages.parse().expect("a number of this file's own")),
    };
    builder.build().expect("the model can be loaded")
}

fn run(engine: &Engine, requests: usize, prompt: u32, answer: u32) {
    let events: Vec<_> = (0..requests as u32)
        .map(|i| {
            let mut request = Request::new(Prompt::Ids((0..prompt).map(|t| (t * 31 + i) % 997).collect()));
            request.stop.max_tokens = Some(answer);
            request.stop.ignore_eos = true;
            engine.submit(request).expect("the request fits")
        })
        .collect();
    for events in events {
        black_box(events.count());
    }
}

fn splits(c: &mut Criterion) {
    for (name, requests, prompt, answer) in
        [("decode 1x8x32", 1, 8, 32), ("decode 8x8x16", 8, 8, 16), ("prompt 2x128x1", 2, 128, 1)]
    {
        let mut group = c.benchmark_group(name);
        group.sample_size(10).measurement_time(Duration::from_secs(8));
        let tokens = if answer > 1 { answer } else { prompt };
        group.throughput(Throughput::Elements(requests as u64 * u64::from(tokens)));
        for split in SPLITS {
            let engine = engine(split);
            group.bench_function(BenchmarkId::from_parameter(split), |b| {
                b.iter(|| run(&engine, requests, prompt, answer))
            });
        }
        group.finish();
    }
}

criterion_group!(benches, splits);
criterion_main!(benches);
