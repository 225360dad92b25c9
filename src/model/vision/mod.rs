//! The vision tower's forward pass, over the ops of a backend.

mod spec;
mod units;

use std::{ops::Range, sync::Arc};

pub use spec::VisionSpec;
pub use units::{VisionPass, VisionUnit, vision_buffer_sizes, vision_units};

use super::weights::Weights;
use crate::{
    backend::{
        self, DType, NormShape, Tensor,
        vision::{Pixels, Places, Reach, SegmentAttention, VisionOps},
    },
    error::Result,
    grid::Grid,
};

/// What a tower, or a part of one, is loaded from and how large its passes may be.
#[derive(Clone)]
pub struct TowerConfig {
    /// The whole tower.
    pub spec: Arc<VisionSpec>,
    /// Its tensors, among the model's.
    pub weights: Arc<Weights>,
    /// The blocks that this part holds.
    pub blocks: Range<usize>,
    /// How weights are kept.
    pub dtype: DType,
    /// Patches of a pass.
    pub rows_max: usize,
}

/// Consecutive blocks, before the first one the patches' embedding, after the last one the merger.
pub struct Tower<B: VisionOps> {
    spec: Arc<VisionSpec>,
    embed: Option<Embed<B>>,
    blocks: Vec<Block<B>>,
    merger: Option<Merger<B>>,
    images: B::Images,
    places: Places,
    scratch: Scratch<B>,
}

struct Embed<B: VisionOps> {
    matrix: B::Matrix, // [dim, patch_dim]
    patches: B::Buf,   // [rows, patch_dim]
    cutter: B::Cutter,
}

struct Block<B: VisionOps> {
    attn_norm: B::Buf,  // [dim]
    qkv: B::Matrix,     // [3 * dim, dim]
    out: B::Matrix,     // [dim, dim]
    mlp_norm: B::Buf,   // [dim]
    gate_up: B::Matrix, // [2 * width, dim]
    down: B::Matrix,    // [dim, width]
    reach: Reach,
}

struct Merger<B: VisionOps> {
    norm: B::Buf,    // [dim]
    up: B::Matrix,   // [cell_rows * dim, cell_rows * dim]
    down: B::Matrix, // [out, cell_rows * dim]
    wide: B::Buf,    // [cells, cell_rows * dim]
    merged: B::Buf,  // [cells, out]
    tokens: B::Buf,  // [cells, out], in the images' own order
}

/// Buffers of a pass, made once.
struct Scratch<B: VisionOps> {
    hidden: B::Buf,  // [rows, dim]: what crosses boundaries
    normed: B::Buf,  // [rows, dim]
    qkv: B::Buf,     // [rows, 3 * dim]
    attn: B::Buf,    // [rows, dim]
    gate_up: B::Buf, // [rows, 2 * width]: as wide as the backend wants rows of `ffn` numbers
    act: B::Buf,     // [rows, width]
}

impl<B: VisionOps> Tower<B> {
    /// Loads the blocks' tensors, and only those.
    pub fn load(backend: &B, config: &TowerConfig) -> Result<Self> {
        let (spec, weights) = (config.spec.clone(), &*config.weights);
        let loader = Loader { backend, weights, prefix: prefix(weights), dtype: config.dtype };
        let rows = backend.rows_room(config.rows_max);
        let embed = match config.blocks.start {
            0 => Some(loader.embed(&spec, (rows, config.rows_max))?),
            _ => None,
        };
        let blocks = config.blocks.clone().map(|i| loader.block(&spec, i)).collect::<Result<_>>()?;
        let merger = match config.blocks.end == spec.full.len() {
            true => Some(loader.merger(&spec, rows)?),
            false => None,
        };
        backend.loaded()?;
        let working = |dim: usize| backend.working_buf(rows * dim);
        let width = backend.row_width(spec.ffn);
        let scratch = Scratch {
            hidden: backend.buf(rows * spec.dim)?,
            normed: working(spec.dim)?,
            qkv: working(spec.heads.qkv_dim())?,
            attn: working(spec.dim)?,
            gate_up: working(2 * width)?,
            act: working(width)?,
        };
        let images = backend.images(config.rows_max, &spec.inv_freq())?;
        Ok(Tower { spec, embed, blocks, merger, images, places: Places::default(), scratch })
    }

    /// Says which images and videos the next pass has.
    pub fn set(&mut self, backend: &B, grids: &[Grid]) -> Result<()> {
        self.places = Places::new(grids, self.spec.merge as u32, self.spec.window as u32);
        backend.set_images(&mut self.images, &self.places)
    }

    /// Brings the pixels of all images, which are cut there; for the part with the embedding.
    pub fn write_pixels(&mut self, backend: &B, pixels: &[Pixels<'_>]) -> Result<()> {
        let Embed { patches, cutter, .. } =
            self.embed.as_mut().expect("pixels come to the first part; this is a bug");
        backend.cut(patches, cutter, &self.images, pixels)
    }

    /// Brings patches that have been cut already, in the images' own order.
    pub fn write_patches(&mut self, backend: &B, patches: &[f32]) -> Result<()> {
        let embed = self.embed.as_mut().expect("patches come to the first part; this is a bug");
        let cell = self.spec.cell_rows() * self.spec.patch_dim();
        assert_eq!(patches.len(), self.places.cells.len() * cell, "patches of other images; this is a bug");
        // Put in order here, they need not be on the device.
        let mut ordered = Vec::with_capacity(patches.len());
        for &i in &self.places.cells {
            ordered.extend_from_slice(&patches[i as usize * cell..][..cell]);
        }
        backend.write(&mut embed.patches, &ordered)
    }

    /// What goes into the first block of this part, unless it has the embedding, and comes out of its last one.
    pub fn hidden(&mut self) -> &mut B::Buf {
        &mut self.scratch.hidden
    }

    /// Runs the part.
    pub fn forward(&mut self, backend: &B) -> Result<()> {
        let all: Vec<usize> = (0..self.blocks.len()).collect();
        self.run(backend, &all)
    }

    /// Runs some of its blocks, with what is before and behind them.
    fn run(&mut self, backend: &B, blocks: &[usize]) -> Result<()> {
        // What pads the rows may be anything: no row takes from it.
        let rows = backend.rows_room(self.places.rows.len());
        if let Some(embed) = &self.embed {
            backend.linear(&mut self.scratch.hidden, &embed.patches, &embed.matrix, rows)?;
        }
        for &block in blocks {
            self.blocks[block].forward(backend, &self.spec, &self.images, &mut self.scratch, rows)?;
        }
        if let Some(merger) = &mut self.merger {
            merger.forward(backend, &self.spec, &self.images, &mut self.scratch, rows)?;
        }
        Ok(())
    }

    /// Lets the device try what passes will ask for, so that no image waits for it.
    pub fn warm_up(&mut self, backend: &B, rows_max: usize) -> Result<()> {
        let (merge, cell) = (self.spec.merge as u32, self.spec.cell_rows());
        for rows in backend.rows_tried(rows_max) {
            let cells = (rows / cell).max(1) as u32;
            let grid = Grid { t: 1, h: merge, w: cells * merge };
            self.set(backend, &[grid])?;
            if cells == 1 && self.embed.is_some() {
                let side = self.spec.patch;
                let frames = [vec![0; 3 * side * side * cell]];
                self.write_pixels(backend, &[Pixels { grid, frames: &frames, levels: &[[0.0; 256]; 3] }])?;
            }
            // All blocks of a reach want the same.
            let of = |reach| self.blocks.iter().position(|block| block.reach == reach);
            let blocks: Vec<usize> = [of(Reach::Window), of(Reach::Frame)].into_iter().flatten().collect();
            self.run(backend, &blocks)?;
        }
        Ok(())
    }

    /// The tokens of all images, in their own order; of the part with the merger.
    pub fn tokens(&self) -> &B::Buf {
        &self.merger.as_ref().expect("tokens are the last part's; this is a bug").tokens
    }
}

impl<B: VisionOps> Block<B> {
    fn forward(
        &self,
        backend: &B,
        spec: &VisionSpec,
        images: &B::Images,
        s: &mut Scratch<B>,
        rows: usize,
    ) -> Result<()> {
        let heads = spec.heads;
        let scale = 1.0 / (heads.head_dim as f32).sqrt();
        let norm = norm(&self.attn_norm, spec, rows);
        backend.norm_linear(&mut s.qkv, &mut s.normed, &s.hidden, norm, &self.qkv)?;
        backend.rope_places(&mut s.qkv, images, heads)?;
        let shape = SegmentAttention { heads, scale, reach: self.reach };
        backend.segment_attention(&mut s.attn, &s.qkv, images, shape)?;
        backend.linear_add(&mut s.hidden, &s.attn, &self.out, rows)?;
        let scratch = (&mut s.normed, &mut s.gate_up);
        let norm = self::norm(&self.mlp_norm, spec, rows);
        backend.norm_gate_up(&mut s.act, scratch, &s.hidden, norm, &self.gate_up)?;
        backend.linear_add(&mut s.hidden, &s.act, &self.down, rows)
    }
}

impl<B: VisionOps> Merger<B> {
    fn forward(
        &mut self,
        backend: &B,
        spec: &VisionSpec,
        images: &B::Images,
        s: &mut Scratch<B>,
        rows: usize,
    ) -> Result<()> {
        let cells = rows / spec.cell_rows();
        backend.norm(&mut s.normed, &s.hidden, norm(&self.norm, spec, rows))?;
        // The rows of a cell, one after another, are a row here.
        backend.linear(&mut self.wide, &s.normed, &self.up, cells)?;
        backend.gelu(&mut self.wide, cells * spec.cell_rows() * spec.dim)?;
        backend.linear(&mut self.merged, &self.wide, &self.down, cells)?;
        backend.scatter_cells(&mut self.tokens, &self.merged, images, spec.out)
    }
}

fn norm<'a, B: VisionOps>(w: &'a B::Buf, spec: &VisionSpec, rows: usize) -> backend::Norm<'a, B> {
    backend::Norm { w, shape: NormShape { rows, dim: spec.dim, eps: VisionSpec::EPS } }
}

/// Older checkpoints have the tower beside the language model, newer ones both within `model`.
fn prefix(weights: &Weights) -> &'static str {
    const NEW: &str = "model.visual.";
    if weights.has(&format!("{NEW}patch_embed.proj.weight")) { NEW } else { "visual." }
}

struct Loader<'a, B: VisionOps> {
    backend: &'a B,
    weights: &'a Weights,
    prefix: &'static str,
    dtype: DType,
}

impl<B: VisionOps> Loader<'_, B> {
    fn embed(&self, spec: &VisionSpec, (rows, rows_max): (usize, usize)) -> Result<Embed<B>> {
        let shape = [spec.dim, VisionSpec::COLORS, spec.frames, spec.patch, spec.patch];
        let mut tensor = self.tensor("patch_embed.proj.weight", &shape)?.to_dtype(self.dtype)?;
        // A convolution whose steps are as long as it is: a row of pixels is a patch.
        tensor.shape = vec![spec.dim, spec.patch_dim()];
        let matrix = self.backend.matrix(&[tensor], &[])?;
        let patches = self.backend.working_buf(rows * spec.patch_dim())?;
        Ok(Embed { matrix, patches, cutter: self.backend.cutter(rows_max, spec.patch_shape())? })
    }

    fn block(&self, spec: &VisionSpec, i: usize) -> Result<Block<B>> {
        let name = |rest: &str| format!("blocks.{i}.{rest}");
        let (dim, ffn, width) = (spec.dim, spec.ffn, self.backend.row_width(spec.ffn));
        Ok(Block {
            attn_norm: self.vector(&name("norm1"), dim)?,
            qkv: self.matrix(&[&name("attn.qkv")], 3 * dim, dim)?,
            out: self.matrix(&[&name("attn.proj")], dim, dim)?,
            mlp_norm: self.vector(&name("norm2"), dim)?,
            gate_up: self.padded(
                &[&name("mlp.gate_proj"), &name("mlp.up_proj")],
                [ffn, dim],
                [width, dim],
            )?,
            down: self.padded(&[&name("mlp.down_proj")], [dim, ffn], [dim, width])?,
            reach: if spec.full[i] { Reach::Frame } else { Reach::Window },
        })
    }

    fn merger(&self, spec: &VisionSpec, rows: usize) -> Result<Merger<B>> {
        let cells = rows / spec.cell_rows();
        let wide = spec.cell_rows() * spec.dim;
        Ok(Merger {
            norm: self.vector("merger.ln_q", spec.dim)?,
            up: self.matrix(&["merger.mlp.0"], wide, wide)?,
            down: self.matrix(&["merger.mlp.2"], spec.out, wide)?,
            wide: self.backend.working_buf(cells * wide)?,
            merged: self.backend.buf(cells * spec.out)?,
            tokens: self.backend.buf(cells * spec.out)?,
        })
    }

    fn vector(&self, name: &str, len: usize) -> Result<B::Buf> {
        self.backend.vector(&self.tensor(&format!("{name}.weight"), &[len])?)
    }

    /// Matrices `[n, k]` under each other, with their biases.
    fn matrix(&self, names: &[&str], n: usize, k: usize) -> Result<B::Matrix> {
        self.padded(names, [n, k], [n, k])
    }

    /// The same, with zeros up to another size.
    fn padded(&self, names: &[&str], [n, k]: [usize; 2], to: [usize; 2]) -> Result<B::Matrix> {
        let weight = |name: &&str| self.tensor(&format!("{name}.weight"), &[n, k])?.to_dtype(self.dtype);
        let part = |name: &&str| weight(name)?.padded(&to);
        let bias = |name: &&str| self.tensor(&format!("{name}.bias"), &[n])?.padded(&to[..1]);
        let parts: Vec<Tensor> = names.iter().map(part).collect::<Result<_>>()?;
        let biases: Vec<Tensor> = names.iter().map(bias).collect::<Result<_>>()?;
        self.backend.matrix(&parts, &biases)
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.weights.tensor(&format!("{}{name}", self.prefix), shape)
    }
}
