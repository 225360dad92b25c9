//! What a safetensors file and the index of a sharded checkpoint say, checked before any of it is believed.

use std::{
    collections::{HashMap, hash_map},
    fmt,
    ops::Range,
    path::Path,
};

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};

use crate::{
    backend::DType,
    error::{Error, Result, shown},
};

/// The format's own limit.
const HEADER_BYTES_MAX: u64 = 100_000_000;
const LEN_BYTES: usize = 8;

/// The header of a safetensors file.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Header {
    /// The tensors by name.
    pub tensors: HashMap<String, Entry>,
}

/// A tensor in a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// As in the file: `BF16`.
    pub dtype: String,
    /// Outermost first.
    pub shape: Vec<usize>,
    /// Its bytes in the file.
    pub range: Range<usize>,
}

impl Entry {
    /// The type, if models can be made of it.
    pub fn dtype(&self) -> Option<DType> {
        match self.dtype.as_str() {
            "F32" => Some(DType::F32),
            "F16" => Some(DType::F16),
            "BF16" => Some(DType::BF16),
            _ => None,
        }
    }

    /// Bytes that shape and type make, if the type is known; the error is an overflow.
    fn bytes(&self) -> Result<Option<usize>, ()> {
        let size = match self.dtype.as_str() {
            "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" => 1,
            "I16" | "U16" | "F16" | "BF16" => 2,
            "I32" | "U32" | "F32" => 4,
            "I64" | "U64" | "F64" | "C64" => 8,
            _ => return Ok(None),
        };
        self.shape.iter().try_fold(size, |n: usize, &d| n.checked_mul(d)).map(Some).ok_or(())
    }
}

/// Parses and checks the header of a safetensors file, of which `bytes` is the whole; `path` is for messages.
///
/// The tensors must cover the rest of the file without gap or overlap, as the format demands.
pub fn parse_header(path: &Path, bytes: &[u8]) -> Result<Header> {
    let wrong = |why: String| Error::data(path, why);
    let Some((len, rest)) = bytes.split_first_chunk::<LEN_BYTES>() else {
        return Err(wrong(format!("{} bytes are too few for a safetensors header", bytes.len())));
    };
    let len = u64::from_le_bytes(*len);
    if len > HEADER_BYTES_MAX {
        return Err(wrong(format!("its header claims {len} bytes, more than {HEADER_BYTES_MAX}")));
    }
    if len > rest.len() as u64 {
        return Err(wrong(format!("its header claims {len} bytes of the {} there are", rest.len())));
    }
    let (text, data) = rest.split_at(len as usize);
    let raw: Entries<RawEntry> = serde_json::from_slice(text)
        .map_err(|e| wrong(format!("its header is not as it should be: {}", shown(&e.to_string()))))?;
    let start = LEN_BYTES + text.len();
    let mut tensors = HashMap::with_capacity(raw.0.len());
    for (name, RawEntry { dtype, shape, data_offsets: (begin, end) }) in raw.0 {
        let named = |why: String| Error::Tensor { path: path.to_path_buf(), name: shown(&name), why };
        if end < begin || end > data.len() {
            let why =
                format!("its offsets, {begin} to {end}, are not within the {} bytes of data", data.len());
            return Err(named(why));
        }
        let entry = Entry { dtype, shape, range: start + begin..start + end };
        match entry.bytes() {
            Ok(Some(n)) if n != end - begin => {
                let Entry { dtype, shape, .. } = &entry;
                let why = format!("{} of {dtype} are {n} bytes, not {}", brief(shape), end - begin);
                return Err(named(why));
            }
            Err(()) => return Err(named(format!("its shape, {}, is too large", brief(&entry.shape)))),
            Ok(_) => {}
        }
        match tensors.entry(name) {
            hash_map::Entry::Vacant(place) => place.insert(entry),
            hash_map::Entry::Occupied(place) => {
                let name = shown(place.key());
                return Err(Error::Tensor { path: path.into(), name, why: "it is there twice".into() });
            }
        };
    }
    check_cover(path, &tensors, start..bytes.len())?;
    Ok(Header { tensors })
}

/// The shards' names, and the place of each tensor's shard in them.
pub(super) type Index = (Vec<String>, HashMap<String, usize>);

/// Parses and checks the index of a sharded checkpoint; `path` is for messages.
pub(super) fn parse_index(path: &Path, bytes: &[u8]) -> Result<Index> {
    #[derive(Deserialize)]
    struct File {
        weight_map: Entries<String>,
    }
    let file: File = serde_json::from_slice(bytes)
        .map_err(|e| Error::data(path, format!("it is not an index: {}", shown(&e.to_string()))))?;
    let mut names = Vec::new();
    let mut numbers = HashMap::new();
    let mut places = HashMap::with_capacity(file.weight_map.0.len());
    for (tensor, shard) in file.weight_map.0 {
        let named = |why: String| Error::Tensor { path: path.into(), name: shown(&tensor), why };
        if !is_plain(&shard) {
            let why = format!("its shard, \"{}\", is not a .safetensors file of this folder", shown(&shard));
            return Err(named(why));
        }
        let number = *numbers.entry(shard).or_insert_with_key(|shard| {
            names.push(shard.clone());
            names.len() - 1
        });
        if places.contains_key(&tensor) {
            return Err(named("it is there twice".into()));
        }
        places.insert(tensor, number);
    }
    Ok((names, places))
}

/// Whether this is the name of a shard in the folder itself.
fn is_plain(shard: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    shard.len() <= 255 && shard.ends_with(".safetensors") && shard.chars().all(fine)
}

/// Whether the tensors lie in this range of the file one after another, from its start to its end.
fn check_cover(path: &Path, tensors: &HashMap<String, Entry>, data: Range<usize>) -> Result<()> {
    let mut sorted: Vec<_> = tensors.iter().collect();
    sorted.sort_unstable_by_key(|(name, entry)| (entry.range.start, entry.range.end, *name));
    let mut next = data.start;
    for (name, entry) in sorted {
        if entry.range.start != next {
            let what = if entry.range.start < next { "overlaps the tensor" } else { "leaves a hole" };
            let why = format!("it {what} before it in the file");
            return Err(Error::Tensor { path: path.into(), name: shown(name), why });
        }
        next = entry.range.end;
    }
    if next != data.end {
        return Err(Error::data(path, format!("its last {} bytes belong to no tensor", data.end - next)));
    }
    Ok(())
}

/// A shape as an error may show it.
fn brief(shape: &[usize]) -> String {
    if shape.len() <= 8 { format!("{shape:?}") } else { format!("a shape of {} dimensions", shape.len()) }
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// The entries of an object, without `__metadata__`: a map would hide names that are there twice.
struct Entries<V>(Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Entries<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visit<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Visit<V> {
            type Value = Entries<V>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<V>, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let value = map.next_value().map_err(|e| {
                        serde::de::Error::custom(format_args!("tensor {}: {e}", shown(&name)))
                    })?;
                    entries.push((name, value));
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Visit(std::marker::PhantomData))
    }
}
