//! Safetensors files: checked headers, mapped shards, tensors by name. Nothing is read before it is asked for.

mod dummy;
mod header;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

pub use header::{Entry, Header, Index, parse_header, parse_index};

use super::{
    config::{open_regular, read_small},
    mapped::Mapped,
};
use crate::{
    backend::{Bytes, DType, Store, Tensor},
    error::{Error, Result, shown},
};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
/// The indices of the largest checkpoints are some 10 MB.
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// The tensors of a model folder, or made-up ones.
pub struct Weights(Source);

enum Source {
    Files(Files),
    Dummy { dtype: DType, seed: u64 },
}

struct Files {
    shards: Vec<Shard>,
    /// Which shard has which tensor; `None`: there is one shard, and its header says.
    places: Option<HashMap<String, usize>>,
    /// For messages: the index, or the one file.
    listing: PathBuf,
}

struct Shard {
    path: PathBuf,
    opened: OnceLock<Result<Opened>>,
}

struct Opened {
    map: Arc<Mapped>,
    header: Header,
}

impl Weights {
    /// Opens a folder's `model.safetensors`, or else the shards that `model.safetensors.index.json` names.
    pub fn open(dir: &Path) -> Result<Weights> {
        let [single, index] = [SINGLE_FILE, INDEX_FILE].map(|name| dir.join(name));
        if single.exists() {
            let shard = Shard { path: single.clone(), opened: OnceLock::new() };
            shard.open()?;
            return Ok(Weights(Source::Files(Files { shards: vec![shard], places: None, listing: single })));
        }
        if !index.exists() {
            return Err(Error::data(dir, format!("it has neither {SINGLE_FILE} nor {INDEX_FILE}")));
        }
        let Index { shards: names, places } = parse_index(&index, &read_small(&index, INDEX_BYTES_MAX)?)?;
        let mut shards = Vec::new();
        for name in names {
            let path = dir.join(name);
            open_regular(&path)?;
            shards.push(Shard { path, opened: OnceLock::new() });
        }
        Ok(Weights(Source::Files(Files { shards, places: Some(places), listing: index })))
    }

    /// Random tensors of any name and shape: weights and biases around 0, norms around 1. A number depends
    /// on the seed, its tensor's name and its index alone, whatever the stages are.
    pub fn dummy(dtype: DType, seed: u64) -> Weights {
        Weights(Source::Dummy { dtype, seed })
    }

    /// Whether there is a tensor of this name. Of random ones there always is.
    pub fn has(&self, name: &str) -> bool {
        match &self.0 {
            Source::Dummy { .. } => true,
            Source::Files(Files { places: Some(places), .. }) => places.contains_key(name),
            Source::Files(files) => {
                files.shards[0].open().is_ok_and(|opened| opened.header.tensors.contains_key(name))
            }
        }
    }

    /// The tensor of this name, which must have this shape. It shares the file's memory,
    /// and is read from it page by page as it is used.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        match &self.0 {
            Source::Dummy { dtype, seed } => dummy::tensor(name, shape, *dtype, *seed),
            Source::Files(files) => files.tensor(name, shape),
        }
    }
}

impl Files {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let missing = |path: &Path| Error::MissingTensor { path: path.to_path_buf(), name: shown(name) };
        let shard = match &self.places {
            None => &self.shards[0],
            Some(places) => &self.shards[*places.get(name).ok_or_else(|| missing(&self.listing))?],
        };
        let Opened { map, header } = shard.open()?;
        let entry = header.tensors.get(name).ok_or_else(|| missing(&shard.path))?;
        let wrong = |why: String| Error::Tensor { path: shard.path.clone(), name: shown(name), why };
        let dtype = entry.dtype().ok_or_else(|| {
            wrong(format!("its type is {}, which is none of F32, F16, BF16", shown(&entry.dtype)))
        })?;
        if entry.shape != shape {
            return Err(wrong(format!("its shape is {:?}, not {shape:?}", entry.shape)));
        }
        Tensor::new(name, shape.to_vec(), dtype, Bytes::new(map.clone(), entry.range.clone()))
    }
}

impl Shard {
    fn open(&self) -> Result<&Opened> {
        self.opened.get_or_init(|| Opened::new(&self.path)).as_ref().map_err(Error::clone)
    }
}

impl Opened {
    fn new(path: &Path) -> Result<Opened> {
        let file = open_regular(path)?;
        let map = Mapped::new(path, file)?;
        let header = parse_header(path, map.bytes())?;
        Ok(Opened { map: Arc::new(map), header })
    }
}
