//! GPUs, contexts and what is said about them.

use std::{
    cell::Cell,
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread::ThreadId,
    time::Duration,
};

pub type Status = c_int;
pub const SUCCESS: Status = 0;
pub const INVALID_VALUE: Status = 1;
pub const OUT_OF_MEMORY: Status = 2;
const INVALID_DEVICE: Status = 101;
const INVALID_CONTEXT: Status = 201;
const LAUNCH_FAILED: Status = 719;
const PEER_ACCESS_ALREADY_ENABLED: Status = 704;
/// CUDA 13.0.
pub const VERSION: c_int = 13_000;

thread_local! {
    /// The current context: the GPU's number and one.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// What the environment says.
pub struct Settings {
    pub gpus: usize,
    pub bytes: usize,
    pub queue: usize,
    pub lock_process: bool,
    pub speed: f64,
    /// How long compiling a file takes.
    pub compiling: Duration,
    /// A GPU, and the piece of work at which it fails.
    pub fails: Option<(usize, u64)>,
    /// A GPU, and the piece of work that it never ends.
    pub stuck: Option<(usize, u64)>,
}

pub fn settings() -> &'static Settings {
    static SETTINGS: OnceLock<Settings> = OnceLock::new();
    SETTINGS.get_or_init(|| {
        let number = |name: &str, otherwise: f64| {
            let given = std::env::var(name).ok();
            given.map_or(otherwise, |v| v.parse().unwrap_or_else(|_| misuse(&format!("{name}: {v}"))))
        };
        let piece = |name: &str| {
            let given = std::env::var(name).ok()?;
            let parts =
                given.split_once(':').and_then(|(gpu, at)| Some((gpu.parse().ok()?, at.parse().ok()?)));
            Some(parts.unwrap_or_else(|| misuse(&format!("{name}: {given}"))))
        };
        Settings {
            gpus: number("DRIVER_GPUS", 4.0) as usize,
            bytes: (number("DRIVER_GIB", 140.0) * (1u64 << 30) as f64) as usize,
            queue: number("DRIVER_QUEUE", 1024.0) as usize,
            lock_process: std::env::var("DRIVER_LOCK").is_ok_and(|v| v == "process"),
            speed: number("DRIVER_SPEED", 1.0),
            compiling: Duration::from_secs_f64(number("DRIVER_COMPILE_MS", 0.0) / 1e3),
            fails: piece("DRIVER_FAILS"),
            stuck: piece("DRIVER_STUCK"),
        }
    })
}

/// Counts a GPU's work: whether this piece ever ends, or an error from the piece on at which the GPU fails.
pub fn count_work(gpu: usize) -> Result<bool, Status> {
    static WORK: [AtomicU64; GPUS_MAX] = [const { AtomicU64::new(0) }; GPUS_MAX];
    let number = WORK[gpu].fetch_add(1, SeqCst);
    if settings().fails.is_some_and(|(fails, at)| fails == gpu && number >= at) {
        LOST.fetch_or(1 << gpu, SeqCst);
    }
    check(gpu).map(|()| settings().stuck != Some((gpu, number)))
}

/// An error if the GPU has failed.
pub fn check(gpu: usize) -> Result<(), Status> {
    if LOST.load(SeqCst) >> gpu & 1 == 1 { Err(LAUNCH_FAILED) } else { Ok(()) }
}

/// GPUs that there may be.
const GPUS_MAX: usize = 64;

/// GPUs that have failed, each a bit.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Something that a driver would not notice, or would crash at.
pub fn misuse(what: &str) -> ! {
    eprintln!("DRIVER MISUSED: {what}");
    std::process::abort()
}

/// The lock that a driver holds while it does something in a GPU's context.
pub fn driver_lock(gpu: usize) -> MutexGuard<'static, ()> {
    static LOCKS: OnceLock<Vec<Mutex<()>>> = OnceLock::new();
    let locks = LOCKS.get_or_init(|| (0..settings().gpus).map(|_| Mutex::new(())).collect());
    lock(&locks[if settings().lock_process { 0 } else { gpu }])
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The GPU whose context is current.
pub fn current() -> Result<usize, Status> {
    CURRENT.get().checked_sub(1).ok_or(INVALID_CONTEXT)
}

/// Streams that are being recorded: their GPU, and who records.
static RECORDINGS: Mutex<Vec<(usize, ThreadId)>> = Mutex::new(Vec::new());

/// This thread records a stream of a GPU from now on.
pub fn begin_recording(gpu: usize) {
    lock(&RECORDINGS).push((gpu, std::thread::current().id()));
}

/// It has ended.
pub fn end_recording(gpu: usize) {
    let me = (gpu, std::thread::current().id());
    lock(&RECORDINGS).retain(|recording| *recording != me);
}

/// What waits for a whole context, or for all, breaks off what another thread records there.
pub fn expect_no_recording(gpu: Option<usize>, doing: &str) {
    let me = std::thread::current().id();
    let other = |(of, who): &(usize, ThreadId)| *who != me && gpu.is_none_or(|gpu| gpu == *of);
    if lock(&RECORDINGS).iter().any(other) {
        misuse(&format!("{doing} while another thread records"));
    }
}

/// The current GPU, which must be this one.
pub fn expect_current(gpu: usize, doing: &str) {
    if current() != Ok(gpu) {
        misuse(&format!("{doing} of GPU {gpu}, and {:?} is current", current()));
    }
}

/// The status of something that may fail.
pub fn status(outcome: Result<(), Status>) -> Status {
    outcome.err().unwrap_or(SUCCESS)
}

fn known(device: c_int) -> Result<usize, Status> {
    usize::try_from(device).ok().filter(|&gpu| gpu < settings().gpus).ok_or(INVALID_DEVICE)
}

/// One more reference to what a handle stands for.
///
/// SAFETY: `raw` comes from `Arc::into_raw` of this type, and that reference has not been given back.
pub unsafe fn shared<T>(raw: *mut c_void) -> Arc<T> {
    // SAFETY: the caller's.
    unsafe {
        Arc::increment_strong_count(raw.cast::<T>());
        Arc::from_raw(raw.cast())
    }
}

/// Writes through a pointer that a caller has given for it.
pub unsafe fn put<T>(to: *mut T, value: T) -> Status {
    if to.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's.
    unsafe { to.write(value) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuInit(_flags: c_uint) -> Status {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Status {
    // SAFETY: the caller's.
    unsafe { put(version, VERSION) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(error: Status, text: *mut *const c_char) -> Status {
    let said: &CStr = match error {
        SUCCESS => c"no error",
        OUT_OF_MEMORY => c"out of memory",
        INVALID_DEVICE => c"invalid device ordinal",
        INVALID_CONTEXT => c"invalid device context",
        LAUNCH_FAILED => c"unspecified launch failure",
        _ => c"an error of the driver without GPUs",
    };
    // SAFETY: the caller's.
    unsafe { put(text, said.as_ptr()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(error: Status, text: *mut *const c_char) -> Status {
    // SAFETY: the caller's.
    unsafe { cuGetErrorString(error, text) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Status {
    // SAFETY: the caller's.
    unsafe { put(count, settings().gpus as c_int) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Status {
    // SAFETY: the caller's.
    known(ordinal).map_or_else(|e| e, |_| unsafe { put(device, ordinal) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) -> Status {
    let text = c"NVIDIA H200".to_bytes_with_nul();
    if (len as usize) < text.len() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller has room for `len`.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, text.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> Status {
    // SAFETY: the caller's.
    unsafe { put(bytes, settings().bytes) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, which: c_int, _device: c_int) -> Status {
    let is = match which {
        // Multiprocessors, bytes of the second-level cache, compute capability, shared memory of a block.
        16 => 132,
        38 => 1 << 20,
        75 => 9,
        76 => 0,
        97 => 232_448,
        _ => return INVALID_VALUE,
    };
    // SAFETY: the caller's.
    unsafe { put(value, is) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetPCIBusId(text: *mut c_char, len: c_int, device: c_int) -> Status {
    let id = format!("0000:{device:02x}:00.0\0");
    if (len as usize) < id.len() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller has room for `len`.
    unsafe { std::ptr::copy_nonoverlapping(id.as_ptr().cast(), text, id.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetP2PAttribute(
    value: *mut c_int,
    _which: c_int,
    _from: c_int,
    _to: c_int,
) -> Status {
    // SAFETY: the caller's.
    unsafe { put(value, 1) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceCanAccessPeer(possible: *mut c_int, _from: c_int, _to: c_int) -> Status {
    // SAFETY: the caller's.
    unsafe { put(possible, 1) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxEnablePeerAccess(peer: *mut c_void, _flags: c_uint) -> Status {
    static ENABLED: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());
    let (Ok(from), Some(to)) = (current(), (peer as usize).checked_sub(1)) else { return INVALID_CONTEXT };
    expect_no_recording(Some(from), "gaining access to another GPU");
    let _driver = driver_lock(from);
    let mut enabled = lock(&ENABLED);
    if enabled.contains(&(from, to)) {
        return PEER_ACCESS_ALREADY_ENABLED;
    }
    enabled.push((from, to));
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) -> Status {
    // SAFETY: the caller's.
    known(device).map_or_else(|e| e, |gpu| unsafe { put(context, (gpu + 1) as *mut c_void) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSetCurrent(context: *mut c_void) -> Status {
    CURRENT.set(context as usize);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut *mut c_void) -> Status {
    // SAFETY: the caller's.
    unsafe { put(context, CURRENT.get() as *mut c_void) }
}
