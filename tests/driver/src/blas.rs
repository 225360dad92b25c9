//! cublasLt: products take as long as on an H200, and their operands must be there.

use std::ffi::{c_int, c_void};

use crate::{
    memory::expect_memory,
    queue::{Effect, Stream, Work},
    state::{SUCCESS, Status, misuse, put},
};

/// What an H200 multiplies at when it has been at it for a while, and what it reads at.
const FLOPS: f64 = 560e12;
const BYTES: f64 = 4.2e12;
const ALGORITHM: u64 = 0x00a1_6031;
const INVALID: Status = 7;
const EXECUTION_FAILED: Status = 13;
const WORKSPACE: usize = 4 << 20;

#[derive(Clone, Copy)]
struct Matrix {
    dtype: c_int,
    rows: u64,
    columns: u64,
}

impl Matrix {
    fn bytes(&self) -> usize {
        let size = match self.dtype {
            0 => 4,
            2 | 14 => 2,
            other => misuse(&format!("a matrix of type {other}")),
        };
        (self.rows * self.columns) as usize * size
    }
}

/// As the library has it.
#[repr(C)]
pub struct Found {
    algorithm: [u64; 8],
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

impl Found {
    fn number(i: u64) -> Found {
        let algorithm = [ALGORITHM, i, 0, 0, 0, 0, 0, 0];
        Found { algorithm, workspace: WORKSPACE, state: SUCCESS, waves: 1.0, reserved: [0; 4] }
    }
}

/// Something that is described by nothing but its address.
unsafe fn make(to: *mut *mut c_void) -> Status {
    // SAFETY: the caller's.
    unsafe { put(to, Box::into_raw(Box::new(0u64)).cast()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtGetVersion() -> usize {
    130_100
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtCreate(handle: *mut *mut c_void) -> Status {
    // SAFETY: the caller's.
    unsafe { make(handle) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescCreate(to: *mut *mut c_void, _compute: c_int, _: c_int) -> Status {
    // SAFETY: the caller's.
    unsafe { make(to) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescSetAttribute(
    _: *mut c_void,
    _: c_int,
    _: *const c_void,
    _: usize,
) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescDestroy(of: *mut c_void) -> Status {
    // SAFETY: the caller's.
    drop(unsafe { Box::from_raw(of.cast::<u64>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceCreate(to: *mut *mut c_void) -> Status {
    // SAFETY: the caller's.
    unsafe { make(to) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceSetAttribute(
    _: *mut c_void,
    _: c_int,
    _: *const c_void,
    _: usize,
) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceDestroy(of: *mut c_void) -> Status {
    // SAFETY: the caller's.
    unsafe { cublasLtMatmulDescDestroy(of) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutCreate(
    to: *mut *mut c_void,
    dtype: c_int,
    rows: u64,
    columns: u64,
    _stride: i64,
) -> Status {
    // SAFETY: the caller's.
    unsafe { put(to, Box::into_raw(Box::new(Matrix { dtype, rows, columns })).cast()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutDestroy(of: *mut c_void) -> Status {
    // SAFETY: the caller's.
    drop(unsafe { Box::from_raw(of.cast::<Matrix>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    _handle: *mut c_void,
    _desc: *mut c_void,
    _a: *mut c_void,
    _b: *mut c_void,
    _c: *mut c_void,
    _d: *mut c_void,
    _preference: *mut c_void,
    wanted: c_int,
    results: *mut Found,
    count: *mut c_int,
) -> Status {
    let found = wanted.min(2);
    for i in 0..found as usize {
        // SAFETY: the caller has room for `wanted`.
        unsafe { results.add(i).write(Found::number(i as u64)) };
    }
    // SAFETY: the caller's.
    unsafe { put(count, found) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulAlgoCheck(
    _handle: *mut c_void,
    _desc: *mut c_void,
    _a: *mut c_void,
    _b: *mut c_void,
    _c: *mut c_void,
    _d: *mut c_void,
    algorithm: *const [u64; 8],
    result: *mut Found,
) -> Status {
    // SAFETY: the caller's.
    let [magic, number, ..] = unsafe { *algorithm };
    if magic != ALGORITHM {
        return INVALID;
    }
    // SAFETY: the caller's.
    unsafe { put(result, Found::number(number)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmul(
    _handle: *mut c_void,
    _desc: *mut c_void,
    _alpha: *const c_void,
    a: u64,
    a_layout: *mut c_void,
    b: u64,
    b_layout: *mut c_void,
    _beta: *const c_void,
    _c: u64,
    _c_layout: *mut c_void,
    d: u64,
    d_layout: *mut c_void,
    algorithm: *const [u64; 8],
    workspace: u64,
    workspace_bytes: usize,
    stream: *mut c_void,
) -> Status {
    // SAFETY: the caller's.
    let (stream, magic) = unsafe { (Stream::of(stream), (*algorithm)[0]) };
    if magic != ALGORITHM || workspace_bytes < WORKSPACE {
        return INVALID;
    }
    // SAFETY: the caller's.
    let [weights, x, out] = [a_layout, b_layout, d_layout].map(|of| unsafe { *of.cast::<Matrix>() });
    if weights.rows != x.rows || out.rows != weights.columns || out.columns != x.columns {
        return INVALID;
    }
    for (at, matrix) in [(a, weights), (b, x), (d, out)] {
        expect_memory(at, matrix.bytes(), "an operand of a product");
    }
    expect_memory(workspace, workspace_bytes, "the workspace of a product");
    let flops = 2.0 * (weights.rows * weights.columns * x.columns) as f64;
    let bytes = (weights.bytes() + x.bytes() + out.bytes()) as f64;
    let seconds = 2e-6 + (flops / FLOPS).max(bytes / BYTES);
    match stream.work(Work { seconds, effect: Effect::Nothing }, "a product") {
        SUCCESS => SUCCESS,
        _ => EXECUTION_FAILED,
    }
}
