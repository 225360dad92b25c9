//! Kernels from source to machine code, by NVRTC, and what has been compiled before, on disk.
//!
//! An entry of the cache is found by everything that the code follows from: source, headers, definitions,
//! architecture, NVRTC's version. It is written aside and renamed; one that is damaged is compiled again.
#![allow(unsafe_code)]

use std::{
    collections::BTreeMap,
    ffi::{CString, c_char},
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use cudarc::nvrtc::sys;

use super::driver::none;
use crate::error::Result;

/// Every kernel file, and what they include.
const SOURCES: &[(&str, &str)] = &[
    ("act.cu", include_str!("../../../kernels/act.cu")),
    ("argmax.cu", include_str!("../../../kernels/argmax.cu")),
    ("attention_decode.cu", include_str!("../../../kernels/attention_decode.cu")),
    ("attention_generic.cu", include_str!("../../../kernels/attention_generic.cu")),
    ("attention_prefill.cu", include_str!("../../../kernels/attention_prefill.cu")),
    ("attention_prefill_wgmma.cu", include_str!("../../../kernels/attention_prefill_wgmma.cu")),
    ("copy.cu", include_str!("../../../kernels/copy.cu")),
    ("dummy.cu", include_str!("../../../kernels/dummy.cu")),
    ("embed.cu", include_str!("../../../kernels/embed.cu")),
    ("gate_up.cu", include_str!("../../../kernels/gate_up.cu")),
    ("gemm.cu", include_str!("../../../kernels/gemm.cu")),
    ("gemv.cu", include_str!("../../../kernels/gemv.cu")),
    ("gemv_any.cu", include_str!("../../../kernels/gemv_any.cu")),
    ("norm.cu", include_str!("../../../kernels/norm.cu")),
    ("patches.cu", include_str!("../../../kernels/patches.cu")),
    ("rope.cu", include_str!("../../../kernels/rope.cu")),
    ("sample.cu", include_str!("../../../kernels/sample.cu")),
    ("segment_attention.cu", include_str!("../../../kernels/segment_attention.cu")),
    ("segment_attention_plain.cu", include_str!("../../../kernels/segment_attention_plain.cu")),
    ("segments.cu", include_str!("../../../kernels/segments.cu")),
];
const HEADERS: &[(&str, &str)] = &[
    ("attention.cuh", include_str!("../../../kernels/attention.cuh")),
    ("attention_pages.cuh", include_str!("../../../kernels/attention_pages.cuh")),
    ("attention_parts.cuh", include_str!("../../../kernels/attention_parts.cuh")),
    ("attention_share.cuh", include_str!("../../../kernels/attention_share.cuh")),
    ("attention_tiles.cuh", include_str!("../../../kernels/attention_tiles.cuh")),
    ("batch.cuh", include_str!("../../../kernels/batch.cuh")),
    ("bulk.cuh", include_str!("../../../kernels/bulk.cuh")),
    ("cluster.cuh", include_str!("../../../kernels/cluster.cuh")),
    ("common.cuh", include_str!("../../../kernels/common.cuh")),
    ("gemv.cuh", include_str!("../../../kernels/gemv.cuh")),
    ("ring.cuh", include_str!("../../../kernels/ring.cuh")),
    ("sample.cuh", include_str!("../../../kernels/sample.cuh")),
    ("tensor_map.cuh", include_str!("../../../kernels/tensor_map.cuh")),
    ("wgmma.cuh", include_str!("../../../kernels/wgmma.cuh")),
];

const MAGIC: &[u8; 8] = b"PIcubin1";

/// A kernel file, compiled for an architecture with these definitions.
pub(super) fn cubin(file: &'static str, defines: &[(&str, u32)], arch: &str) -> Result<Arc<[u8]>> {
    let (_, source) = SOURCES
        .iter()
        .find(|(name, _)| *name == file)
        .unwrap_or_else(|| panic!("no kernel file {file}; this is a bug"));
    let mut options =
        vec![format!("--gpu-architecture={arch}"), "--std=c++17".into(), "-default-device".into()];
    options.extend(defines.iter().map(|(name, value)| format!("-D{name}={value}")));
    let key = key(source, &options);
    let cached = cache_folder().map(|folder| folder.join(format!("{file}-{arch}-{key:032x}.cubin")));
    // Stages want the same files at the same time: the first one compiles, and the others take what it has made.
    let entry = entry(key);
    let mut made = entry.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(code) = &*made {
        return Ok(code.clone());
    }
    if let Some(found) = cached.as_deref().and_then(|path| read_entry(path, key)) {
        return Ok(made.insert(found.into()).clone());
    }
    let start = std::time::Instant::now();
    let compiled = compile(file, source, &options)?;
    tracing::debug!(file, ?defines, arch, ms = start.elapsed().as_millis() as u64, "compiled");
    if let Some(path) = &cached
        && let Err(error) = write_entry(path, key, &compiled)
    {
        tracing::debug!(path = %path.display(), %error, "compiled code is not kept");
    }
    Ok(made.insert(compiled.into()).clone())
}

/// Machine code, once there is some.
type Entry = Arc<Mutex<Option<Arc<[u8]>>>>;

/// What has been compiled or found in this process: some megabytes for a model. It is held by whoever compiles.
fn entry(key: u128) -> Entry {
    static ENTRIES: Mutex<BTreeMap<u128, Entry>> = Mutex::new(BTreeMap::new());
    ENTRIES.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default().clone()
}

/// Where things are kept that can be made again; `None` if the environment names no place.
pub fn cache_folder() -> Option<PathBuf> {
    let given = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = given("XDG_CACHE_HOME").or_else(|| given("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("pipeline-infer"))
}

/// What stands for all kernels and their headers: it changes with each of them.
pub fn kernels_key() -> u128 {
    let mut hash = Fnv::default();
    for (name, text) in SOURCES.iter().chain(HEADERS) {
        hash.part(name.as_bytes());
        hash.part(text.as_bytes());
    }
    hash.0
}

fn key(source: &str, options: &[String]) -> u128 {
    let mut hash = Fnv::default();
    hash.part(source.as_bytes());
    for (name, text) in HEADERS {
        hash.part(name.as_bytes());
        hash.part(text.as_bytes());
    }
    options.iter().for_each(|option| hash.part(option.as_bytes()));
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two numbers.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    hash.part(&major.to_le_bytes());
    hash.part(&minor.to_le_bytes());
    hash.0
}

/// FNV-1a with 128 bits.
pub(super) struct Fnv(pub(super) u128);

impl Default for Fnv {
    fn default() -> Self {
        Fnv(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }
}

impl Fnv {
    /// Takes in a part and where it ends.
    pub(super) fn part(&mut self, bytes: &[u8]) {
        for &byte in bytes.iter().chain(&(bytes.len() as u64).to_le_bytes()) {
            self.0 = (self.0 ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }
}

/// An entry's contents; `None` if there is none or it is damaged.
fn read_entry(path: &Path, key: u128) -> Option<Vec<u8>> {
    let bytes = fs::read(path).ok()?;
    let contents = entry_contents(&bytes, key);
    if contents.is_none() {
        tracing::warn!(path = %path.display(), "damaged, made again");
    }
    contents.map(<[u8]>::to_vec)
}

fn entry_contents(bytes: &[u8], key: u128) -> Option<&[u8]> {
    let (magic, rest) = bytes.split_at_checked(MAGIC.len())?;
    let (for_key, rest) = rest.split_at_checked(16)?;
    let (sum, contents) = rest.split_at_checked(16)?;
    let right = magic == MAGIC && for_key == key.to_le_bytes() && sum == checksum(contents).to_le_bytes();
    right.then_some(contents)
}

fn checksum(contents: &[u8]) -> u128 {
    let mut hash = Fnv::default();
    hash.part(contents);
    hash.0
}

fn write_entry(path: &Path, key: u128, contents: &[u8]) -> std::io::Result<()> {
    let sum = checksum(contents);
    let parts: [&[u8]; 4] = [MAGIC, &key.to_le_bytes(), &sum.to_le_bytes(), contents];
    write_aside(path, &parts.concat())
}

/// Writes a file as a whole, or not at all.
pub fn write_aside(path: &Path, contents: &[u8]) -> std::io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let aside = folder.join(format!(".{}-{n}", std::process::id()));
    let outcome = fs::write(&aside, contents).and_then(|()| fs::rename(&aside, path));
    if outcome.is_err() {
        let _ = fs::remove_file(&aside);
    }
    outcome
}

/// A program that is destroyed at the end.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created in `compile`, destroyed here alone.
        let _ = unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn compile(file: &str, source: &str, options: &[String]) -> Result<Vec<u8>> {
    let c = |text: &str| CString::new(text).expect("kernel sources hold no zero; this is a bug");
    let refuse = |doing: &str, outcome: sys::nvrtcResult| none(format!("{file}: {doing}: {outcome:?}"));
    let (source, name) = (c(source), c(file));
    let texts: Vec<CString> = HEADERS.iter().map(|(_, text)| c(text)).collect();
    let names: Vec<CString> = HEADERS.iter().map(|(name, _)| c(name)).collect();
    let options: Vec<CString> = options.iter().map(|o| c(o)).collect();
    let pointers = |list: &[CString]| list.iter().map(|s| s.as_ptr()).collect::<Vec<*const c_char>>();
    let mut program = Program(std::ptr::null_mut());
    // SAFETY: all strings live until the program has been compiled, and are as many as said.
    let outcome = unsafe {
        sys::nvrtcCreateProgram(
            &mut program.0,
            source.as_ptr(),
            name.as_ptr(),
            HEADERS.len() as i32,
            pointers(&texts).as_ptr(),
            pointers(&names).as_ptr(),
        )
    };
    outcome.result().map_err(|e| refuse("creating a program", e.0))?;
    // SAFETY: as above.
    let outcome =
        unsafe { sys::nvrtcCompileProgram(program.0, options.len() as i32, pointers(&options).as_ptr()) };
    outcome.result().map_err(|e| none(format!("{file}: {:?}: {}", e.0, log(&program))))?;
    let mut size = 0;
    // SAFETY: writes one number.
    unsafe { sys::nvrtcGetCUBINSize(program.0, &mut size) }.result().map_err(|e| refuse("sizing", e.0))?;
    let mut code = vec![0u8; size];
    // SAFETY: as many bytes as it has said.
    let outcome = unsafe { sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast()) };
    outcome.result().map_err(|e| refuse("reading the code", e.0))?;
    Ok(code)
}

/// What the compiler says, in one line.
fn log(program: &Program) -> String {
    let mut size = 0;
    // SAFETY: writes one number.
    if unsafe { sys::nvrtcGetProgramLogSize(program.0, &mut size) }.result().is_err() {
        return "no log".into();
    }
    let mut text = vec![0u8; size];
    // SAFETY: as many bytes as it has said.
    if unsafe { sys::nvrtcGetProgramLog(program.0, text.as_mut_ptr().cast()) }.result().is_err() {
        return "no log".into();
    }
    let text = String::from_utf8_lossy(&text).replace('\0', "");
    text.split_whitespace().take(100).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_entries_are_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b.cubin");
        write_entry(&path, 7, b"code").unwrap();
        assert_eq!(read_entry(&path, 7).unwrap(), b"code");
        assert_eq!(read_entry(&path, 8), None, "of another key");
        let whole = fs::read(&path).unwrap();
        for len in 0..whole.len() {
            assert_eq!(entry_contents(&whole[..len], 7), None, "cut to {len}");
        }
        for i in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[i] ^= 1;
            assert_eq!(entry_contents(&damaged, 7), None, "bit 0 of byte {i}");
        }
        let left: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(left.len(), 1, "nothing is left aside");
    }

    #[test]
    fn parts_have_ends() {
        let hash = |parts: &[&str]| {
            let mut hash = Fnv::default();
            parts.iter().for_each(|p| hash.part(p.as_bytes()));
            hash.0
        };
        assert_ne!(hash(&["ab", "c"]), hash(&["a", "bc"]));
    }

    /// What `tools/kernels.py` compiles is what the program includes.
    #[test]
    fn every_kernel_file_is_included() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let mut files: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(".cu") || name.ends_with(".cuh"))
            .collect();
        files.sort();
        let mut known: Vec<String> =
            SOURCES.iter().chain(HEADERS).map(|(name, _)| (*name).to_owned()).collect();
        known.sort();
        assert_eq!(files, known);
    }
}
