//! Streams and events: a thread for each stream, which sleeps for as long as a GPU would work.

use std::{
    collections::VecDeque,
    ffi::{c_int, c_uint, c_void},
    sync::{Arc, Condvar, Mutex, MutexGuard, Once, OnceLock, PoisonError, Weak},
    time::{Duration, Instant},
};

use crate::{
    memory::{copy_now, expect_memory, fill_now},
    state::{
        INVALID_VALUE, SUCCESS, Status, begin_recording, check, count_work, current, driver_lock,
        end_recording, expect_current, expect_no_recording, lock, misuse, put, settings, shared, status,
    },
};

const NOT_READY: Status = 600;
const CAPTURE_UNSUPPORTED: Status = 900;
/// A thread sleeps only for what is longer than waking it takes.
const NAP: Duration = Duration::from_micros(150);

/// What a piece of work takes that has no end: years.
const NEVER: f64 = 1e9;

/// What a piece of work leaves behind.
#[derive(Debug, Clone, Copy)]
pub enum Effect {
    Nothing,
    Copy { to: u64, from: u64, bytes: usize },
    Fill { at: u64, byte: u8, bytes: usize },
}

/// A piece of work.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    pub seconds: f64,
    pub effect: Effect,
}

enum Op {
    Work(Work),
    Graph(Arc<Vec<Work>>),
    Record(Arc<Event>, u64),
    Wait(Arc<Event>, u64),
}

pub struct Stream {
    pub gpu: usize,
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    ops: VecDeque<Op>,
    /// All ops so far, and those that have been done.
    put: u64,
    done: u64,
    ended: bool,
    /// What is being recorded.
    recorded: Option<Vec<Work>>,
}

pub struct Event {
    gpu: usize,
    timed: bool,
    inner: Mutex<Reached>,
    changed: Condvar,
}

struct Reached {
    /// How often it has been recorded, and the latest record that has been reached, with its time.
    recorded: u64,
    reached: u64,
    at: Instant,
}

/// Those that there are.
fn all() -> &'static Mutex<Vec<Weak<Stream>>> {
    static ALL: OnceLock<Mutex<Vec<Weak<Stream>>>> = OnceLock::new();
    ALL.get_or_init(Mutex::default)
}

/// Waits until a GPU has done all that it has been given, or fails.
pub fn drain(gpu: usize) -> Result<(), Status> {
    let streams: Vec<Arc<Stream>> = lock(all()).iter().filter_map(Weak::upgrade).collect();
    streams.iter().filter(|stream| stream.gpu == gpu).try_for_each(|stream| stream.drain())
}

/// Waits for a change, and looks up now and then: a GPU may have failed.
fn nap<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    changed.wait_timeout(guard, Duration::from_millis(20)).unwrap_or_else(PoisonError::into_inner).0
}

impl Stream {
    /// SAFETY: `raw` is a stream that has not been destroyed.
    pub unsafe fn of(raw: *mut c_void) -> Arc<Stream> {
        if raw.is_null() {
            misuse("the default stream");
        }
        // SAFETY: it was made by `cuStreamCreate`, which keeps one reference.
        unsafe { shared(raw) }
    }

    /// Puts work at the end, or into what is being recorded. Who finds no room waits, and keeps the driver's lock.
    pub fn work(&self, mut work: Work, doing: &str) -> Status {
        expect_current(self.gpu, doing);
        let _driver = driver_lock(self.gpu);
        match count_work(self.gpu) {
            Ok(true) => (),
            Ok(false) => work.seconds = NEVER,
            Err(failed) => return failed,
        }
        let mut inner = lock(&self.inner);
        match &mut inner.recorded {
            Some(recorded) => recorded.push(work),
            None => drop(self.put(inner, Op::Work(work))),
        }
        SUCCESS
    }

    fn put<'a>(&'a self, mut inner: MutexGuard<'a, Inner>, op: Op) -> MutexGuard<'a, Inner> {
        while (inner.put - inner.done) as usize >= settings().queue && check(self.gpu).is_ok() {
            inner = nap(&self.changed, inner);
        }
        inner.put += 1;
        inner.ops.push_back(op);
        self.changed.notify_all();
        inner
    }

    /// An op that is no part of a recording.
    fn put_plain(&self, op: Op, doing: &str) -> Status {
        expect_current(self.gpu, doing);
        let _driver = driver_lock(self.gpu);
        if let Err(failed) = check(self.gpu) {
            return failed;
        }
        let inner = lock(&self.inner);
        if inner.recorded.is_some() {
            misuse(&format!("{doing} while the stream is recorded"));
        }
        drop(self.put(inner, op));
        SUCCESS
    }

    pub fn repeat(&self, graph: Arc<Vec<Work>>) -> Status {
        count_work(self.gpu).map_or_else(|e| e, |_| self.put_plain(Op::Graph(graph), "a recorded pass"))
    }

    pub fn begin(&self) -> Status {
        let mut inner = lock(&self.inner);
        if inner.recorded.replace(Vec::new()).is_some() {
            misuse("a recording within a recording");
        }
        begin_recording(self.gpu);
        SUCCESS
    }

    pub fn end(&self) -> Option<Vec<Work>> {
        end_recording(self.gpu);
        lock(&self.inner).recorded.take()
    }

    /// Waits for what there is; an error if the GPU fails meanwhile.
    fn drain(&self) -> Result<(), Status> {
        let mut inner = lock(&self.inner);
        let until = inner.put;
        while inner.done < until {
            check(self.gpu)?;
            inner = nap(&self.changed, inner);
        }
        check(self.gpu)
    }

    /// Does one thing after the other.
    fn run(self: Arc<Stream>) {
        let mut now = Instant::now();
        loop {
            let mut inner = lock(&self.inner);
            while inner.ops.is_empty() && !inner.ended {
                inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
            }
            let Some(op) = inner.ops.pop_front() else { return };
            drop(inner);
            if check(self.gpu).is_err() {
                // Nothing of what it has been given is done any more, and no event is reached.
                return;
            }
            now = now.max(Instant::now().checked_sub(NAP).unwrap_or(now));
            match op {
                Op::Work(work) => now = work.run(now),
                Op::Graph(graph) => now = graph.iter().fold(now, |now, work| work.run(now)),
                Op::Record(event, number) => {
                    sleep_until(now);
                    event.reach(number, now);
                }
                Op::Wait(event, number) => now = now.max(event.wait(number)),
            }
            let mut inner = lock(&self.inner);
            inner.done += 1;
            self.changed.notify_all();
        }
    }
}

impl Work {
    /// Takes its time, from when it can begin; when it ends.
    fn run(&self, from: Instant) -> Instant {
        let until = from + Duration::from_secs_f64(self.seconds / settings().speed);
        if until > Instant::now() + NAP {
            sleep_until(until);
        }
        match self.effect {
            Effect::Nothing => (),
            Effect::Copy { to, from, bytes } => copy_now(to, from, bytes),
            Effect::Fill { at, byte, bytes } => fill_now(at, byte, bytes),
        }
        until
    }
}

fn sleep_until(then: Instant) {
    let left = then.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        std::thread::sleep(left);
    }
}

impl Event {
    /// SAFETY: `raw` is an event that has not been destroyed.
    unsafe fn of(raw: *mut c_void) -> Arc<Event> {
        // SAFETY: it was made by `cuEventCreate`, which keeps one reference.
        unsafe { shared(raw) }
    }

    fn reach(&self, number: u64, at: Instant) {
        let mut inner = lock(&self.inner);
        (inner.reached, inner.at) = (inner.reached.max(number), at);
        self.changed.notify_all();
    }

    fn wait(&self, number: u64) -> Instant {
        let mut inner = lock(&self.inner);
        while inner.reached < number {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.at
    }

    fn recorded(&self) -> u64 {
        lock(&self.inner).recorded
    }
}

/// At the end of a process a driver waits for its GPUs.
fn end_with_all_work() {
    extern "C" fn wait() {
        (0..settings().gpus).for_each(|gpu| _ = drain(gpu));
    }
    static ONCE: Once = Once::new();
    if settings().stuck.is_some() {
        // SAFETY: it may be called at the end: it waits, and does no more.
        ONCE.call_once(|| _ = unsafe { libc::atexit(wait) });
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) -> Status {
    // SAFETY: the caller's.
    unsafe { put(least, 0).max(put(greatest, -5)) }
}

/// Each stream has a thread of its own here: none goes before others.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreateWithPriority(
    stream: *mut *mut c_void,
    flags: c_uint,
    priority: c_int,
) -> Status {
    if !(-5..=0).contains(&priority) {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's.
    unsafe { cuStreamCreate(stream, flags) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) -> Status {
    let Ok(gpu) = current() else { return INVALID_VALUE };
    end_with_all_work();
    let made = Arc::new(Stream { gpu, inner: Mutex::default(), changed: Condvar::new() });
    let mut streams = lock(all());
    streams.retain(|stream| stream.strong_count() > 0);
    streams.push(Arc::downgrade(&made));
    let runs = made.clone();
    std::thread::spawn(move || runs.run());
    // SAFETY: the caller's.
    unsafe { put(stream, Arc::into_raw(made).cast_mut().cast()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(stream: *mut c_void) -> Status {
    // SAFETY: the caller's; what has been put into it is still done.
    let stream = unsafe { Arc::from_raw(stream.cast::<Stream>()) };
    lock(&stream.inner).ended = true;
    stream.changed.notify_all();
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamSynchronize(stream: *mut c_void) -> Status {
    // SAFETY: the caller's.
    let stream = unsafe { Stream::of(stream) };
    if lock(&stream.inner).recorded.is_some() {
        misuse("a stream is waited for while it is recorded");
    }
    status(stream.drain())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamQuery(stream: *mut c_void) -> Status {
    // SAFETY: the caller's.
    let stream = unsafe { Stream::of(stream) };
    expect_current(stream.gpu, "a question to a stream");
    expect_no_recording(Some(stream.gpu), "a question to a stream");
    let _driver = driver_lock(stream.gpu);
    if let Err(failed) = check(stream.gpu) {
        return failed;
    }
    let inner = lock(&stream.inner);
    match (inner.recorded.is_some(), inner.done == inner.put) {
        (true, _) => CAPTURE_UNSUPPORTED,
        (_, true) => SUCCESS,
        _ => NOT_READY,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(stream: *mut c_void, what: *mut c_int) -> Status {
    // SAFETY: the caller's.
    let stream = unsafe { Stream::of(stream) };
    let recorded = lock(&stream.inner).recorded.is_some();
    // SAFETY: the caller's.
    unsafe { put(what, c_int::from(recorded)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamWaitEvent(stream: *mut c_void, event: *mut c_void, _: c_uint) -> Status {
    // SAFETY: the caller's.
    let (stream, event) = unsafe { (Stream::of(stream), Event::of(event)) };
    let number = event.recorded();
    if number == 0 {
        misuse("a stream waits for an event that has never been recorded");
    }
    stream.put_plain(Op::Wait(event, number), "a wait")
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: *mut c_void) -> Status {
    expect_memory(to, bytes, "the target of a copy");
    expect_memory(from, bytes, "the source of a copy");
    let work = Work { seconds: 2e-6 + bytes as f64 / 5e11, effect: Effect::Copy { to, from, bytes } };
    // SAFETY: the caller's.
    unsafe { Stream::of(stream) }.work(work, "a copy")
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemsetD8Async(at: u64, byte: u8, bytes: usize, stream: *mut c_void) -> Status {
    expect_memory(at, bytes, "what is filled");
    expect_no_recording(current().ok(), "filling");
    let work = Work { seconds: 2e-6 + bytes as f64 / 3e12, effect: Effect::Fill { at, byte, bytes } };
    // SAFETY: the caller's.
    unsafe { Stream::of(stream) }.work(work, "filling")
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut *mut c_void, flags: c_uint) -> Status {
    let Ok(gpu) = current() else { return INVALID_VALUE };
    let inner = Mutex::new(Reached { recorded: 0, reached: 0, at: Instant::now() });
    let made = Arc::new(Event { gpu, timed: flags & 2 == 0, inner, changed: Condvar::new() });
    // SAFETY: the caller's.
    unsafe { put(event, Arc::into_raw(made).cast_mut().cast()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(event: *mut c_void) -> Status {
    // SAFETY: the caller's; streams keep what they still need of it.
    drop(unsafe { Arc::from_raw(event.cast::<Event>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: *mut c_void, stream: *mut c_void) -> Status {
    // SAFETY: the caller's.
    let (event, stream) = unsafe { (Event::of(event), Stream::of(stream)) };
    if event.gpu != stream.gpu {
        misuse(&format!("an event of GPU {} is recorded in a stream of GPU {}", event.gpu, stream.gpu));
    }
    let number = {
        let mut inner = lock(&event.inner);
        inner.recorded += 1;
        inner.recorded
    };
    stream.put_plain(Op::Record(event, number), "an event")
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventQuery(event: *mut c_void) -> Status {
    // SAFETY: the caller's.
    let event = unsafe { Event::of(event) };
    let _driver = driver_lock(event.gpu);
    if let Err(failed) = check(event.gpu) {
        return failed;
    }
    let inner = lock(&event.inner);
    if inner.reached >= inner.recorded { SUCCESS } else { NOT_READY }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventSynchronize(event: *mut c_void) -> Status {
    // SAFETY: the caller's.
    let event = unsafe { Event::of(event) };
    let number = event.recorded();
    let mut inner = lock(&event.inner);
    while inner.reached < number && check(event.gpu).is_ok() {
        inner = nap(&event.changed, inner);
    }
    drop(inner);
    status(check(event.gpu))
}

unsafe fn elapsed(ms: *mut f32, start: *mut c_void, end: *mut c_void) -> Status {
    // SAFETY: the caller's.
    let (start, end) = unsafe { (Event::of(start), Event::of(end)) };
    if !start.timed || !end.timed || start.recorded() == 0 || end.recorded() == 0 {
        misuse("the time between events that have none");
    }
    let at = |event: &Event| lock(&event.inner).at;
    let time = at(&end).saturating_duration_since(at(&start)).as_secs_f32() * 1e3;
    // SAFETY: the caller's.
    unsafe { put(ms, time.max(1e-3)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime(ms: *mut f32, start: *mut c_void, end: *mut c_void) -> Status {
    // SAFETY: the caller's.
    unsafe { elapsed(ms, start, end) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime_v2(ms: *mut f32, start: *mut c_void, end: *mut c_void) -> Status {
    // SAFETY: the caller's.
    unsafe { elapsed(ms, start, end) }
}
