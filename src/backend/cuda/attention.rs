//! Softmax attention over KV pages: fast kernels for 16-bit types and the usual head sizes, a plain one for the rest.
#![allow(unsafe_code)]

use super::{
    Batch, Buf, Cuda, DeviceFacts, DevicePtr, Grid, Kernel, Kv, Loading, Module, Stream, batch::BatchView,
    beside, joined, launch::args, memory::DeviceBuf,
};
use crate::{
    backend::{AttentionShape, DType},
    batch::KV_BLOCK,
    error::{Error, Result},
};

/// Rows of a tile of a sequence of several rows: `BLOCK_M` in attention_prefill.cu.
pub const PREFILL_ROWS: usize = 128;

/// The largest head.
const HEAD_DIM_MAX: usize = 256;
/// Head sizes that the fast kernels are made for.
const FAST_HEADS: [usize; 5] = [64, 80, 96, 128, 256];
/// Warps of a block of attention_decode.cu and pages that each has under way, best first.
const DECODE_RINGS: [(usize, usize); 6] = [(8, 4), (8, 3), (8, 2), (6, 2), (4, 2), (2, 2)];
/// Bytes of shared memory of a block of attention_decode.cu beside the dynamic ones, at most.
const DECODE_STATIC: u32 = 2 << 10;

/// Tokens that a block of attention_prefill.cu is given at least, where they are shared out, and shares at most.
const SHARE_TOKENS: usize = 512;
const SHARES_MAX: usize = 8;
/// Rows of a block of attention_prefill_merge.
const MERGE_ROWS: usize = 4;
/// Head sizes of attention_prefill_wgmma.cu, its block's threads and tokens of a tile.
const WIDE_HEADS: [usize; 2] = [64, 128];
const WIDE_THREADS: u32 = 384;
const WIDE_TOKENS: usize = 128;
/// Bytes of its shared memory beside the dynamic ones, at most.
const WIDE_STATIC: u32 = 1 << 10;

/// Bytes of the kernels' scratch on GPUs of up to 200 multiprocessors, each with two blocks.
pub(super) const SCRATCH_BYTES_MAX: usize = 48 << 20;

/// What the type and the head size allow.
pub(super) enum Kernels {
    Fast(Box<Fast>),
    Plain(Kernel),
}

/// The fast kernels.
pub(super) struct Fast {
    prefill: Prefill,
    /// For up to 8 query heads of a KV head, and for more.
    decode: Vec<Decode>,
}

/// The kernels for several rows, with their scratch.
struct Prefill {
    kernel: Kernel,
    /// Of a block of it.
    threads: u32,
    shared: u32,
    /// In its place, where there is one for the GPU.
    wide: Option<Wide>,
    /// For few rows after many tokens, with what it leaves.
    shares: Shares,
}

/// attention_prefill_wgmma.cu.
struct Wide {
    kernel: Kernel,
    shared: u32,
    /// How many run at once.
    blocks: u32,
}

/// Blocks of attention_prefill.cu that share the tokens of a tile of rows.
struct Shares {
    kernel: Kernel,
    merge: Kernel,
    shared: u32,
    /// How many run at once, and may leave parts.
    blocks: usize,
    parts: DeviceBuf,
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
            (Some(tokens), Some(_)) if fast => Ok(Kernels::Fast(Box::new(Fast::load(load, tokens)?))),
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
            Kernels::Fast(fast) => {
                fast.prefill.shares.parts.bytes()
                    + fast.decode.iter().map(|d| d.parcels.bytes()).sum::<usize>()
            }
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
        // Two tiles of long heads would not fit into the registers: larger groups are taken in several goes.
        let head_tiles = if load.of.head_dim <= 128 { 1..=2 } else { 1..=1 };
        let (prefill, decode) = std::thread::scope(|scope| {
            let decode = head_tiles.map(|tiles| beside(scope, move || Decode::load(load, tiles)));
            let decode = decode.collect::<Result<Vec<_>>>()?;
            let prefill = Prefill::load(load, tokens)?;
            Ok((prefill, decode.into_iter().map(joined).collect::<Result<_>>()?))
        })?;
        Ok(Fast { prefill, decode })
    }
}

impl Prefill {
    fn load(load: &Loading, tokens: usize) -> Result<Prefill> {
        let head_dim = load.of.head_dim;
        // A warp has 32 rows, or 16 where a head is long.
        let threads = if head_dim <= 128 { PREFILL_ROWS } else { 2 * PREFILL_ROWS } as u32;
        let (module, wide, shares) = std::thread::scope(|scope| {
            let wide = beside(scope, || Wide::load(load))?;
            let shares = beside(scope, || Shares::load(load, threads))?;
            Ok((Prefill::module(load, tokens)?, joined(wide)?, joined(shares)?))
        })?;
        let kernel = module.kernel("attention_prefill")?;
        let shared = prefill_shared(head_dim, tokens);
        kernel.allow_shared(shared)?;
        Ok(Prefill { kernel, threads, shared, wide, shares })
    }

    fn module(load: &Loading, tokens: usize) -> Result<Module> {
        let defines = [
            ("DTYPE", load.dtype()),
            ("HEAD_DIM", load.of.head_dim as u32),
            ("BLOCK_M", PREFILL_ROWS as u32),
            ("BLOCK_N", tokens as u32),
        ];
        load.module("attention_prefill.cu", &defines)
    }
}

impl Wide {
    fn load(load: &Loading) -> Result<Option<Wide>> {
        let head_dim = load.of.head_dim;
        // Two stages of queries, keys and values, and what aligns them.
        let shared = (3 * 2 * WIDE_TOKENS * head_dim * 2 + 1024) as u32;
        let room = load.facts.shared_per_block_max >= shared + WIDE_STATIC;
        if load.facts.arch() != "sm_90a" || !WIDE_HEADS.contains(&head_dim) || !room {
            return Ok(None);
        }
        let defines = [("DTYPE", load.dtype()), ("HEAD_DIM", head_dim as u32)];
        let kernel =
            load.module("attention_prefill_wgmma.cu", &defines)?.kernel("attention_prefill_wgmma")?;
        kernel.allow_shared(shared)?;
        Ok(Some(Wide { kernel, shared, blocks: load.facts.multiprocessors }))
    }
}

impl Shares {
    fn load(load: &Loading, threads: u32) -> Result<Shares> {
        let (head_dim, tokens) = (load.of.head_dim, 32);
        let module = Prefill::module(load, tokens)?;
        let kernel = module.kernel("attention_prefill_shares")?;
        let merge = module.kernel("attention_prefill_merge")?;
        let shared = prefill_shared(head_dim, tokens);
        kernel.allow_shared(shared)?;
        let each = kernel.blocks_per_multiprocessor(threads, shared)?.clamp(1, 2);
        let blocks = (load.facts.multiprocessors * each) as usize;
        // `Part`.
        let parts = DeviceBuf::new(load.context, blocks * PREFILL_ROWS * (head_dim + 2) * 4)?;
        Ok(Shares { kernel, merge, shared, blocks, parts })
    }

    /// Among how many blocks the tokens of a tile are shared out, where `pairs` of a head and a tile see up to `reach` tokens.
    fn count(&self, pairs: usize, reach: usize) -> usize {
        (self.blocks / pairs.max(1)).min(reach / SHARE_TOKENS).clamp(1, SHARES_MAX)
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
        let grid = Grid { blocks: [blocks, 1, 1], threads, shared, cluster: 1 };
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
            let grid = Grid {
                blocks: [now.rows_padded as u32, operands.heads, 1],
                threads: 128,
                shared: 0,
                cluster: 1,
            };
            operands.launch(cuda, kernel, grid)
        }
        Kernels::Fast(fast) => {
            if now.single > 0 {
                let group = heads.heads / heads.kv_heads;
                let last = fast.decode.last().expect("one is always loaded; this is a bug");
                operands.decode(cuda, fast.decode.iter().find(|d| group <= d.heads).unwrap_or(last))?;
            }
            if now.tiles == 0 {
                return Ok(());
            }
            let reach = shape.window.map_or(now.reach, |window| now.reach.min(window + PREFILL_ROWS));
            operands.prefill(cuda, &fast.prefill, now.tiles, reach)
        }
    }
}

impl Operands {
    fn launch(&self, cuda: &Cuda, kernel: &Kernel, grid: Grid) -> Result<()> {
        let Operands { out, qkv, keys, values, batch, heads, kv_heads, window, scale } = self;
        // SAFETY: (ptr × 4, Batch, u32 × 3, f32) matches attention_prefill.cu, attention_prefill_wgmma.cu and
        // attention_generic.cu; the sizes have been checked.
        unsafe {
            cuda.launch(
                kernel,
                grid,
                &mut args![*out, *qkv, *keys, *values, *batch, *heads, *kv_heads, *window, *scale],
            )
        }
    }

    fn prefill(&self, cuda: &Cuda, prefill: &Prefill, tiles: usize, reach: usize) -> Result<()> {
        let count = prefill.shares.count(self.heads as usize * tiles, reach);
        let grid = |shares: usize, shared| Grid {
            blocks: [self.heads, tiles as u32, shares as u32],
            threads: prefill.threads,
            shared,
            cluster: 1,
        };
        match (count, &prefill.wide) {
            (1, None) => self.launch(cuda, &prefill.kernel, grid(1, prefill.shared)),
            (1, Some(wide)) => {
                let blocks = [wide.blocks.min(self.heads * tiles as u32), 1, 1];
                let grid = Grid { blocks, threads: WIDE_THREADS, shared: wide.shared, cluster: 1 };
                self.launch(cuda, &wide.kernel, grid)
            }
            _ => self.prefill_shared(cuda, &prefill.shares, grid(count, prefill.shares.shared)),
        }
    }

    fn prefill_shared(&self, cuda: &Cuda, shares: &Shares, grid: Grid) -> Result<()> {
        let Operands { out, qkv, keys, values, batch, heads, kv_heads, window, scale } = self;
        let ([_, tiles, count], parts) = (grid.blocks, shares.parts.ptr());
        // SAFETY: (ptr × 4, Batch, u32 × 3, f32, Part*) as in attention_prefill.cu; the sizes have been checked, and there
        // is a part for each block. One stream uses them, so launches do not meet in them.
        unsafe {
            cuda.launch(
                &shares.kernel,
                grid,
                &mut args![*out, *qkv, *keys, *values, *batch, *heads, *kv_heads, *window, *scale, parts],
            )?
        };
        let blocks = [*heads, tiles, (PREFILL_ROWS / MERGE_ROWS) as u32];
        let grid = Grid { blocks, threads: 32 * MERGE_ROWS as u32, shared: 0, cluster: 1 };
        // SAFETY: (T*, Batch, u32, f32, const Part*, u32) as in attention_prefill.cu; the rest as above.
        unsafe { cuda.launch(&shares.merge, grid, &mut args![*out, *batch, *heads, *scale, parts, count]) }
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
