//! Random weights, made where they are wanted: kernels/dummy.cu.
#![allow(unsafe_code)]

use super::{Cuda, DevicePtr, Grid, Kernel, Loading, launch::args};
use crate::{backend::Random, error::Result};

const THREADS: u32 = 256;

pub(super) struct Kernels {
    dummy: Kernel,
}

impl Kernels {
    pub(super) fn load(load: &Loading) -> Result<Kernels> {
        let module = load.module("dummy.cu", &[("DTYPE", load.dtype())])?;
        Ok(Kernels { dummy: module.kernel("dummy")? })
    }
}

/// Fills memory with the first `len` of the random numbers, with the bits that the host makes.
///
/// SAFETY: there is room for as many numbers of the model's type, which nobody else uses until the stream has been
/// waited for.
pub(super) unsafe fn fill(cuda: &Cuda, to: DevicePtr, len: usize, random: Random) -> Result<()> {
    // Stacked parts may begin anywhere; vectors are stored from the first whole one on.
    let size = cuda.dtype.size();
    let ahead = ((16 - to.0 as usize % 16) % 16 / size).min(len);
    let rest = (to.add(ahead * size), len - ahead, ahead);
    for (to, len, first) in [(to, ahead, 0), rest] {
        let blocks = len.div_ceil(THREADS as usize * 16 / size).min(64 * cuda.facts.multiprocessors as usize);
        let grid = Grid::row(blocks as u32, THREADS);
        // SAFETY: (T*, u64, u64, float, u64) as in dummy.cu; the rest is the caller's.
        unsafe {
            cuda.launch(
                &cuda.kernels.dummy.dummy,
                grid,
                &mut args![to, len as u64, random.key, random.centre, first as u64],
            )?
        };
    }
    Ok(())
}
