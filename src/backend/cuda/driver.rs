//! The driver, its devices and their contexts.
#![allow(unsafe_code)]

use std::{
    cell::Cell,
    sync::{Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard},
};

use cudarc::{
    cublaslt,
    driver::{
        result,
        sys::{self, CUdevice_attribute},
    },
    nvrtc,
};

use super::lost;
use crate::error::{Error, Result};

/// The oldest driver that knows what is asked of it: graphs with programmatic launches, CUDA 12.3.
const DRIVER_MIN: i32 = 12_030;
/// The oldest GPUs with the instructions that the kernels use (Ampere).
const COMPUTE_MIN: (i32, i32) = (8, 0);

/// What a GPU is.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct DeviceFacts {
    /// Its number.
    pub ordinal: usize,
    /// As its maker calls it.
    pub name: String,
    /// Compute capability.
    pub compute: (i32, i32),
    /// Bytes of memory.
    pub memory_bytes: usize,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of the second-level cache.
    pub l2_bytes: usize,
    /// Bytes of shared memory that a block may ask for.
    pub shared_per_block_max: u32,
}

impl DeviceFacts {
    /// What an H200 is, as far as kernels are planned by it.
    #[cfg(test)]
    pub(super) fn h200() -> DeviceFacts {
        DeviceFacts {
            ordinal: 0,
            name: String::new(),
            compute: (9, 0),
            memory_bytes: 0,
            multiprocessors: 132,
            l2_bytes: 0,
            shared_per_block_max: 227 << 10,
        }
    }

    /// The architecture that kernels are compiled for. From Hopper on instructions of that very architecture are
    /// allowed.
    pub fn arch(&self) -> String {
        let (major, minor) = self.compute;
        let suffix = if major >= 9 { "a" } else { "" };
        format!("sm_{major}{minor}{suffix}")
    }

    /// Whether kernels can be compiled for it.
    pub fn usable(&self) -> bool {
        self.compute >= COMPUTE_MIN
    }

    /// Whether kernels may start before the one before them has ended.
    pub fn overlaps_launches(&self) -> bool {
        self.compute >= (9, 0)
    }
}

/// All GPUs. An error says what is missing.
pub fn devices() -> Result<&'static [DeviceFacts]> {
    static FOUND: OnceLock<Result<Vec<DeviceFacts>>> = OnceLock::new();
    FOUND.get_or_init(find).as_deref().map_err(Error::clone)
}

/// Whether there is a driver, whatever else may be missing.
pub fn driver_present() -> bool {
    // SAFETY: it opens the driver's library, which is trusted as every program on the machine trusts it.
    unsafe { sys::is_culib_present() }
}

/// An error of the GPUs in general.
pub(super) fn none(why: impl Into<String>) -> Error {
    Error::Device { device: "cuda".into(), why: why.into() }
}

fn find() -> Result<Vec<DeviceFacts>> {
    // SAFETY: they open libraries, whose initialisers are trusted as every program on the machine trusts them.
    let (compiler, blas) = unsafe { (nvrtc::sys::is_culib_present(), cublaslt::sys::is_culib_present()) };
    let driver = driver_present();
    let missing = match (driver, compiler, blas) {
        (false, ..) => "libcuda.so.1 is not there: no NVIDIA driver is installed",
        (_, false, _) => {
            "libnvrtc.so is not there: it comes with the CUDA toolkit, or as the package nvidia-cuda-nvrtc"
        }
        (_, _, false) => {
            "libcublasLt.so is not there: it comes with the CUDA toolkit, or as the package nvidia-cublas"
        }
        _ => "",
    };
    if !missing.is_empty() {
        return Err(none(missing));
    }
    let mut version = 0;
    // SAFETY: writes one number.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(said)?;
    if version < DRIVER_MIN {
        let show = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
        let (have, want) = (show(version), show(DRIVER_MIN));
        return Err(none(format!("the driver is for CUDA {have}, and at least {want} is needed")));
    }
    result::init().map_err(said)?;
    let count = result::device::get_count().map_err(said)?;
    if count == 0 {
        return Err(none("the driver sees no GPU"));
    }
    (0..count).map(|i| facts(i as usize).map_err(|e| failed(i as usize, "asking for its facts", e))).collect()
}

fn said(e: result::DriverError) -> Error {
    none(message(e))
}

fn message(e: result::DriverError) -> String {
    let text = e.error_string().ok().and_then(|s| s.to_str().ok()).unwrap_or("an unknown error");
    format!("{text} ({:?})", e.0)
}

/// An error of one GPU.
pub(super) fn failed(ordinal: usize, doing: &str, e: result::DriverError) -> Error {
    Error::Device { device: format!("cuda:{ordinal}"), why: format!("{doing}: {}", message(e)) }
}

fn facts(ordinal: usize) -> Result<DeviceFacts, result::DriverError> {
    use CUdevice_attribute::*;
    let device = result::device::get(ordinal as i32)?;
    // SAFETY: the device exists.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) };
    Ok(DeviceFacts {
        ordinal,
        name: result::device::get_name(device)?,
        compute: (
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // SAFETY: the device exists.
        memory_bytes: unsafe { result::device::total_mem(device)? },
        multiprocessors: attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
        l2_bytes: attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        shared_per_block_max: attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
    })
}

/// Says what a GPU is used with.
fn tell(facts: &DeviceFacts) {
    let (mut cuda, mut major, mut minor) = (0, 0, 0);
    // SAFETY: they write one number and two.
    unsafe {
        let _ = sys::cuDriverGetVersion(&mut cuda);
        let _ = nvrtc::sys::nvrtcVersion(&mut major, &mut minor);
    }
    let driver = std::fs::read_to_string("/sys/module/nvidia/version").unwrap_or_default();
    tracing::info!(
        device = format!("cuda:{}", facts.ordinal),
        name = facts.name,
        arch = facts.arch(),
        driver = driver.trim(),
        cuda = format!("{}.{}", cuda / 1000, cuda % 1000 / 10),
        nvrtc = format!("{major}.{minor}"),
        // SAFETY: it only answers.
        cublaslt = unsafe { cublaslt::sys::cublasLtGetVersion() },
        "opened"
    );
}

/// Passes are recorded with nobody else in the driver for what may make it wait for a whole context: taking and giving
/// back memory, loading code, and first launches, which load code. It refuses that while a stream of the context is being
/// recorded, whoever asks.
static RECORDING: RwLock<()> = RwLock::new(());

thread_local! {
    /// Whether this thread is recording a pass.
    static RECORDS: Cell<bool> = const { Cell::new(false) };
}

/// Calls what records a pass, with nobody else inside.
pub(super) fn alone<T>(record: impl FnOnce() -> T) -> T {
    /// Says at the end, also of a panic, that the thread records no more.
    struct Records;
    impl Drop for Records {
        fn drop(&mut self) {
            RECORDS.set(false);
        }
    }
    let _alone = RECORDING.write().unwrap_or_else(PoisonError::into_inner);
    RECORDS.set(true);
    let _records = Records;
    record()
}

/// Whether this thread is recording a pass.
pub(super) fn recording() -> bool {
    RECORDS.get()
}

/// Held around a single call that must not meet a recording of another thread. Never two at a time by one thread.
pub(super) fn beside_no_recording() -> Option<RwLockReadGuard<'static, ()>> {
    (!RECORDS.get()).then(|| RECORDING.read().unwrap_or_else(PoisonError::into_inner))
}

/// A GPU's context: the one that all users of it in this process share. It is kept until the process ends.
#[derive(Clone, Copy)]
pub(super) struct Context {
    pub(super) raw: sys::CUcontext,
    pub(super) device: sys::CUdevice,
    pub(super) ordinal: usize,
}

/// Those that have been made.
static KEPT: Mutex<Vec<Context>> = Mutex::new(Vec::new());

// SAFETY: a context may be used from any thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// The context of a GPU, which must be one that kernels can be compiled for.
    pub(super) fn of(ordinal: usize) -> Result<Context> {
        let found = devices()?;
        let refuse = |why| Err(Error::Device { device: format!("cuda:{ordinal}"), why });
        let Some(facts) = found.get(ordinal) else {
            return refuse(format!("there is no such GPU: {} found", found.len()));
        };
        if !facts.usable() {
            let (have, want) = (facts.compute, COMPUTE_MIN);
            let (a, b, c, d) = (have.0, have.1, want.0, want.1);
            return refuse(format!("{} has compute capability {a}.{b}, and {c}.{d} is needed", facts.name));
        }
        let mut kept = KEPT.lock().expect("no code that holds it panics; this is a bug");
        if let Some(context) = kept.iter().find(|c| c.ordinal == ordinal) {
            return Ok(*context);
        }
        let doing = "making a context";
        let device = result::device::get(ordinal as i32).map_err(|e| failed(ordinal, doing, e))?;
        // SAFETY: the device exists; the context is never released.
        let raw = unsafe { result::primary_ctx::retain(device) }.map_err(|e| failed(ordinal, doing, e))?;
        let context = Context { raw, device, ordinal };
        kept.push(context);
        tell(facts);
        Ok(context)
    }

    /// Makes this the calling thread's GPU.
    pub(super) fn enter(self) -> Result<()> {
        // Asking costs nanoseconds; remembering would go wrong where other code on the thread changes it.
        if matches!(result::ctx::get_current(), Ok(Some(current)) if current == self.raw) {
            return Ok(());
        }
        // SAFETY: the context lives as long as the process.
        self.check("entering its context", unsafe { result::ctx::set_current(self.raw) })
    }

    /// Lets what runs here write to memory of `other`.
    pub(super) fn allow_access_to(self, other: Context) -> Result<()> {
        self.enter()?;
        let _beside = beside_no_recording();
        // SAFETY: both contexts live.
        match unsafe { sys::cuCtxEnablePeerAccess(other.raw, 0) }.result() {
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
            outcome => self.check("gaining access to another GPU", outcome),
        }
    }

    /// Names the GPU in an error, and takes note if it is lost.
    pub(super) fn check<T>(self, doing: &str, outcome: Result<T, result::DriverError>) -> Result<T> {
        outcome.map_err(|e| {
            let lost = lost::ends_context(e.0).then(|| self.lost());
            lost.into_iter().for_each(lost::lose);
            failed(lost.unwrap_or(self.ordinal), doing, e)
        })
    }

    /// The GPU that is lost, when a call for this one has said so: it may be another one's event that was waited for.
    fn lost(self) -> usize {
        let is = |context: &Context| {
            // SAFETY: contexts live as long as the process.
            let entered = unsafe { result::ctx::set_current(context.raw) };
            entered.and_then(|()| result::mem_get_info()).is_err_and(|e| lost::ends_context(e.0))
        };
        let others = || KEPT.lock().map_or_else(|_| Vec::new(), |kept| kept.clone());
        let found = if is(&self) { None } else { others().into_iter().find(is) };
        // SAFETY: as above.
        let _ = unsafe { result::ctx::set_current(self.raw) };
        found.unwrap_or(self).ordinal
    }

    /// Whether what it has been given to do may never end, so that nothing is to be freed.
    pub(super) fn is_abandoned(self) -> bool {
        lost::is_abandoned(self.ordinal)
    }

    /// Bytes that are free now.
    pub(super) fn free_bytes(self) -> Result<usize> {
        self.enter()?;
        Ok(self.check("asking for free memory", result::mem_get_info())?.0)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, Ordering::SeqCst},
        time::Duration,
    };

    use super::*;

    #[test]
    fn a_recording_keeps_others_out_and_not_itself() {
        let inside = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        alone(|| {
                            assert!(!inside.swap(true, SeqCst));
                            assert!(beside_no_recording().is_none(), "its own calls are part of it");
                            std::thread::sleep(Duration::from_micros(50));
                            inside.store(false, SeqCst);
                        });
                    }
                });
                scope.spawn(|| {
                    for _ in 0..5000 {
                        let beside = beside_no_recording();
                        assert!(beside.is_some() && !inside.load(SeqCst));
                    }
                });
            }
        });
        assert!(std::panic::catch_unwind(|| alone(|| panic!("made to panic"))).is_err());
        assert!(beside_no_recording().is_some(), "a recording that panicked has ended");
    }
}
