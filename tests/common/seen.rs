//! Prompts with images and videos: those of tests/data/qwen2_5_vl, through a tower and decoders without an engine.

use std::{
    fs,
    ops::Range,
    path::Path,
    sync::{Arc, Mutex},
};

use pipeline_infer::{
    backend::{
        Backend, DType, Limits,
        vision::{RowRun, VisionOps},
    },
    batch::{IMAGE_ROW, KV_BLOCK, MicroBatch, OutputRow, SeqId, SeqRows},
    grid::{self, Grid, Spacing, Span},
    model::{
        Model,
        decoder::{Decoder, DecoderConfig, ImageStore},
        open_model,
        vision::{Tower, TowerConfig},
    },
    text::Tokenizer,
    vision::{self, Media, Patches, Preprocessor},
};

use super::data;

pub(crate) const FOLDER: &str = "qwen2_5_vl";

/// What golden.json says of prompts with images.
#[derive(serde::Deserialize)]
pub(crate) struct SeenGolden {
    pub(crate) seen: Vec<SeenPrompt>,
    pub(crate) seen_logits: String,
    pub(crate) seen_native_difference_max: f32,
}

#[derive(serde::Deserialize)]
pub(crate) struct SeenPrompt {
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) greedy: Vec<u32>,
    pub(crate) logits_first_row: usize,
    /// Positions.
    pub(crate) rows: Vec<[u32; 3]>,
    pub(crate) delta: i64,
    #[serde(default)]
    pub(crate) images: Vec<String>,
    #[serde(default)]
    pub(crate) videos: Vec<SeenVideo>,
}

#[derive(serde::Deserialize)]
pub(crate) struct SeenVideo {
    pub(crate) frames: Vec<String>,
    pub(crate) fps: f64,
}

pub(crate) fn seen_golden() -> SeenGolden {
    serde_json::from_slice(&fs::read(data(FOLDER).join("golden.json")).unwrap()).unwrap()
}

/// A prompt as the stages get it, with the rows of its images from `first` of the store on.
pub(crate) struct Seen {
    /// As the text has them, with as many pads as there are rows.
    pub(crate) pads: Vec<u32>,
    pub(crate) ids: Vec<u32>,
    pub(crate) positions: grid::Positions,
    /// Of its images and videos, in its order.
    pub(crate) patches: Vec<Patches>,
    pub(crate) store: Range<usize>,
}

/// The prompt's way from text and files.
pub(crate) fn seen(model: &Model, prompt: &SeenPrompt, first: usize) -> Seen {
    let preprocessor = Preprocessor::read(&model.dir).unwrap();
    let images: Vec<Patches> =
        prompt.images.iter().map(|path| preprocessor.image_file(&data(path)).unwrap()).collect();
    let videos: Vec<vision::Video> = prompt
        .videos
        .iter()
        .map(|v| {
            let frames: Vec<_> = v.frames.iter().map(|path| data(path)).collect();
            preprocessor.video_files(&frames, v.fps).unwrap()
        })
        .collect();
    let ids = Tokenizer::open(&model.dir).unwrap().unwrap().encode(&prompt.text, false).unwrap();
    let (pads, tower) = (model.spec.pads.unwrap(), model.spec.vision.as_ref().unwrap());
    let merge = tower.merge as u32;
    let grids = (
        images.iter().map(|i| i.grid).collect::<Vec<Grid>>(),
        videos.iter().map(|v| (v.patches.grid, v.seconds)).collect::<Vec<_>>(),
    );
    let media = Media { images: &grids.0, videos: &grids.1 };
    let of = vision::Pads { image: pads.image, video: pads.video };
    let placed = vision::place(&ids, of, media, merge).unwrap();
    let spacing = Spacing { merge, tokens_per_second: tower.tokens_per_second };
    let positions = grid::positions(&placed.spans, spacing).unwrap();
    let mut row = first;
    let taken = |id: &u32| match *id == pads.image || *id == pads.video {
        true => {
            row += 1;
            IMAGE_ROW | (row - 1) as u32
        }
        false => *id,
    };
    let ids = placed.ids.iter().map(taken).collect();
    // In the prompt's order, as its rows are.
    let (mut images, mut videos) = (images.into_iter(), videos.into_iter().map(|v| v.patches));
    let of = |span: &Span| match span {
        Span::Text(_) => None,
        Span::Image(_) => images.next(),
        Span::Video { .. } => videos.next(),
    };
    let patches = placed.spans.iter().filter_map(of).collect();
    Seen { pads: placed.ids, ids, positions, patches, store: first..row }
}

/// A store of so many rows with the images of these prompts, all from one pass through these parts of the tower.
pub(crate) fn encode<B: VisionOps>(
    backend: &B,
    model: &Model,
    dtype: DType,
    (parts, rows): (&[Range<usize>], usize),
    prompts: &[&Seen],
) -> ImageStore<B> {
    let (spec, dim) = (model.spec.vision.clone().unwrap(), model.spec.dim);
    let patches: Vec<&Patches> = prompts.iter().flat_map(|p| &p.patches).collect();
    let grids: Vec<Grid> = patches.iter().map(|p| p.grid).collect();
    let rows_max = grids.iter().map(|g| g.patches()).sum();
    let weights = Arc::new(open_model(&model.dir, false).unwrap().weights);
    let mut store = backend.buf(rows * dim).unwrap();
    let mut hidden = vec![0.0; rows_max * spec.dim];
    for blocks in parts {
        let (spec, weights) = (spec.clone(), weights.clone());
        let config = TowerConfig { spec, weights, blocks: blocks.clone(), dtype, rows_max };
        let mut tower = Tower::load(backend, &config).unwrap();
        tower.set(backend, &grids).unwrap();
        match blocks.start {
            0 => {
                let all: Vec<f32> = patches.iter().flat_map(|p| p.rows.iter().copied()).collect();
                tower.write_patches(backend, &all).unwrap();
            }
            _ => backend.write(tower.hidden(), &hidden).unwrap(),
        }
        tower.forward(backend).unwrap();
        if blocks.end < config.spec.full.len() {
            backend.read(&mut hidden, tower.hidden()).unwrap();
            continue;
        }
        let mut from = 0;
        for Range { start, end } in prompts.iter().map(|p| p.store.clone()) {
            let run = RowRun { from, to: start, rows: end - start, dim };
            backend.copy_rows(&mut store, tower.tokens(), run).unwrap();
            from += run.rows;
        }
        // A tower's memory goes with it.
        backend.loaded().unwrap();
    }
    Arc::new(Mutex::new(store))
}

/// A sequence, its next tokens, and what they turn by.
pub(crate) type Part<'a> = (usize, &'a [u32], &'a [[u32; 3]]);

/// Decoders, one a run of layers, and sequences that have been through them.
pub(crate) struct Stages<'a, B: Backend> {
    backend: &'a B,
    decoders: Vec<Decoder<B>>,
    dim: usize,
    vocab: usize,
    /// Tokens of each sequence that are in the caches.
    cached: Vec<usize>,
    blocks_each: usize,
}

impl<'a, B: Backend> Stages<'a, B> {
    pub(crate) fn new(
        backend: &'a B,
        model: &Model,
        dtype: DType,
        (layers, rows_max, sequences): (&[Range<usize>], usize, usize),
        store: &ImageStore<B>,
    ) -> Self {
        let weights = Arc::new(open_model(&model.dir, false).unwrap().weights);
        let limits = Limits {
            rows_max,
            seqs_max: sequences,
            outputs_max: rows_max,
            context_max: model.spec.context_max,
        };
        let blocks_each = limits.context_max.div_ceil(KV_BLOCK);
        let load = |layers: &Range<usize>| {
            let config = DecoderConfig {
                split_head: false,
                spec: Arc::new(model.spec.clone()),
                arch: model.arch,
                weights: weights.clone(),
                layers: layers.clone(),
                dtype,
                limits,
                kv_blocks: sequences * blocks_each,
            };
            let decoder = Decoder::load(backend, &config).unwrap();
            if layers.start == 0 { decoder.with_images(store.clone()) } else { decoder }
        };
        let decoders = layers.iter().map(load).collect();
        let (dim, vocab) = (model.spec.dim, model.spec.vocab);
        Stages { backend, decoders, dim, vocab, cached: vec![0; sequences], blocks_each }
    }

    /// The logits of all rows of a micro-batch with these sequences' next tokens and what they turn by.
    pub(crate) fn pass(&mut self, parts: &[Part<'_>]) -> Vec<f32> {
        let batch = self.micro_batch(parts);
        let (rows, mut hidden) = (batch.rows(), Vec::new());
        for decoder in &mut self.decoders {
            decoder.prepare(self.backend, &batch).unwrap();
            if !hidden.is_empty() {
                self.backend.write(decoder.hidden_mut(), &hidden).unwrap();
            }
            decoder.forward(self.backend).unwrap();
            hidden.resize(rows * self.dim, 0.0);
            self.backend.read(&mut hidden, decoder.hidden(rows).0).unwrap();
        }
        let mut logits = vec![f32::NAN; rows * self.vocab];
        self.backend.read(&mut logits, self.decoders.last().unwrap().logits()).unwrap();
        logits
    }

    fn micro_batch(&mut self, parts: &[Part<'_>]) -> MicroBatch {
        let mut batch = MicroBatch::default();
        for &(i, ids, turns) in parts {
            let (seq, seat, row, cached) = (SeqId(i as u64), i as u32, batch.rows(), self.cached[i]);
            let blocks = (i * self.blocks_each..(i + 1) * self.blocks_each).rev().map(|b| b as u32).collect();
            batch.seqs.push(SeqRows { seq, seat, row, len: ids.len(), cached, blocks });
            batch.ids.extend(ids);
            batch.turns.extend(turns);
            batch.positions.extend((cached..cached + ids.len()).map(|p| p as u32));
            batch.outputs.extend((row..row + ids.len()).map(|row| OutputRow { row, seq, seat }));
            self.cached[i] += ids.len();
        }
        batch
    }

    /// The logits of a prompt's rows, in chunks.
    pub(crate) fn prompt(&mut self, i: usize, prompt: &Seen, chunk: usize) -> Vec<f32> {
        let parts = prompt.ids.chunks(chunk).zip(prompt.positions.rows.chunks(chunk));
        parts.flat_map(|(ids, turns)| self.pass(&[(i, ids, turns)])).collect()
    }

    /// The best tokens after a prompt, given the logits of its last row.
    pub(crate) fn greedy(&mut self, i: usize, prompt: &Seen, last: &[f32], count: usize) -> Vec<u32> {
        let best =
            |logits: &[f32]| (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        let mut tokens = vec![best(last) as u32];
        while tokens.len() < count {
            let turn = (self.cached[i] as i64 + prompt.positions.delta) as u32;
            let logits = self.pass(&[(i, &tokens[tokens.len() - 1..], &[[turn; 3]])]);
            tokens.push(best(&logits) as u32);
        }
        tokens
    }
}

/// A micro-batch of a prompt alone.
pub(crate) fn only(prompt: &Seen) -> MicroBatch {
    let (rows, seq) = (prompt.ids.len(), SeqId(0));
    let blocks = (0..rows.div_ceil(KV_BLOCK) as u32).collect();
    MicroBatch {
        ids: prompt.ids.clone(),
        positions: (0..rows as u32).collect(),
        turns: prompt.positions.rows.clone(),
        seqs: vec![SeqRows { seq, seat: 0, row: 0, len: rows, cached: 0, blocks }],
        ..MicroBatch::default()
    }
}

/// A model folder whose tensors, and config.json if given, are spelled differently.
pub(crate) fn respelled(
    from: &Path,
    spell: impl Fn(String) -> String,
    config: Option<&str>,
) -> tempfile::TempDir {
    let bytes = fs::read(from.join("model.safetensors")).unwrap();
    let (len, rest) = bytes.split_at(8);
    let (header, numbers) = rest.split_at(u64::from_le_bytes(len.try_into().unwrap()) as usize);
    let header = spell(String::from_utf8(header.to_vec()).unwrap());
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "json"))
    {
        fs::copy(&entry, folder.path().join(entry.file_name().unwrap())).unwrap();
    }
    let renamed = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), numbers].concat();
    fs::write(folder.path().join("model.safetensors"), renamed).unwrap();
    if let Some(config) = config {
        fs::write(folder.path().join("config.json"), config).unwrap();
    }
    folder
}
