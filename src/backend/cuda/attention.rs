//! Softmax attention over KV pages: fast kernels for 16-bit types and the usual head sizes, a plain one for the rest.
#![allow(unsafe_code)]

use super::{
    Batch, Buf, Cuda, DeviceFacts, DevicePtr, Grid, Kernel, Kv, Loading, Stream, batch::BatchView,
    launch::args, memory::DeviceBuf,
};
use crate::{
    backend::{AttentionShape, DType},
    batch::KV_BLOCK,
    error::{Error, Result},
};

/// Rows of a tile of a sequence of several rows: `BLOCK_M` in attention_prefill.cu.
pub(super) const PREFILL_ROWS: usize = 128;

/// The largest head.
const HEAD_DIM_MAX: usize = 256;
/// Head sizes that the fast kernels are made for.
const FAST_HEADS: [usize; 5] = [64, 80, 96, 128, 256];
/// Warps of a block of attention_decode.cu and pages that each has under way, best first.
const DECODE_RINGS: [(usize, usize); 6] = [(8, 4), (8, 3), (8, 2), (6, 2), (4, 2), (2, 2)];
/// Bytes of shared memory of a block of attention_decode.cu beside the dynamic ones, at most.
const DECODE_STATIC: u32 = 2 << 10;

/// Bytes of the kernels' scratch on GPUs of up to 200 multiprocessors, each with two blocks.
pub(super) const SCRATCH_BYTES_MAX: usize = 16 << 20;

/// What the type and the head size allow.
pub(super) enum Kernels {
    Fast(Fast),
    Plain(Kernel),
}

/// The fast kernels.
pub(super) struct Fast {
    prefill: Kernel,
    /// Of a block of it.
    prefill_threads: u32,
    prefill_shared: u32,
    /// For up to 8 query heads of a KV head, and for more.
    decode: Vec<Decode>,
}

/// attention_decode.cu with its scratch.
struct Decode {
    kernel: Kernel,
    /// Query heads of a KV head that go together.
    heads: usize,
    grid: Grid,
    /// What blocks leave for each other; ones in all bits between launches.
    parcels: DeviceBuf,
}

impl Kernels {
    pub(super) fn load(load: &Loading) -> Result<Kernels> {
        let head_dim = load.of.head_dim;
        if !head_dim.is_multiple_of(2) || head_dim > HEAD_DIM_MAX {
            let why = format!("heads of {head_dim} numbers; even ones up to {HEAD_DIM_MAX} are possible");
            return Err(Error::Device { device: format!("cuda:{}", load.facts.ordinal), why });
        }
        let fast = load.of.dtype != DType::F32 && FAST_HEADS.contains(&head_dim);
        let tiles = prefill_tokens(load.facts, head_dim);
        match (tiles, decode_ring(load.facts, head_dim, 1)) {
            (Some(tokens), Some(_)) if fast => Ok(Kernels::Fast(Fast::load(load, tokens)?)),
            _ => {
                let defines = [("DTYPE", load.dtype()), ("HEAD_DIM", head_dim as u32)];
                Ok(Kernels::Plain(
                    load.module("attention_generic.cu", &defines)?.kernel("attention_generic")?,
                ))
            }
        }
    }
}

impl Kernels {
    /// Bytes of their scratch on the GPU.
    pub(super) fn scratch_bytes(&self) -> usize {
        match self {
            Kernels::Fast(fast) => fast.decode.iter().map(|d| d.parcels.bytes()).sum(),
            Kernels::Plain(_) => 0,
        }
    }
}

/// Bytes of shared memory of a block of attention_prefill.cu that takes `tokens` at a time.
fn prefill_shared(head_dim: usize, tokens: usize) -> u32 {
    let row = 2 * head_dim + 16;
    ((PREFILL_ROWS + 4 * tokens) * row) as u32
}

/// Tokens that a block takes at a time: `BLOCK_N`. Two blocks should fit on a multiprocessor.
fn prefill_tokens(facts: &DeviceFacts, head_dim: usize) -> Option<usize> {
    let room = facts.shared_per_block_max;
    let blocks = if head_dim <= 128 { 2 } else { 1 };
    let roomy = blocks * prefill_shared(head_dim, 64) <= room;
    if roomy { Some(64) } else { (prefill_shared(head_dim, 32) <= room).then_some(32) }
}

/// Bytes of `Part` in attention_decode.cu.
fn part_bytes(head_dim: usize, head_tiles: usize) -> usize {
    head_tiles * (head_dim / 16 * 32 * 16 + 8 * 8)
}

/// Bytes of a block's `Parcel`s in attention_decode.cu.
fn parcel_bytes(head_dim: usize, head_tiles: usize) -> usize {
    head_tiles * (head_dim / 16) * (32 * 16 + 4 * 16)
}

/// Bytes of dynamic shared memory of a block of attention_decode.cu: of each warp a part, then `stages` pages of keys and
/// values, padded by 32 bytes for every four tokens.
fn decode_shared(head_dim: usize, head_tiles: usize, (warps, stages): (usize, usize)) -> u32 {
    let page = 2 * (KV_BLOCK / 4) * (4 * head_dim * 2 + 32);
    (warps * (part_bytes(head_dim, head_tiles) + stages * page)) as u32
}

/// Warps and pages of each that fit.
fn decode_ring(facts: &DeviceFacts, head_dim: usize, head_tiles: usize) -> Option<(usize, usize)> {
    let room = facts.shared_per_block_max;
    DECODE_RINGS.into_iter().find(|&ring| decode_shared(head_dim, head_tiles, ring) + DECODE_STATIC <= room)
}

impl Fast {
    fn load(load: &Loading, tokens: usize) -> Result<Fast> {
        let head_dim = load.of.head_dim;
        let defines = [
            ("DTYPE", load.dtype()),
            ("HEAD_DIM", head_dim as u32),
            ("BLOCK_M", PREFILL_ROWS as u32),
            ("BLOCK_N", tokens as u32),
        ];
        let prefill = load.module("attention_prefill.cu", &defines)?.kernel("attention_prefill")?;
        let prefill_shared = prefill_shared(head_dim, tokens);
        prefill.allow_shared(prefill_shared)?;
        // A warp has 32 rows, or 16 where a head is long.
        let prefill_threads = if head_dim <= 128 { PREFILL_ROWS } else { 2 * PREFILL_ROWS } as u32;
        // Two tiles of long heads would not fit into the registers: larger groups are taken in several goes.
        let head_tiles = if head_dim <= 128 { 1..=2 } else { 1..=1 };
        let decode = head_tiles.map(|tiles| Decode::load(load, tiles)).collect::<Result<_>>()?;
        Ok(Fast { prefill, prefill_threads, prefill_shared, decode })
    }
}

impl Decode {
    fn load(load: &Loading, head_tiles: usize) -> Result<Decode> {
        let head_dim = load.of.head_dim;
        let ring = decode_ring(load.facts, head_dim, head_tiles).unwrap_or((2, 2));
        let defines = [
            ("DTYPE", load.dtype()),
            ("HEAD_DIM", head_dim as u32),
            ("HEAD_TILES", head_tiles as u32),
            ("WARPS", ring.0 as u32),
            ("STAGES", ring.1 as u32),
        ];
        let kernel = load.module("attention_decode.cu", &defines)?.kernel("attention_decode")?;
        let shared = decode_shared(head_dim, head_tiles, ring);
        kernel.allow_shared(shared)?;
        let threads = 32 * ring.0 as u32;
        let blocks = load.facts.multiprocessors * kernel.blocks_per_multiprocessor(threads, shared)?.max(1);
        let parcels = DeviceBuf::new(load.context, blocks as usize * parcel_bytes(head_dim, head_tiles))?;
        let stream = Stream::new(load.context)?;
        // SAFETY: as many bytes, of nobody else.
        unsafe { stream.fill(parcels.ptr(), 0xff, parcels.bytes())? };
        stream.synchronize()?;
        let grid = Grid { blocks: [blocks, 1, 1], threads, shared };
        Ok(Decode { kernel, heads: 8 * head_tiles, grid, parcels })
    }
}

/// What every launch is given.
struct Operands {
    out: DevicePtr,    // [rows, q_dim]
    qkv: DevicePtr,    // [rows, qkv_dim]
    keys: DevicePtr,   // [blocks, kv_heads, KV_BLOCK, head_dim]
    values: DevicePtr, // the same
    batch: BatchView,
    heads: u32,
    kv_heads: u32,
    window: u32,
    scale: f32,
}

pub(super) fn attention(
    cuda: &Cuda,
    out: &mut Buf,
    qkv: &Buf,
    kv: &Kv,
    batch: &Batch,
    shape: AttentionShape,
) -> Result<()> {
    let (heads, now) = (shape.heads, batch.shape());
    kv.expect(heads, batch);
    let operands = Operands {
        out: out.expect(cuda.dtype, now.rows * heads.q_dim()),
        qkv: qkv.expect(cuda.dtype, now.rows * heads.qkv_dim()),
        keys: kv.keys(),
        values: kv.values(),
        batch: batch.view(),
        heads: heads.heads as u32,
        kv_heads: heads.kv_heads as u32,
        // None is 0; sums with it must not overflow.
        window: shape.window.map_or(0, |w| w.clamp(1, 1 << 30) as u32),
        scale: shape.scale,
    };
    match &cuda.kernels.attention {
        Kernels::Plain(kernel) => {
            let grid = Grid { blocks: [now.rows_padded as u32, operands.heads, 1], threads: 128, shared: 0 };
            operands.launch(cuda, kernel, grid)
        }
        Kernels::Fast(fast) => {
            if now.single > 0 {
                let group = heads.heads / heads.kv_heads;
                let last = fast.decode.last().expect("one is always loaded; this is a bug");
                operands.decode(cuda, fast.decode.iter().find(|d| group <= d.heads).unwrap_or(last))?;
            }
            let (threads, shared) = (fast.prefill_threads, fast.prefill_shared);
            let grid = Grid { blocks: [operands.heads, now.tiles as u32, 1], threads, shared };
            operands.launch(cuda, &fast.prefill, grid)
        }
    }
}

impl Operands {
    fn launch(&self, cuda: &Cuda, kernel: &Kernel, grid: Grid) -> Result<()> {
        let Operands { out, qkv, keys, values, batch, heads, kv_heads, window, scale } = self;
        // SAFETY: (ptr × 4, Batch, u32 × 3, f32) matches attention_prefill.cu and attention_generic.cu; the sizes have
        // been checked.
        unsafe {
            cuda.launch(
                kernel,
                grid,
                &mut args![*out, *qkv, *keys, *values, *batch, *heads, *kv_heads, *window, *scale],
            )
        }
    }

    fn decode(&self, cuda: &Cuda, decode: &Decode) -> Result<()> {
        let Operands { out, qkv, keys, values, batch, heads, kv_heads, window, scale } = self;
        let parcels = decode.parcels.ptr();
        // SAFETY: (ptr × 5, Batch, u32 × 3, f32) matches attention_decode.cu; the sizes have been checked, and the
        // scratch is as large as the grid needs. One stream uses it, so launches do not meet in it.
        unsafe {
            cuda.launch(
                &decode.kernel,
                decode.grid,
                &mut args![*out, *qkv, *keys, *values, parcels, *batch, *heads, *kv_heads, *window, *scale],
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `tools/kernels.py` compiles every ring that a GPU may be given.
    #[test]
    fn every_ring_is_among_the_variants() {
        let source = include_str!("../../../kernels/attention_decode.cu");
        let lines: Vec<&str> = source.lines().filter_map(|l| l.strip_prefix("// variants: ")).collect();
        let has = |line: &str, name: &str, value: usize, default: usize| {
            let given = line.split(' ').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
            given.map_or(value == default, |all| all.split(',').any(|v| v == value.to_string()))
        };
        for (warps, stages) in DECODE_RINGS {
            let named = lines.iter().any(|l| has(l, "WARPS", warps, 8) && has(l, "STAGES", stages, 2));
            assert!(named, "{warps} warps with {stages} stages");
        }
    }
}
