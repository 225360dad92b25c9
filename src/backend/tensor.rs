//! Weights on the host, as a file has them.

use std::{ops::Range, sync::Arc};

use super::Random;
use crate::error::{Error, Result};

/// A type of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a 32-bit float.
    BF16,
}

impl DType {
    /// Bytes a number.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// As in `--dtype`.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
        }
    }
}

/// What tensors' bytes lie in: a mapped file, or converted numbers.
pub trait Store: Send + Sync {
    /// All bytes, where they are.
    fn bytes(&self) -> &[u8];
    /// Copies the bytes from `at` on. A file is read, which is faster than looking at pages for the first time.
    fn copy(&self, at: usize, to: &mut [u8]) -> Result<()>;
}

impl Store for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }

    fn copy(&self, at: usize, to: &mut [u8]) -> Result<()> {
        to.copy_from_slice(&self[at..at + to.len()]);
        Ok(())
    }
}

/// A part of a store that several tensors share.
#[derive(Clone)]
pub struct Bytes {
    store: Arc<dyn Store>,
    range: Range<usize>,
}

impl Bytes {
    /// A part of `store`. The range must lie within it.
    pub fn new(store: Arc<dyn Store>, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= store.bytes().len(),
            "a tensor outside its file; this is a bug"
        );
        Bytes { store, range }
    }

    /// The bytes, where they are.
    pub fn as_slice(&self) -> &[u8] {
        &self.store.bytes()[self.range.clone()]
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// A part of them, by its place among them.
    pub fn part(&self, range: Range<usize>) -> Bytes {
        assert!(range.end <= self.len(), "a part outside its tensor; this is a bug");
        Bytes::new(self.store.clone(), self.range.start + range.start..self.range.start + range.end)
    }

    /// Copies all of them to where as many have room.
    pub fn copy(&self, to: &mut [u8]) -> Result<()> {
        assert_eq!(to.len(), self.len(), "room for other bytes; this is a bug");
        self.store.copy(self.range.start, to)
    }
}

/// A named array of numbers on the host. Its bytes need not be aligned.
#[derive(Clone)]
pub struct Tensor {
    /// As in the file.
    pub name: String,
    /// Outermost first.
    pub shape: Vec<usize>,
    /// The type of its numbers.
    pub dtype: DType,
    numbers: Numbers,
}

#[derive(Clone)]
enum Numbers {
    Bytes(Bytes),
    /// To be made where they are wanted.
    Random(Random),
}

impl Tensor {
    /// A tensor over bytes, which must be as many as shape and type say.
    pub fn new(name: impl Into<String>, shape: Vec<usize>, dtype: DType, bytes: Bytes) -> Result<Self> {
        let name = name.into();
        let len = shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d));
        let have = bytes.as_slice().len();
        if len != Some(have) {
            let why = format!("tensor {name}: {have} bytes do not make {shape:?} of {}", dtype.name());
            return Err(Error::Engine(why));
        }
        Ok(Tensor { name, shape, dtype, numbers: Numbers::Bytes(bytes) })
    }

    /// A tensor of random numbers, which are not made yet.
    pub fn random(name: impl Into<String>, shape: Vec<usize>, dtype: DType, random: Random) -> Result<Self> {
        let name = name.into();
        if shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d)).is_none() {
            return Err(Error::Engine(format!("random tensor {name}: {shape:?} is too large")));
        }
        Ok(Tensor { name, shape, dtype, numbers: Numbers::Random(random) })
    }

    /// What its numbers are made from, if they are random and not made yet.
    pub fn random_numbers(&self) -> Option<Random> {
        match self.numbers {
            Numbers::Bytes(_) => None,
            Numbers::Random(random) => Some(random),
        }
    }

    /// The same tensor, with its numbers made.
    pub fn made(&self) -> Result<Tensor> {
        let Numbers::Random(random) = self.numbers else { return Ok(self.clone()) };
        let size = self.len() * self.dtype.size();
        let mut bytes: Vec<u8> = Vec::new();
        bytes.try_reserve_exact(size).map_err(|e| {
            Error::Engine(format!("random tensor {}: no memory for {size} bytes: {e}", self.name))
        })?;
        bytes.resize(size, 0);
        random.fill(&mut bytes, self.dtype);
        let bytes = Bytes::new(Arc::new(bytes), 0..size);
        Ok(Tensor { numbers: Numbers::Bytes(bytes), ..self.clone() })
    }

    /// A tensor of the given numbers, kept in `dtype`.
    pub fn from_f32(
        name: impl Into<String>,
        shape: Vec<usize>,
        dtype: DType,
        values: &[f32],
    ) -> Result<Self> {
        Tensor::collect(name.into(), shape, dtype, values.len(), values.iter().copied())
    }

    fn collect(
        name: String,
        shape: Vec<usize>,
        dtype: DType,
        len: usize,
        values: impl Iterator<Item = f32>,
    ) -> Result<Self> {
        let mut bytes: Vec<u8> = Vec::new();
        bytes.try_reserve_exact(len * dtype.size()).map_err(|e| {
            Error::Engine(format!("tensor {name}: no memory for {len} numbers of {}: {e}", dtype.name()))
        })?;
        for v in values {
            match dtype {
                DType::F32 => bytes.extend_from_slice(&v.to_le_bytes()),
                DType::F16 => bytes.extend_from_slice(&half::f16::from_f32(v).to_le_bytes()),
                DType::BF16 => bytes.extend_from_slice(&half::bf16::from_f32(v).to_le_bytes()),
            }
        }
        let len = bytes.len();
        Tensor::new(name, shape, dtype, Bytes::new(Arc::new(bytes), 0..len))
    }

    /// The numbers' bytes, little-endian. Random numbers must have been made.
    pub fn bytes(&self) -> &[u8] {
        self.stored().as_slice()
    }

    /// Where the numbers' bytes are. Random numbers must have been made.
    pub fn stored(&self) -> &Bytes {
        match &self.numbers {
            Numbers::Bytes(bytes) => bytes,
            Numbers::Random(_) => panic!("tensor {} has not been made; this is a bug", self.name),
        }
    }

    /// The same numbers in a larger shape, with zeros after the rows and after each row's numbers. One dimension is rows of
    /// one number.
    pub fn padded(&self, shape: &[usize]) -> Result<Tensor> {
        let of = |shape: &[usize]| (shape[0], shape.get(1).copied().unwrap_or(1) * self.dtype.size());
        let ((rows, row), (rows_new, row_new)) = (of(&self.shape), of(shape));
        assert!(
            shape.len() == self.shape.len() && shape.len() <= 2 && rows <= rows_new && row <= row_new,
            "tensor {} of {:?} padded to {shape:?}; this is a bug",
            self.name,
            self.shape
        );
        if self.shape == shape {
            return Ok(self.clone());
        }
        let made = self.made()?;
        let size = rows_new * row_new;
        let mut bytes: Vec<u8> = Vec::new();
        bytes
            .try_reserve_exact(size)
            .map_err(|e| Error::Engine(format!("tensor {}: no memory for {size} bytes: {e}", self.name)))?;
        for from in made.bytes().chunks_exact(row) {
            bytes.extend_from_slice(from);
            bytes.resize(bytes.len() + row_new - row, 0);
        }
        bytes.resize(size, 0);
        Tensor::new(&*self.name, shape.to_vec(), self.dtype, Bytes::new(Arc::new(bytes), 0..size))
    }

    /// Some of its rows.
    pub fn rows(&self, rows: Range<usize>) -> Tensor {
        let all = self.shape[0];
        assert!(rows.end <= all, "rows that tensor {} does not have; this is a bug", self.name);
        let row = self.len() / all.max(1);
        let numbers = match &self.numbers {
            Numbers::Bytes(bytes) => {
                let at = |row_at: usize| row_at * row * self.dtype.size();
                Numbers::Bytes(bytes.part(at(rows.start)..at(rows.end)))
            }
            Numbers::Random(random) => Numbers::Random(random.from((rows.start * row) as u64)),
        };
        let mut shape = self.shape.clone();
        shape[0] = rows.len();
        Tensor { name: self.name.clone(), shape, dtype: self.dtype, numbers }
    }

    /// How many numbers.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers, widened.
    pub fn to_f32(&self) -> Vec<f32> {
        self.numbers().collect()
    }

    /// The numbers one by one, widened: a large tensor is never held twice in a wider type.
    fn numbers(&self) -> Box<dyn Iterator<Item = f32> + '_> {
        if let Numbers::Random(random) = self.numbers {
            return Box::new((0..self.len() as u64).map(move |i| random.at(i)));
        }
        let pair = |b: &[u8]| [b[0], b[1]];
        let bytes = self.bytes();
        match self.dtype {
            DType::F32 => {
                Box::new(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
            }
            DType::F16 => {
                Box::new(bytes.chunks_exact(2).map(move |b| half::f16::from_le_bytes(pair(b)).to_f32()))
            }
            DType::BF16 => {
                Box::new(bytes.chunks_exact(2).map(move |b| half::bf16::from_le_bytes(pair(b)).to_f32()))
            }
        }
    }

    /// The same numbers in another type; shares the bytes where it is the same one.
    pub fn to_dtype(&self, dtype: DType) -> Result<Tensor> {
        if dtype == self.dtype || matches!(self.numbers, Numbers::Random(_)) {
            return Ok(Tensor { dtype, ..self.clone() });
        }
        Tensor::collect(self.name.clone(), self.shape.clone(), dtype, self.len(), self.numbers())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_tensor_are_those_of_the_whole() {
        let tensor = Tensor::from_f32("t", vec![3, 2], DType::BF16, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        let rows = tensor.rows(1..3);
        assert_eq!((rows.shape.clone(), rows.to_f32()), (vec![2, 2], vec![3.0, 4.0, 5.0, 6.0]));
        assert!(tensor.rows(3..3).is_empty());
        let random = Tensor::random("r", vec![9, 5], DType::F32, Random { key: 3, centre: 1.0 }).unwrap();
        assert_eq!(random.rows(2..7).to_f32(), random.to_f32()[10..35]);
        assert_eq!(random.rows(2..7).made().unwrap().to_f32(), random.made().unwrap().to_f32()[10..35]);
    }

    #[test]
    fn padding_is_zeros_after_rows_and_numbers() {
        let tensor = Tensor::from_f32("t", vec![2, 3], DType::BF16, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        let padded = tensor.padded(&[3, 4]).unwrap();
        let want = [1.0, 2.0, 3.0, 0.0, 4.0, 5.0, 6.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        assert_eq!((padded.shape.clone(), padded.to_f32()), (vec![3, 4], want.to_vec()));
        assert_eq!(tensor.padded(&[2, 3]).unwrap().to_f32(), tensor.to_f32());
        let bias = Tensor::from_f32("b", vec![2], DType::F32, &[7.0, 8.0]).unwrap();
        assert_eq!(bias.padded(&[4]).unwrap().to_f32(), [7.0, 8.0, 0.0, 0.0]);
        let random = Tensor::random("r", vec![2, 2], DType::F32, Random { key: 3, centre: 0.0 }).unwrap();
        let made = random.to_f32();
        assert_eq!(random.padded(&[2, 3]).unwrap().to_f32(), [made[0], made[1], 0.0, made[2], made[3], 0.0]);
    }
}
