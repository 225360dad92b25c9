//! Matrix products by cublasLt, with the algorithm for each shape chosen by measurement.
//!
//! The choices are one table for the process, kept on disk: all stages make the same ones, so that a layer's bits do
//! not depend on the stage that it runs in.
#![allow(unsafe_code)]

use std::{
    collections::HashMap,
    ffi::c_void,
    path::PathBuf,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use cudarc::cublaslt::{
    result::{self, CublasError},
    sys::{self, cublasLtMatmulDescAttributes_t, cublasLtMatmulPreferenceAttributes_t, cudaDataType_t},
};

use super::{
    compile::{Fnv, cache_folder, write_aside},
    driver::{Context, DeviceFacts, beside_no_recording},
    memory::{DeviceBuf, DevicePtr, Stream},
    tune,
};
use crate::{
    backend::DType,
    error::{Error, Result},
};

/// Scratch for algorithms that split sums; Hopper's best ones want 32 MiB.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;
/// `CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE`: where an algorithm splits a sum, its parts are added in f32, not in the
/// type of the result.
const SPLIT_SUMS: u32 = 2;

/// `CUBLAS_OP_T`.
const TRANSPOSED: i32 = 1;

/// A product `out[rows, n] = x[rows, k] · w[n, k]ᵀ (+ bias[n]) (+ out)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) n: usize,
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

pub(super) type Algo = [u64; 8];

impl Blas {
    pub(super) fn new(context: Context, facts: &'static DeviceFacts) -> Result<Self> {
        context.enter()?;
        let workspace = DeviceBuf::new(context, WORKSPACE_BYTES)?;
        let handle = handle_of(context)?;
        Ok(Blas { context, facts, handle, workspace, chosen: Mutex::default() })
    }

    /// Bytes of scratch.
    pub(super) fn workspace_bytes(&self) -> usize {
        self.workspace.bytes()
    }

    /// Writes the choices so far to the disk, where the next process finds them.
    pub(super) fn keep_choices() {
        table().write();
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
        // One at a time: whoever comes second finds what the first has measured.
        let mut table = table();
        let key = self.table_key(shape);
        if let Some(algo) = table.get(key)
            && self.usable(plan, &algo)
        {
            return Ok(algo);
        }
        let began = Instant::now();
        let candidates = self.candidates(shape, plan)?;
        let timed = candidates.len() > 1 && tune::is_worth_it(shape, table.spent);
        let mut best = None;
        if timed {
            // Sums would be added again and again: they go to scratch. Other results are overwritten by the product that
            // follows.
            let bytes = if shape.add { shape.rows * shape.n * shape.out.size() } else { 0 };
            let Ok(sums) = DeviceBuf::new(self.context, bytes) else {
                // Whoever has the memory for it chooses better.
                return Ok(candidates[0]);
            };
            let operands = Operands { out: if shape.add { sums.ptr() } else { operands.out }, ..operands };
            // SAFETY: the caller's; the scratch is as large as the output.
            best = unsafe { self.fastest(stream, plan, operands, &candidates)? };
            stream.synchronize()?;
        }
        let algo = best.map_or(candidates[0], |(_, algo)| algo);
        let (count, ms) = (candidates.len(), best.map(|(ms, _)| ms));
        tracing::debug!(?shape, candidates = count, timed, ms, "chosen");
        table.spent += began.elapsed();
        table.put(key, algo, timed || count == 1);
        Ok(algo)
    }

    fn table_key(&self, shape: Shape) -> u128 {
        let mut hash = Fnv::default();
        hash.part(self.facts.name.as_bytes());
        // SAFETY: it only answers.
        hash.part(&unsafe { sys::cublasLtGetVersion() }.to_le_bytes());
        hash.part(format!("{shape:?} {WORKSPACE_BYTES} {SPLIT_SUMS}").as_bytes());
        hash.0
    }

    /// What cublasLt thinks fastest, best first.
    fn candidates(&self, shape: Shape, plan: &Plan) -> Result<Vec<Algo>> {
        let name = |e| failed(self.context, &format!("looking for a way to multiply as {shape:?}"), e);
        let preference = Preference::new().map_err(name)?;
        let wanted = tune::candidates(shape);
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
                wanted as i32,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        outcome.result().map_err(name)?;
        let usable = found[..count as usize].iter().filter(|f| f.state.result().is_ok());
        let found: Vec<Algo> = usable.map(|f| f.algo.data).collect();
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
        outcome.result().is_ok()
            && checked.state.result().is_ok()
            && checked.workspaceSize <= self.workspace.bytes()
    }

    /// SAFETY: as for `multiply`.
    pub(super) unsafe fn run(
        &self,
        stream: &Stream,
        plan: &Plan,
        operands: Operands,
        algo: &Algo,
    ) -> Result<(), CublasError> {
        let (one, beta) = (1f32, if plan.add { 1f32 } else { 0f32 });
        let algo = sys::cublasLtMatmulAlgo_t { data: *algo };
        let at = |p: DevicePtr| p.0 as *mut c_void;
        let _beside = beside_no_recording();
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
                self.workspace.bytes(),
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
        let Shape { rows, n, k, dtype, out, .. } = shape;
        let layout = |dtype, rows: usize, columns: usize| {
            result::create_matrix_layout(data_type(dtype), rows as u64, columns as u64, rows as i64)
        };
        let plan = Plan {
            operation: result::create_matmul_desc(
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cudaDataType_t::CUDA_R_32F,
            )?,
            w: layout(dtype, k, n)?,
            x: layout(dtype, k, rows)?,
            out: layout(out, n, rows)?,
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

/// The choices so far, in the process and on disk.
struct Table {
    path: Option<PathBuf>,
    /// By key, the choice and whether it was made by timing: others are not kept on disk.
    entries: HashMap<u128, (Algo, bool)>,
    /// Whether there are some that the disk does not have.
    changed: bool,
    /// Time that choosing has taken.
    spent: Duration,
}

fn table() -> MutexGuard<'static, Table> {
    static TABLE: OnceLock<Mutex<Table>> = OnceLock::new();
    lock(TABLE.get_or_init(|| Mutex::new(Table::open(cache_folder().map(|f| f.join("matmul.txt"))))))
}

impl Table {
    fn open(path: Option<PathBuf>) -> Table {
        let mut table = Table { path, entries: HashMap::new(), changed: false, spent: Duration::ZERO };
        table.read();
        table
    }

    fn get(&self, key: u128) -> Option<Algo> {
        self.entries.get(&key).map(|(algo, _)| *algo)
    }

    fn put(&mut self, key: u128, algo: Algo, timed: bool) {
        self.entries.insert(key, (algo, timed));
        self.changed |= timed;
    }

    /// Adds what is on disk.
    fn read(&mut self) {
        let text = self.path.as_deref().and_then(|p| std::fs::read_to_string(p).ok()).unwrap_or_default();
        for (key, algo) in text.lines().filter_map(parse_line) {
            self.entries.entry(key).or_insert((algo, true));
        }
    }

    /// Brings the disk what it does not have, beside what other processes have written meanwhile.
    fn write(&mut self) {
        if !std::mem::take(&mut self.changed) {
            return;
        }
        self.read();
        let Some(path) = &self.path else { return };
        let timed = self.entries.iter().filter(|(_, (_, timed))| *timed);
        let mut lines: Vec<String> = timed.map(|(key, (algo, _))| line(*key, algo)).collect();
        lines.sort();
        if let Err(error) = write_aside(path, lines.concat().as_bytes()) {
            tracing::debug!(path = %path.display(), %error, "the choice of algorithms is not kept");
        }
    }
}

/// An entry as text: the key, the algorithm's words and a check of both.
fn line(key: u128, algo: &Algo) -> String {
    let words: Vec<String> = algo.iter().map(|w| format!("{w:016x}")).collect();
    format!("{key:032x} {} {:016x}\n", words.join(" "), check(key, algo))
}

fn check(key: u128, algo: &Algo) -> u64 {
    let mut hash = Fnv::default();
    hash.part(&key.to_le_bytes());
    algo.iter().for_each(|w| hash.part(&w.to_le_bytes()));
    hash.0 as u64
}

fn parse_line(line: &str) -> Option<(u128, Algo)> {
    let mut fields = line.split_ascii_whitespace();
    let key = u128::from_str_radix(fields.next()?, 16).ok()?;
    let mut algo = Algo::default();
    for word in &mut algo {
        *word = u64::from_str_radix(fields.next()?, 16).ok()?;
    }
    let sum = u64::from_str_radix(fields.next()?, 16).ok()?;
    (sum == check(key, &algo)).then_some((key, algo))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_back_and_damaged_ones_do_not() {
        let algo: Algo = std::array::from_fn(|i| (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let text = line(u128::MAX / 3, &algo);
        assert_eq!(parse_line(&text), Some((u128::MAX / 3, algo)));
        let text = text.trim_end();
        for end in 0..text.len() {
            assert_eq!(parse_line(&text[..end]), None, "cut to {end}");
        }
        for i in (0..text.len()).filter(|&i| text.as_bytes()[i] != b' ') {
            let other = if text.as_bytes()[i] == b'0' { "1" } else { "0" };
            let mut damaged = text.to_owned();
            damaged.replace_range(i..i + 1, other);
            assert_eq!(parse_line(&damaged), None, "character {i}");
        }
    }

    #[test]
    fn timed_choices_are_kept_beside_those_of_others() {
        let folder = tempfile::tempdir().unwrap();
        let path = || Some(folder.path().join("matmul.txt"));
        let (mut one, mut other) = (Table::open(path()), Table::open(path()));
        one.put(1, [1; 8], true);
        one.put(2, [2; 8], false);
        other.put(3, [3; 8], true);
        one.write();
        other.write();
        let found = Table::open(path());
        assert_eq!([1, 2, 3].map(|key| found.get(key)), [Some([1; 8]), None, Some([3; 8])]);
        assert_eq!((one.get(2), other.get(1)), (Some([2; 8]), Some([1; 8])));
    }
}
