//! Room for images that are being prepared: however many threads there are, they take no more memory than this together.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes; any single image takes fewer.
const BYTES_MAX: u64 = 2 << 30;

static ALL: Room = Room::new(BYTES_MAX);

/// An image's part of the room, until it is dropped.
pub(super) struct Turn<'a> {
    room: &'a Room,
    bytes: u64,
}

struct Room {
    taken: Mutex<u64>,
    freed: Condvar,
    bytes_max: u64,
}

impl Turn<'static> {
    /// Waits until there are so many bytes. Whoever has a turn waits for no other one.
    pub(super) fn wait(bytes: u64) -> Turn<'static> {
        ALL.wait(bytes)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.room.taken() -= self.bytes;
        self.room.freed.notify_all();
    }
}

impl Room {
    const fn new(bytes_max: u64) -> Room {
        Room { taken: Mutex::new(0), freed: Condvar::new(), bytes_max }
    }

    fn wait(&self, bytes: u64) -> Turn<'_> {
        let bytes = bytes.min(self.bytes_max);
        let full = |taken: &mut u64| *taken + bytes > self.bytes_max;
        let taken = self.freed.wait_while(self.taken(), full);
        *taken.unwrap_or_else(PoisonError::into_inner) += bytes;
        Turn { room: self, bytes }
    }

    fn taken(&self) -> MutexGuard<'_, u64> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU64, Ordering},
        thread,
    };

    use super::*;

    #[test]
    fn no_more_is_taken_than_there_is() {
        let (room, now) = (Room::new(100), AtomicU64::new(0));
        thread::scope(|scope| {
            for thread in 0..6 {
                let (room, now) = (&room, &now);
                scope.spawn(move || {
                    for bytes in (0..200).map(|i| (i * 7 + thread * 13) % 60) {
                        let _turn = room.wait(bytes);
                        assert!(now.fetch_add(bytes, Ordering::SeqCst) + bytes <= 100);
                        thread::yield_now();
                        now.fetch_sub(bytes, Ordering::SeqCst);
                    }
                });
            }
        });
        // What is larger than the room has it to itself.
        drop(room.wait(1000));
        assert_eq!(*room.taken(), 0);
    }
}
