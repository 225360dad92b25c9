//! Which algorithm multiplies matrices of which shapes: one table for the process, kept on disk.
//!
//! Whoever wants a shape that the table does not have chooses for all. Stages on several GPUs choose for different shapes at
//! the same time (`warm_up` lets decoders begin with different ones); those on one GPU take turns, since they would slow
//! each other.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
    sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use super::{
    blas::Algo,
    compile::{Fnv, cache_folder, write_aside},
};

/// What is known of a shape.
pub(super) enum Found {
    Known(Algo),
    /// Nothing: whoever has asked is to choose, and others who ask wait for that.
    Unknown(Choosing),
}

/// The right to choose for a shape on a GPU, which nobody else chooses on. If it is dropped, somebody else may.
pub(super) struct Choosing {
    key: u128,
    device: usize,
    began: Instant,
}

/// What a shape's algorithm is, as far as it is known and can be used.
pub(super) fn find(key: u128, device: usize, usable: impl Fn(&Algo) -> bool) -> Found {
    let mut table = table();
    loop {
        if let Some(algo) = table.get(key).filter(&usable) {
            return Found::Known(algo);
        }
        if !table.coming.contains(&key) && !table.devices.contains(&device) {
            table.coming.insert(key);
            table.devices.insert(device);
            return Found::Unknown(Choosing { key, device, began: Instant::now() });
        }
        table = CHOSEN.wait(table).unwrap_or_else(PoisonError::into_inner);
    }
}

/// Writes the choices so far to the disk, where the next process finds them.
pub(super) fn write() {
    table().write();
}

impl Choosing {
    /// How long has been spent on choosing on this GPU before.
    pub(super) fn spent(&self) -> Duration {
        table().spent.get(&self.device).copied().unwrap_or_default()
    }

    /// Tells all. A choice that was not made by timing is not kept on disk.
    pub(super) fn keep(self, algo: Algo, timed: bool) {
        table().put(self.key, algo, timed);
    }
}

impl Drop for Choosing {
    fn drop(&mut self) {
        let mut table = table();
        table.coming.remove(&self.key);
        table.devices.remove(&self.device);
        *table.spent.entry(self.device).or_default() += self.began.elapsed();
        CHOSEN.notify_all();
    }
}

/// Told when somebody has chosen, or has not.
static CHOSEN: Condvar = Condvar::new();

fn table() -> MutexGuard<'static, Table> {
    static TABLE: OnceLock<Mutex<Table>> = OnceLock::new();
    let table = TABLE.get_or_init(|| Mutex::new(Table::open(cache_folder().map(|f| f.join("matmul.txt")))));
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The choices so far, in the process and on disk.
#[derive(Default)]
struct Table {
    path: Option<PathBuf>,
    /// By key, the choice and whether it was made by timing: others are not kept on disk.
    entries: HashMap<u128, (Algo, bool)>,
    /// Whether there are some that the disk does not have.
    changed: bool,
    /// What is being chosen now, and on which GPUs.
    coming: BTreeSet<u128>,
    devices: BTreeSet<usize>,
    /// Time that choosing has taken, by the GPU.
    spent: BTreeMap<usize, Duration>,
}

impl Table {
    fn open(path: Option<PathBuf>) -> Table {
        let mut table = Table { path, ..Table::default() };
        table.read();
        table
    }

    fn get(&self, key: u128) -> Option<Algo> {
        self.entries.get(&key).map(|(algo, _)| *algo)
    }

    fn put(&mut self, key: u128, algo: Algo, timed: bool) {
        self.entries.insert(key, (algo, timed));
        self.changed |= timed;
    }

    /// Adds what is on disk.
    fn read(&mut self) {
        let text = self.path.as_deref().and_then(|p| std::fs::read_to_string(p).ok()).unwrap_or_default();
        for (key, algo) in text.lines().filter_map(parse_line) {
            // What is being chosen here is for whoever chooses to say: some may have been told otherwise by then.
            if !self.coming.contains(&key) {
                self.entries.entry(key).or_insert((algo, true));
            }
        }
    }

    /// Brings the disk what it does not have, beside what other processes have written meanwhile.
    fn write(&mut self) {
        if !std::mem::take(&mut self.changed) {
            return;
        }
        self.read();
        let Some(path) = &self.path else { return };
        let timed = self.entries.iter().filter(|(_, (_, timed))| *timed);
        let mut lines: Vec<String> = timed.map(|(key, (algo, _))| line(*key, algo)).collect();
        lines.sort();
        if let Err(error) = write_aside(path, lines.concat().as_bytes()) {
            tracing::debug!(path = %path.display(), %error, "the choice of algorithms is not kept");
        }
    }
}

/// An entry as text: the key, the algorithm's words and a check of both.
fn line(key: u128, algo: &Algo) -> String {
    let words: Vec<String> = algo.iter().map(|w| format!("{w:016x}")).collect();
    format!("{key:032x} {} {:016x}\n", words.join(" "), check(key, algo))
}

fn check(key: u128, algo: &Algo) -> u64 {
    let mut hash = Fnv::default();
    hash.part(&key.to_le_bytes());
    algo.iter().for_each(|w| hash.part(&w.to_le_bytes()));
    hash.0 as u64
}

fn parse_line(line: &str) -> Option<(u128, Algo)> {
    let mut fields = line.split_ascii_whitespace();
    let key = u128::from_str_radix(fields.next()?, 16).ok()?;
    let mut algo = Algo::default();
    for word in &mut algo {
        *word = u64::from_str_radix(fields.next()?, 16).ok()?;
    }
    let sum = u64::from_str_radix(fields.next()?, 16).ok()?;
    (sum == check(key, &algo)).then_some((key, algo))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_back_and_damaged_ones_do_not() {
        let algo: Algo = std::array::from_fn(|i| (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let text = line(u128::MAX / 3, &algo);
        assert_eq!(parse_line(&text), Some((u128::MAX / 3, algo)));
        let text = text.trim_end();
        for end in 0..text.len() {
            assert_eq!(parse_line(&text[..end]), None, "cut to {end}");
        }
        for i in (0..text.len()).filter(|&i| text.as_bytes()[i] != b' ') {
            let other = if text.as_bytes()[i] == b'0' { "1" } else { "0" };
            let mut damaged = text.to_owned();
            damaged.replace_range(i..i + 1, other);
            assert_eq!(parse_line(&damaged), None, "character {i}");
        }
    }

    #[test]
    fn timed_choices_are_kept_beside_those_of_others() {
        let folder = tempfile::tempdir().unwrap();
        let path = || Some(folder.path().join("matmul.txt"));
        let (mut one, mut other) = (Table::open(path()), Table::open(path()));
        one.put(1, [1; 8], true);
        one.put(2, [2; 8], false);
        other.put(3, [3; 8], true);
        one.write();
        other.write();
        let found = Table::open(path());
        assert_eq!([1, 2, 3].map(|key| found.get(key)), [Some([1; 8]), None, Some([3; 8])]);
        assert_eq!((one.get(2), other.get(1)), (Some([2; 8]), Some([1; 8])));
        // What is being chosen is not taken from there.
        let mut third = Table { path: path(), coming: [3].into(), ..Table::default() };
        third.read();
        assert_eq!([1, 3].map(|key| third.get(key)), [Some([1; 8]), None]);
    }

    #[test]
    fn one_chooses_for_all_and_gpus_choose_for_others_meanwhile() {
        // Keys and GPUs that nothing else in this process has.
        let [key, other, third] = [7, 8, 9].map(|n| u128::MAX - n);
        let gpus = [1000, 1001];
        let chooses = |key, gpu| match find(key, gpu, |_| true) {
            Found::Known(algo) => panic!("{algo:?} is known"),
            Found::Unknown(choosing) => choosing,
        };
        let first = chooses(key, gpus[0]);
        let second = chooses(other, gpus[1]);
        std::thread::scope(|scope| {
            // The shape is being chosen for elsewhere; so is another; the GPU is in use.
            let waits = [(key, gpus[1]), (other, gpus[0]), (third, gpus[0])].map(|(key, gpu)| {
                scope.spawn(move || match find(key, gpu, |_| true) {
                    Found::Known(algo) => Some(algo),
                    Found::Unknown(_) => None,
                })
            });
            let done = || [0, 1, 2].map(|i| waits[i].is_finished());
            std::thread::sleep(Duration::from_millis(30));
            assert_eq!(done(), [false; 3]);
            first.keep([5; 8], false);
            while done() != [true, false, true] {
                std::thread::sleep(Duration::from_millis(1));
            }
            // Given up: whoever waits for it is to choose.
            drop(second);
            assert_eq!(waits.map(|waits| waits.join().unwrap()), [Some([5; 8]), None, None]);
        });
        let again = chooses(other, gpus[1]);
        assert!(again.spent() >= Duration::from_millis(30));
        drop(again);
        // What cannot be used is chosen anew.
        assert!(matches!(find(key, gpus[0], |_| false), Found::Unknown(_)));
    }
}
