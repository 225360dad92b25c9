//! What a split costs: the same work through one stage, even splits and uneven ones, on the CPU and, where there are any, on
//! GPUs. Workloads have the ids of `pipeline-infer bench`: `small-llama/8x8x16/s2` is what
//! `bench throughput --model benches/small-llama --weights dummy --requests 8 --input-len 8 --output-len 16 --stages 2` does.
//!
//! On SmolLM2-135M where PIPELINE_INFER_SMOLLM2 names its folder, else on random weights of a small shape. On the CPU all
//! stages share the host's cores, so what differs between the rows is what the boundaries cost.

use std::{hint::black_box, path::PathBuf, time::Duration};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pipeline_infer::{
    Engine, EngineBuilder, Prompt, Request,
    backend::cuda,
    engine::WeightSource,
    layout::{Device, Layout},
};

/// Requests, prompt tokens, new tokens.
const WORKLOADS: &[(usize, u32, u32)] = &[(1, 8, 32), (8, 8, 16), (2, 128, 1)];

/// A model, what it is called, and how many layers it has.
struct Model {
    name: String,
    folder: PathBuf,
    weights: WeightSource,
    layers: usize,
}

impl Model {
    fn find() -> Model {
        let real = std::env::var_os("PIPELINE_INFER_SMOLLM2")
            .map(PathBuf::from)
            .filter(|dir| dir.join("model.safetensors").exists());
        let small = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/small-llama");
        let (folder, weights, layers) = match real {
            Some(folder) => (folder, WeightSource::Real, 30),
            None => (small, WeightSource::Dummy, 8),
        };
        let name = folder.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned());
        Model { name, folder, weights, layers }
    }

    /// The same micro-batches in every split; no prompt is found cached in the second round.
    fn builder(&self) -> EngineBuilder {
        Engine::builder().model(&self.folder).weights(self.weights).slots(1).chunk(128).prefix_cache(false)
    }

    fn build(&self, split: &Split) -> Engine {
        let builder = match split {
            Split::Stages(stages, device) => self.builder().device(*device).stages(*stages),
            Split::Layout(layout) => self.builder().layout(layout.clone()),
        };
        builder.build().expect("the model can be loaded")
    }

    /// Splits with what they are called.
    fn on_cpu(&self) -> Vec<(String, Split)> {
        let mut splits: Vec<(String, Split)> =
            [1, 2, 4].map(|n| (format!("s{n}"), Split::Stages(n, Device::Cpu))).into();
        let (cut, last) = (self.layers - 2, self.layers - 1);
        let uneven = format!("0-{}@cpu,{cut}-{last}@cpu", cut - 1);
        splits.push((format!("s2.0-{}+{cut}-{last}", cut - 1), Split::of(&uneven)));
        splits
    }

    /// One stage, two on one GPU, and one on each of several.
    fn on_gpus(&self, gpus: usize) -> Vec<(String, Split)> {
        let mut splits = vec![("gpu/s1".into(), Split::Stages(1, Device::Cuda(0)))];
        let (half, last) = (self.layers / 2, self.layers - 1);
        for (name, second) in [("gpu/s2.same", 0), ("gpu/s2", 1)].into_iter().take(gpus.min(2)) {
            let layout = format!("0-{}@cuda:0,{half}-{last}@cuda:{second}", half - 1);
            splits.push((name.into(), Split::of(&layout)));
        }
        splits
    }
}

/// How the layers are cut.
enum Split {
    Stages(usize, Device),
    Layout(Layout),
}

impl Split {
    fn of(layout: &str) -> Split {
        Split::Layout(layout.parse().expect("a layout of this file's own"))
    }
}

fn run(engine: &Engine, (requests, prompt, answer): (usize, u32, u32)) {
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
    let model = Model::find();
    let mut all = model.on_cpu();
    match cuda::devices() {
        Ok(gpus) => all.extend(model.on_gpus(gpus.len())),
        Err(why) => println!("SKIPPED: stage splits on GPUs: {why}"),
    }
    for &workload in WORKLOADS {
        let (requests, prompt, answer) = workload;
        let mut group = c.benchmark_group(format!("{}/{requests}x{prompt}x{answer}", model.name));
        group.sample_size(10).measurement_time(Duration::from_secs(8));
        let tokens = if answer > 1 { answer } else { prompt };
        group.throughput(Throughput::Elements(requests as u64 * u64::from(tokens)));
        for (name, split) in &all {
            let engine = model.build(split);
            group.bench_function(BenchmarkId::from_parameter(name), |b| b.iter(|| run(&engine, workload)));
        }
        group.finish();
    }
}

criterion_group!(benches, splits);
criterion_main!(benches);
