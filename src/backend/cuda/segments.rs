//! The ops of a vision tower: rotation by places, attention within segments, tokens put back in order.
//!
//! Their kernels are compiled for the tower's heads, which are not the decoder's: they are loaded with the room for a
//! tower's places.
#![allow(unsafe_code)]

mod pack;

use self::pack::{Layout, Tiles};
use super::{
    Buf, Cuda, DevicePtr, Grid, Kernel, Loading, Matrix, PipelineFacts, act, copy, launch::args, linear,
    memory::DeviceBuf, norm, patches::Cutter, relay::Relay, row_width, warm_up,
};
use crate::{
    backend::{
        DType, HeadShape, Norm,
        vision::{PatchShape, Pixels, Places, Reach, RowRun, SegmentAttention, VisionOps},
    },
    error::{Error, Result},
};

/// Rows of a tile of a long segment and of a short one: `BLOCK_M` in segment_attention.cu.
const TILE_ROWS: [usize; 2] = [128, 64];
/// `BLOCK_N` there: rows of a short segment at most.
const SHORT_ROWS: usize = 64;
/// The largest head of segment_attention.cu; its numbers are whole sixteens.
const FAST_HEAD_MAX: usize = 128;
/// The largest head of all.
const HEAD_MAX: usize = 256;
/// Threads of a block of it: four warps for tiles of either size.
const TILE_THREADS: u32 = 128;
/// Threads of place_rotations and scatter_cells.
const THREADS: u32 = 128;
/// Numbers that a block of scatter_cells writes: `SPAN`.
const SPAN: usize = 1024;
/// Rows that a block of rope_places takes: `ROWS`.
const ROPE_ROWS: usize = 4;
/// Rows of a block of segment_attention_plain: `WARPS`.
const PLAIN_ROWS: usize = 4;
/// Passes whose places may be on their way at once.
const PASSES: usize = 2;

/// The places of a pass on the GPU, and the kernels that go by them.
pub struct Images {
    kernels: Kernels,
    rows_max: usize,
    head_dim: usize,
    inv_freq: Buf,        // [head_dim / 4]
    rotations: DeviceBuf, // [rows, head_dim / 2] of (cosine, sine)
    packed: Relay,
    now: Layout,
}

/// One file an op.
struct Kernels {
    rotations: Kernel,
    rope: Kernel,
    scatter: Kernel,
    attention: Attention,
}

/// What the type and the head size allow.
enum Attention {
    /// For long segments, and for short ones.
    Fast([Fast; 2]),
    Plain(Kernel),
}

/// segment_attention.cu for tiles of so many rows.
struct Fast {
    kernel: Kernel,
    rows: usize,
    shared: u32,
}

/// Bytes of the room for places of so many rows on the GPU.
pub(super) fn device_bytes(rows_max: usize, head_dim: usize) -> [usize; 2] {
    [rotations_bytes(rows_max, head_dim), Layout::bytes_max(rows_max)]
}

fn rotations_bytes(rows_max: usize, head_dim: usize) -> usize {
    rows_max * head_dim / 2 * 8
}

impl Kernels {
    fn load(load: &Loading) -> Result<Kernels> {
        let head_dim = load.of.head_dim;
        let defines = [("DTYPE", load.dtype()), ("HEAD_DIM", head_dim as u32)];
        let module = load.module("segments.cu", &defines)?;
        let fast = load.of.dtype != DType::F32 && head_dim.is_multiple_of(16) && head_dim <= FAST_HEAD_MAX;
        let attention = match fast {
            true => Attention::Fast([Fast::load(load, TILE_ROWS[0], 2)?, Fast::load(load, TILE_ROWS[1], 1)?]),
            false => {
                let module = load.module("segment_attention_plain.cu", &defines)?;
                Attention::Plain(module.kernel("segment_attention_plain")?)
            }
        };
        Ok(Kernels {
            rotations: module.kernel("place_rotations")?,
            rope: module.kernel("rope_places")?,
            scatter: module.kernel("scatter_cells")?,
            attention,
        })
    }
}

impl Fast {
    /// For tiles of so many rows, of which a warp has `row_tiles` times 16. Tiles of few are of segments that need no second
    /// stage of keys and values.
    fn load(load: &Loading, rows: usize, row_tiles: usize) -> Result<Fast> {
        let head_dim = load.of.head_dim;
        let defines = [
            ("DTYPE", load.dtype()),
            ("HEAD_DIM", head_dim as u32),
            ("BLOCK_M", rows as u32),
            ("ROW_TILES", row_tiles as u32),
        ];
        let kernel = load.module("segment_attention.cu", &defines)?.kernel("segment_attention")?;
        let stages = if rows == TILE_ROWS[0] { 2 } else { 1 };
        let shared = ((rows + stages * 2 * SHORT_ROWS) * (2 * head_dim + 16)) as u32;
        kernel.allow_shared(shared)?;
        Ok(Fast { kernel, rows, shared })
    }
}

impl Images {
    fn new(cuda: &Cuda, rows_max: usize, inv_freq: &[f32]) -> Result<Images> {
        let head_dim = 4 * inv_freq.len();
        if head_dim > HEAD_MAX {
            return Err(cuda.error(format!("heads of {head_dim} numbers; up to {HEAD_MAX} are possible")));
        }
        let of = PipelineFacts { dtype: cuda.dtype, head_dim, seats: 0, in_flight: 0 };
        let load = Loading { context: cuda.context, facts: cuda.facts, of };
        let mut frequencies =
            Buf { memory: cuda.take(4 * inv_freq.len())?.into(), dtype: DType::F32, len: inv_freq.len() };
        copy::write(cuda, &mut frequencies, inv_freq)?;
        Ok(Images {
            kernels: Kernels::load(&load)?,
            rows_max,
            head_dim,
            inv_freq: frequencies,
            rotations: cuda.take(rotations_bytes(rows_max, head_dim))?,
            packed: Relay::new(cuda, Layout::bytes_max(rows_max), PASSES)?,
            now: Layout::default(),
        })
    }

    fn set(&mut self, cuda: &Cuda, from: &Places) -> Result<()> {
        let rows = from.rows.len();
        if rows > self.rows_max {
            let why = format!("{rows} patches where there is room for {}", self.rows_max);
            return Err(Error::Request(why));
        }
        let tile_rows = match self.kernels.attention {
            Attention::Fast(_) => Some((TILE_ROWS, SHORT_ROWS)),
            Attention::Plain(_) => None,
        };
        let mut now = Layout::default();
        self.packed.bring(cuda, |bytes| {
            now = Layout::pack(bytes, from, tile_rows);
            now.bytes
        })?;
        self.now = now;
        self.rotate(cuda)
    }

    /// Fills the table of the pass.
    fn rotate(&self, cuda: &Cuda) -> Result<()> {
        let (table, places) = (self.rotations.ptr(), self.packed.room().ptr());
        let (inv_freq, rows) = (self.inv_freq.f32s(self.head_dim / 4), self.now.rows as u32);
        let numbers = self.now.rows * self.head_dim / 2;
        let grid = Grid::row(numbers.div_ceil(THREADS as usize) as u32, THREADS);
        // SAFETY: (float2*, const uint2*, const float*, u32) as in segments.cu; there is room for `rows_max` rows, which the
        // rows do not exceed.
        unsafe { cuda.launch(&self.kernels.rotations, grid, &mut args![table, places, inv_freq, rows]) }
    }

    /// Where the numbers of the pass's cells are, and how many.
    pub(super) fn cells(&self) -> (DevicePtr, usize) {
        (self.at(self.now.cells_at), self.now.cells)
    }

    /// Panics if heads are others than the kernels are for.
    fn expect(&self, heads: HeadShape) {
        let same = heads.head_dim == self.head_dim && heads.heads == heads.kv_heads;
        assert!(same, "{heads:?} in a tower with heads of {}; this is a bug", self.head_dim);
    }

    fn at(&self, place: usize) -> DevicePtr {
        self.packed.room().ptr().add(place)
    }
}

/// What every launch of attention is given.
struct Operands {
    out: DevicePtr, // [rows, q_dim]
    qkv: DevicePtr, // [rows, qkv_dim]
    heads: u32,
    scale: f32,
}

impl Operands {
    fn fast(&self, cuda: &Cuda, fast: &Fast, images: &Images, tiles: Tiles) -> Result<()> {
        let Operands { out, qkv, heads, scale } = *self;
        let grid = Grid {
            blocks: [tiles.count as u32 * heads, 1, 1],
            threads: TILE_THREADS,
            shared: fast.shared,
            cluster: 1,
        };
        let tiles = images.at(tiles.at);
        // SAFETY: (T*, const T*, const uint4*, u32, float) as in segment_attention.cu; the buffers have been checked, and
        // tiles lie within the rows.
        unsafe { cuda.launch(&fast.kernel, grid, &mut args![out, qkv, tiles, heads, scale]) }
    }

    fn plain(&self, cuda: &Cuda, kernel: &Kernel, images: &Images, segments: usize) -> Result<()> {
        let Operands { out, qkv, heads, scale } = *self;
        let rows = images.now.rows;
        let blocks = [rows.div_ceil(PLAIN_ROWS) as u32, heads, 1];
        let grid = Grid { blocks, threads: 32 * PLAIN_ROWS as u32, shared: 0, cluster: 1 };
        let (segments, rows) = (images.at(segments), rows as u32);
        // SAFETY: (T*, const T*, const uint2*, u32, u32, float) as in segment_attention_plain.cu; the buffers have been
        // checked, and each row has its segment.
        unsafe { cuda.launch(kernel, grid, &mut args![out, qkv, segments, rows, heads, scale]) }
    }
}

impl VisionOps for Cuda {
    type Images = Images;
    type Cutter = Cutter;

    fn rows_tried(&self, rows_max: usize) -> Vec<usize> {
        warm_up::tower_rows(rows_max)
    }

    fn images(&self, rows_max: usize, inv_freq: &[f32]) -> Result<Images> {
        Images::new(self, rows_max, inv_freq)
    }

    fn set_images(&self, images: &mut Images, from: &Places) -> Result<()> {
        images.set(self, from)
    }

    fn cutter(&self, rows_max: usize, shape: PatchShape) -> Result<Cutter> {
        Cutter::new(self, rows_max, shape)
    }

    fn cut(&self, out: &mut Buf, cutter: &mut Cutter, images: &Images, from: &[Pixels<'_>]) -> Result<()> {
        cutter.cut(self, out, images, from)
    }

    fn row_width(&self, len: usize) -> usize {
        row_width(len, self.dtype)
    }

    fn copy_rows(&self, to: &mut Buf, from: &Buf, run: RowRun) -> Result<()> {
        let RowRun { from: first, to: at, rows, dim } = run;
        let from = from.expect(DType::F32, (first + rows) * dim).add(4 * first * dim);
        let to = to.expect(DType::F32, (at + rows) * dim).add(4 * at * dim);
        // SAFETY: both buffers have been checked to reach so far.
        unsafe { Cuda::copy_rows(self, to, from, rows * dim) }
    }

    fn linear(&self, out: &mut Buf, x: &Buf, w: &Matrix, rows: usize) -> Result<()> {
        linear::linear(self, out, x, w, rows)
    }

    fn norm(&self, out: &mut Buf, x: &Buf, norm: Norm<'_, Self>) -> Result<()> {
        norm::rms_norm(self, out, x, norm)
    }

    fn gelu(&self, x: &mut Buf, len: usize) -> Result<()> {
        act::gelu(self, x, len)
    }

    fn rope_places(&self, qkv: &mut Buf, images: &Images, shape: HeadShape) -> Result<()> {
        images.expect(shape);
        let rows = images.now.rows;
        let (qkv, table) = (qkv.expect(self.dtype, rows * shape.qkv_dim()), images.rotations.ptr());
        let pieces = rope_pieces(shape.head_dim, self.dtype);
        // As many heads as a block of up to 256 threads has room for.
        let together = (256 / pieces).clamp(1, 2 * shape.heads);
        let blocks = [rows.div_ceil(ROPE_ROWS) as u32, (2 * shape.heads).div_ceil(together) as u32, 1];
        let grid = Grid { blocks, threads: (together * pieces) as u32, shared: 0, cluster: 1 };
        let (rows, heads) = (rows as u32, shape.heads as u32);
        // SAFETY: (T*, const float2*, u32, u32) as in segments.cu; the buffer has been checked, and the table is of as many
        // rows.
        unsafe { self.launch(&images.kernels.rope, grid, &mut args![qkv, table, rows, heads]) }
    }

    fn segment_attention(
        &self,
        out: &mut Buf,
        qkv: &Buf,
        images: &Images,
        shape: SegmentAttention,
    ) -> Result<()> {
        images.expect(shape.heads);
        let rows = images.now.rows;
        let operands = Operands {
            out: out.expect(self.dtype, rows * shape.heads.q_dim()),
            qkv: qkv.expect(self.dtype, rows * shape.heads.qkv_dim()),
            heads: shape.heads.heads as u32,
            scale: shape.scale,
        };
        let tiles = match shape.reach {
            Reach::Window => images.now.windows,
            Reach::Frame => images.now.frames,
        };
        match &images.kernels.attention {
            Attention::Fast(both) => {
                let fast = both.iter().find(|fast| fast.rows == tiles.rows);
                operands.fast(self, fast.expect("tiles of either size; this is a bug"), images, tiles)
            }
            Attention::Plain(kernel) => operands.plain(self, kernel, images, tiles.at),
        }
    }

    fn scatter_cells(&self, out: &mut Buf, x: &Buf, images: &Images, dim: usize) -> Result<()> {
        let count = images.now.cells;
        let (to, from) = (out.expect(DType::F32, count * dim), x.expect(DType::F32, count * dim));
        let grid = Grid {
            blocks: [count as u32, dim.div_ceil(SPAN) as u32, 1],
            threads: THREADS,
            shared: 0,
            cluster: 1,
        };
        let (cells, dim) = (images.cells().0, dim as u32);
        // SAFETY: (float*, const float*, const u32*, u32) as in segments.cu; the buffers have been checked, and cells are
        // numbers below their count.
        unsafe { self.launch(&images.kernels.scatter, grid, &mut args![to, from, cells, dim]) }
    }
}

/// `PIECES` in segments.cu: threads that share a head.
fn rope_pieces(head_dim: usize, dtype: DType) -> usize {
    let half = head_dim / 2;
    let wide = 16 / dtype.size();
    let together = [8, 4, 2, 1].into_iter().find(|&n| n <= wide && half.is_multiple_of(n));
    half / together.unwrap_or(1)
}
