//! NVRTC: code is the source, with its length before it. What the real NVRTC makes is taken too.

use std::ffi::{CStr, c_char, c_int, c_void};

use crate::state::{SUCCESS, Status, put, settings};

const MAGIC: &[u8; 8] = b"NOTCODE1";

/// What a compiled file holds; nothing is known of real code.
pub struct Code(Option<String>);

impl Code {
    /// SAFETY: `at` is where bytes begin that this compiler has written, or another one.
    pub unsafe fn read(at: *const u8) -> Option<Code> {
        // SAFETY: the caller's.
        let head = unsafe { std::slice::from_raw_parts(at, 16) };
        if head.starts_with(b"\x7fELF") {
            return Some(Code(None));
        }
        if &head[..8] != MAGIC {
            return None;
        }
        let len = u64::from_le_bytes(head[8..].try_into().ok()?) as usize;
        // SAFETY: the caller's.
        let text = unsafe { std::slice::from_raw_parts(at.add(16), len) };
        String::from_utf8(text.to_vec()).ok().map(|text| Code(Some(text)))
    }

    /// Whether it has such a kernel: by its whole name, or the end of one that a macro makes.
    pub fn has(&self, name: &str) -> bool {
        let word = |text: &str, name: &str| {
            let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
            text.match_indices(name).any(|(at, _)| {
                let (before, after) =
                    (text[..at].chars().next_back(), text[at + name.len()..].chars().next());
                !part(before) && !part(after)
            })
        };
        self.0.as_ref().is_none_or(|text| word(text, name))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> Status {
    // SAFETY: the caller's.
    unsafe {
        put(major, 13);
        put(minor, 0)
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCreateProgram(
    program: *mut *mut c_void,
    source: *const c_char,
    _name: *const c_char,
    _count: c_int,
    _headers: *const *const c_char,
    _names: *const *const c_char,
) -> Status {
    // SAFETY: the caller's.
    let source = unsafe { CStr::from_ptr(source) }.to_bytes().to_vec();
    let mut code = MAGIC.to_vec();
    code.extend((source.len() as u64).to_le_bytes());
    code.extend(source);
    // SAFETY: the caller's.
    unsafe { put(program, Box::into_raw(Box::new(code)).cast()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCompileProgram(
    _program: *mut c_void,
    _count: c_int,
    _options: *const *const c_char,
) -> Status {
    std::thread::sleep(settings().compiling);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBINSize(program: *mut c_void, size: *mut usize) -> Status {
    // SAFETY: the caller's.
    unsafe { put(size, (*program.cast::<Vec<u8>>()).len()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBIN(program: *mut c_void, to: *mut c_char) -> Status {
    // SAFETY: the caller's, who has asked for the size.
    unsafe {
        let code = &*program.cast::<Vec<u8>>();
        std::ptr::copy_nonoverlapping(code.as_ptr().cast(), to, code.len());
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLogSize(_program: *mut c_void, size: *mut usize) -> Status {
    // SAFETY: the caller's.
    unsafe { put(size, 1) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLog(_program: *mut c_void, to: *mut c_char) -> Status {
    // SAFETY: the caller's.
    unsafe { put(to, 0) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcDestroyProgram(program: *mut *mut c_void) -> Status {
    // SAFETY: the caller's.
    drop(unsafe { Box::from_raw((*program).cast::<Vec<u8>>()) });
    SUCCESS
}
