//! Zeroed memory that begins on a cache line and costs nothing until it is touched.
#![allow(unsafe_code)]

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    cell::RefCell,
    fmt,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    thread::LocalKey,
};

use super::device_error;
use crate::error::Result;

const LINE_BYTES: usize = 64;

/// Numbers for which any bits are a value.
///
/// # Safety
///
/// Plain numbers, for which zeroed memory is valid.
pub unsafe trait Number: Copy + 'static {}
// SAFETY: plain numbers.
unsafe impl Number for f32 {}
// SAFETY: plain numbers.
unsafe impl Number for u16 {}
// SAFETY: plain numbers.
unsafe impl Number for u8 {}

/// A fixed number of numbers.
pub struct Memory<T: Number> {
    base: NonNull<u8>,
    first: NonNull<T>,
    len: usize,
    layout: Layout,
}

// SAFETY: it owns its numbers, which are plain.
unsafe impl<T: Number> Send for Memory<T> {}
// SAFETY: shared, it can only be read.
unsafe impl<T: Number> Sync for Memory<T> {}

impl<T: Number> Memory<T> {
    /// `len` zeros.
    pub(super) fn new(len: usize) -> Result<Self> {
        let refused = || device_error(format!("no memory for {len} numbers of {} bytes", size_of::<T>()));
        // The allocator gives zero pages untouched only at its own alignment: the line's is made here.
        let bytes = len.checked_mul(size_of::<T>()).and_then(|n| n.checked_add(LINE_BYTES));
        let layout = bytes.and_then(|n| Layout::from_size_align(n, 16).ok()).ok_or_else(refused)?;
        // SAFETY: the size is not zero.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refused)?;
        let skip = base.as_ptr().align_offset(LINE_BYTES);
        assert!(skip < LINE_BYTES, "no address is a multiple of {LINE_BYTES}; this is a bug");
        // SAFETY: less than the line by which the allocation is longer than the numbers.
        let first = unsafe { base.add(skip) }.cast();
        Ok(Memory { base, first, len, layout })
    }
}

impl<T: Number> Drop for Memory<T> {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

impl<T: Number> Deref for Memory<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` valid numbers from `first` on, owned by self.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }
}

impl<T: Number> DerefMut for Memory<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and nobody else has them.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.len) }
    }
}

impl<T: Number> fmt::Debug for Memory<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} numbers of {} bytes", self.len, size_of::<T>())
    }
}

/// A thread's own room for intermediate numbers, which is kept and grows when it has to.
pub(super) type Scratch<T> = RefCell<Option<Memory<T>>>;

/// Calls `f` with at least `len` numbers, of any value.
pub(super) fn with_scratch<T: Number, R>(
    scratch: &'static LocalKey<Scratch<T>>,
    len: usize,
    f: impl FnOnce(&mut [T]) -> R,
) -> Result<R> {
    scratch.with_borrow_mut(|room| {
        if room.as_ref().is_none_or(|m| m.len() < len) {
            *room = None;
            *room = Some(Memory::new(len)?);
        }
        let memory = room.as_mut().expect("scratch was just made; this is a bug");
        Ok(f(&mut memory[..len]))
    })
}

/// The first `len` numbers of a buffer.
pub(super) fn prefix<T>(buf: &[T], len: usize) -> &[T] {
    assert!(len <= buf.len(), "{len} numbers in a buffer of {}; this is a bug", buf.len());
    &buf[..len]
}

/// The first `len` numbers of a buffer, to be written.
pub(super) fn prefix_mut<T>(buf: &mut [T], len: usize) -> &mut [T] {
    assert!(len <= buf.len(), "{len} numbers in a buffer of {}; this is a bug", buf.len());
    &mut buf[..len]
}

/// A slice that several threads write parts of.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a, T> {
    first: *mut T,
    len: usize,
    life: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: every access is through an unsafe method, whose caller sees to it that nobody else has that part.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn new(all: &'a mut [T]) -> Self {
        Shared { first: all.as_mut_ptr(), len: all.len(), life: std::marker::PhantomData }
    }

    /// A part of it.
    ///
    /// SAFETY: nobody else has a number of this part as long as the result lives.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)] // that is what it is for
    pub(super) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        // SAFETY: `at` has checked that it is within the slice; the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.at(start, len), len) }
    }

    /// Where a part of it is.
    #[inline(always)]
    pub(super) fn at(&self, start: usize, len: usize) -> *mut T {
        let within = start.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(within, "{len} numbers from {start} on, of {}; this is a bug", self.len);
        // SAFETY: within the slice.
        unsafe { self.first.add(start) }
    }
}
