//! In place of `src/sync.rs`: shuttle's mutex and threads, and over them the part of crossbeam's channels that is used.
//! Whatever is done to one of them is a point where another thread may go on.

pub use shuttle::{sync::Mutex, thread};

/// Channels as crossbeam's: who sends to nobody, or waits for nobody, is told.
pub mod channel {
    use std::{
        collections::VecDeque,
        fmt,
        sync::{Arc, PoisonError},
    };

    use shuttle::sync::{Condvar, Mutex, MutexGuard};

    struct Shared<T> {
        state: Mutex<State<T>>,
        came: Condvar,
        room: Condvar,
    }

    struct State<T> {
        queue: VecDeque<T>,
        len_max: usize,
        senders: usize,
        receivers: usize,
    }

    /// Where values are put.
    pub struct Sender<T>(Arc<Shared<T>>);

    /// Where they come out.
    pub struct Receiver<T>(Arc<Shared<T>>);

    /// Nobody receives any more.
    pub struct SendError<T>(pub T);

    impl<T> fmt::Debug for SendError<T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("SendError(..)")
        }
    }

    /// What a channel said instead of waiting.
    #[derive(Debug, PartialEq, Eq)]
    pub enum TrySendError<T> {
        /// There is no room.
        Full(T),
        /// Nobody receives any more.
        Disconnected(T),
    }

    /// Nothing is there, and nobody sends any more.
    #[derive(Debug, PartialEq, Eq)]
    pub struct RecvError;

    /// Nothing is there now, or ever.
    #[derive(Debug, PartialEq, Eq)]
    pub enum TryRecvError {
        /// Somebody may still send.
        Empty,
        /// Nobody sends any more.
        Disconnected,
    }

    /// A channel with room for so many values.
    pub fn bounded<T>(len_max: usize) -> (Sender<T>, Receiver<T>) {
        assert!(len_max > 0, "channels without room are not modelled");
        let state = State { queue: VecDeque::new(), len_max, senders: 1, receivers: 1 };
        let shared =
            Arc::new(Shared { state: Mutex::new(state), came: Condvar::new(), room: Condvar::new() });
        (Sender(shared.clone()), Receiver(shared))
    }

    /// A channel that always has room.
    pub fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
        bounded(usize::MAX)
    }

    impl<T> Shared<T> {
        fn lock(&self) -> MutexGuard<'_, State<T>> {
            self.state.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    impl<T> Sender<T> {
        /// Puts a value in as soon as there is room.
        pub fn send(&self, value: T) -> Result<(), SendError<T>> {
            let mut state = self.0.lock();
            while state.queue.len() >= state.len_max && state.receivers > 0 {
                state = self.0.room.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.receivers == 0 {
                return Err(SendError(value));
            }
            state.queue.push_back(value);
            self.0.came.notify_one();
            Ok(())
        }

        /// Puts a value in if there is room now.
        pub fn try_send(&self, value: T) -> Result<(), TrySendError<T>> {
            let mut state = self.0.lock();
            if state.receivers == 0 {
                return Err(TrySendError::Disconnected(value));
            }
            if state.queue.len() >= state.len_max {
                return Err(TrySendError::Full(value));
            }
            state.queue.push_back(value);
            self.0.came.notify_one();
            Ok(())
        }
    }

    impl<T> Receiver<T> {
        /// Waits for the next value.
        pub fn recv(&self) -> Result<T, RecvError> {
            let mut state = self.0.lock();
            loop {
                if let Some(value) = state.queue.pop_front() {
                    self.0.room.notify_one();
                    return Ok(value);
                }
                if state.senders == 0 {
                    return Err(RecvError);
                }
                state = self.0.came.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }

        /// The next value, if it is there now.
        pub fn try_recv(&self) -> Result<T, TryRecvError> {
            let mut state = self.0.lock();
            let value = state.queue.pop_front().ok_or(match state.senders {
                0 => TryRecvError::Disconnected,
                _ => TryRecvError::Empty,
            })?;
            self.0.room.notify_one();
            Ok(value)
        }

        /// Values as long as one is there.
        pub fn try_iter(&self) -> impl Iterator<Item = T> + '_ {
            std::iter::from_fn(|| self.try_recv().ok())
        }

        /// Waits for values until nobody sends any more.
        pub fn iter(&self) -> impl Iterator<Item = T> + '_ {
            std::iter::from_fn(|| self.recv().ok())
        }
    }

    impl<T: 'static> IntoIterator for Receiver<T> {
        type Item = T;
        type IntoIter = Box<dyn Iterator<Item = T>>;

        fn into_iter(self) -> Self::IntoIter {
            Box::new(std::iter::from_fn(move || self.recv().ok()))
        }
    }

    impl<T> Clone for Sender<T> {
        fn clone(&self) -> Self {
            self.0.lock().senders += 1;
            Sender(self.0.clone())
        }
    }

    impl<T> Drop for Sender<T> {
        fn drop(&mut self) {
            let mut state = self.0.lock();
            state.senders -= 1;
            if state.senders == 0 {
                self.0.came.notify_all();
            }
        }
    }

    impl<T> Drop for Receiver<T> {
        fn drop(&mut self) {
            let mut state = self.0.lock();
            state.receivers -= 1;
            if state.receivers == 0 {
                self.0.room.notify_all();
                // As crossbeam does: what nobody will receive goes at once. It may itself hold ends of channels.
                let left = std::mem::take(&mut state.queue);
                drop(state);
                drop(left);
            }
        }
    }
}
