//! A stage of the tower on its thread, and the one that brings tokens to the store.

use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError},
    thread::JoinHandle,
    time::Instant,
};

use crossbeam_channel as channel;

use super::{Arrived, Cut, VisionConfig, guard, needs::weight_bytes, packet, spawn};
use crate::{
    backend::vision::{RowRun, VisionOps},
    error::{Error, Result},
    grid::Grid,
    model::{
        decoder::ImageStore,
        vision::{Tower, TowerConfig},
    },
    pipeline::StageMetrics,
    transport::{Closed, Receiver, Sender},
};

/// Rows of a pass that stages on GPUs have tried before they say that they are loaded, at most.
const WARM_ROWS: usize = 16_384;

/// Where a stage's images come from.
pub(super) enum Feed<B: VisionOps> {
    /// Patches, on the host.
    Patches(channel::Receiver<(Arc<Cut>, Vec<f32>)>),
    /// The stage before, and what it has sent.
    Packets(Box<dyn Receiver<B>>, channel::Receiver<Arc<Cut>>),
}

/// A stage about to start.
pub(super) struct Part<B: VisionOps> {
    pub(super) index: usize,
    pub(super) backend: Arc<B>,
    pub(super) tower: TowerConfig,
    pub(super) input: Feed<B>,
    pub(super) output: Box<dyn Sender<B>>,
    /// What has been sent, to the stage after.
    pub(super) works: channel::Sender<Arc<Cut>>,
    /// For what goes wrong.
    pub(super) results: channel::Sender<Arrived>,
    pub(super) metrics: Arc<StageMetrics>,
}

/// Brings tokens to the store.
pub(super) struct Keeper<B: VisionOps> {
    pub(super) backend: Arc<B>,
    pub(super) packets: Box<dyn Receiver<B>>,
    pub(super) works: channel::Receiver<Arc<Cut>>,
    pub(super) store: ImageStore<B>,
    pub(super) results: channel::Sender<Arrived>,
}

impl<B: VisionOps> Part<B> {
    /// Starts its thread, which tells whether the stage could be loaded, and the bytes of its weights.
    pub(super) fn spawn(self, loaded: channel::Sender<Result<usize>>) -> Result<JoinHandle<()>> {
        let name = format!("vision stage {}", self.index);
        spawn(name.clone(), move || {
            let tower = guard(&name, || self.load());
            // Nobody listens any more if another stage could not be loaded.
            let _ = loaded.send(tower.as_ref().map(|_| weight_bytes(&self.tower)).map_err(Error::clone));
            let Ok(tower) = tower else { return };
            let results = self.results.clone();
            let mut running = Running { part: self, tower, passes: VecDeque::new(), since: Instant::now() };
            loop {
                match guard(&name, || running.serve()) {
                    Ok(true) => (),
                    Ok(false) => return,
                    // After a failure nothing that comes later can be trusted: the stage ends.
                    Err(error) => {
                        let _ = results.send(Err(error));
                        return;
                    }
                }
            }
        })
    }

    fn load(&self) -> Result<Tower<B>> {
        let mut tower = Tower::load(&*self.backend, &self.tower)?;
        if B::ASYNC {
            self.warm_up(&mut tower)?;
        }
        Ok(tower)
    }

    /// What the device compiles or chooses when it first sees a number of rows.
    fn warm_up(&self, tower: &mut Tower<B>) -> Result<()> {
        let side = self.tower.spec.merge as u32;
        let (mut grid, mut down) = (Grid { t: 1, h: side, w: side }, false);
        while grid.patches() <= self.tower.rows_max.min(WARM_ROWS) {
            tower.set(&*self.backend, &[grid])?;
            tower.forward(&*self.backend)?;
            *(if down { &mut grid.h } else { &mut grid.w }) *= 2;
            down = !down;
        }
        self.backend.loaded()
    }
}

/// A stage that has been loaded.
struct Running<B: VisionOps> {
    tower: Tower<B>,
    part: Part<B>,
    /// Passes whose times have not been read: when they began and ended.
    passes: VecDeque<(B::Mark, B::Mark)>,
    since: Instant,
}

impl<B: VisionOps> Running<B> {
    /// One pass; false when there are no more.
    fn serve(&mut self) -> Result<bool> {
        let Part { backend, tower: config, input, output, works, metrics, .. } = &mut self.part;
        let spec = &config.spec;
        let (backend, tower) = (&**backend, &mut self.tower);
        let (work, patches) = match input {
            Feed::Patches(patches) => match patches.recv() {
                Ok((work, patches)) => (work, Some(patches)),
                Err(_) => return Ok(false),
            },
            Feed::Packets(packets, works) => match (packets.wait(), works.recv()) {
                (Ok(_), Ok(work)) => (work, None),
                _ => return Ok(false),
            },
        };
        let waited = self.since.elapsed();
        tower.set(backend, &work.grids)?;
        let began = match (patches, &mut *input) {
            (Some(patches), _) => {
                let began = backend.mark()?;
                tower.write_patches(backend, &patches)?;
                began
            }
            (None, Feed::Packets(packets, _)) => {
                packets.arrive()?;
                let began = backend.mark()?;
                packets.take(tower.hidden())?;
                began
            }
            (None, Feed::Patches(_)) => unreachable!("a pass of nothing; this is a bug"),
        };
        tower.forward(backend)?;
        self.passes.push_back((began, backend.mark()?));
        if let Feed::Packets(packets, _) = input {
            packets.give_back()?;
        }
        let gone = |Closed| Error::Engine("the next vision stage is gone".into());
        output.wait_for_room().map_err(gone)?;
        let rows: usize = work.grids.iter().map(|grid| grid.patches()).sum();
        // The packet's company first: who has the packet looks for it.
        let _ = works.send(work.clone());
        match config.blocks.end == spec.full.len() {
            true => output.send(packet(work.pass), tower.tokens(), rows / spec.cell_rows() * spec.out)?,
            false => output.send(packet(work.pass), tower.hidden(), rows * spec.dim)?,
        }
        while let Some((began, ended)) = self.passes.front() {
            let Some(busy) = backend.between(began, ended)? else { break };
            metrics.add_pass(busy);
            self.passes.pop_front();
        }
        metrics.add_waited(waited, rows);
        self.since = Instant::now();
        Ok(true)
    }
}

impl<B: VisionOps> Keeper<B> {
    pub(super) fn spawn(mut self, config: &VisionConfig) -> Result<JoinHandle<()>> {
        const NAME: &str = "image store";
        let (dim, tokens) = (config.spec.out, config.patches_max / config.spec.cell_rows());
        let merge = config.spec.merge as u32;
        let mut landing = self.backend.buf(tokens * dim)?;
        spawn(NAME.into(), move || {
            let results = self.results.clone();
            loop {
                let arrived = match guard(NAME, || self.serve(&mut landing, dim, merge)) {
                    Ok(Some(pass)) => Ok(pass),
                    Ok(None) => return,
                    Err(error) => Err(error),
                };
                let failed = arrived.is_err();
                if results.send(arrived).is_err() || failed {
                    return;
                }
            }
        })
    }

    /// Brings one pass's images to their rows, and waits until they are there.
    fn serve(&mut self, landing: &mut B::Buf, dim: usize, merge: u32) -> Result<Option<u64>> {
        let backend = &*self.backend;
        let (Ok(_), Ok(work)) = (self.packets.wait(), self.works.recv()) else { return Ok(None) };
        self.packets.take(landing)?;
        let mut from = 0;
        for (grid, &row) in work.grids.iter().zip(&work.rows) {
            let rows = grid.tokens(merge);
            let mut store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
            backend.copy_rows(&mut store, landing, RowRun { from, to: row as usize, rows, dim })?;
            from += rows;
        }
        self.packets.give_back()?;
        // In the order of the device this is read behind the copies.
        backend.read(&mut [0.0], landing)?;
        Ok(Some(work.pass))
    }
}
