//! Matrix products by cublasLt, with the algorithm for each shape chosen by measurement where rows are few: see `tune`.
//!
//! The choices are one table for the process, kept on disk: all stages make the same ones, so that a layer's bits do
//! not depend on the stage that it runs in.
#![allow(unsafe_code)]

use std::{
    collections::HashMap,
    ffi::c_void,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use cudarc::cublaslt::{
    result::{self, CublasError},
    sys::{self, cublasLtMatmulDescAttributes_t, cublasLtMatmulPreferenceAttributes_t, cudaDataType_t},
};

use super::{
    choices::{self, Found},
    compile::Fnv,
    driver::{Context, DeviceFacts, beside_no_recording},
    gemm,
    memory::{DeviceBuf, DevicePtr, Stream},
    tune,
};
use crate::{
    backend::DType,
    error::{Error, Result},
};

/// Scratch for algorithms that split sums; Hopper's best ones want 32 MiB.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;
/// The same, and what blocks of gemm.cu and gate_up.cu tell each other.
pub(super) const SCRATCH_BYTES: usize = WORKSPACE_BYTES + gemm::LEFT_BYTES;
/// `CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE`: where an algorithm splits a sum, its parts are added in f32, not in the
/// type of the result.
const SPLIT_SUMS: u32 = 2;

/// `CUBLAS_OP_T`.
const TRANSPOSED: i32 = 1;

/// A product `out[rows, n] = x[rows, k] · w[n, k]ᵀ (+ bias[n]) (+ out)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) n: usize,
    /// Numbers from a row of out to the next: `n` or more.
    pub(super) width: usize,
    pub(super) k: usize,
    /// Of x, w and the bias.
    pub(super) dtype: DType,
    /// Of out: `dtype` or f32.
    pub(super) out: DType,
    /// Whether a bias is added. It has out's type.
    pub(super) bias: bool,
    /// Whether what is in `out` is added.
    pub(super) add: bool,
}

/// By this its choice is known in later runs.
impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shape { rows, n, width, k, dtype, out, bias, add } = self;
        let mut shown = f.debug_struct("Shape");
        shown.field("rows", rows).field("n", n).field("k", k).field("dtype", dtype).field("out", out);
        shown.field("bias", bias).field("add", add);
        if width != n { shown.field("width", width).finish() } else { shown.finish() }
    }
}

/// Where the numbers are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operands {
    pub(super) out: DevicePtr,
    pub(super) x: DevicePtr,
    pub(super) w: DevicePtr,
    /// Unused without a bias.
    pub(super) bias: DevicePtr,
}

/// A handle on one stage's stream.
pub(super) struct Blas {
    pub(super) context: Context,
    pub(super) facts: &'static DeviceFacts,
    handle: sys::cublasLtHandle_t,
    workspace: DeviceBuf,
    /// By shape, its choice.
    chosen: Mutex<HashMap<Shape, Algo>>,
}

// SAFETY: a handle may be used from any thread, and the workspace by one stream at a time: the stage's.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// An algorithm, as cublasLt has it.
pub(super) type Algo = [u64; 8];

impl Blas {
    pub(super) fn new(context: Context, facts: &'static DeviceFacts) -> Result<Self> {
        context.enter()?;
        let workspace = DeviceBuf::new(context, SCRATCH_BYTES)?;
        let stream = Stream::new(context)?;
        // SAFETY: as many bytes, of nobody else.
        unsafe { stream.fill(workspace.ptr().add(WORKSPACE_BYTES), 0, gemm::LEFT_BYTES)? };
        stream.synchronize()?;
        let handle = handle_of(context)?;
        Ok(Blas { context, facts, handle, workspace, chosen: Mutex::default() })
    }

    /// Bytes of scratch.
    pub(super) fn workspace_bytes(&self) -> usize {
        self.workspace.bytes()
    }

    /// Scratch for one product at a time.
    pub(super) fn workspace(&self) -> DevicePtr {
        self.workspace.ptr()
    }

    /// `left` of gemm.cu and gate_up.cu, behind the scratch.
    pub(super) fn left(&self) -> DevicePtr {
        self.workspace.ptr().add(WORKSPACE_BYTES)
    }

    /// Writes the choices so far to the disk, where the next process finds them.
    pub(super) fn keep_choices() {
        choices::write();
    }

    /// Enqueues the product.
    ///
    /// SAFETY: the operands have the shape's sizes and live until it has been done.
    pub(super) unsafe fn multiply(&self, stream: &Stream, shape: Shape, operands: Operands) -> Result<()> {
        self.context.enter()?;
        let plan = Plan::new(self.context, shape, operands.bias)?;
        let known = lock(&self.chosen).get(&shape).copied();
        let algo = match known {
            Some(algo) => algo,
            None => {
                // SAFETY: the caller's.
                let algo = unsafe { self.choose(stream, shape, &plan, operands)? };
                lock(&self.chosen).insert(shape, algo);
                algo
            }
        };
        // SAFETY: the caller's.
        unsafe { self.run(stream, &plan, operands, &algo) }
            .map_err(|e| stream.explain(failed(self.context, &format!("multiplying as {shape:?}"), e)))
    }

    /// Takes the shape's algorithm from the table, or measures.
    ///
    /// SAFETY: as for `multiply`.
    unsafe fn choose(&self, stream: &Stream, shape: Shape, plan: &Plan, operands: Operands) -> Result<Algo> {
        let device = self.context.ordinal;
        let measuring = match choices::find(
            self.table_key(&format!("{shape:?} of {}", tune::candidates(shape))),
            device,
            |algo| self.usable(plan, algo),
        ) {
            Found::Known(algo) => return Ok(algo),
            Found::Unknown(measuring) => measuring,
        };
        let candidates = self.candidates(shape, plan)?;
        let timed = candidates.len() > 1 && tune::is_worth_it(shape.rows, measuring.spent());
        let mut best = None;
        if timed {
            // Sums would be added again and again: they go to scratch. Other results are overwritten by the product that
            // follows.
            let bytes = if shape.add { shape.rows * shape.n * shape.out.size() } else { 0 };
            let Ok(sums) = DeviceBuf::new(self.context, bytes) else {
                // A guess, which all stages of this process take.
                measuring.keep(candidates[0], false);
                return Ok(candidates[0]);
            };
            let operands = Operands { out: if shape.add { sums.ptr() } else { operands.out }, ..operands };
            // SAFETY: the caller's; the scratch is as large as the output.
            best = unsafe { self.fastest(stream, plan, operands, &candidates)? };
            stream.synchronize()?;
        }
        let algo = best.map_or(candidates[0], |(_, algo)| algo);
        let (count, ms) = (candidates.len(), best.map(|(ms, _)| ms));
        tracing::debug!(device, ?shape, candidates = count, timed, ms, "chosen");
        measuring.keep(algo, timed);
        Ok(algo)
    }

    /// Where a choice stands in the table.
    pub(super) fn table_key(&self, what: &str) -> u128 {
        let mut hash = Fnv::default();
        hash.part(self.facts.name.as_bytes());
        // SAFETY: it only answers.
        hash.part(&unsafe { sys::cublasLtGetVersion() }.to_le_bytes());
        hash.part(format!("{what} {WORKSPACE_BYTES} {SPLIT_SUMS}").as_bytes());
        hash.0
    }

    /// What cublasLt thinks fastest, best first: as many as are to be tried.
    fn candidates(&self, shape: Shape, plan: &Plan) -> Result<Vec<Algo>> {
        let name = |e| failed(self.context, &format!("looking for a way to multiply as {shape:?}"), e);
        let preference = Preference::new().map_err(name)?;
        // SAFETY: plain data.
        let mut found: [sys::cublasLtMatmulHeuristicResult_t; tune::CANDIDATES] =
            unsafe { std::mem::zeroed() };
        let mut count = 0;
        // SAFETY: all descriptors live; there is room for as many results as said.
        let outcome = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.operation,
                plan.w,
                plan.x,
                plan.out,
                plan.out,
                preference.0,
                tune::CANDIDATES as i32,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        outcome.result().map_err(name)?;
        let usable = found[..count as usize].iter().filter(|f| f.state.result().is_ok());
        let found: Vec<Algo> = usable.map(|f| f.algo.data).take(tune::candidates(shape)).collect();
        match found.is_empty() {
            true => Err(name(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED))),
            false => Ok(found),
        }
    }

    /// Whether an algorithm from the disk fits this shape here.
    fn usable(&self, plan: &Plan, algo: &Algo) -> bool {
        let algo = sys::cublasLtMatmulAlgo_t { data: *algo };
        // SAFETY: plain data, which the call fills.
        let mut checked: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        // SAFETY: all descriptors live.
        let outcome = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.handle,
                plan.operation,
                plan.w,
                plan.x,
                plan.out,
                plan.out,
                &algo,
                &mut checked,
            )
        };
        outcome.result().is_ok() && checked.state.result().is_ok() && checked.workspaceSize <= WORKSPACE_BYTES
    }

    /// SAFETY: as for `multiply`.
    pub(super) unsafe fn run(
        &self,
        stream: &Stream,
        plan: &Plan,
        operands: Operands,
        algo: &Algo,
    ) -> Result<(), CublasError> {
        let _beside = beside_no_recording();
        // SAFETY: the caller's.
        unsafe { self.enqueue(stream, plan, operands, algo) }
    }

    /// The same, beside no recording already.
    ///
    /// SAFETY: as for `multiply`.
    pub(super) unsafe fn enqueue(
        &self,
        stream: &Stream,
        plan: &Plan,
        operands: Operands,
        algo: &Algo,
    ) -> Result<(), CublasError> {
        let (one, beta) = (1f32, if plan.add { 1f32 } else { 0f32 });
        let algo = sys::cublasLtMatmulAlgo_t { data: *algo };
        let at = |p: DevicePtr| p.0 as *mut c_void;
        // SAFETY: the descriptors fit the operands, which the caller vouches for.
        unsafe {
            result::matmul(
                self.handle,
                plan.operation,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                at(operands.w),
                plan.w,
                at(operands.x),
                plan.x,
                at(operands.out),
                plan.out,
                at(operands.out),
                plan.out,
                &algo,
                at(self.workspace.ptr()),
                WORKSPACE_BYTES,
                stream.raw.cast(),
            )
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        Blas::keep_choices();
    }
}

/// A GPU's handle: one for all its users, and kept until the process ends. Destroying one waits for the whole context,
/// which breaks off what any other stage is recording there.
fn handle_of(context: Context) -> Result<sys::cublasLtHandle_t> {
    struct Kept(usize, sys::cublasLtHandle_t);
    // SAFETY: a handle may be used from any thread.
    unsafe impl Send for Kept {}
    static KEPT: Mutex<Vec<Kept>> = Mutex::new(Vec::new());
    let mut kept = lock(&KEPT);
    if let Some(Kept(_, handle)) = kept.iter().find(|Kept(ordinal, _)| *ordinal == context.ordinal) {
        return Ok(*handle);
    }
    let _beside = beside_no_recording();
    let handle = result::create_handle().map_err(|e| failed(context, "opening cublasLt", e))?;
    kept.push(Kept(context.ordinal, handle));
    Ok(handle)
}

fn failed(context: Context, doing: &str, e: CublasError) -> Error {
    Error::Device { device: format!("cuda:{}", context.ordinal), why: format!("{doing}: {:?}", e.0) }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn data_type(dtype: DType) -> cudaDataType_t {
    match dtype {
        DType::F32 => cudaDataType_t::CUDA_R_32F,
        DType::F16 => cudaDataType_t::CUDA_R_16F,
        DType::BF16 => cudaDataType_t::CUDA_R_16BF,
    }
}

/// Descriptors of a product. cublasLt counts by columns: a row-major `[rows, n]` is its `n x rows`.
pub(super) struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    add: bool,
}

impl Plan {
    fn new(context: Context, shape: Shape, bias: DevicePtr) -> Result<Plan> {
        Plan::make(shape, bias).map_err(|e| failed(context, &format!("describing {shape:?}"), e))
    }

    fn make(shape: Shape, bias: DevicePtr) -> Result<Plan, CublasError> {
        let Shape { rows, n, width, k, dtype, out, .. } = shape;
        let wide = |dtype, rows: usize, columns: usize, width: usize| {
            result::create_matrix_layout(data_type(dtype), rows as u64, columns as u64, width as i64)
        };
        let layout = |dtype, rows, columns| wide(dtype, rows, columns, rows);
        let plan = Plan {
            operation: result::create_matmul_desc(
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cudaDataType_t::CUDA_R_32F,
            )?,
            w: layout(dtype, k, n)?,
            x: layout(dtype, k, rows)?,
            out: wide(out, n, rows, width)?,
            add: shape.add,
        };
        use cublasLtMatmulDescAttributes_t::*;
        plan.set(CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if shape.bias {
            plan.set(CUBLASLT_MATMUL_DESC_EPILOGUE, &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
            plan.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias.0)?;
            plan.set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &data_type(out))?;
        }
        Ok(plan)
    }

    fn set<T>(&self, which: cublasLtMatmulDescAttributes_t, value: &T) -> Result<(), CublasError> {
        let at = std::ptr::from_ref(value).cast();
        // SAFETY: the descriptor lives; the value is of the attribute's type.
        unsafe { result::set_matmul_desc_attribute(self.operation, which, at, size_of::<T>()) }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: created in `make`, destroyed here alone.
        unsafe {
            let _ = result::destroy_matmul_desc(self.operation);
            for layout in [self.w, self.x, self.out] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

/// What an algorithm may use.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self, CublasError> {
        use cublasLtMatmulPreferenceAttributes_t::*;
        let preference = Preference(result::create_matmul_pref()?);
        preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
        preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &SPLIT_SUMS)?;
        Ok(preference)
    }

    fn set<T>(&self, which: cublasLtMatmulPreferenceAttributes_t, value: &T) -> Result<(), CublasError> {
        let at = std::ptr::from_ref(value).cast();
        // SAFETY: it lives; the value is of the attribute's type.
        unsafe { result::set_matmul_pref_attribute(self.0, which, at, size_of::<T>()) }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed here alone.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
