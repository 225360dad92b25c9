//! A stage of the tower on its thread, and the one that brings tokens to the store.

use std::{
    sync::{Arc, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crossbeam_channel as channel;

use super::{Arrived, Cut, VisionConfig, Work, guard, needs::weight_bytes, packet, spans::Spans, spawn};
use crate::{
    backend::vision::{RowRun, VisionOps},
    engine::{
        images::{Tables, grid},
        meter::Meter,
    },
    error::{Error, Result},
    grid::Grid,
    model::{
        decoder::ImageStore,
        vision::{Tower, TowerConfig, VisionPass},
    },
    pipeline::StageMetrics,
    transport::{Closed, Receiver, Sender},
};

/// How often it is looked whether tokens have come to the store. Whoever waits on the device would keep other threads from it.
const LOOK: Duration = Duration::from_micros(50);

/// Where a stage's images come from.
pub(super) enum Feed<B: VisionOps> {
    /// Pixels, on the host.
    Pixels(channel::Receiver<Work>),
    /// The stage before, and what it has sent.
    Packets(Box<dyn Receiver<B>>, channel::Receiver<Arc<Cut>>),
}

/// A stage about to start.
pub(super) struct Part<B: VisionOps> {
    pub(super) index: usize,
    pub(super) backend: Arc<B>,
    pub(super) tower: TowerConfig,
    pub(super) tables: Tables,
    /// Closes when the device may be tried.
    pub(super) opens: channel::Receiver<()>,
    pub(super) input: Feed<B>,
    pub(super) output: Box<dyn Sender<B>>,
    /// What has been sent, to the stage after.
    pub(super) works: channel::Sender<Arc<Cut>>,
    /// For what goes wrong.
    pub(super) results: channel::Sender<Arrived>,
    pub(super) metrics: Arc<StageMetrics>,
    pub(super) meter: Arc<Meter>,
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
            let spans =
                Spans::new(self.index, self.backend.clone(), (self.metrics.clone(), self.meter.clone()));
            let mut running = Running { part: self, tower, spans, since: Instant::now() };
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
        let backend = &*self.backend;
        let mut tower = Tower::load(backend, &self.tower)?;
        backend.loaded()?;
        if B::ASYNC {
            let _ = self.opens.recv();
        }
        let began = Instant::now();
        tower.warm_up(backend, self.tower.rows_max)?;
        backend.loaded()?;
        let (stage, device, ms) = (self.index, backend.name(), began.elapsed().as_millis() as u64);
        tracing::info!(stage, device, ms, "the vision stage is warmed up");
        Ok(tower)
    }
}

/// A stage that has been loaded.
struct Running<B: VisionOps> {
    tower: Tower<B>,
    part: Part<B>,
    spans: Spans<B>,
    since: Instant,
}

impl<B: VisionOps> Running<B> {
    /// One pass; false when there are no more.
    fn serve(&mut self) -> Result<bool> {
        let Part { backend, tower: config, tables, input, output, works, metrics, .. } = &mut self.part;
        let (backend, tower, spec) = (&**backend, &mut self.tower, &config.spec);
        let (work, began) = match input {
            Feed::Pixels(coming) => {
                let Some(Work { pass, images, rows }) = self.spans.wait(coming)? else { return Ok(false) };
                let grid = |media| grid(spec, media).expect("an image has been checked; this is a bug");
                let grids: Vec<Grid> = images.iter().map(grid).collect();
                let of = images.iter().zip(&grids);
                let pixels: Vec<_> = of.map(|(media, grid)| tables.pixels(media, *grid)).collect();
                tower.set(backend, &grids)?;
                let began = backend.mark()?;
                tower.write_pixels(backend, &pixels)?;
                let cost = VisionPass::new(spec, &grids);
                (Arc::new(Cut { pass, grids, rows, cost }), began)
            }
            Feed::Packets(packets, coming) => {
                let Some(work) = self.spans.wait(coming)? else { return Ok(false) };
                if packets.wait().is_err() {
                    return Ok(false);
                }
                tower.set(backend, &work.grids)?;
                packets.arrive()?;
                let began = backend.mark()?;
                packets.take(tower.hidden())?;
                (work, began)
            }
        };
        let waited = self.since.elapsed();
        tower.forward(backend)?;
        self.spans.add(work.clone(), [began, backend.mark()?]);
        if let Feed::Packets(packets, _) = input {
            packets.give_back()?;
        }
        let gone = |Closed| Error::Engine("the next vision stage is gone".into());
        output.wait_for_room().map_err(gone)?;
        let rows = work.cost.rows;
        // The packet's company first: who has the packet looks for it.
        let _ = works.send(work.clone());
        match config.blocks.end == spec.full.len() {
            true => output.send(packet(work.pass), tower.tokens(), rows / spec.cell_rows() * spec.out)?,
            false => output.send(packet(work.pass), tower.hidden(), rows * spec.dim)?,
        }
        self.spans.read()?;
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
        // In the order of the device this is behind the copies.
        let there = backend.mark()?;
        while backend.between(&there, &there)?.is_none() {
            thread::sleep(LOOK);
        }
        Ok(Some(work.pass))
    }
}
