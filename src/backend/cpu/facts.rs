//! What the processors are.

use serde::Serialize;

use super::Simd;

/// The processors of this machine.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CpuFacts {
    /// As the maker calls them; the architecture where the system does not say.
    pub name: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// The instruction set that the ops are compiled for and use here.
    pub instructions: &'static str,
}

/// The processors of this machine.
pub fn facts() -> CpuFacts {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    CpuFacts {
        name: name(&text).unwrap_or(std::env::consts::ARCH).to_owned(),
        cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
        instructions: Simd::best().name(),
    }
}

/// The first processor's name in /proc/cpuinfo.
fn name(text: &str) -> Option<&str> {
    let (_, name) =
        text.lines().filter_map(|l| l.split_once(':')).find(|(key, _)| key.trim() == "model name")?;
    Some(name.trim()).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_the_first_processors() {
        let text = "processor\t: 0\nmodel\t\t: 17\nmodel name\t: A 9: B\nprocessor\t: 1\nmodel name\t: C\n";
        assert_eq!(name(text), Some("A 9: B"));
        assert_eq!(name("processor\t: 0\nmodel name\t: \n"), None);
        assert!(!facts().name.is_empty() && facts().cores > 0);
    }
}
