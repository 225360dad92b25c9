//! Work that is shared out among as many threads as there are cores.

use std::{
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
};

/// Threads that so many pieces of work are for.
pub(crate) fn threads(count: usize) -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(count).max(1)
}

/// What `work` makes of each number, in their order, by as many threads as there are cores.
pub(crate) fn side_by_side<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let mut made: Vec<(usize, T)> = Vec::with_capacity(count);
    thread::scope(|scope| {
        let some = || {
            let numbers = std::iter::from_fn(|| Some(next.fetch_add(1, Relaxed)).filter(|&i| i < count));
            numbers.map(|i| (i, work(i))).collect::<Vec<_>>()
        };
        // This thread is one of them; without the others it does all.
        let more = (1..threads(count)).map_while(|_| thread::Builder::new().spawn_scoped(scope, some).ok());
        let more: Vec<_> = more.collect();
        made.extend(some());
        for thread in more {
            made.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
    });
    made.sort_unstable_by_key(|(i, _)| *i);
    made.into_iter().map(|(_, made)| made).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_is_in_order() {
        for count in [0, 1, 2, 1000] {
            let made = side_by_side(count, |i| {
                // Others overtake the first ones.
                if i < 4 {
                    thread::yield_now();
                }
                2 * i
            });
            assert_eq!(made, (0..count).map(|i| 2 * i).collect::<Vec<_>>());
        }
    }
}
