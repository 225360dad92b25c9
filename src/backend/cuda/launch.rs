//! Kernels and their launches.
#![allow(unsafe_code)]

use std::{
    ffi::{CString, c_void},
    marker::PhantomData,
    sync::{Arc, Mutex, PoisonError},
};

use cudarc::driver::{
    result,
    sys::{self, CUfunction_attribute},
};

use super::{
    driver::{Context, beside_no_recording},
    memory::Stream,
};
use crate::error::Result;

/// Loaded code: one kernel file, compiled for one set of definitions. It stays for the stages to come.
#[derive(Clone, Copy)]
pub(crate) struct Module {
    context: Context,
    raw: sys::CUmodule,
    file: &'static str,
}

/// One `__global__` function. Its module is never unloaded.
pub(crate) struct Kernel {
    context: Context,
    raw: sys::CUfunction,
    name: &'static str,
}

// SAFETY: a module may be asked from any thread.
unsafe impl Send for Module {}

/// A module's GPU, its file and its definitions.
type ModuleKey = (usize, &'static str, Vec<(&'static str, u32)>);

/// Those that have been loaded.
static LOADED: Mutex<Vec<(ModuleKey, Module)>> = Mutex::new(Vec::new());

// SAFETY: a function may be launched from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// The shape of a launch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Grid {
    /// Blocks in each direction.
    pub(crate) blocks: [u32; 3],
    /// Threads a block.
    pub(crate) threads: u32,
    /// Bytes of dynamic shared memory a block.
    pub(crate) shared: u32,
    /// Blocks that run together and reach each other's shared memory, where the kernel does not say it itself.
    pub(crate) cluster: u32,
}

impl Grid {
    /// A row of blocks, without dynamic shared memory.
    pub(crate) fn row(blocks: u32, threads: u32) -> Grid {
        Grid { blocks: [blocks, 1, 1], threads, shared: 0, cluster: 1 }
    }
}

impl Module {
    /// The module, from `cubin` if it has not been loaded yet.
    pub(super) fn find_or_load(
        context: Context,
        file: &'static str,
        defines: &[(&'static str, u32)],
        cubin: impl FnOnce() -> Result<Arc<[u8]>>,
    ) -> Result<Module> {
        let key = (context.ordinal, file, defines.to_vec());
        let loaded = || LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, module)) = loaded().iter().find(|(of, _)| *of == key) {
            return Ok(*module);
        }
        // Two at a time may load the same one twice: either does.
        let module = Module::load(context, file, &cubin()?)?;
        loaded().push((key, module));
        Ok(module)
    }

    /// Loads machine code.
    fn load(context: Context, file: &'static str, cubin: &[u8]) -> Result<Module> {
        context.enter()?;
        let doing = format!("loading {file}");
        let _beside = beside_no_recording();
        // SAFETY: the image is whole: it comes from the compiler, or from the cache, which checks it.
        let raw = context.check(&doing, unsafe { result::module::load_data(cubin.as_ptr().cast()) })?;
        Ok(Module { context, raw, file })
    }

    /// A function of it.
    pub(crate) fn kernel(&self, name: &'static str) -> Result<Kernel> {
        self.context.enter()?;
        let symbol = CString::new(name).expect("a kernel's name has no zero; this is a bug");
        // SAFETY: the module is loaded.
        let raw = unsafe { result::module::get_function(self.raw, symbol) };
        let raw = self.context.check(&format!("looking for {name} in {}", self.file), raw)?;
        // A multiprocessor divides its memory into cache and shared memory anew only when it is idle. So all kernels want
        // it alike, or one could not start beside the one before it. A wish: what a driver says to it does not matter.
        let which = CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        // SAFETY: the function is loaded.
        let _ = unsafe { result::function::set_function_attribute(raw, which, 100) };
        Ok(Kernel { context: self.context, raw, name })
    }
}

impl Kernel {
    /// Allows blocks this much dynamic shared memory, or more: another stage may need more of the same function.
    pub(crate) fn allow_shared(&self, bytes: u32) -> Result<()> {
        static ALLOWING: Mutex<()> = Mutex::new(());
        let _alone = ALLOWING.lock().unwrap_or_else(PoisonError::into_inner);
        self.context.enter()?;
        let which = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let mut allowed = 0;
        // SAFETY: writes one number; the function is loaded.
        let asked = unsafe { sys::cuFuncGetAttribute(&mut allowed, which, self.raw) }.result();
        if asked.is_ok() && allowed >= bytes as i32 {
            return Ok(());
        }
        // SAFETY: the function is loaded.
        let outcome = unsafe { result::function::set_function_attribute(self.raw, which, bytes as i32) };
        self.context.check(&format!("allowing {} {bytes} bytes of shared memory", self.name), outcome)
    }

    /// Blocks of this shape that a multiprocessor holds.
    pub(crate) fn blocks_per_multiprocessor(&self, threads: u32, shared: u32) -> Result<u32> {
        self.context.enter()?;
        let mut blocks = 0;
        // SAFETY: writes one number.
        let outcome = unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut blocks,
                self.raw,
                threads as i32,
                shared as usize,
            )
        };
        self.context.check(&format!("asking how {} fits", self.name), outcome.result())?;
        Ok(blocks as u32)
    }

    /// Puts a launch at the end of the stream. `early`: it may start while the kernel before it still runs.
    ///
    /// SAFETY: the arguments are as many and of the types that the kernel takes; what they point to is as large
    /// as the kernel uses it, and lives until it has run.
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        grid: Grid,
        early: bool,
        args: &mut [Arg<'_>],
    ) -> Result<()> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        self.context.enter()?;
        use sys::CUlaunchAttributeID::*;
        let attribute = |id, value| sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let together = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: grid.cluster, y: 1, z: 1 };
        let mut attributes = [
            attribute(
                CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: early.into() },
            ),
            attribute(
                CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                sys::CUlaunchAttributeValue { clusterDim: together },
            ),
        ];
        // What there is nothing to say of is left out: old drivers know neither.
        let from = if early { 0 } else { 1 };
        let to = if grid.cluster > 1 { 2 } else { 1 };
        let [x, y, z] = grid.blocks;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared,
            hStream: stream.raw,
            attrs: attributes[from..].as_mut_ptr(),
            numAttrs: (to - from) as u32,
        };
        let beside = beside_no_recording();
        // SAFETY: the caller's.
        let outcome = unsafe {
            sys::cuLaunchKernelEx(&config, self.raw, args.as_mut_ptr().cast(), std::ptr::null_mut()).result()
        };
        drop(beside);
        match outcome {
            Ok(()) => Ok(()),
            Err(e) => {
                let outcome = self.context.check(&format!("launching {} as {grid:?}", self.name), Err(e));
                outcome.map_err(|error| stream.explain(error))
            }
        }
    }
}

/// The address of one of a launch's arguments, which must outlive it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Arg<'a>(*mut c_void, PhantomData<&'a ()>);

impl<'a> Arg<'a> {
    pub(crate) fn of<T: Copy>(value: &'a T) -> Arg<'a> {
        Arg(std::ptr::from_ref(value).cast_mut().cast(), PhantomData)
    }
}

/// A launch's arguments.
macro_rules! args {
    ($($arg:expr),* $(,)?) => {
        [$($crate::backend::cuda::launch::Arg::of(&$arg)),*]
    };
}
pub(crate) use args;
