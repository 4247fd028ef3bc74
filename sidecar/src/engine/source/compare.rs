//! Which blocks are compared by digest before they are sent.

use std::collections::HashMap;

use watari_core::{geometry::DiskIndex, primary::Read};

/// One bit per block that may differ at the peer; memory only while there is something to compare.
#[derive(Default)]
pub(super) struct Compare {
    bits: HashMap<(DiskIndex, u64), u64>,
}

impl Compare {
    fn each(first: u64, blocks: u64, mut f: impl FnMut(u64, u64)) {
        let (mut at, end) = (first, first + blocks);
        while at < end {
            let n = (64 - at % 64).min(end - at);
            f(at / 64, (u64::MAX >> (64 - n)) << (at % 64));
            at += n;
        }
    }

    pub(super) fn set(&mut self, disk: DiskIndex, first: u64, blocks: u64) {
        Self::each(first, blocks, |word, mask| *self.bits.entry((disk, word)).or_default() |= mask);
    }

    pub(super) fn any(&self, read: &Read) -> bool {
        let mut any = false;
        for e in &read.extents {
            Self::each(e.start.0, u64::from(e.blocks), |word, mask| {
                any |= self.bits.get(&(read.disk, word)).is_some_and(|w| w & mask != 0);
            });
        }
        any
    }

    pub(super) fn done(&mut self, read: &Read) {
        for e in &read.extents {
            Self::each(e.start.0, u64::from(e.blocks), |word, mask| {
                if let Some(w) = self.bits.get_mut(&(read.disk, word)) {
                    *w &= !mask;
                    if *w == 0 {
                        self.bits.remove(&(read.disk, word));
                    }
                }
            });
        }
    }

    pub(super) fn clear(&mut self) {
        self.bits = HashMap::new();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bits.is_empty()
    }
}
