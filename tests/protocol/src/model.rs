//! In place of `src/model`: a decoder that asks its device for whole passes.

/// The forward pass.
pub mod decoder {
    use std::sync::Arc;

    use crate::{
        backend::Backend,
        batch::{MicroBatch, Step},
        error::Result,
    };

    /// A stage's units.
    pub struct Decoder<B: Backend> {
        hidden: B::Buf,
        batch: Arc<MicroBatch>,
    }

    impl<B: Backend> Decoder<B> {
        /// Takes room on the device.
        pub fn load(backend: &B) -> Result<Self> {
            Ok(Decoder { hidden: backend.buf()?, batch: Arc::default() })
        }

        /// Bytes of no weights.
        pub fn weight_bytes(&self) -> usize {
            0
        }

        /// The rows that came from the stage before.
        pub fn hidden_mut(&mut self) -> &mut B::Buf {
            &mut self.hidden
        }

        /// The rows for the stage after.
        pub fn hidden(&self, rows: usize) -> (&B::Buf, usize) {
            (&self.hidden, rows)
        }

        /// Takes the next micro-batch.
        pub fn prepare(&mut self, backend: &B, batch: &MicroBatch) -> Result<()> {
            self.batch = Arc::new(batch.clone());
            backend.prepare(batch)
        }

        /// Carries it out.
        pub fn forward(&mut self, backend: &B) -> Result<()> {
            backend.forward(&mut self.hidden, &self.batch)
        }

        /// Asks for tokens.
        pub fn sample(&mut self, backend: &B, step: &Step) -> Result<B::Pending> {
            backend.sample(&self.hidden, step)
        }
    }
}
