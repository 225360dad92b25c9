//! Memory of GPUs, which is memory of the host that nobody has written to yet, and pinned memory.

use std::{
    collections::BTreeMap,
    ffi::{c_int, c_uint, c_void},
    sync::Mutex,
};

use crate::state::{
    INVALID_VALUE, OUT_OF_MEMORY, SUCCESS, Status, check, current, driver_lock, expect_no_recording, lock,
    misuse, put, settings,
};

/// What is taken: bytes from an address on, of a GPU or of the host.
#[derive(Debug, Clone, Copy)]
struct Block {
    bytes: usize,
    gpu: Option<usize>,
}

static BLOCKS: Mutex<BTreeMap<u64, Block>> = Mutex::new(BTreeMap::new());

/// A range of memory that must be there.
pub fn expect_memory(at: u64, bytes: usize, doing: &str) {
    let blocks = lock(&BLOCKS);
    let block = blocks.range(..=at).next_back();
    let within = |(start, block): (&u64, &Block)| at - start + bytes as u64 <= block.bytes as u64;
    if bytes > 0 && !block.is_some_and(within) {
        let near = block.map(|(start, block)| format!("{block:?} begins {} bytes before it", at - start));
        misuse(&format!("{doing}: {bytes} bytes at {at:#x} are not there; {near:?}"));
    }
}

fn taken(gpu: usize) -> usize {
    lock(&BLOCKS).values().filter(|block| block.gpu == Some(gpu)).map(|block| block.bytes).sum()
}

fn take(bytes: usize, gpu: Option<usize>) -> Result<u64, Status> {
    let bytes = bytes.max(1).next_multiple_of(512);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, of nobody's memory.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(OUT_OF_MEMORY);
    }
    lock(&BLOCKS).insert(at as u64, Block { bytes, gpu });
    Ok(at as u64)
}

fn give_back(at: u64, gpu: bool) -> Status {
    let Some(block) = lock(&BLOCKS).remove(&at).filter(|block| block.gpu.is_some() == gpu) else {
        misuse(&format!("memory at {at:#x} is given back, and nobody has taken it"))
    };
    // SAFETY: mapped in `take`; nobody knows of it any more.
    unsafe { libc::munmap(at as *mut c_void, block.bytes) };
    SUCCESS
}

/// Copies, as a GPU would.
pub fn copy_now(to: u64, from: u64, bytes: usize) {
    expect_memory(to, bytes, "the target of a copy");
    expect_memory(from, bytes, "the source of a copy");
    // SAFETY: both are there; what is still written elsewhere is what the order of streams is tested for.
    unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
}

/// Fills. Zeros are given back to the system: there may be gigabytes of them.
pub fn fill_now(at: u64, byte: u8, bytes: usize) {
    expect_memory(at, bytes, "what is filled");
    let page = 4096u64;
    let (start, end) = (at.next_multiple_of(page), (at + bytes as u64) / page * page);
    if byte == 0 && start < end {
        // SAFETY: whole pages of a private mapping, which are zero when they are touched again.
        unsafe { libc::madvise(start as *mut c_void, (end - start) as usize, libc::MADV_DONTNEED) };
        // SAFETY: what is before and after them is there.
        unsafe {
            std::ptr::write_bytes(at as *mut u8, 0, (start - at) as usize);
            std::ptr::write_bytes(end as *mut u8, 0, (at + bytes as u64 - end) as usize);
        }
        return;
    }
    // SAFETY: it is there.
    unsafe { std::ptr::write_bytes(at as *mut u8, byte, bytes) };
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Status {
    let Ok(gpu) = current() else { return INVALID_VALUE };
    if let Err(failed) = check(gpu) {
        return failed;
    }
    let all = settings().bytes;
    // SAFETY: the caller's.
    unsafe {
        put(total, all);
        put(free, all.saturating_sub(taken(gpu)))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(at: *mut u64, bytes: usize) -> Status {
    let Ok(gpu) = current() else { return INVALID_VALUE };
    expect_no_recording(Some(gpu), "taking memory");
    let _driver = driver_lock(gpu);
    if bytes == 0 || taken(gpu) + bytes > settings().bytes {
        return if bytes == 0 { INVALID_VALUE } else { OUT_OF_MEMORY };
    }
    // SAFETY: the caller's.
    take(bytes, Some(gpu)).map_or_else(|e| e, |address| unsafe { put(at, address) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFree_v2(at: u64) -> Status {
    let Ok(gpu) = current() else { return INVALID_VALUE };
    expect_no_recording(Some(gpu), "giving memory back");
    // It waits for all that the GPU has been given.
    if let Err(failed) = crate::queue::drain(gpu) {
        return failed;
    }
    let _driver = driver_lock(gpu);
    give_back(at, true)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(at: *mut *mut c_void, bytes: usize, _flags: c_uint) -> Status {
    expect_no_recording(None, "pinning memory");
    // SAFETY: the caller's.
    take(bytes, None).map_or_else(|e| e, |address| unsafe { put(at, address as *mut c_void) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(at: *mut c_void) -> Status {
    expect_no_recording(None, "giving pinned memory back");
    give_back(at as u64, false)
}

/// What the real one refuses of a matrix of 16-bit numbers in tiles whose rows of 128 bytes are swapped about.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuTensorMapEncodeTiled(
    map: *mut [u64; 16],
    _dtype: c_int,
    rank: u32,
    address: *mut c_void,
    len: *const u64,
    apart: *const u64,
    tile: *const u32,
    _steps: *const u32,
    _interleave: c_int,
    _swizzle: c_int,
    _promotion: c_int,
    _fill: c_int,
) -> Status {
    if let Err(status) = current() {
        return status;
    }
    if !(2..=5).contains(&rank) || !(map as u64).is_multiple_of(64) {
        return INVALID_VALUE;
    }
    let rank = rank as usize;
    // SAFETY: the caller's: as many as the rank says, and strides one fewer.
    let (len, apart, tile) = unsafe {
        let apart = std::slice::from_raw_parts(apart, rank - 1);
        (std::slice::from_raw_parts(len, rank), apart, std::slice::from_raw_parts(tile, rank))
    };
    let fits = (address as u64).is_multiple_of(16)
        && len.iter().all(|n| (1..=1 << 32).contains(n))
        && apart.iter().all(|bytes| bytes.is_multiple_of(16) && *bytes < 1 << 40)
        && tile.iter().all(|n| (1..=256).contains(n))
        && tile[0] * 2 <= 128;
    if !fits {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's.
    unsafe { map.write([1; 16]) };
    SUCCESS
}
