//! Through host memory.

use std::sync::Arc;

use super::{Closed, EndsBetween, Receiver, Sender, Transport};
use crate::{
    backend::Backend,
    batch::Step,
    error::{Error, Result},
    sync::channel,
};

/// A boundary through host memory: works between any two devices.
#[derive(Debug, Clone, Copy, Default)]
pub struct Host;

impl<A: Backend, B: Backend> Transport<A, B> for Host {
    fn name(&self) -> &'static str {
        "host"
    }

    fn connect(&self, from: Arc<A>, to: Arc<B>, depth: usize, len_max: usize) -> Result<EndsBetween<A, B>> {
        assert!(depth > 0, "a boundary without buffers; this is a bug");
        let (full_in, full_out) = channel::bounded(depth);
        let (free_in, free_out) = channel::bounded(depth);
        for _ in 0..depth {
            free_in.send(buffer(len_max)?).expect("the boundary's own end is open; this is a bug");
        }
        let sender = HostSender { backend: from, full: full_in, free: free_out, room: None };
        let receiver = HostReceiver { backend: to, full: full_out, free: free_in, came: None };
        Ok((Box::new(sender), Box::new(receiver)))
    }
}

fn buffer(len_max: usize) -> Result<Vec<f32>> {
    let mut numbers = Vec::new();
    numbers.try_reserve_exact(len_max).map_err(|e| Error::Device {
        device: "host".into(),
        why: format!("a boundary of {len_max} numbers: {e}"),
    })?;
    Ok(numbers)
}

struct HostSender<B> {
    backend: Arc<B>,
    full: channel::Sender<(Step, Vec<f32>)>,
    free: channel::Receiver<Vec<f32>>,
    room: Option<Vec<f32>>,
}

impl<B: Backend> Sender<B> for HostSender<B> {
    fn wait_for_room(&mut self) -> Result<(), Closed> {
        if self.room.is_none() {
            self.room = Some(self.free.recv().map_err(|_| Closed)?);
        }
        Ok(())
    }

    fn clear(&mut self) -> Result<()> {
        Ok(())
    }

    fn send(&mut self, step: Step, hidden: &B::Buf, len: usize) -> Result<()> {
        let mut numbers = self.room.take().expect("nothing was waited for before a send; this is a bug");
        assert!(len <= numbers.capacity(), "a packet larger than the boundary; this is a bug");
        numbers.resize(len, 0.0);
        self.backend.read(&mut numbers, hidden)?;
        self.full.send((step, numbers)).map_err(|_| Error::Engine("the next stage is gone".into()))
    }
}

struct HostReceiver<B> {
    backend: Arc<B>,
    full: channel::Receiver<(Step, Vec<f32>)>,
    free: channel::Sender<Vec<f32>>,
    came: Option<Vec<f32>>,
}

impl<B: Backend> Receiver<B> for HostReceiver<B> {
    fn wait(&mut self) -> Result<Step, Closed> {
        let (step, numbers) = self.full.recv().map_err(|_| Closed)?;
        self.came = Some(numbers);
        Ok(step)
    }

    fn arrive(&mut self) -> Result<()> {
        Ok(())
    }

    fn take(&mut self, hidden: &mut B::Buf) -> Result<()> {
        let numbers = self.came.as_ref().expect("nothing came before a take; this is a bug");
        self.backend.write(hidden, numbers)
    }

    fn give_back(&mut self) -> Result<()> {
        let numbers = self.came.take().expect("nothing came before it is given back; this is a bug");
        // The sender may be gone already; then nobody needs the buffer.
        let _ = self.free.send(numbers);
        Ok(())
    }
}
