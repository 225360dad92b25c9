//! What GPUs have consumed, as NVML tells: a library of the driver's that is opened at run time, and may be missing.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_void};

use cudarc::driver::sys;
use libloading::Library;

use super::driver::{failed, none};
use crate::error::Result;

const LIBRARY: &str = "libnvidia-ml.so.1";
/// Room for a place on the PCI bus: `0000:65:00.0`, with a longer domain.
const PLACE_BYTES: usize = 32;
const SUCCESS: c_int = 0;

type Handle = *mut c_void;
type Call = unsafe extern "C" fn() -> c_int;
type Find = unsafe extern "C" fn(*const c_char, *mut Handle) -> c_int;
type Read = unsafe extern "C" fn(Handle, *mut u64) -> c_int;

/// The counters of some GPUs.
pub struct Energy {
    handles: Vec<Handle>,
    read: Read,
    shutdown: Call,
    /// Where the functions are.
    _library: Library,
}

impl Energy {
    /// Opens the library, and finds these GPUs in it. An error says what is missing.
    pub fn open(ordinals: &[usize]) -> Result<Energy> {
        let missing = |e: libloading::Error| none(format!("{LIBRARY}: {e}"));
        // SAFETY: its initialisers are trusted as every program on the machine trusts them.
        let library = unsafe { Library::new(LIBRARY) }.map_err(missing)?;
        // SAFETY: the types are those of nvml.h, on every version that has these names.
        let (init, find, read, shutdown) = unsafe {
            (
                *library.get::<Call>(b"nvmlInit_v2\0").map_err(missing)?,
                *library.get::<Find>(b"nvmlDeviceGetHandleByPciBusId_v2\0").map_err(missing)?,
                *library.get::<Read>(b"nvmlDeviceGetTotalEnergyConsumption\0").map_err(missing)?,
                *library.get::<Call>(b"nvmlShutdown\0").map_err(missing)?,
            )
        };
        // SAFETY: it takes nothing; the library stays open.
        said("nvmlInit_v2", unsafe { init() })?;
        // From here on dropping it shuts the library down.
        let mut energy = Energy { handles: Vec::new(), read, shutdown, _library: library };
        for &ordinal in ordinals {
            let mut handle: Handle = std::ptr::null_mut();
            let place = place(ordinal)?;
            // SAFETY: the text ends with a zero; one pointer is written.
            said("nvmlDeviceGetHandleByPciBusId_v2", unsafe { find(place.as_ptr(), &mut handle) })?;
            energy.handles.push(handle);
        }
        energy.joules()?;
        Ok(energy)
    }

    /// Of all of them together, since their driver was loaded.
    pub fn joules(&self) -> Result<f64> {
        let mut sum = 0;
        for &handle in &self.handles {
            let mut millijoules = 0;
            // SAFETY: the handle is the library's own; one number is written.
            let code = unsafe { (self.read)(handle, &mut millijoules) };
            said("nvmlDeviceGetTotalEnergyConsumption", code)?;
            sum += millijoules;
        }
        Ok(sum as f64 / 1e3)
    }
}

impl Drop for Energy {
    fn drop(&mut self) {
        // SAFETY: it takes nothing, and nobody uses a handle any more.
        unsafe { (self.shutdown)() };
    }
}

/// Where a GPU is on the PCI bus: numbers differ between the driver and NVML.
fn place(ordinal: usize) -> Result<[c_char; PLACE_BYTES]> {
    let mut bytes = [0 as c_char; PLACE_BYTES];
    // SAFETY: it writes so many bytes at most, the last one zero.
    let code = unsafe {
        sys::cuDeviceGetPCIBusId(bytes.as_mut_ptr(), PLACE_BYTES as c_int, ordinal as sys::CUdevice)
    };
    code.result().map_err(|e| failed(ordinal, "asking for its place on the bus", e))?;
    Ok(bytes)
}

fn said(call: &str, code: c_int) -> Result<()> {
    match code {
        SUCCESS => Ok(()),
        code => Err(none(format!("{call} of {LIBRARY} answers {code}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_of_one_line() {
        // Where there is a driver, no GPU is asked for.
        if let Err(error) = Energy::open(&[]) {
            let told = error.to_string();
            assert!(told.contains(LIBRARY) && told.lines().count() == 1, "{told}");
        }
    }
}
