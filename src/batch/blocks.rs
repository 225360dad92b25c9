//! The KV blocks of a sequence: a list that grows at its end while micro-batches in flight read its beginning. To grow takes as long
//! whatever its length is, and nothing is copied: there is room for the longest answer from the beginning.

use std::{
    fmt,
    ops::{Deref, Range},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

/// A sequence's KV blocks as far as they were known when its rows were planned, in the order of their tokens.
#[derive(Clone, Default)]
pub struct Blocks {
    cells: Arc<[AtomicU32]>,
    len: usize,
}

/// All that a sequence has, for the one who adds to them.
#[derive(Debug, Default)]
pub(crate) struct BlockList(Blocks);

impl BlockList {
    /// A list that never has more than `most`.
    pub(crate) fn new(first: impl IntoIterator<Item = u32>, most: usize) -> BlockList {
        let cells = (0..most).map(|_| AtomicU32::new(0)).collect();
        let mut list = BlockList(Blocks { cells, len: 0 });
        first.into_iter().for_each(|id| list.push(id));
        list
    }

    /// One more.
    pub(crate) fn push(&mut self, id: u32) {
        let Blocks { cells, len } = &mut self.0;
        assert!(*len < cells.len(), "more KV blocks than a sequence can have; this is a bug");
        // Nobody looks at it yet: clones know fewer, and who gets one that knows it gets it in a way that puts this write first.
        cells[*len].store(id, Relaxed);
        *len += 1;
    }
}

/// What it has now; clones stay as they are.
impl Deref for BlockList {
    type Target = Blocks;

    fn deref(&self) -> &Blocks {
        &self.0
    }
}

impl Blocks {
    /// How many.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The one of this place.
    pub fn at(&self, place: usize) -> u32 {
        self.known()[place].load(Relaxed)
    }

    /// All of them.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = u32> + ExactSizeIterator {
        self.range(0..self.len)
    }

    /// Those of some places.
    pub fn range(&self, places: Range<usize>) -> impl DoubleEndedIterator<Item = u32> + ExactSizeIterator {
        self.known()[places].iter().map(|cell| cell.load(Relaxed))
    }

    fn known(&self) -> &[AtomicU32] {
        &self.cells[..self.len]
    }
}

impl FromIterator<u32> for Blocks {
    fn from_iter<I: IntoIterator<Item = u32>>(ids: I) -> Blocks {
        let cells: Arc<[AtomicU32]> = ids.into_iter().map(AtomicU32::new).collect();
        Blocks { len: cells.len(), cells }
    }
}

impl From<Vec<u32>> for Blocks {
    fn from(ids: Vec<u32>) -> Blocks {
        ids.into_iter().collect()
    }
}

impl From<&[u32]> for Blocks {
    fn from(ids: &[u32]) -> Blocks {
        ids.iter().copied().collect()
    }
}

impl<const N: usize> From<[u32; N]> for Blocks {
    fn from(ids: [u32; N]) -> Blocks {
        ids.into_iter().collect()
    }
}

impl PartialEq for Blocks {
    fn eq(&self, other: &Blocks) -> bool {
        self.iter().eq(other.iter())
    }
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_stays_as_it_was_while_the_list_grows() {
        let mut list = BlockList::new([7, 8], 40);
        let mut seen = vec![list.clone()];
        let (send, receive) = crossbeam_channel::unbounded::<Blocks>();
        let reader = std::thread::spawn(move || {
            receive.iter().map(|blocks| (blocks.len(), blocks.iter().sum::<u32>())).collect::<Vec<_>>()
        });
        for id in 100..138 {
            list.push(id);
            seen.push(list.clone());
            send.send(list.clone()).unwrap();
        }
        drop(send);
        let all: Vec<u32> = [7, 8].into_iter().chain(100..138).collect();
        assert_eq!(list.iter().collect::<Vec<_>>(), all);
        for (i, blocks) in seen.iter().enumerate() {
            assert!(blocks.iter().eq(all[..2 + i].iter().copied()));
            assert_eq!((blocks.len(), blocks.at(1 + i)), (2 + i, all[1 + i]));
            assert!(Arc::ptr_eq(&blocks.cells, &list.0.cells), "nothing was copied");
        }
        let sums: Vec<(usize, u32)> = (3..=40).map(|len| (len, all[..len].iter().sum())).collect();
        assert_eq!(reader.join().unwrap(), sums);
        assert_eq!(*list, Blocks::from(all.clone()));
        assert_ne!(*list, Blocks::from(&all[1..]));
        assert!(list.range(1..3).rev().eq([100, 8]));
        assert_eq!(format!("{:?} {:?}", seen[0], Blocks::from([])), "[7, 8] []");
    }

    #[test]
    #[should_panic(expected = "more KV blocks than a sequence can have; this is a bug")]
    fn a_list_grows_to_what_it_can_hold() {
        let mut list = BlockList::new([], 2);
        (0..3).for_each(|id| list.push(id));
    }

    #[test]
    #[should_panic(expected = "the len is 2 but the index is 2")]
    fn what_comes_later_is_not_seen() {
        let mut list = BlockList::new([4, 5], 3);
        let seen = list.clone();
        list.push(6);
        seen.at(2);
    }

    #[test]
    #[should_panic(expected = "more KV blocks than a sequence can have; this is a bug")]
    fn a_list_begins_with_no_more_than_it_can_hold() {
        BlockList::new(0..4, 3);
    }
}
