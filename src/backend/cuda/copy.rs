//! Numbers from place to place: kernels/copy.cu, and the host.
#![allow(unsafe_code)]

use super::{Buf, Cuda, DevicePtr, Grid, Kernel, Loading, launch::args, memory::Pinned};
use crate::{backend::DType, error::Result};

const THREADS: u32 = 256;

pub(super) struct Kernels {
    copy_f32: Kernel,
}

impl Kernels {
    pub(super) fn load(load: &Loading) -> Result<Kernels> {
        let module = load.module("copy.cu", &[("DTYPE", 0)])?;
        Ok(Kernels { copy_f32: module.kernel("copy_f32")? })
    }
}

/// Copies f32 by a kernel, to memory of this or of another GPU. Both addresses are aligned to 16 bytes.
///
/// SAFETY: this GPU reaches both, they have as many numbers, and they live until the copy has been done.
pub(super) unsafe fn rows(cuda: &Cuda, to: DevicePtr, from: DevicePtr, numbers: usize) -> Result<()> {
    // One vector of 16 bytes a thread, up to four blocks a multiprocessor.
    let blocks =
        (numbers as u64).div_ceil(4 * u64::from(THREADS)).min(4 * u64::from(cuda.facts.multiprocessors));
    let grid = Grid::row(blocks as u32, THREADS);
    // SAFETY: (float*, const float*, u64) as in copy.cu; the rest is the caller's.
    unsafe { cuda.launch(&cuda.kernels.copy.copy_f32, grid, &mut args![to, from, numbers as u64]) }
}

/// Waits for everything in the stream, and brings numbers to the host, widened.
pub(super) fn read(cuda: &Cuda, out: &mut [f32], from: &Buf) -> Result<()> {
    let bytes = out.len() * from.dtype.size();
    let at = from.expect(from.dtype, out.len());
    let pinned = Pinned::new(cuda.context, bytes)?;
    // SAFETY: as many bytes on both sides; they live until the stream has been waited for.
    unsafe { cuda.copy(pinned.ptr(), at, bytes)? };
    cuda.synchronize()?;
    // SAFETY: the copy has been done.
    let bytes = unsafe { &pinned.as_slice()[..bytes] };
    let pair = |b: &[u8]| [b[0], b[1]];
    match from.dtype {
        DType::F32 => {
            let numbers = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            out.iter_mut().zip(numbers).for_each(|(to, v)| *to = v);
        }
        DType::F16 => {
            let numbers = bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes(pair(b)).to_f32());
            out.iter_mut().zip(numbers).for_each(|(to, v)| *to = v);
        }
        DType::BF16 => {
            let numbers = bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes(pair(b)).to_f32());
            out.iter_mut().zip(numbers).for_each(|(to, v)| *to = v);
        }
    }
    Ok(())
}

/// Brings numbers to the GPU, rounded to the buffer's type, and waits until they are there.
pub(super) fn write(cuda: &Cuda, to: &mut Buf, from: &[f32]) -> Result<()> {
    let at = to.expect(to.dtype, from.len());
    let bytes: Vec<u8> = match to.dtype {
        DType::F32 => from.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F16 => from.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
        DType::BF16 => from.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
    };
    let mut pinned = Pinned::new(cuda.context, bytes.len())?;
    // SAFETY: no GPU knows of it yet.
    unsafe { pinned.as_mut_slice().copy_from_slice(&bytes) };
    // SAFETY: as many bytes on both sides; they live until the stream has been waited for.
    unsafe { cuda.copy(at, pinned.ptr(), bytes.len())? };
    cuda.synchronize()
}
