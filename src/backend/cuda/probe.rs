//! What the GPUs of this machine are, how they are linked, and what they reach, measured.
#![allow(unsafe_code)]

use cudarc::driver::{
    result::{self, DriverError},
    sys::{self, CUdevice_P2PAttribute},
};
use half::bf16;
use serde::Serialize;

use super::{
    blas::{Blas, Operands, Shape},
    driver::{Context, DeviceFacts, devices, failed},
    memory::{DeviceBuf, Event, Pinned, Stream},
};
use crate::{backend::DType, error::Result};

/// What a copy within a GPU copies. Far more than any second-level cache.
const COPY_BYTES: usize = 1 << 30;
/// What a copy between GPUs copies: the rate grows no more beyond it.
const PEER_BYTES: usize = 256 << 20;
/// Rows, columns and depth of the matrix product.
const MATMUL_SIZE: usize = 8192;
/// Random numbers that fill the memory, again and again: as many as no second-level cache holds.
const NOISE_BYTES: usize = 64 << 20;
/// Times that each is measured; the best counts.
const ROUNDS: usize = 10;

/// The GPUs of this machine and the links between them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Probe {
    /// In the order of their numbers.
    pub gpus: Vec<Gpu>,
    /// From each GPU to each other one.
    pub links: Vec<Link>,
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Gpu {
    /// What it is.
    #[serde(flatten)]
    pub facts: DeviceFacts,
    /// What kernels are compiled for: `sm_90a`.
    pub arch: String,
    /// Bytes of memory that nobody has taken; `None` if it cannot be used.
    pub memory_free_bytes: Option<usize>,
    /// A copy within its memory: what is read and written together.
    pub copy_gb_per_s: Option<f64>,
    /// A product of two bf16 matrices of 8192 rows and columns by cublasLt.
    pub matmul_bf16_tflop_per_s: Option<f64>,
}

/// The way from one GPU to another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Link {
    /// Who writes.
    pub from: usize,
    /// Whose memory is written.
    pub to: usize,
    /// Whether the driver allows it without the host in between.
    pub peer_access: bool,
    /// What the driver's answers point to.
    pub kind: LinkKind,
    /// Among the machine's links; 0 is the best.
    pub performance_rank: i32,
    /// Whether atomic operations work across it.
    pub native_atomics: bool,
    /// A copy between plain allocations.
    pub copy_gb_per_s: Option<f64>,
    /// Whether that copy brought what was sent: on some hosts it does not.
    pub intact: Option<bool>,
}

/// A kind of link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkKind {
    /// Direct, with atomic operations.
    Nvlink,
    /// Direct, without them.
    Pcie,
    /// Through memory of the host.
    Host,
}

impl LinkKind {
    /// As in tables.
    pub fn name(self) -> &'static str {
        match self {
            LinkKind::Nvlink => "NVLink",
            LinkKind::Pcie => "PCIe",
            LinkKind::Host => "host",
        }
    }
}

/// Looks at all GPUs, and measures if asked to. An error says why there is none; what cannot be measured is a
/// warning and `None`.
pub fn probe(measure: bool) -> Result<Probe> {
    let found = devices()?;
    let mut gpus: Vec<Gpu> = found.iter().map(Gpu::new).collect();
    let mut links = Vec::new();
    for from in 0..found.len() {
        for to in (0..found.len()).filter(|&to| to != from) {
            links.push(Link::new(from, to)?);
        }
    }
    let usable = |gpu: &Gpu| gpu.memory_free_bytes.is_some();
    let first = gpus.iter().find(|gpu| usable(gpu)).map(|gpu| gpu.facts.ordinal);
    if let Some(first) = first.filter(|_| measure) {
        let mut noise = Noise::new(Context::of(first)?)?;
        let rig = |gpu: &Gpu| told(Rig::new(&found[gpu.facts.ordinal], &noise));
        let rigs: Vec<Option<Rig>> = gpus.iter().map(|gpu| usable(gpu).then(|| rig(gpu))?).collect();
        for (gpu, rig) in gpus.iter_mut().zip(&rigs) {
            gpu.copy_gb_per_s = rig.as_ref().and_then(|rig| told(rig.copy_rate()));
            gpu.matmul_bf16_tflop_per_s = rig.as_ref().and_then(|rig| told(rig.matmul_rate()));
        }
        for link in &mut links {
            if let (Some(from), Some(to)) = (&rigs[link.from], &rigs[link.to]) {
                told(link.measure(from, to, &mut noise));
            }
        }
    }
    Ok(Probe { gpus, links })
}

/// What cannot be measured is told, and the rest goes on.
fn told<T>(outcome: Result<T>) -> Option<T> {
    outcome.inspect_err(|error| tracing::warn!(%error, "not measured")).ok()
}

impl Gpu {
    fn new(facts: &DeviceFacts) -> Gpu {
        let free = Context::of(facts.ordinal).and_then(Context::free_bytes);
        Gpu {
            facts: facts.clone(),
            arch: facts.arch(),
            memory_free_bytes: free.inspect_err(|error| tracing::warn!(%error, "cannot be used")).ok(),
            copy_gb_per_s: None,
            matmul_bf16_tflop_per_s: None,
        }
    }
}

impl Link {
    fn new(from: usize, to: usize) -> Result<Link> {
        use CUdevice_P2PAttribute::*;
        let ask = |which| attribute(which, from, to).map_err(|e| failed(from, "asking for its links", e));
        let peer_access = ask(CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED)? != 0;
        let native_atomics = ask(CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED)? != 0;
        let kind = match (peer_access, native_atomics) {
            (true, true) => LinkKind::Nvlink,
            (true, false) => LinkKind::Pcie,
            (false, _) => LinkKind::Host,
        };
        let performance_rank = ask(CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK)?;
        Ok(Link {
            from,
            to,
            peer_access,
            kind,
            performance_rank,
            native_atomics,
            copy_gb_per_s: None,
            intact: None,
        })
    }

    fn measure(&mut self, from: &Rig, to: &Rig, noise: &mut Noise) -> Result<()> {
        if self.peer_access {
            from.context.allow_access_to(to.context)?;
        }
        // SAFETY: the memory has more bytes.
        unsafe { to.stream.fill(to.target.ptr(), 0, NOISE_BYTES)? };
        to.stream.synchronize()?;
        let ms = from.best_ms(|| {
            // SAFETY: both have more bytes, and live until the copy has been done: `best_ms` waits for it.
            unsafe { from.stream.copy(to.target.ptr(), from.source.ptr(), PEER_BYTES) }
        })?;
        self.copy_gb_per_s = Some(gb_per_s(PEER_BYTES, ms));
        self.intact = Some(noise.is_at_target(to)?);
        Ok(())
    }
}

fn attribute(which: CUdevice_P2PAttribute, from: usize, to: usize) -> Result<i32, DriverError> {
    let (from, to) = (result::device::get(from as i32)?, result::device::get(to as i32)?);
    let mut value = 0;
    // SAFETY: both devices exist; writes one number.
    unsafe { sys::cuDeviceGetP2PAttribute(&mut value, which, from, to) }.result().map(|()| value)
}

fn gb_per_s(bytes: usize, ms: f32) -> f64 {
    bytes as f64 / f64::from(ms) / 1e6
}

/// Numbers that look random, as activations and weights do: a chip draws less power for zeros, and is faster.
struct Noise {
    numbers: Pinned,
    /// What came back from a GPU.
    returned: Pinned,
}

impl Noise {
    fn new(context: Context) -> Result<Noise> {
        let mut numbers = Pinned::new(context, NOISE_BYTES)?;
        let mut state = 1u64;
        // SAFETY: no GPU knows it yet.
        for bytes in unsafe { numbers.as_mut_slice() }.chunks_exact_mut(4) {
            // Two numbers between -1 and 1 from the upper bits, which are the better ones.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let number = |bits: u64| bf16::from_f32((bits & 0xffff) as f32 / 32768.0 - 1.0).to_le_bytes();
            bytes[..2].copy_from_slice(&number(state >> 48));
            bytes[2..].copy_from_slice(&number(state >> 32));
        }
        Ok(Noise { numbers, returned: Pinned::new(context, NOISE_BYTES)? })
    }

    /// Whether a GPU's target begins with these numbers.
    fn is_at_target(&mut self, rig: &Rig) -> Result<bool> {
        // SAFETY: both have as many bytes, and live until the copy has been done.
        unsafe { rig.stream.copy(self.returned.ptr(), rig.target.ptr(), NOISE_BYTES)? };
        rig.stream.synchronize()?;
        // SAFETY: no GPU writes to them any more.
        Ok(unsafe { self.returned.as_slice() == self.numbers.as_slice() })
    }
}

/// What measuring takes on a GPU.
struct Rig {
    context: Context,
    facts: &'static DeviceFacts,
    stream: Stream,
    /// Full of noise.
    source: DeviceBuf,
    target: DeviceBuf,
}

impl Rig {
    fn new(facts: &'static DeviceFacts, noise: &Noise) -> Result<Rig> {
        let context = Context::of(facts.ordinal)?;
        let (source, target) = (DeviceBuf::new(context, COPY_BYTES)?, DeviceBuf::new(context, COPY_BYTES)?);
        let rig = Rig { context, facts, stream: Stream::new(context)?, source, target };
        let at = rig.source.ptr();
        // SAFETY: the noise is as long and the source longer; both live until the stream has ended.
        unsafe { rig.stream.copy(at, noise.numbers.ptr(), NOISE_BYTES)? };
        let mut filled = NOISE_BYTES;
        while filled < COPY_BYTES {
            let more = filled.min(COPY_BYTES - filled);
            // SAFETY: within the source, and without overlap.
            unsafe { rig.stream.copy(at.add(filled), at, more)? };
            filled += more;
        }
        rig.stream.synchronize()?;
        Ok(rig)
    }

    /// Gigabytes read and written a second.
    fn copy_rate(&self) -> Result<f64> {
        let ms = self.best_ms(|| {
            // SAFETY: both have as many bytes, and live until the copy has been done: `best_ms` waits for it.
            unsafe { self.stream.copy(self.target.ptr(), self.source.ptr(), COPY_BYTES) }
        })?;
        Ok(gb_per_s(2 * COPY_BYTES, ms))
    }

    /// TFLOP a second.
    fn matmul_rate(&self) -> Result<f64> {
        let n = MATMUL_SIZE;
        let shape = Shape {
            rows: n,
            n,
            width: n,
            k: n,
            dtype: DType::BF16,
            out: DType::BF16,
            bias: false,
            add: false,
        };
        let bytes = 2 * n * n;
        assert!(2 * bytes <= COPY_BYTES, "no room for two matrices; this is a bug");
        let (x, w) = (self.source.ptr(), self.source.ptr().add(bytes));
        let operands = Operands { out: self.target.ptr(), x, w, bias: self.target.ptr() };
        let blas = Blas::new(self.context, self.facts)?;
        // SAFETY: the matrices have these sizes, and live until the product has been made: `best_ms` waits for it.
        let multiply = || unsafe { blas.multiply(&self.stream, shape, operands) };
        // The first one looks for the best algorithm.
        multiply()?;
        let ms = self.best_ms(multiply)?;
        Ok(2.0 * (n as f64).powi(3) / f64::from(ms) / 1e9)
    }

    /// Milliseconds of the fastest of some rounds. The work is in the stream, and has been done when this returns.
    fn best_ms(&self, work: impl Fn() -> Result<()>) -> Result<f32> {
        let (start, end) = (Event::timed(self.context)?, Event::timed(self.context)?);
        let mut best = f32::INFINITY;
        for _ in 0..ROUNDS {
            start.record(&self.stream)?;
            let outcome = work();
            end.record(&self.stream)?;
            end.synchronize()?;
            outcome?;
            best = best.min(end.ms_since(&start)?);
        }
        Ok(best)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // What is still under way uses the memory; an error has been told by whoever put it there.
        let _ = self.stream.synchronize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_measured_is_plausible() {
        let Ok(found) = devices() else { return eprintln!("SKIPPED: no GPU to measure") };
        let Probe { gpus, links } = probe(true).unwrap();
        assert_eq!((gpus.len(), links.len()), (found.len(), found.len() * (found.len() - 1)));
        for gpu in gpus.iter().filter(|gpu| gpu.copy_gb_per_s.is_some()) {
            let (copy, matmul) = (gpu.copy_gb_per_s.unwrap(), gpu.matmul_bf16_tflop_per_s.unwrap());
            assert!((50.0..50_000.0).contains(&copy) && (5.0..20_000.0).contains(&matmul), "{gpu:?}");
        }
        for link in links.iter().filter(|link| link.copy_gb_per_s.is_some()) {
            assert!((0.5..5_000.0).contains(&link.copy_gb_per_s.unwrap()), "{link:?}");
            assert_eq!(link.intact, Some(true), "{link:?}");
        }
    }
}
