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

/// Bytes of the host's memory; a guess of 8 GiB where the system does not say.
pub fn memory_bytes() -> usize {
    let all = meminfo("MemTotal:").unwrap_or(8 << 30);
    group().map_or(all, |(limit, _)| all.min(limit))
}

/// Bytes of the host's memory that are free, or hold what can be read from files again; a guess of 4 GiB where the system
/// does not say.
pub fn free_bytes() -> usize {
    let free = meminfo("MemAvailable:").unwrap_or(4 << 30);
    group().map_or(free, |(limit, taken)| free.min(limit.saturating_sub(taken)))
}

/// A line of /proc/meminfo, in bytes.
fn meminfo(key: &str) -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(rest.split_whitespace().next()?.parse::<usize>().ok()? << 10)
}

/// What the container may take, and has taken of it for good.
fn group() -> Option<(usize, usize)> {
    let read = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    let limit = read("memory.max")?.trim().parse().ok()?;
    let stat = read("memory.stat")?;
    let taken = stat.lines().find_map(|line| line.strip_prefix("anon "))?.trim().parse().ok()?;
    Some((limit, taken))
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
    fn some_of_the_memory_is_free() {
        assert!(free_bytes() > 0 && free_bytes() <= memory_bytes());
    }

    #[test]
    fn the_name_is_the_first_processors() {
        let text = "processor\t: 0\nmodel\t\t: 17\nmodel name\t: A 9: B\nprocessor\t: 1\nmodel name\t: C\n";
        assert_eq!(name(text), Some("A 9: B"));
        assert_eq!(name("processor\t: 0\nmodel name\t: \n"), None);
        assert!(!facts().name.is_empty() && facts().cores > 0);
    }
}
