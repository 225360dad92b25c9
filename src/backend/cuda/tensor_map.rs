//! What the copy engine has to know of a matrix: `Map` of kernels/tensor_map.cuh.
#![allow(unsafe_code)]

use cudarc::driver::sys;

use super::{Cuda, DevicePtr};
use crate::{backend::DType, error::Result};

/// Columns of a tile: 128 bytes.
pub(super) const COLUMNS: usize = 64;

/// `[rows, columns]` in tiles of so many rows.
pub(super) fn of_rows(
    cuda: &Cuda,
    at: (DevicePtr, DType),
    (rows, columns): (usize, usize),
    tile: u32,
) -> Result<sys::CUtensorMap> {
    new(cuda, at, [columns as u64, rows as u64], [columns as u64], [COLUMNS as u32, tile])
}

/// Numbers of 16 bits, of so many in each direction, that lie so many apart in all but the first, in tiles of such a size.
pub(super) fn new<const RANK: usize, const STRIDES: usize>(
    cuda: &Cuda,
    (at, dtype): (DevicePtr, DType),
    len: [u64; RANK],
    apart: [u64; STRIDES],
    tile: [u32; RANK],
) -> Result<sys::CUtensorMap> {
    use sys::{
        CUtensorMapDataType::*, CUtensorMapFloatOOBfill::*, CUtensorMapInterleave::*,
        CUtensorMapL2promotion::*, CUtensorMapSwizzle::*,
    };
    let dtype = match dtype {
        DType::F16 => CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        _ => CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    cuda.context.enter()?;
    let (bytes, ones) = (apart.map(|numbers| 2 * numbers), [1u32; RANK]);
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: as many sizes as directions, and strides one fewer; the map is written and nothing else.
    let outcome = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            dtype,
            RANK as u32,
            at.0 as *mut _,
            len.as_ptr(),
            bytes.as_ptr(),
            tile.as_ptr(),
            ones.as_ptr(),
            CU_TENSOR_MAP_INTERLEAVE_NONE,
            CU_TENSOR_MAP_SWIZZLE_128B,
            CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    cuda.context.check(&format!("describing numbers of {len:?} in tiles of {tile:?}"), outcome.result())?;
    Ok(map)
}
