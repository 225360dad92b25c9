//! Modules, kernels and their launches, and recorded passes.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use crate::{
    compiler::Code,
    queue::{Effect, Stream, Work},
    state::{
        INVALID_VALUE, SUCCESS, Status, current, driver_lock, expect_current, expect_no_recording, lock,
        misuse, put, shared,
    },
};

const NOT_FOUND: Status = 500;
/// Shared memory that a kernel may have without asking for more.
const SHARED: u32 = 48 << 10;
/// Seconds that any kernel takes.
const KERNEL: f64 = 3e-6;

struct Module {
    gpu: usize,
    code: Code,
}

struct Kernel {
    gpu: usize,
    name: String,
    shared_max: Mutex<u32>,
    /// Its code is loaded by the first launch.
    launched: AtomicBool,
}

/// As the driver has it.
#[repr(C)]
pub struct Launch {
    blocks: [c_uint; 3],
    threads: [c_uint; 3],
    shared: c_uint,
    stream: *mut c_void,
    attributes: *mut c_void,
    attribute_count: c_uint,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_void) -> Status {
    let Ok(gpu) = current() else { return INVALID_VALUE };
    expect_no_recording(Some(gpu), "loading code");
    let _driver = driver_lock(gpu);
    // SAFETY: the caller's: an image of our own compiler.
    let Some(code) = (unsafe { Code::read(image.cast()) }) else { return INVALID_VALUE };
    // SAFETY: the caller's.
    unsafe { put(module, Box::into_raw(Box::new(Module { gpu, code })).cast()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut *mut c_void,
    module: *mut c_void,
    name: *const c_char,
) -> Status {
    // SAFETY: the caller's; modules are never unloaded.
    let (module, name) = unsafe { (&*module.cast::<Module>(), CStr::from_ptr(name)) };
    expect_current(module.gpu, "a kernel");
    let Ok(name) = name.to_str() else { return INVALID_VALUE };
    if !module.code.has(name) {
        return NOT_FOUND;
    }
    let kernel = Kernel {
        gpu: module.gpu,
        name: name.to_owned(),
        shared_max: Mutex::new(SHARED),
        launched: false.into(),
    };
    // SAFETY: the caller's.
    unsafe { put(function, Box::into_raw(Box::new(kernel)).cast()) }
}

/// SAFETY: `raw` is a kernel.
unsafe fn kernel<'a>(raw: *mut c_void) -> &'a Kernel {
    // SAFETY: the caller's; kernels are never given back.
    unsafe { &*raw.cast() }
}

/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
const SHARED_MAX: c_int = 8;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncSetAttribute(function: *mut c_void, which: c_int, value: c_int) -> Status {
    // SAFETY: the caller's.
    let kernel = unsafe { kernel(function) };
    if which == SHARED_MAX {
        if value > 232_448 {
            return INVALID_VALUE;
        }
        *lock(&kernel.shared_max) = value as u32;
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetAttribute(
    value: *mut c_int,
    which: c_int,
    function: *mut c_void,
) -> Status {
    if which != SHARED_MAX {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's.
    unsafe { put(value, *lock(&kernel(function).shared_max) as c_int) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    blocks: *mut c_int,
    _function: *mut c_void,
    threads: c_int,
    shared: usize,
) -> Status {
    let by_threads = 2048 / threads.max(1);
    let by_shared = (228 << 10) / (shared + 1024);
    // SAFETY: the caller's.
    unsafe { put(blocks, by_threads.min(by_shared as c_int).min(16)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernelEx(
    launch: *const Launch,
    function: *mut c_void,
    args: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> Status {
    // SAFETY: the caller's.
    let (launch, kernel) = unsafe { (&*launch, kernel(function)) };
    // SAFETY: the caller's.
    let stream = unsafe { Stream::of(launch.stream) };
    let [x, y, z] = launch.blocks;
    let threads: u32 = launch.threads.iter().product();
    let fits = x > 0 && x < 1 << 31 && (1..65536).contains(&y) && (1..65536).contains(&z);
    if !fits || !(1..=1024).contains(&threads) || launch.shared > *lock(&kernel.shared_max) {
        return INVALID_VALUE;
    }
    if kernel.gpu != stream.gpu {
        misuse(&format!("{} of GPU {} in a stream of GPU {}", kernel.name, kernel.gpu, stream.gpu));
    }
    if !kernel.launched.swap(true, Relaxed) {
        expect_no_recording(Some(kernel.gpu), &kernel.name);
    }
    let effect = match &*kernel.name {
        // SAFETY: (float*, const float*, u64), as in copy.cu.
        "copy_f32" => unsafe {
            let number = |i: usize| (*args.add(i)).cast::<u64>().read_unaligned();
            Effect::Copy { to: number(0), from: number(1), bytes: 4 * number(2) as usize }
        },
        _ => Effect::Nothing,
    };
    stream.work(Work { seconds: KERNEL, effect }, &kernel.name)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamBeginCapture_v2(stream: *mut c_void, _mode: c_int) -> Status {
    // SAFETY: the caller's.
    unsafe { Stream::of(stream) }.begin()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(stream: *mut c_void, graph: *mut *mut c_void) -> Status {
    // SAFETY: the caller's.
    let Some(recorded) = (unsafe { Stream::of(stream) }).end() else { return INVALID_VALUE };
    // SAFETY: the caller's.
    unsafe { put(graph, Arc::into_raw(Arc::new(recorded)).cast_mut().cast()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(
    ready: *mut *mut c_void,
    graph: *mut c_void,
    _flags: u64,
) -> Status {
    // SAFETY: the caller's: a graph, of which this takes one more reference.
    unsafe {
        Arc::increment_strong_count(graph.cast::<Vec<Work>>());
        put(ready, graph)
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphLaunch(ready: *mut c_void, stream: *mut c_void) -> Status {
    // SAFETY: the caller's.
    let (stream, graph) = unsafe { (Stream::of(stream), shared::<Vec<Work>>(ready)) };
    stream.repeat(graph)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphDestroy(graph: *mut c_void) -> Status {
    // SAFETY: the caller's.
    drop(unsafe { Arc::from_raw(graph.cast::<Vec<Work>>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecDestroy(ready: *mut c_void) -> Status {
    // SAFETY: the caller's.
    unsafe { cuGraphDestroy(ready) }
}
