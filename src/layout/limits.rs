//! Less memory than devices have: for those who want some of it themselves, and for trying what a small device would do.

use std::{collections::BTreeMap, str::FromStr};

use super::{Device, DeviceSpec, devices::amount};
use crate::error::{Error, Result, shown};

/// The most bytes that a pipeline may take of devices, as if no more were free.
///
/// ```
/// use pipeline_infer::layout::{Device, MemoryLimits};
///
/// let limits: MemoryLimits = "cuda:1=40g,cuda:3=20g".parse()?;
/// assert_eq!(limits.of(Device::Cuda(1), 100_000_000_000), 40_000_000_000);
/// assert_eq!(limits.of(Device::Cuda(0), 100_000_000_000), 100_000_000_000);
/// # Ok::<(), pipeline_infer::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryLimits(BTreeMap<Device, usize>);

impl MemoryLimits {
    /// With a limit for one more device, or another one.
    #[must_use]
    pub fn with(mut self, device: Device, bytes: usize) -> Self {
        self.0.insert(device, bytes);
        self
    }

    /// Bytes that may be taken of a device with so many free.
    pub fn of(&self, device: Device, free: usize) -> usize {
        self.0.get(&device).map_or(free, |&most| free.min(most))
    }

    /// The devices that have limits.
    pub fn devices(&self) -> impl Iterator<Item = Device> {
        self.0.keys().copied()
    }

    /// Lowers what is free on these devices.
    pub fn apply(&self, devices: &mut [DeviceSpec]) {
        devices.iter_mut().for_each(|device| device.free = self.of(device.device, device.free));
    }

    /// An error if there is a limit for none of these.
    pub fn check(&self, devices: &[DeviceSpec]) -> Result<()> {
        if let Some((unknown, _)) =
            self.0.iter().find(|(limited, _)| devices.iter().all(|d| d.device != **limited))
        {
            return Err(Error::usage(format!("--device-memory {unknown}"), "it is not among the devices"));
        }
        Ok(())
    }
}

/// `cuda:1=40g,cuda:3=1.5t`: bytes, in powers of 1000.
impl FromStr for MemoryLimits {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut limits = MemoryLimits::default();
        for part in text.split(',').map(str::trim) {
            let wrong = |why: &str| Error::usage(format!("--device-memory {}", shown(part)), why);
            let (device, bytes) =
                part.split_once('=').ok_or_else(|| wrong("expected DEVICE=BYTES, such as cuda:1=40g"))?;
            let device =
                device.trim().parse::<Device>().map_err(|_| wrong("the device is neither cpu nor cuda:N"))?;
            let bytes = amount(bytes).ok_or_else(|| wrong("expected bytes above 0, such as 40g"))?;
            if limits.0.insert(device, bytes as usize).is_some() {
                return Err(wrong("the device has a limit already"));
            }
        }
        Ok(limits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_lower_what_is_free_and_nonsense_is_named() {
        let mut devices = DeviceSpec::list("3xl4").unwrap();
        let limits: MemoryLimits = "cuda:1=4g, cuda:2=900g".parse().unwrap();
        assert_eq!(
            limits,
            MemoryLimits::default()
                .with(Device::Cuda(2), 900_000_000_000)
                .with(Device::Cuda(1), 4_000_000_000)
        );
        limits.check(&devices).unwrap();
        limits.apply(&mut devices);
        assert_eq!((devices[1].free, devices[2].free), (4_000_000_000, devices[0].free));
        let told = limits.check(&devices[..1]).unwrap_err().to_string();
        assert_eq!(told, "--device-memory cuda:1: it is not among the devices");
        for (text, want) in [
            ("", "expected DEVICE=BYTES"),
            ("cuda:1", "expected DEVICE=BYTES"),
            ("gpu=4g", "neither cpu nor cuda:N"),
            ("cuda:1=-4g", "expected bytes above 0"),
            ("cuda:1=0", "expected bytes above 0"),
            ("cuda:1=4g,cuda:1=5g", "--device-memory cuda:1=5g: the device has a limit already"),
        ] {
            let told = text.parse::<MemoryLimits>().unwrap_err().to_string();
            assert!(told.contains(want), "{text}: {told}");
        }
    }
}
