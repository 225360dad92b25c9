//! Devices as data: what a plan needs to know of them, without one being there.

use std::str::FromStr;

use serde::Serialize;

use super::Device;
use crate::{
    backend::{DType, cpu},
    error::{Error, Result, shown},
};

/// What a device offers, as reached rather than as advertised.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DeviceSpec {
    /// Where it is in a layout.
    #[serde(serialize_with = "as_text")]
    pub device: Device,
    /// What it is: `h200-141g`. Devices of one name are alike but for what is free.
    pub name: String,
    /// Bytes of memory.
    pub memory: usize,
    /// Of them, those that a pipeline may take.
    pub free: usize,
    /// Bytes a second that matrix products read weights with.
    pub bandwidth: f64,
    /// Operations a second of large matrix products.
    pub rates: Rates,
    /// Seconds of a kernel whose start nothing hides.
    pub launch: f64,
    /// Seconds of a pass beside its units.
    pub pass: f64,
    /// Rows at which products run at half of their rate.
    pub half_rate_rows: f64,
    /// Attention's share of the rate of matrix products.
    pub attention: f64,
    /// To the next stage's device. Between two, the slower one's counts.
    pub link: Link,
}

/// Floating-point operations a second, by type.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rates {
    /// Without TF32.
    pub f32: f64,
    /// Dense, summed in f32.
    pub f16: f64,
    /// Dense, summed in f32.
    pub bf16: f64,
}

impl Rates {
    /// Of a type.
    pub fn of(&self, dtype: DType) -> f64 {
        match dtype {
            DType::F32 => self.f32,
            DType::F16 => self.f16,
            DType::BF16 => self.bf16,
        }
    }
}

/// The way across a boundary.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Link {
    /// Seconds until the first rows have come.
    pub latency: f64,
    /// Bytes a second.
    pub bandwidth: f64,
}

/// What is known of a device by name, as its maker says.
struct Known {
    name: &'static str,
    /// What the driver's name for it contains, in capitals.
    driver_name: &'static str,
    memory_mib: usize,
    bandwidth_gb: f64,
    bf16_tflops: f64,
    f32_tflops: f64,
    nvlink: bool,
}

/// Longer driver names come before those that they contain.
const KNOWN: &[Known] = &[
    known("b200", "B200", (183_359, 8000.0), (2250.0, 75.0), true),
    known("h200-141g", "H200", (143_771, 4800.0), (989.0, 67.0), true),
    known("h100-pcie", "H100 PCIE", (81_559, 2039.0), (756.0, 51.0), false),
    known("h100-80g", "H100", (81_559, 3352.0), (989.0, 67.0), true),
    known("a100-40g", "A100-SXM4-40GB", (40_960, 1555.0), (312.0, 19.5), true),
    known("a100-80g", "A100", (81_920, 2039.0), (312.0, 19.5), true),
    known("l40s", "L40S", (46_068, 864.0), (362.0, 91.6), false),
    known("l4", "NVIDIA L4", (23_034, 300.0), (121.0, 30.3), false),
    known("a10", "NVIDIA A10", (23_028, 600.0), (125.0, 31.2), false),
    known("rtx3090", "RTX 3090", (24_576, 936.0), (71.0, 35.6), false),
    known("rtx4090", "RTX 4090", (24_564, 1008.0), (165.0, 82.6), false),
    known("rtx5090", "RTX 5090", (32_607, 1792.0), (209.5, 104.8), false),
];

/// Names of devices that kernels cannot be compiled for, with their compute capability.
const TOO_OLD: &[(&str, &str)] = &[
    ("v100", "7.0"),
    ("t4", "7.5"),
    ("p100", "6.0"),
    ("p40", "6.1"),
    ("rtx2080", "7.5"),
    ("rtx2080ti", "7.5"),
];

/// Shares of what makers promise that are reached, measured on an H200: weights of whole models come at 4.15 of 4.8 TB/s;
/// products of thousands of rows are made at 717 of 989 TFLOP/s, as passes have it, which is between 640 at the clock of one
/// that has multiplied for long and 790 at the full clock.
const BANDWIDTH_REACHED: f64 = 0.865;
const RATE_REACHED: f64 = 0.725;
/// A kernel that starts when the one before it has ended, and a pass's upload, rotations and events.
const LAUNCH_S: f64 = 4.2e-6;
const PASS_S: f64 = 10e-6;
/// Measured between H200s: 14.8 µs for a row, with the receiver's own part of a pass.
const NVLINK: Link = Link { latency: 13e-6, bandwidth: 270e9 };
const PCIE: Link = Link { latency: 20e-6, bandwidth: 20e9 };
/// Rows at which matrix units do half of what they do with thousands.
const HALF_RATE_ROWS: f64 = 18.0;
/// 430 of 717 TFLOP/s: 530 at the full clock, for 2,048 tokens after as many.
const ATTENTION_RATE: f64 = 0.60;
/// The same of processors: threads that wake, memory that the host copies to and from, and products that are bound by
/// reading until weights are widened once for several rows.
const CPU_LAUNCH_S: f64 = 5e-6;
const CPU_PASS_S: f64 = 30e-6;
const CPU_LINK: Link = Link { latency: 60e-6, bandwidth: 6e9 };
const CPU_HALF_RATE_ROWS: f64 = 2.0;
const CPU_ATTENTION_RATE: f64 = 0.4;
/// Of the host's memory that is free, what others are left, as a divisor.
const CPU_RESERVE: usize = 8;
/// Of a GPU's memory, what the driver, code and fragments take.
const RESERVE_BYTES: usize = 640 << 20;
const DEVICES_MAX: usize = 256;

const fn known(
    name: &'static str,
    driver_name: &'static str,
    (memory_mib, bandwidth_gb): (usize, f64),
    (bf16_tflops, f32_tflops): (f64, f64),
    nvlink: bool,
) -> Known {
    Known { name, driver_name, memory_mib, bandwidth_gb, bf16_tflops, f32_tflops, nvlink }
}

impl Known {
    fn spec(&self) -> DeviceSpec {
        let memory = self.memory_mib << 20;
        let narrow = self.bf16_tflops * 1e12 * RATE_REACHED;
        DeviceSpec {
            device: Device::Cuda(0),
            name: self.name.into(),
            memory,
            free: memory - RESERVE_BYTES,
            bandwidth: self.bandwidth_gb * 1e9 * BANDWIDTH_REACHED,
            rates: Rates { f32: self.f32_tflops * 1e12 * RATE_REACHED, f16: narrow, bf16: narrow },
            launch: LAUNCH_S,
            pass: PASS_S,
            half_rate_rows: HALF_RATE_ROWS,
            attention: ATTENTION_RATE,
            link: if self.nvlink { NVLINK } else { PCIE },
        }
    }
}

impl DeviceSpec {
    /// A device of the registry; `None` if there is none of that name.
    pub fn known(name: &str) -> Option<DeviceSpec> {
        KNOWN.iter().find(|known| known.name.eq_ignore_ascii_case(name)).map(Known::spec)
    }

    /// The registry's names.
    pub fn names() -> impl Iterator<Item = &'static str> {
        KNOWN.iter().map(|known| known.name)
    }

    /// Whether it is as fast as its name says: a description may change what the registry has, and a name that it does not
    /// have says nothing.
    pub fn is_as_named(&self) -> bool {
        let same = |known: DeviceSpec| (known.bandwidth, known.rates) == (self.bandwidth, self.rates);
        DeviceSpec::known(&self.name).is_none_or(same)
    }

    /// A GPU of this machine: by its driver's name, or else by how many multiprocessors it has.
    pub fn of_gpu(name: &str, multiprocessors: u32, memory: usize) -> DeviceSpec {
        let capital = name.to_uppercase();
        // L4 and A10 are also how L40 and A100 begin.
        let is = |known: &&Known| {
            let rest = capital.split_once(known.driver_name).map(|(_, rest)| rest);
            rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
        };
        let small_a100 =
            |known: &&Known| known.name == "a100-40g" && capital.contains("A100") && memory < 60 << 30;
        let found = KNOWN.iter().find(small_a100).or_else(|| KNOWN.iter().find(is));
        let spec = found.map_or_else(|| guessed(name, multiprocessors), Known::spec);
        DeviceSpec { memory, free: memory.saturating_sub(RESERVE_BYTES), ..spec }
    }

    /// The processor of this machine, as a moment's work on so many threads measures it (by default on all cores), with what
    /// is free of its memory now.
    pub fn of_cpu(threads: Option<usize>) -> Result<DeviceSpec> {
        let cpu::CpuSpeed { threads, bandwidth, rates: [f32, f16, bf16] } = cpu::speed(threads)?;
        let rates = Rates { f32, f16, bf16 };
        let name = format!("cpu-{threads}cores");
        Ok(DeviceSpec {
            memory: cpu::memory_bytes(),
            free: DeviceSpec::cpu_free(),
            bandwidth,
            rates,
            ..blank_cpu(&name)
        })
    }

    /// Bytes of the host's memory that a pipeline may take beside GPUs.
    pub fn cpu_free() -> usize {
        let free = cpu::free_bytes();
        free - free / CPU_RESERVE
    }

    /// Devices as `--devices` describes them: `8xh100-80g,4xl4`, `l4,cpu:mem=64g,bw=100g,bf16=1t`. `cpu` alone is this
    /// machine's.
    ///
    /// ```
    /// # use pipeline_infer::layout::DeviceSpec;
    /// let devices = DeviceSpec::list("2xh100-80g,mine:mem=24g,bw=900g,bf16=150t")?;
    /// assert_eq!((devices.len(), devices[2].memory), (3, 24_000_000_000));
    /// # Ok::<(), pipeline_infer::Error>(())
    /// ```
    pub fn list(text: &str) -> Result<Vec<DeviceSpec>> {
        // A part that is key=value alone goes on with what the part before it began.
        let mut items: Vec<Vec<&str>> = Vec::new();
        for part in text.split(',').map(str::trim) {
            match items.last_mut() {
                Some(item) if part.contains('=') && !part.contains(':') => item.push(part),
                _ => items.push(vec![part]),
            }
        }
        let mut devices = Vec::new();
        let mut gpus = 0;
        for item in items {
            let wrong = |why: String| Error::usage(format!("--devices {}", shown(item[0])), why);
            let (count, described) = Described::parse(&item).map_err(wrong)?;
            if count > DEVICES_MAX || devices.len() + count > DEVICES_MAX {
                return Err(wrong(format!("more than {DEVICES_MAX} devices")));
            }
            for _ in 0..count {
                let mut device = described.clone();
                if device.device != Device::Cpu {
                    device.device = Device::Cuda(gpus);
                    gpus += 1;
                } else if devices.iter().any(|d: &DeviceSpec| d.device == Device::Cpu) {
                    return Err(wrong("there is one processor, whose cores all its stages share".into()));
                }
                devices.push(device);
            }
        }
        Ok(devices)
    }
}

/// Something between an L4 and an A100, by its size.
fn guessed(name: &str, multiprocessors: u32) -> DeviceSpec {
    let each = f64::from(multiprocessors.max(1));
    let narrow = 2e12 * each * RATE_REACHED;
    DeviceSpec {
        name: name.into(),
        bandwidth: 10e9 * each * BANDWIDTH_REACHED,
        rates: Rates { f32: narrow / 4.0, f16: narrow, bf16: narrow },
        link: PCIE,
        ..KNOWN[0].spec()
    }
}

/// One description, on its way to a [`DeviceSpec`].
struct Described;

impl Described {
    /// How many, and what: `8xh100-80g`, `l4:mem=20g`, `mine:mem=24g` `bw=900g` `bf16=150t`.
    fn parse(item: &[&str]) -> Result<(usize, DeviceSpec), String> {
        let (head, first) =
            item[0].split_once(':').map_or((item[0], None), |(head, rest)| (head, Some(rest)));
        let (count, name) = match head.split_once(['x', 'X']) {
            Some((n, name)) if !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()) => (n, name),
            _ => ("1", head),
        };
        let count = count.parse::<usize>().map_err(|_| format!("{} devices are too many", shown(count)))?;
        if count == 0 {
            return Err("none of them".into());
        }
        let pairs: Vec<&str> = first.into_iter().chain(item[1..].iter().copied()).collect();
        Ok((count, Described::spec(name, &pairs)?))
    }

    fn spec(name: &str, pairs: &[&str]) -> Result<DeviceSpec, String> {
        let lower = name.to_lowercase();
        if let Some((_, compute)) =
            TOO_OLD.iter().find(|(old, _)| lower == *old || lower.starts_with(&format!("{old}-")))
        {
            return Err(format!("it is too old: compute capability 8.0 is needed, and it has {compute}"));
        }
        if lower == "cpu" && pairs.is_empty() {
            return DeviceSpec::of_cpu(None).map_err(|error| error.to_string());
        }
        let mut spec = match DeviceSpec::known(name) {
            Some(spec) => spec,
            None if pairs.is_empty() => {
                let known: Vec<_> = DeviceSpec::names().collect();
                return Err(format!(
                    "no known device (known: {}, cpu); others are described as NAME:mem=24g,bw=900g,bf16=150t",
                    known.join(", ")
                ));
            }
            None => blank(name)?,
        };
        for pair in pairs {
            set(&mut spec, pair)?;
        }
        for (key, missing) in
            [("mem", spec.memory == 0), ("bw", spec.bandwidth == 0.0), ("bf16", spec.rates.bf16 == 0.0)]
        {
            if missing {
                return Err(format!("{key}= is missing, as in NAME:mem=24g,bw=900g,bf16=150t"));
            }
        }
        if spec.free > spec.memory {
            return Err("free= is more than mem=".into());
        }
        if spec.rates.f32 == 0.0 {
            spec.rates.f32 = spec.rates.bf16 / 8.0;
        }
        Ok(spec)
    }
}

/// A device of which nothing is known but its name.
fn blank(name: &str) -> Result<DeviceSpec, String> {
    let named = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > 64 || !name.chars().all(named) {
        return Err("a device's name is letters, digits, and - _ .".into());
    }
    if name.eq_ignore_ascii_case("cpu") {
        return Ok(blank_cpu(name));
    }
    let zero = Rates { f32: 0.0, f16: 0.0, bf16: 0.0 };
    let known = KNOWN[KNOWN.len() - 1].spec();
    Ok(DeviceSpec { name: name.into(), memory: 0, free: 0, bandwidth: 0.0, rates: zero, ..known })
}

fn blank_cpu(name: &str) -> DeviceSpec {
    DeviceSpec {
        device: Device::Cpu,
        name: name.into(),
        memory: 0,
        free: 0,
        bandwidth: 0.0,
        rates: Rates { f32: 0.0, f16: 0.0, bf16: 0.0 },
        launch: CPU_LAUNCH_S,
        pass: CPU_PASS_S,
        half_rate_rows: CPU_HALF_RATE_ROWS,
        attention: CPU_ATTENTION_RATE,
        link: CPU_LINK,
    }
}

/// What is described is what is reached: nothing is taken off.
fn set(spec: &mut DeviceSpec, pair: &str) -> Result<(), String> {
    let (key, value) = pair.split_once('=').ok_or_else(|| format!("\"{}\" is not KEY=VALUE", shown(pair)))?;
    let amount = amount(value).ok_or_else(|| {
        format!("{}={}: expected a number above 0, such as 24g or 1.5t", shown(key), shown(value))
    })?;
    match key.trim() {
        "mem" => {
            spec.memory = amount as usize;
            spec.free =
                spec.memory.saturating_sub(if spec.device == Device::Cpu { 0 } else { RESERVE_BYTES });
        }
        "free" => spec.free = amount as usize,
        "bw" => spec.bandwidth = amount,
        "bf16" => (spec.rates.bf16, spec.rates.f16) = (amount, amount),
        "f16" => spec.rates.f16 = amount,
        "f32" => spec.rates.f32 = amount,
        "link" => spec.link.bandwidth = amount,
        _ => return Err(format!("\"{}\" is none of mem, free, bw, bf16, f16, f32 and link", shown(key))),
    }
    Ok(())
}

/// `24g`, `1.5t`, `900G`; in powers of 1000.
pub(super) fn amount(text: &str) -> Option<f64> {
    const AMOUNT_MAX: f64 = 1e18;
    let text = text.trim();
    let scale = match text.chars().last()?.to_ascii_lowercase() {
        'k' => 1e3,
        'm' => 1e6,
        'g' => 1e9,
        't' => 1e12,
        'p' => 1e15,
        _ => 1.0,
    };
    let number = if scale > 1.0 { &text[..text.len() - 1] } else { text };
    let plain = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let amount = f64::from_str(number).ok().filter(|_| plain)? * scale;
    (1.0..=AMOUNT_MAX).contains(&amount).then_some(amount)
}

fn as_text<S: serde::Serializer>(device: &Device, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        DeviceSpec::list(text).unwrap_err().to_string()
    }

    #[test]
    fn lists_count_name_and_number_devices() {
        let devices = DeviceSpec::list("2xh100-80g, L4 ,cpu:mem=64g,bw=100g,bf16=1t").unwrap();
        let names: Vec<_> = devices.iter().map(|d| (d.device.to_string(), d.name.clone())).collect();
        let want = [("cuda:0", "h100-80g"), ("cuda:1", "h100-80g"), ("cuda:2", "l4"), ("cpu", "cpu")];
        assert_eq!(names, want.map(|(device, name)| (device.to_owned(), name.to_owned())));
        assert_eq!((devices[3].free, devices[3].rates.f16), (64_000_000_000, 1e12));
        let limited = DeviceSpec::list("h200-141g:free=40g,bw=2t,l4").unwrap();
        assert_eq!((limited.len(), limited[0].free, limited[0].bandwidth), (2, 40_000_000_000, 2e12));
        // As measured: weights at 4.15 TB/s, products at 717 TFLOP/s.
        let h200 = DeviceSpec::known("H200-141G").unwrap();
        assert!(
            (h200.bandwidth / 4.15e12 - 1.0).abs() < 0.01 && (h200.rates.bf16 / 717e12 - 1.0).abs() < 0.01
        );
    }

    #[test]
    fn what_cannot_be_described_is_named() {
        for (text, want) in [
            ("8xv100", "--devices 8xv100: it is too old: compute capability 8.0 is needed, and it has 7.0"),
            ("h100", "--devices h100: no known device (known: b200, h200-141g"),
            ("", "--devices : no known device"),
            ("0xl4", "none of them"),
            ("99999999999999999999xl4", "too many"),
            ("200xl4,57xl4", "--devices 57xl4: more than 256 devices"),
            ("mine:mem=24g", "bw= is missing"),
            ("mine:mem=24g,bw=1t,bf16=x", "bf16=x: expected a number"),
            ("mine:mem=-1,bw=1t", "mem=-1: expected"),
            ("mine:mem=1e9", "mem=1e9: expected"),
            ("mine:size=24g", "\"size\" is none of mem,"),
            ("mine:mem", "\"mem\" is not KEY=VALUE"),
            ("l4:free=99g", "free= is more than mem="),
            ("a b:mem=1g", "a device's name is"),
            ("2xcpu:mem=64g,bw=100g,bf16=1t", "one processor"),
        ] {
            let said = message(text);
            assert!(said.contains(want) && !said.contains('\n'), "{text}: {said}");
        }
    }

    #[test]
    fn gpus_are_known_by_their_drivers_names() {
        let known = |name: &str, gib: usize| DeviceSpec::of_gpu(name, 100, gib << 30).name;
        for (name, gib, want) in [
            ("NVIDIA H200", 140, "h200-141g"),
            ("NVIDIA H100 80GB HBM3", 79, "h100-80g"),
            ("NVIDIA H100 PCIe", 79, "h100-pcie"),
            ("NVIDIA A100-SXM4-80GB", 80, "a100-80g"),
            ("NVIDIA A100-PCIE-40GB", 40, "a100-40g"),
            ("NVIDIA L4", 22, "l4"),
            ("NVIDIA L40S", 45, "l40s"),
            ("NVIDIA A10G", 22, "a10"),
            ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
            ("NVIDIA L40", 45, "NVIDIA L40"),
        ] {
            assert_eq!(known(name, gib), want, "{name}");
        }
    }
}
