//! The same device, for a vision tower.

use super::{Faulty, norm};
use crate::{
    backend::{
        HeadShape, Norm,
        cpu::Cpu,
        vision::{PatchShape, Pixels, Places, RowRun, SegmentAttention, VisionOps},
    },
    error::Result,
    pipeline::Point,
};

impl<const ASYNC: bool> VisionOps for Faulty<ASYNC> {
    type Images = <Cpu as VisionOps>::Images;
    type Cutter = <Cpu as VisionOps>::Cutter;

    fn images(&self, rows_max: usize, inv_freq: &[f32]) -> Result<Self::Images> {
        self.at(Point::Load)?;
        self.cpu.images(rows_max, inv_freq)
    }

    fn set_images(&self, images: &mut Self::Images, from: &Places) -> Result<()> {
        self.cpu.set_images(images, from)
    }

    fn cutter(&self, rows_max: usize, shape: PatchShape) -> Result<Self::Cutter> {
        self.cpu.cutter(rows_max, shape)
    }

    fn cut(
        &self,
        out: &mut Self::Buf,
        cutter: &mut Self::Cutter,
        images: &Self::Images,
        from: &[Pixels<'_>],
    ) -> Result<()> {
        self.cpu.cut(out, cutter, images, from)
    }

    fn rows_tried(&self, rows_max: usize) -> Vec<usize> {
        self.cpu.rows_tried(rows_max)
    }

    fn row_width(&self, len: usize) -> usize {
        self.cpu.row_width(len)
    }

    fn linear(&self, out: &mut Self::Buf, x: &Self::Buf, w: &Self::Matrix, rows: usize) -> Result<()> {
        self.cpu.linear(out, x, w, rows)
    }

    fn norm(&self, out: &mut Self::Buf, x: &Self::Buf, of: Norm<'_, Self>) -> Result<()> {
        self.cpu.norm(out, x, norm(&of))
    }

    fn gelu(&self, x: &mut Self::Buf, len: usize) -> Result<()> {
        self.cpu.gelu(x, len)
    }

    fn rope_places(&self, qkv: &mut Self::Buf, images: &Self::Images, heads: HeadShape) -> Result<()> {
        self.cpu.rope_places(qkv, images, heads)
    }

    fn segment_attention(
        &self,
        out: &mut Self::Buf,
        qkv: &Self::Buf,
        images: &Self::Images,
        shape: SegmentAttention,
    ) -> Result<()> {
        self.at(Point::Tower)?;
        self.cpu.segment_attention(out, qkv, images, shape)
    }

    fn scatter_cells(
        &self,
        out: &mut Self::Buf,
        x: &Self::Buf,
        images: &Self::Images,
        dim: usize,
    ) -> Result<()> {
        self.cpu.scatter_cells(out, x, images, dim)
    }

    fn copy_rows(&self, to: &mut Self::Buf, from: &Self::Buf, run: RowRun) -> Result<()> {
        self.at(Point::Keep)?;
        self.cpu.copy_rows(to, from, run)
    }
}
