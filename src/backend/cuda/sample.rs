//! Choosing tokens: kernels/sample.cu and kernels/argmax.cu.
//!
//! The parameters of a step's outputs go to the GPU with the launch; what penalties and biases need lies there in rows
//! of the vocabulary's length, two for each sequence that can run. The GPU writes tokens and log-probabilities to pinned
//! memory, where the host reads them when the step is done. All of it is taken at load.
#![allow(unsafe_code)]

mod slot;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use self::slot::{LOGPROBS_WORDS, START_WORDS, Slot, Staging};
use super::{
    Buf, Cuda, DevicePtr, Grid, Kernel, Loading, Tokens, allocated, beside, joined, launch::args,
    memory::DeviceBuf,
};
use crate::{
    backend::DType,
    batch::{MicroBatch, OutputRow, Sampled, SeqId, SeqStart, Step},
    error::Result,
    request::{LOGPROBS_MAX, Logprobs, SamplingParams},
};

/// Logits of a block: `SPAN` in argmax.cu.
const ARGMAX_SPAN: usize = 4096;
/// `WARPS` and `FEW_OUTPUTS` of the kernels, and `CLUSTER` where there are any.
const WARPS: usize = 16;
const FEW_OUTPUTS: usize = 16;
const CLUSTER: usize = 8;
/// `IN_PROMPT` in sample.cuh.
const IN_PROMPT: u32 = 1 << 31;
/// More than the static shared memory of `sample`.
const STATIC_SHARED: usize = 16 << 10;

pub(super) struct Kernels {
    sample: Kernel,
    argmax: Kernel,
    pub(super) largest: Kernel,
    choose_found: Kernel,
    logprobs: Kernel,
    clear_words: Kernel,
    mark_prompt: Kernel,
    set_bias: Kernel,
}

impl Kernels {
    pub(super) fn load(load: &Loading) -> Result<Kernels> {
        let (sample, argmax) = std::thread::scope(|scope| {
            let argmax = beside(scope, || load.module("argmax.cu", &[("DTYPE", 0)]))?;
            Ok((load.module("sample.cu", &[("DTYPE", 0)])?, joined(argmax)?))
        })?;
        Ok(Kernels {
            sample: sample.kernel("sample")?,
            argmax: argmax.kernel("argmax")?,
            largest: argmax.kernel("largest")?,
            choose_found: argmax.kernel("choose_found")?,
            logprobs: argmax.kernel("logprobs")?,
            clear_words: argmax.kernel("clear_words")?,
            mark_prompt: argmax.kernel("mark_prompt")?,
            set_bias: argmax.kernel("set_bias")?,
        })
    }
}

/// Bytes on the GPU.
pub(super) fn device_bytes(seats: usize, vocab: usize) -> usize {
    let fixed = [seats * size_of::<SampleParams>(), seats * 8, seats * 4];
    fixed.into_iter().map(allocated).sum::<usize>() + allocated(2 * seats * row_bytes(vocab))
}

/// Bytes from one row of the vocabulary's length to the next.
fn row_bytes(vocab: usize) -> usize {
    (4 * vocab).next_multiple_of(256)
}

/// Chooses tokens for the sequences that it has been told about.
pub struct Sampler {
    vocab: usize,
    outputs_max: usize,
    seqs: HashMap<SeqId, SeqState>,
    /// What `spare` and the sequences' rows lie in: two a seat.
    _rows: DeviceBuf,
    spare: Vec<DevicePtr>, // [vocab] words each
    params: DeviceBuf,     // [outputs_max] of SampleParams
    best: DeviceBuf,       // [outputs_max] of u64, zero between launches
    done: DeviceBuf,       // [outputs_max] of u32, likewise
    draw: DrawLaunch,
    slots: Arc<Mutex<Vec<Slot>>>,
}

/// How `sample` is launched.
#[derive(Clone, Copy)]
struct DrawLaunch {
    cluster: usize,
    /// Bytes of the keys of a block; 0 if they do not fit into shared memory.
    shared: usize,
}

/// What is kept of a sequence from its start to its end.
struct SeqState {
    sampling: Arc<SamplingParams>,
    seed: u64,
    answered: u32,
    counts: Option<DevicePtr>,
    bias: Option<DevicePtr>,
}

/// `struct SampleParams` in sample.cuh.
#[derive(Clone, Copy)]
#[repr(C)]
struct SampleParams {
    seed: u64,
    answered: u32,
    seat: u32,
    counts: DevicePtr,
    bias: DevicePtr,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition: f32,
    presence: f32,
    frequency: f32,
    logprobs: u32,
}

/// `struct FewParams` in sample.cuh.
#[derive(Clone, Copy)]
#[repr(C)]
struct FewParams([SampleParams; FEW_OUTPUTS]);

/// What tokens are chosen from.
#[derive(Clone, Copy)]
pub(super) enum From<'a> {
    /// Rows of the vocabulary's length.
    Logits(&'a Buf),
    /// The best that so many parts of the vocabulary have to offer, where nothing else is wanted: a number of 8 bytes each, and so
    /// many of each part.
    Found(&'a Buf, usize, usize),
}

/// Tokens that may not have been chosen yet.
pub struct Pending {
    tokens: Arc<Tokens>,
    step: u64,
    slot: Option<Slot>,
    /// Which outputs want log-probabilities; empty if none does.
    wanted: Vec<bool>,
    slots: Arc<Mutex<Vec<Slot>>>,
}

/// Takes note of the sequences that end and start with this step, and chooses a token for each of its output rows.
pub(super) fn sample(cuda: &Cuda, from: From<'_>, sampler: &mut Sampler, step: &Step) -> Result<Pending> {
    let batch = &*step.batch;
    let outputs = batch.outputs.len();
    assert!(outputs <= sampler.outputs_max, "more outputs than seats; this is a bug");
    for seq in &batch.ends {
        sampler.end(*seq);
    }
    let mut slot = sampler.slot(cuda)?;
    sampler.start(cuda, &batch.starts, &mut slot)?;
    let mut wanted = Vec::new();
    if outputs > 0 {
        let params: Vec<SampleParams> = batch.outputs.iter().map(|o| sampler.next(o)).collect();
        sampler.choose(cuda, from, &params, &mut slot)?;
        if params.iter().any(|p| p.logprobs > 0) {
            wanted.extend(params.iter().map(|p| p.logprobs > 0));
        }
    }
    cuda.record_event(cuda.tokens.chosen(step.step))?;
    let slots = sampler.slots.clone();
    Ok(Pending { tokens: cuda.tokens.clone(), step: step.step, slot: Some(slot), wanted, slots })
}

impl Sampler {
    pub(super) fn new(cuda: &Cuda, vocab: usize) -> Result<Sampler> {
        let outputs_max = cuda.tokens.seats();
        let cluster = if cuda.facts.compute >= (9, 0) { CLUSTER } else { 1 };
        // `per_warp` in sample.cu.
        let keys = 4 * WARPS * vocab.div_ceil(cluster * WARPS).next_multiple_of(4);
        let fits = keys + STATIC_SHARED <= cuda.facts.shared_per_block_max as usize;
        if fits {
            cuda.kernels.sample.sample.allow_shared(keys as u32)?;
        }
        let (stride, rows) = (row_bytes(vocab), 2 * outputs_max);
        let memory = cuda.take(rows * stride)?;
        let spare = (0..rows).map(|i| memory.ptr().add(i * stride)).collect();
        let slots = (0..cuda.tokens.in_flight()).map(|_| Slot::new(cuda, outputs_max));
        Ok(Sampler {
            vocab,
            outputs_max,
            seqs: HashMap::new(),
            _rows: memory,
            spare,
            params: cuda.take(outputs_max * size_of::<SampleParams>())?,
            best: cuda.zeroed(8 * outputs_max)?,
            done: cuda.zeroed(4 * outputs_max)?,
            draw: DrawLaunch { cluster, shared: if fits { keys } else { 0 } },
            slots: Arc::new(Mutex::new(slots.collect::<Result<_>>()?)),
        })
    }

    /// What an output's sequence wants of its next token, which is counted.
    fn next(&mut self, output: &OutputRow) -> SampleParams {
        let state = self.seqs.get_mut(&output.seq);
        let state = state.expect("an output row of a sequence that never started; this is a bug");
        let p = &state.sampling;
        let row = |row: Option<DevicePtr>| row.unwrap_or(DevicePtr::NULL);
        let params = SampleParams {
            seed: state.seed,
            answered: state.answered,
            seat: output.seat,
            counts: row(state.counts),
            bias: row(state.bias),
            temperature: p.temperature,
            top_k: p.top_k,
            top_p: p.top_p,
            min_p: p.min_p,
            repetition: p.repetition_penalty,
            presence: p.presence_penalty,
            frequency: p.frequency_penalty,
            logprobs: p.logprobs.map_or(0, |k| k + 1),
        };
        state.answered += 1;
        params
    }

    fn choose(&self, cuda: &Cuda, from: From<'_>, params: &[SampleParams], slot: &mut Slot) -> Result<()> {
        let outputs = params.len();
        let mut few = FewParams([params[0]; FEW_OUTPUTS]);
        let many = if outputs <= FEW_OUTPUTS {
            few.0[..outputs].copy_from_slice(params);
            DevicePtr::NULL
        } else {
            // SAFETY: plain numbers without gaps; the slot's last step is done.
            unsafe {
                let bytes = std::slice::from_raw_parts(params.as_ptr().cast::<u8>(), size_of_val(params));
                slot.params.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
            }
            // SAFETY: room for `outputs_max` on both sides; the slot lives until the step is done.
            unsafe { cuda.copy(self.params.ptr(), slot.params.ptr(), size_of_val(params))? };
            self.params.ptr()
        };
        let kernels = &cuda.kernels.sample;
        let (vocab, tokens, last) = (self.vocab as u32, slot.tokens.ptr(), cuda.tokens.table());
        let logits = match from {
            From::Logits(logits) => logits.expect(DType::F32, outputs * self.vocab),
            From::Found(found, parts, pitch) => {
                return choose_found(cuda, (found, parts, pitch), (tokens, last), (many, few), outputs);
            }
        };
        if params.iter().all(|p| p.temperature == 0.0) {
            let parts = self.vocab.div_ceil(ARGMAX_SPAN) as u32;
            let grid = Grid { blocks: [parts, outputs as u32, 1], threads: 256, shared: 0, cluster: 1 };
            // SAFETY: (u32*, u32*, const float*, const SampleParams*, FewParams, u32, u64*, u32*) as in argmax.cu.
            unsafe {
                cuda.launch(
                    &kernels.argmax,
                    grid,
                    &mut args![tokens, last, logits, many, few, vocab, self.best.ptr(), self.done.ptr()],
                )?
            };
        } else {
            let DrawLaunch { cluster, shared } = self.draw;
            let grid = Grid {
                blocks: [(outputs * cluster) as u32, 1, 1],
                threads: WARPS as u32 * 32,
                shared: shared as u32,
                cluster: 1,
            };
            // SAFETY: (u32*, u32*, const float*, const SampleParams*, FewParams, u32, u32) as in sample.cu.
            unsafe {
                cuda.launch(
                    &kernels.sample,
                    grid,
                    &mut args![tokens, last, logits, many, few, vocab, u32::from(shared > 0)],
                )?
            };
        }
        if params.iter().any(|p| p.logprobs > 0) {
            // SAFETY: (Logprobs*, const u32*, const float*, const SampleParams*, FewParams, u32) as in argmax.cu.
            unsafe {
                cuda.launch(
                    &kernels.logprobs,
                    Grid::row(outputs as u32, 1024),
                    &mut args![slot.logprobs.ptr(), tokens, logits, many, few, vocab],
                )?
            };
        }
        Ok(())
    }

    fn end(&mut self, seq: SeqId) {
        if let Some(state) = self.seqs.remove(&seq) {
            // The stream's order keeps what still uses them before what will.
            self.spare.extend(state.counts);
            self.spare.extend(state.bias);
        }
    }

    fn start(&mut self, cuda: &Cuda, starts: &[SeqStart], slot: &mut Slot) -> Result<()> {
        // SAFETY: the slot's last step is done.
        let mut staging = unsafe { Staging::new(cuda, &mut slot.start) };
        for start in starts {
            // One that begins again without having ended.
            self.end(start.seq);
            let (sampling, answered) = (start.sampling.clone(), start.generated.len() as u32);
            let mut state = SeqState { sampling, seed: start.seed, answered, counts: None, bias: None };
            if start.sampling.penalizes() {
                let row = self.cleared_row(cuda)?;
                let marks = start.sampling.repetition_penalty != 1.0;
                for part in start.prompt.chunks(START_WORDS).filter(|_| marks) {
                    staging.make_room(part.len())?;
                    let ids = staging.put(part.iter().copied());
                    self.mark(cuda, row, ids, part.len())?;
                }
                let counts: Vec<(u32, u32)> = counted(start).into_iter().collect();
                self.set_words(cuda, row, &mut staging, &counts)?;
                state.counts = Some(row);
            }
            let bias = merged(&start.sampling.logit_bias).into_iter();
            let bias: Vec<(u32, u32)> = bias.map(|(id, bias)| (id, bias.to_bits())).collect();
            if !bias.is_empty() {
                let row = self.cleared_row(cuda)?;
                self.set_words(cuda, row, &mut staging, &bias)?;
                state.bias = Some(row);
            }
            self.seqs.insert(start.seq, state);
        }
        Ok(())
    }

    fn cleared_row(&mut self, cuda: &Cuda) -> Result<DevicePtr> {
        let row = self.spare.pop().expect("more sequences than seats; this is a bug");
        // SAFETY: (u32*, u32) as in argmax.cu; the row has as many words.
        unsafe {
            cuda.launch(
                &cuda.kernels.sample.clear_words,
                words_grid(self.vocab),
                &mut args![row, self.vocab as u32],
            )?
        };
        Ok(row)
    }

    fn mark(&self, cuda: &Cuda, row: DevicePtr, ids: DevicePtr, len: usize) -> Result<()> {
        // SAFETY: (u32*, const u32*, u32, u32) as in argmax.cu; the ids stay in the slot until the step is done.
        unsafe {
            cuda.launch(
                &cuda.kernels.sample.mark_prompt,
                words_grid(len),
                &mut args![row, ids, len as u32, self.vocab as u32],
            )
        }
    }

    /// Writes words of 32 bits to a row by their ids: biases, or counts, which pass through the kernel unchanged as any
    /// bits do.
    fn set_words(
        &self,
        cuda: &Cuda,
        row: DevicePtr,
        staging: &mut Staging<'_>,
        words: &[(u32, u32)],
    ) -> Result<()> {
        for part in words.chunks(START_WORDS / 2) {
            staging.make_room(2 * part.len())?;
            let ids = staging.put(part.iter().map(|(id, _)| *id));
            let values = staging.put(part.iter().map(|(_, word)| *word));
            // SAFETY: (float*, const u32*, const float*, u32, u32) as in argmax.cu; the rest as for `mark`.
            unsafe {
                cuda.launch(
                    &cuda.kernels.sample.set_bias,
                    words_grid(part.len()),
                    &mut args![row, ids, values, part.len() as u32, self.vocab as u32],
                )?
            };
        }
        Ok(())
    }

    /// Memory of the host that no step uses.
    fn slot(&self, cuda: &Cuda) -> Result<Slot> {
        if let Some(slot) = lock(&self.slots).pop() {
            return Ok(slot);
        }
        // Only after a failure: slots of steps that may still run do not come back.
        Slot::new(cuda, self.outputs_max)
    }
}

/// Of what so many parts have found, each for `pitch` rows.
fn choose_found(
    cuda: &Cuda,
    (found, parts, pitch): (&Buf, usize, usize),
    (tokens, last): (DevicePtr, DevicePtr),
    (many, few): (DevicePtr, FewParams),
    outputs: usize,
) -> Result<()> {
    let from = found.expect(DType::F32, 2 * parts * pitch);
    let grid = Grid::row(outputs.div_ceil(32) as u32, 32);
    let (parts, pitch, outputs) = (parts as u32, pitch as u32, outputs as u32);
    // SAFETY: (u32*, u32*, const u64*, const SampleParams*, FewParams, u32, u32, u32) as in argmax.cu.
    unsafe {
        cuda.launch(
            &cuda.kernels.sample.choose_found,
            grid,
            &mut args![tokens, last, from, many, few, parts, pitch, outputs],
        )
    }
}

/// Up to 64 blocks for so many words.
fn words_grid(words: usize) -> Grid {
    Grid::row(words.div_ceil(256).min(64) as u32, 256)
}

/// The counts of the tokens that a sequence has chosen already if it begins again, as sample.cuh has them.
fn counted(start: &SeqStart) -> BTreeMap<u32, u32> {
    let mut counts = BTreeMap::new();
    if !start.sampling.penalizes() {
        return counts;
    }
    for &id in start.generated.iter() {
        *counts.entry(id).or_insert(0) += 1;
    }
    if start.sampling.repetition_penalty != 1.0 && !counts.is_empty() {
        for id in start.prompt.iter() {
            counts.entry(*id).and_modify(|count| *count |= IN_PROMPT);
        }
    }
    counts
}

/// Each token's bias: several for one token are added up, in their order.
fn merged(biases: &[(u32, f32)]) -> BTreeMap<u32, f32> {
    let mut merged = BTreeMap::new();
    for &(id, bias) in biases {
        merged.entry(id).and_modify(|sum| *sum += bias).or_insert(bias);
    }
    merged
}

impl Pending {
    /// Waits for the tokens of the micro-batch's output rows.
    pub(super) fn collect(self, batch: &MicroBatch) -> Result<Vec<Sampled>> {
        self.tokens.wait(self.step)?;
        let slot = self.slot.as_ref().expect("a slot until the end; this is a bug");
        // SAFETY: the step is done.
        let (tokens, logprobs) = unsafe { (slot.tokens.as_slice(), slot.logprobs.as_slice()) };
        let sampled = batch.outputs.iter().enumerate().map(|(i, output)| Sampled {
            seq: output.seq,
            id: word(tokens, i),
            logprobs: self
                .wanted
                .get(i)
                .is_some_and(|&wanted| wanted)
                .then(|| read_logprobs(&logprobs[4 * LOGPROBS_WORDS * i..][..4 * LOGPROBS_WORDS])),
        });
        Ok(sampled.collect())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // A slot whose step may still run is never used again, nor freed.
        let slot = self.slot.take();
        match self.tokens.wait(self.step) {
            Ok(()) => lock(&self.slots).extend(slot),
            Err(_) => std::mem::forget(slot),
        }
    }
}

fn word(bytes: &[u8], i: usize) -> u32 {
    let b = &bytes[4 * i..][..4];
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

fn read_logprobs(bytes: &[u8]) -> Logprobs {
    let number = |i| f32::from_bits(word(bytes, i));
    let len = (word(bytes, 1) as usize).min(LOGPROBS_MAX as usize);
    let top = (0..len).map(|i| (word(bytes, 2 + i), number(2 + LOGPROBS_MAX as usize + i))).collect();
    Logprobs { chosen: number(0), top }
}

fn lock(slots: &Mutex<Vec<Slot>>) -> MutexGuard<'_, Vec<Slot>> {
    slots.lock().unwrap_or_else(PoisonError::into_inner)
}
