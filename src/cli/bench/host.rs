//! What the host's processor did, thread by thread, and how much memory the process has taken; as Linux tells.

use std::{collections::BTreeMap, fs, path::Path};

/// Clock ticks a second in `/proc`, on every architecture.
const TICKS: f64 = 100.0;

/// Processor seconds of the threads of one name, since they began.
pub(super) type CpuTimes = BTreeMap<String, f64>;

/// Until now; empty where nobody tells.
pub(super) fn cpu_times() -> CpuTimes {
    let mut times = CpuTimes::new();
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return times };
    for task in tasks.flatten() {
        // A thread may end at any time.
        if let Some((name, seconds)) = thread(&task.path()) {
            *times.entry(name).or_insert(0.0) += seconds;
        }
    }
    times
}

/// What came between two moments.
pub(super) fn between(was: &CpuTimes, is: &CpuTimes) -> CpuTimes {
    let since = |(name, seconds): (&String, &f64)| {
        let seconds = seconds - was.get(name).copied().unwrap_or(0.0);
        (name.clone(), seconds.max(0.0))
    };
    is.iter().map(since).collect()
}

/// The most memory that the process has had; `None` where nobody tells.
pub(super) fn memory_peak() -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes << 10)
}

fn thread(task: &Path) -> Option<(String, f64)> {
    let name = fs::read_to_string(task.join("comm")).ok()?.trim_end().to_owned();
    // Nanoseconds, where the kernel counts them; else ticks.
    let exact = fs::read_to_string(task.join("schedstat")).ok().and_then(|text| nanoseconds(&text));
    let seconds = match exact {
        Some(seconds) => seconds,
        None => ticks(&fs::read_to_string(task.join("stat")).ok()?)?,
    };
    Some((name, seconds))
}

fn nanoseconds(schedstat: &str) -> Option<f64> {
    schedstat.split_whitespace().next()?.parse::<u64>().ok().map(|ns| ns as f64 / 1e9)
}

/// Of the program and of the kernel for it.
fn ticks(stat: &str) -> Option<f64> {
    // The name, in brackets, may have anything in it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<f64>().ok();
    Some((next()? + next()?) / TICKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_proc_are_read() {
        assert_eq!(nanoseconds("1500000000 7 9\n"), Some(1.5));
        let stat = "1 (a) b) R 2 3 4 5 6 7 8 9 10 11 120 30 0 0 20 0 1";
        assert_eq!(ticks(stat), Some(1.5));
        assert_eq!((ticks("1 (x"), nanoseconds("")), (None, None));
    }

    #[test]
    fn only_what_came_between_counts() {
        let times =
            |of: &[(&str, f64)]| of.iter().map(|&(name, s)| (name.to_owned(), s)).collect::<CpuTimes>();
        let (was, is) = (times(&[("a", 1.0), ("gone", 2.0)]), times(&[("a", 1.5), ("new", 0.25)]));
        assert_eq!(between(&was, &is), times(&[("a", 0.5), ("new", 0.25)]));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_is_found() {
        let before = cpu_times();
        let mut sum = 0u64;
        let started = std::time::Instant::now();
        while started.elapsed().as_millis() < 60 {
            sum = std::hint::black_box(sum + 1);
        }
        let spent: f64 = between(&before, &cpu_times()).values().sum();
        assert!(spent > 0.0, "{spent}");
        assert!(memory_peak().is_some_and(|bytes| bytes > 1 << 20));
    }
}
