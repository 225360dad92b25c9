//! In place of `src/backend`: as much of the trait as the pipeline's files use, and a device of [`World`] behind it.

use std::time::Duration;

use crate::{
    batch::{MicroBatch, ON_DEVICE, Sampled, Step},
    error::Result,
    world::World,
};

/// What a pass over a micro-batch consists of here.
pub trait Backend: Send + Sync + Sized + 'static {
    /// Numbers on the device.
    type Buf: Send;
    /// Tokens that may not have been chosen yet.
    type Pending: Send;
    /// A moment on the device's clock.
    type Mark: Send;
    /// Whether ops return before they are done.
    const ASYNC: bool;

    /// For wiring alone: a stage's device.
    fn of(stage: usize, world: &World, last: bool) -> Self;
    /// In messages.
    fn name(&self) -> String;
    /// Room for hidden rows.
    fn buf(&self) -> Result<Self::Buf>;
    /// Takes the micro-batch.
    fn prepare(&self, batch: &MicroBatch) -> Result<()>;
    /// What comes later waits for the tokens of this step.
    fn await_tokens(&self, after: u64) -> Result<()>;
    /// From the hidden rows of the stage before, or from tokens, to those for the stage after.
    fn forward(&self, hidden: &mut Self::Buf, batch: &MicroBatch) -> Result<()>;
    /// Chooses tokens.
    fn sample(&self, hidden: &Self::Buf, step: &Step) -> Result<Self::Pending>;
    /// Waits for them.
    fn collect(&self, pending: Self::Pending, batch: &MicroBatch) -> Result<Vec<Sampled>>;
    /// Marks the moment.
    fn mark(&self) -> Result<Self::Mark>;
    /// The time between two moments.
    fn between(&self, from: &Self::Mark, to: &Self::Mark) -> Result<Option<Duration>>;
    /// Copies to the host.
    fn read(&self, out: &mut [f32], from: &Self::Buf) -> Result<()>;
    /// Copies from the host.
    fn write(&self, to: &mut Self::Buf, from: &[f32]) -> Result<()>;
}

/// The number that stands for a step's hidden rows when they leave a stage.
fn hidden_number(step: u64, stage: usize) -> f32 {
    (step * 16 + stage as u64) as f32
}

/// The number that stands for the token that a step brings.
fn token_number(step: u64) -> f32 {
    (step * 16 + 15) as f32
}

/// The step that a micro-batch belongs to: it is its row's position here.
fn step_of(batch: &MicroBatch) -> u64 {
    u64::from(batch.positions[0])
}

/// A stage's device. On the processor (`ASYNC` is false) the same things happen; there the host's turns are what matters.
pub struct Device<const ASYNC: bool> {
    stage: usize,
    last: bool,
    world: World,
}

/// A number on a device. When it goes, the driver waits for the whole device.
pub struct Buf {
    world: World,
    stage: usize,
    cell: usize,
}

impl Drop for Buf {
    fn drop(&mut self) {
        let mut state = self.world.lock();
        // Of a device that has failed nothing can be waited for.
        let _ = state.drain(self.stage);
        state.free(self.cell..self.cell + 1);
    }
}

/// A token that may not have been chosen yet: its step, and the operation that writes it.
pub struct Pending {
    step: u64,
    wrote: (usize, u64),
}

impl<const ASYNC: bool> Device<ASYNC> {
    /// Every call to the device may be the one that fails.
    fn call<T>(&self, act: impl FnOnce(&mut crate::world::State) -> T) -> Result<T> {
        self.world.call(self.stage, act)
    }
}

impl<const ASYNC: bool> Backend for Device<ASYNC> {
    type Buf = Buf;
    type Pending = Pending;
    type Mark = ();
    const ASYNC: bool = ASYNC;

    fn of(stage: usize, world: &World, last: bool) -> Self {
        Device { stage, last, world: world.clone() }
    }

    fn name(&self) -> String {
        format!("test:{}", self.stage)
    }

    fn buf(&self) -> Result<Buf> {
        let cell = self.call(|state| state.alloc(1))?;
        Ok(Buf { world: self.world.clone(), stage: self.stage, cell })
    }

    fn prepare(&self, _: &MicroBatch) -> Result<()> {
        self.call(|_| ())
    }

    fn await_tokens(&self, after: u64) -> Result<()> {
        self.call(|state| state.wait(self.stage, state.chosen(after)))
    }

    fn forward(&self, hidden: &mut Buf, batch: &MicroBatch) -> Result<()> {
        let (stage, step) = (self.stage, step_of(batch));
        self.call(|state| {
            let came = match stage {
                0 if batch.ids[0] != ON_DEVICE => None,
                0 => {
                    let seat = state.table + batch.outputs[0].seat as usize;
                    Some((state.read(stage, seat), token_number(batch.seqs[0].cached as u64)))
                }
                _ => Some((state.read(stage, hidden.cell), hidden_number(step, stage - 1))),
            };
            if let Some((came, wanted)) = came
                && came != wanted
            {
                state.violated(format!("stage {stage} reads {came} where step {step} brings {wanted}"));
            }
            state.write(stage, hidden.cell, hidden_number(step, stage));
        })
    }

    fn sample(&self, hidden: &Buf, step: &Step) -> Result<Pending> {
        assert!(self.last, "tokens are chosen by the last stage");
        let seat = step.batch.outputs[0].seat as usize;
        self.call(|state| {
            state.read(self.stage, hidden.cell);
            let cell = state.table + seat;
            let wrote = match ASYNC {
                true => state.write(self.stage, cell, token_number(step.step)),
                false => (self.stage, 0),
            };
            Pending { step: step.step, wrote }
        })
        .and_then(|pending| {
            self.call(|state| state.record(self.stage, state.chosen(step.step)))?;
            Ok(pending)
        })
    }

    fn collect(&self, pending: Pending, batch: &MicroBatch) -> Result<Vec<Sampled>> {
        self.call(|state| {
            state.synchronize(state.chosen(pending.step))?;
            state.expect_done(pending.wrote, "the host reads a token");
            let id = pending.step as u32;
            Ok(vec![Sampled { seq: batch.outputs[0].seq, id, logprobs: None }])
        })?
    }

    fn mark(&self) -> Result<()> {
        self.call(|_| ())
    }

    fn between(&self, _: &(), _: &()) -> Result<Option<Duration>> {
        self.call(|_| Some(Duration::ZERO))
    }

    fn read(&self, out: &mut [f32], from: &Buf) -> Result<()> {
        self.call(|state| {
            out[0] = state.read(self.stage, from.cell);
            state.drain(self.stage)
        })?
    }

    fn write(&self, to: &mut Buf, from: &[f32]) -> Result<()> {
        self.call(|state| {
            state.write(self.stage, to.cell, from[0]);
            state.drain(self.stage)
        })?
    }
}

/// In place of `src/backend/cpu`.
pub mod cpu {
    /// The processor, as a stage sees it.
    pub type Cpu = super::Device<false>;
}

/// In place of `src/backend/cuda`: what `src/transport/peer.rs` asks of a GPU.
pub mod cuda {
    use super::{Buf as OwnBuf, Device};
    use crate::{error::Result, world::World};

    pub use super::Buf;

    /// A stage's GPU.
    pub type Cuda = Device<true>;

    /// Bytes that one number is kept in, since entries of a ring begin there.
    const CELL_BYTES: usize = 256;

    /// A place in memory.
    #[derive(Clone, Copy)]
    pub struct DevicePtr(usize);

    impl DevicePtr {
        /// So many bytes further on.
        #[allow(clippy::should_implement_trait)]
        pub fn add(self, bytes: usize) -> DevicePtr {
            DevicePtr(self.0 + bytes / CELL_BYTES)
        }
    }

    /// A place in a stream.
    #[derive(Clone)]
    pub struct Event(usize);

    /// Memory that packets cross a boundary in. Pinned memory goes without a look at the devices.
    pub struct Ring {
        world: World,
        cells: std::ops::Range<usize>,
        device: Option<usize>,
    }

    impl Ring {
        /// Where it begins.
        pub fn ptr(&self) -> DevicePtr {
            DevicePtr(self.cells.start)
        }
    }

    impl Ring {
        /// Shows a number.
        ///
        /// # Safety
        /// Nothing can go wrong here; it is unsafe where the real one is.
        pub unsafe fn read<T>(&self, at: usize, _len: usize, look: impl FnOnce(&[f32]) -> T) -> T {
            let number = self.world.lock().read_on_host(self.cells.start + at / CELL_BYTES);
            look(&[number])
        }

        /// Lets a number be written.
        ///
        /// # Safety
        /// As above.
        pub unsafe fn write<T>(&self, at: usize, _len: usize, put: impl FnOnce(&mut [f32]) -> T) -> T {
            let mut number = [f32::NAN];
            let outcome = put(&mut number);
            self.world.lock().write_on_host(self.cells.start + at / CELL_BYTES, number[0]);
            outcome
        }
    }

    impl Drop for Ring {
        fn drop(&mut self) {
            let mut state = self.world.lock();
            if let Some(stage) = self.device {
                let _ = state.drain(stage);
            }
            state.free(self.cells.clone());
        }
    }

    impl OwnBuf {
        /// Where its numbers are.
        pub fn f32s(&self, _len: usize) -> DevicePtr {
            DevicePtr(self.cell)
        }
    }

    impl Cuda {
        /// The self-test needs no more room than a packet.
        pub const TEST_BYTES: usize = CELL_BYTES;

        /// Whether that GPU's memory can be written to.
        pub fn reaches(&self, _: &Cuda) -> Result<bool> {
            Ok(true)
        }

        /// What is wrong with packets that are sent there.
        pub fn self_test(&self, _: &Cuda, _: &Ring) -> Result<Option<String>> {
            Ok(None)
        }

        /// Memory of this GPU.
        pub fn ring(&self, bytes: usize) -> Result<Ring> {
            self.memory(bytes, Some(self.stage))
        }

        /// Memory of the host.
        pub fn host_ring(&self, bytes: usize) -> Result<Ring> {
            self.memory(bytes, None)
        }

        fn memory(&self, bytes: usize, device: Option<usize>) -> Result<Ring> {
            let len = bytes / CELL_BYTES;
            let at = self.world.lock().alloc(len);
            Ok(Ring { world: self.world.clone(), cells: at..at + len, device })
        }

        /// An event that has not been recorded.
        pub fn event(&self) -> Result<Event> {
            Ok(Event(self.world.lock().event()))
        }

        /// Makes the stream wait.
        pub fn wait(&self, event: &Event) -> Result<()> {
            self.call(|state| state.wait(self.stage, event.0))
        }

        /// Waits on the host.
        pub fn wait_on_host(&self, event: &Event) -> Result<()> {
            self.world.lock().synchronize(event.0)
        }

        /// Records an event.
        pub fn record_event(&self, event: &Event) -> Result<()> {
            self.call(|state| state.record(self.stage, event.0))
        }

        /// Puts numbers on their way, then the event.
        ///
        /// # Safety
        /// Nothing can go wrong here; it is unsafe where the real one is.
        pub unsafe fn send_rows(
            &self,
            to: DevicePtr,
            from: DevicePtr,
            len: usize,
            sent: &Event,
        ) -> Result<()> {
            // SAFETY: as above.
            unsafe { self.copy_rows(to, from, len)? };
            self.record_event(sent)
        }

        /// Puts numbers on their way.
        ///
        /// # Safety
        /// As above.
        pub unsafe fn copy_rows(&self, to: DevicePtr, from: DevicePtr, _len: usize) -> Result<()> {
            self.call(|state| {
                let number = state.read(self.stage, from.0);
                state.write(self.stage, to.0, number);
            })
        }
    }
}
