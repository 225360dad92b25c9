//! Threads that wait, awake for a moment, for the next job's tasks.
//!
//! A job opens a gate; workers that notice go through it and take task numbers until there are no more. The
//! caller takes tasks too, then closes the gate and waits for those inside only: a worker that was asleep,
//! or that the system had put aside, costs the job nothing.
#![allow(unsafe_code)]

use std::{
    any::Any,
    cell::UnsafeCell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::*},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::memory::Shared;

/// How long an idle worker stays awake: longer than the work between two jobs of a step.
const AWAKE: Duration = Duration::from_micros(50);

/// The gate: whether a job is open (1), whether the pool ends (2), workers inside (in units of `INSIDE`), and
/// the number of jobs so far (in units of `JOB`).
const OPEN: u64 = 1;
const END: u64 = 2;
const INSIDE: u64 = 4;
const JOB: u64 = 1 << 24;

/// Threads for jobs that consist of numbered tasks.
pub(super) struct Pool {
    state: Arc<State>,
    /// Held as long as a job runs: there is one at a time.
    turn: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

/// A line of its own for what many threads write.
#[repr(align(128))]
struct Line<T>(T);

struct State {
    gate: Line<AtomicU64>,
    next: Line<AtomicUsize>,
    job: UnsafeCell<Job>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    asleep: AtomicUsize,
    bed: Mutex<()>,
    wake: Condvar,
}

// SAFETY: the raw pointer and the cell are `job`, which is written only with no worker inside and the gate
// closed, and read only inside.
unsafe impl Send for State {}
// SAFETY: as above.
unsafe impl Sync for State {}

impl Pool {
    /// A pool of this many threads, the caller of a job among them. If the system refuses some, the others
    /// do the work.
    pub(super) fn new(threads: usize) -> Self {
        let state = Arc::new(State {
            gate: Line(AtomicU64::new(0)),
            next: Line(AtomicUsize::new(0)),
            job: UnsafeCell::new(Job { task: &|_| (), tasks: 0 }),
            panic: Mutex::new(None),
            asleep: AtomicUsize::new(0),
            bed: Mutex::new(()),
            wake: Condvar::new(),
        });
        let spawn = |i| {
            let state = state.clone();
            std::thread::Builder::new().name(format!("cpu-{i}")).spawn(move || state.work()).ok()
        };
        let workers = (1..threads).map_while(spawn).collect();
        Pool { state, turn: Mutex::new(()), workers }
    }

    /// How many threads there are, the caller among them.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task` with every number below `tasks`, on all threads, and returns when all is done.
    /// Panics if one of them does. Not to be called from within a task.
    pub(super) fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() {
            return (0..tasks).for_each(task);
        }
        let turn = lock(&self.turn);
        let state = &*self.state;
        // SAFETY: only the lifetime changes. Workers use the pointer inside the gate only, and `close` below,
        // which runs in any case, waits until none is inside.
        let task = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync)>(task)
        };
        let job = Job { task, tasks };
        // SAFETY: the gate is closed and nobody inside; the turn is ours.
        unsafe { *state.job.get() = job };
        state.next.0.store(0, Relaxed);
        state.open(tasks - 1);
        state.take_tasks(job);
        state.close();
        let panic = lock(&state.panic).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Calls `f(row, rows' numbers)` for runs of about `grain` numbers of `out`, whole rows of `dim`.
    pub(super) fn rows(
        &self,
        out: &mut [f32],
        dim: usize,
        grain: usize,
        f: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        if dim == 0 {
            return;
        }
        let rows = out.len() / dim;
        let run = grain.div_ceil(dim).max(1);
        let out = Shared::new(out);
        self.run(rows.div_ceil(run), &|i| {
            let row = i * run;
            // SAFETY: the runs of different tasks do not overlap.
            f(row, unsafe { out.part(row * dim, run.min(rows - row) * dim) });
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.state.gate.0.fetch_or(END, SeqCst);
        drop(lock(&self.state.bed));
        self.state.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker does not panic: tasks that do are caught.
            let _ = worker.join();
        }
    }
}

impl State {
    /// Opens the gate for the job, to the sleeping as well, as far as there is work for them.
    fn open(&self, helpers: usize) {
        self.gate.0.fetch_add(JOB | OPEN, SeqCst);
        let asleep = self.asleep.load(SeqCst);
        if asleep > 0 {
            // Whoever is about to sleep has looked at the gate before, or holds this lock.
            drop(lock(&self.bed));
            (0..asleep.min(helpers)).for_each(|_| self.wake.notify_one());
        }
    }

    /// Closes the gate and waits for those inside.
    fn close(&self) {
        let mut gate = self.gate.0.fetch_and(!OPEN, SeqCst);
        let mut turns = 0u32;
        while gate % JOB >= INSIDE {
            turns += 1;
            if turns.is_multiple_of(256) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
            gate = self.gate.0.load(Acquire);
        }
    }

    /// A worker's life.
    fn work(&self) {
        let mut seen = 0;
        while let Some(gate) = self.next_job(seen) {
            seen = gate / JOB;
            if self.enter(gate) {
                // SAFETY: inside the gate.
                self.take_tasks(unsafe { *self.job.get() });
                self.gate.0.fetch_sub(INSIDE, Release);
            }
        }
    }

    /// Waits for an open gate other than `seen`; `None` at the end.
    fn next_job(&self, seen: u64) -> Option<u64> {
        let idle = |gate: u64| gate & END == 0 && (gate & OPEN == 0 || gate / JOB == seen);
        let mut since = None;
        loop {
            for _ in 0..64 {
                let gate = self.gate.0.load(Acquire);
                if !idle(gate) {
                    return Some(gate).filter(|g| g & END == 0);
                }
                std::hint::spin_loop();
            }
            // On a busy machine the caller may be waiting for this very core.
            std::thread::yield_now();
            if since.get_or_insert_with(Instant::now).elapsed() > AWAKE {
                let mut bed = lock(&self.bed);
                self.asleep.fetch_add(1, SeqCst);
                while idle(self.gate.0.load(SeqCst)) {
                    bed = self.wake.wait(bed).unwrap_or_else(PoisonError::into_inner);
                }
                self.asleep.fetch_sub(1, SeqCst);
                since = None;
            }
        }
    }

    /// Goes in, unless the gate has been closed meanwhile.
    fn enter(&self, mut gate: u64) -> bool {
        let job = gate / JOB;
        while gate & OPEN != 0 && gate / JOB == job {
            match self.gate.0.compare_exchange_weak(gate, gate + INSIDE, Acquire, Relaxed) {
                Ok(_) => return true,
                Err(now) => gate = now,
            }
        }
        false
    }

    /// Does tasks until there are no more. A panic ends the job early and is kept for its caller.
    fn take_tasks(&self, job: Job) {
        // SAFETY: the caller is inside the gate, or is the one who opened it: the closure lives.
        let task = unsafe { &*job.task };
        let all = || {
            loop {
                let i = self.next.0.fetch_add(1, Relaxed);
                if i >= job.tasks {
                    break;
                }
                task(i);
            }
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(all)) {
            self.next.0.store(job.tasks, Relaxed);
            lock(&self.panic).get_or_insert(panic);
        }
    }
}

/// A panic elsewhere leaves nothing half done behind these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 100] {
                for _ in 0..200 {
                    let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, &|i| {
                        counts[i].fetch_add(1, Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Relaxed) == 1), "{threads} threads, {tasks} tasks");
                }
            }
        }
    }

    #[test]
    fn sleeping_workers_wake() {
        let pool = Pool::new(2);
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(2));
            // Each task waits for the other: both threads are needed.
            let met = AtomicUsize::new(0);
            pool.run(2, &|_| {
                met.fetch_add(1, SeqCst);
                while met.load(SeqCst) < 2 {
                    std::thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn several_callers_take_turns() {
        let pool = Pool::new(3);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..500 {
                        let sum = AtomicUsize::new(0);
                        pool.run(10, &|i| {
                            sum.fetch_add(i, Relaxed);
                        });
                        assert_eq!(sum.into_inner(), 45);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(2);
        for bad in [0, 5, 63] {
            let run = || pool.run(64, &|i| assert!(i != bad, "task {i}"));
            let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
            assert_eq!(panic.downcast_ref::<String>().unwrap(), &format!("task {bad}"));
            pool.run(64, &|_| ());
        }
    }

    #[test]
    fn rows_are_cut_whole() {
        let pool = Pool::new(2);
        let mut out = vec![0.0; 7 * 5];
        pool.rows(&mut out, 5, 11, |row, numbers| {
            assert_eq!(numbers.len() % 5, 0);
            for (i, n) in numbers.iter_mut().enumerate() {
                *n += (row * 5 + i) as f32;
            }
        });
        assert!(out.iter().enumerate().all(|(i, &n)| n == i as f32));
    }
}
