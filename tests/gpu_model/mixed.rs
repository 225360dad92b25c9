//! Stages on the processor beside stages on GPUs: against transformers, in any order, and with the same bits wherever the
//! cuts between stages on a kind of device are.
//!
//! The kinds differ in their last bits, so what is bound is what is bound of each kind alone: logits to transformers', in
//! f32 by `F32_BOUND` and in 16 bits by twice transformers' own rounding. Across the boundary not a bit changes.

use std::sync::Arc;

use pipeline_infer::{
    Engine, Event, FinishReason,
    backend::{
        Backend, DType, Limits,
        cpu::Cpu,
        cuda::{Cuda, PipelineFacts},
    },
    batch::{Blocks, KV_BLOCK, MicroBatch, OutputRow, SeqId, SeqRows},
    engine::EngineBuilder,
    layout::{Device, Layout},
    model::{
        decoder::{Decoder, DecoderConfig},
        open_model,
    },
};

use crate::{
    common::{
        chat_llama, collect,
        golden::{F32_BOUND, checkpoints, difference, floats, golden, greedy_tokens_agree},
        logprob_bits, request,
    },
    device::gpus,
};

/// Every order of kinds over so many layers, with at most four stages: a bit each, set where the stage is on a GPU.
fn mixes(layers: usize) -> Vec<Layout> {
    let mut all = Vec::new();
    for stages in 2..=layers.min(4) {
        for kinds in 1..(1 << stages) - 1 {
            let mut layout = Layout::even(stages, layers, Device::Cpu).unwrap().stages().to_vec();
            for (i, stage) in layout.iter_mut().enumerate() {
                if kinds >> i & 1 == 1 {
                    stage.device = Device::Cuda(i % gpus());
                }
            }
            all.push(Layout::new(layout).unwrap());
        }
    }
    all
}

/// A stage on a device of any kind.
trait Part {
    /// From the rows of the stage before to those for the stage after, or to all rows' logits.
    fn pass(&mut self, batch: &MicroBatch, hidden: Vec<f32>) -> Vec<f32>;
}

struct On<B: Backend> {
    backend: Arc<B>,
    decoder: Decoder<B>,
    first: bool,
    /// Numbers of a row that leaves.
    out: usize,
    last: bool,
}

impl<B: Backend> Part for On<B> {
    fn pass(&mut self, batch: &MicroBatch, hidden: Vec<f32>) -> Vec<f32> {
        let backend = &*self.backend;
        if !self.first {
            backend.write(self.decoder.hidden_mut(), &hidden).unwrap();
        }
        self.decoder.prepare(backend, batch).unwrap();
        self.decoder.forward(backend).unwrap();
        let mut out = vec![f32::NAN; batch.rows() * self.out];
        let from = if self.last { self.decoder.logits() } else { self.decoder.hidden(batch.rows()).0 };
        backend.read(&mut out, from).unwrap();
        out
    }
}

/// Logits of every position of a prompt, in chunks, through the stages of a layout.
fn logits(layout: &Layout, dir: &std::path::Path, dtype: DType, ids: &[u32], chunk: usize) -> Vec<f32> {
    let model = open_model(dir, false).unwrap();
    let (spec, weights) = (Arc::new(model.spec), Arc::new(model.weights));
    let blocks: Blocks = (0..ids.len().div_ceil(KV_BLOCK) as u32).rev().collect();
    let gpus = layout.stages().iter().filter_map(|stage| match stage.device {
        Device::Cpu => None,
        Device::Cuda(i) => Some(i),
    });
    let facts = PipelineFacts { dtype, head_dim: spec.heads.head_dim, seats: 1, in_flight: 1 };
    let mut cuda = Cuda::pipeline(&gpus.collect::<Vec<_>>(), facts).unwrap().into_iter();
    let cpu = Arc::new(Cpu::new(Some(2)));
    let mut parts: Vec<Box<dyn Part>> = Vec::new();
    for stage in layout.stages() {
        let config = DecoderConfig {
            split_head: false,
            spec: spec.clone(),
            arch: model.arch,
            weights: weights.clone(),
            layers: stage.layers.clone(),
            dtype,
            limits: Limits { rows_max: chunk, seqs_max: 1, outputs_max: chunk, context_max: ids.len() },
            kv_blocks: blocks.len(),
        };
        let (first, last) = (stage.layers.start == 0, stage.layers.end == spec.layers.len());
        let out = if last { spec.vocab } else { spec.dim };
        parts.push(match stage.device {
            Device::Cpu => {
                let (backend, decoder) = (cpu.clone(), Decoder::load(&*cpu, &config).unwrap());
                Box::new(On { backend, decoder, first, out, last })
            }
            Device::Cuda(_) => {
                let backend = cuda.next().unwrap();
                let decoder = Decoder::load(&*backend, &config).unwrap();
                Box::new(On { backend, decoder, first, out, last })
            }
        });
    }
    let mut all = Vec::new();
    for (i, ids) in ids.chunks(chunk).enumerate() {
        let (seq, cached) = (SeqId(0), i * chunk);
        let rows = SeqRows { seq, seat: 0, row: 0, len: ids.len(), cached, blocks: blocks.clone() };
        let batch = MicroBatch {
            ids: ids.to_vec(),
            positions: (cached..cached + ids.len()).map(|p| p as u32).collect(),
            seqs: vec![rows],
            outputs: (0..ids.len()).map(|row| OutputRow { row, seq, seat: 0 }).collect(),
            ..MicroBatch::default()
        };
        all.extend(parts.iter_mut().fold(Vec::new(), |hidden, part| part.pass(&batch, hidden)));
    }
    all
}

#[test]
fn logits_of_mixed_stages_agree_with_transformers() {
    if gpus() == 0 {
        return;
    }
    for dir in checkpoints() {
        let (golden, model) = (golden(&dir), open_model(&dir, false).unwrap());
        let (layers, vocab) = (model.spec.layers.len(), model.spec.vocab);
        let wide = floats(dir.join(&golden.logits));
        let mut worst = 0f32;
        for layout in mixes(layers) {
            for (i, prompt) in golden.prompts.iter().enumerate() {
                let expected = &wide[prompt.logits_first_row * vocab..][..prompt.ids.len() * vocab];
                let what = format!("{}, {layout}, prompt {i}", dir.display());
                let off = difference(&logits(&layout, &dir, DType::F32, &prompt.ids, 17), expected, vocab);
                assert!(off <= F32_BOUND, "{what}: {off:e}");
                worst = worst.max(off);
                let Some(native) = golden.native_difference_max.filter(|_| i == 0) else { continue };
                let narrow = logits(&layout, &dir, model.dtype, &prompt.ids, 17);
                assert!(narrow.iter().all(|v| v.is_finite()), "{what}");
                let off = narrow.iter().zip(expected).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
                assert!(off <= 2.0 * native, "{what}, {}: {off} against {native}", model.dtype.name());
            }
        }
        println!("{}: {worst:e} of a row's largest logit at most, in f32", dir.display());
    }
}

fn engine(layout: &str, with: impl FnOnce(EngineBuilder) -> EngineBuilder) -> Engine {
    let builder = Engine::builder().model(chat_llama()).layout(layout.parse().unwrap()).threads(2);
    with(builder).build().unwrap_or_else(|e| panic!("{layout}: {e}"))
}

#[test]
fn engines_of_mixed_stages_give_transformers_tokens() {
    if gpus() == 0 {
        return;
    }
    for dir in checkpoints() {
        let golden = golden(&dir);
        let layers = open_model(&dir, false).unwrap().spec.layers.len();
        for layout in mixes(layers) {
            let what = format!("{}, {layout}", dir.display());
            let builder = Engine::builder().model(&dir).dtype(DType::F32).layout(layout.clone()).threads(2);
            let engine = builder.build().unwrap_or_else(|e| panic!("{what}: {e}"));
            greedy_tokens_agree(&engine, &golden, &what);
            let stats = engine.stats();
            assert!(stats.stages.iter().all(|stage| stage.times.batches > 0), "{what}: {stats:?}");
        }
    }
}

/// Layers go from one kind of device to the other while requests run, and keys and values with them.
#[test]
fn layers_move_between_kinds_of_devices() {
    if gpus() == 0 {
        return;
    }
    for dir in checkpoints() {
        let golden = golden(&dir);
        let layouts = mixes(open_model(&dir, false).unwrap().spec.layers.len());
        let builder = Engine::builder().model(&dir).dtype(DType::F32).layout(layouts[0].clone()).threads(2);
        // Room for the stages that take over.
        let engine = builder.kv_memory(64 << 20).build().unwrap();
        let brought = std::thread::scope(|scope| {
            let mover = scope.spawn(|| -> usize {
                let next = layouts.iter().rev().cycle().take(12);
                next.map(|layout| engine.relayout(layout.clone()).unwrap().kv_bytes).sum()
            });
            while !mover.is_finished() {
                greedy_tokens_agree(&engine, &golden, &format!("{}, moved", dir.display()));
            }
            mover.join().unwrap()
        });
        let stats = engine.stats();
        assert!(brought > 0 && stats.rebuilds == 0 && stats.relayouts > 1, "{}: {stats:?}", dir.display());
    }
}

/// Layers on the same kinds of devices give the same bits, in however many stages.
#[test]
fn cuts_within_a_kind_of_device_change_no_bit() {
    if gpus() == 0 {
        return;
    }
    let last = gpus() - 1;
    let answers = |layout: &str| {
        let engine = engine(layout, |b| b.slots(1).chunk(24).prefix_cache(false));
        let answer = |i: u32| {
            let ids: Vec<u32> = (0..3 + 17 * i).map(|t| (t * 13 + i * 7) % 200).collect();
            let mut request = request(&ids, 20);
            request.sampling.logprobs = Some(4);
            request.sampling.temperature = 0.8;
            request.sampling.seed = Some(u64::from(i));
            logprob_bits(&collect(engine.submit(request).unwrap()))
        };
        (0..5).map(answer).collect::<Vec<_>>()
    };
    for [one, other] in [
        ["0-1@cpu,2-3@cuda:0".into(), format!("0@cpu,1@cpu,2@cuda:0,3@cuda:{last}")],
        ["0-1@cuda:0,2-3@cpu".into(), format!("0@cuda:0,1@cuda:{last},2@cpu,3@cpu")],
        ["0@cuda:0,1-2@cpu,3@cuda:0".into(), format!("0@cuda:0,1@cpu,2@cpu,3@cuda:{last}")],
        ["0@cpu,1-2@cuda:0,3@cpu".into(), format!("0@cpu,1@cuda:0,2@cuda:{last},3@cpu")],
    ] {
        let want = answers(&one);
        assert_eq!(answers(&one), want, "{one}: again");
        assert_eq!(answers(&other), want, "{other} as {one}");
    }
}

/// Requests that end early leave nothing behind, and an engine can be dropped with all hands full.
#[test]
fn clients_of_mixed_stages_can_go() {
    if gpus() == 0 {
        return;
    }
    for layout in ["0@cpu,1-2@cuda:0,3@cpu", "0@cuda:0,1-2@cpu,3@cuda:0", "0-1@cuda:0,2-3@cpu"] {
        let engine = engine(layout, |b| b.max_context(128));
        for round in 0..4u32 {
            let mut open: Vec<_> =
                (0..8).map(|i| engine.submit(request(&[i + round, 5, 6], 60)).unwrap()).collect();
            open[0].next().unwrap();
            open[1].cancel();
            drop(open.remove(2));
            let reasons = open.into_iter().map(|events| match events.last() {
                Some(Event::Finished { reason, .. }) => reason,
                other => panic!("{layout}: {other:?}"),
            });
            assert!(reasons.filter(|reason| *reason == FinishReason::Length).count() >= 6, "{layout}");
        }
        let _open: Vec<_> = (0..8).map(|i| engine.submit(request(&[i, 5, 6], 100)).unwrap()).collect();
        drop(engine);
    }
}
