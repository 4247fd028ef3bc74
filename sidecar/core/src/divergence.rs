//! What a fenced side wrote that its peer does not have (design §3.6): a list of blocks, durable before the role record says
//! `Fenced`. Its bytes are the file `divergence` (see `FORMAT.md`).
//!
//! The list may name too much (blocks that a comparison would find equal), never too little. It holds no content: that
//! lies on the disks until a person consents, and in undo after it. It does not decide when it is made; the shell does.

use alloc::vec::Vec;

use crate::{
    codec::{Put, Reader, Short, crc32},
    geometry::{Block, DiskIndex, Extent, Generation, GenerationNumber},
    limits,
    record::Id,
};

/// Version of the format; a newer one is refused and never written to.
pub const DIVERGENCE_VERSION: u32 = 1;
/// Most extents in one list: 14 MiB. A longer list is made coarser, not cut short.
pub const EXTENTS_MAX: usize = 1 << 20;

const MAGIC: [u8; 8] = *b"WATARDIV";
const HEADER_BYTES: usize = 80;
const EXTENT_BYTES: usize = 14;
const CRC_BYTES: usize = 4;
/// Largest file, in bytes: bounds what a reader takes.
pub const FILE_BYTES_MAX: usize = HEADER_BYTES + EXTENTS_MAX * EXTENT_BYTES + CRC_BYTES;

/// The list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Divergence {
    pub pair: Id,
    /// Epoch counter under which these blocks were written.
    pub epoch: u64,
    /// Epoch counter of the side that goes on.
    pub by: u64,
    /// Newest generation that both sites have.
    pub base: Generation,
    /// When it was found, milliseconds since 1970.
    pub found_unix_millis: u64,
    /// Changes were not tracked: any block may have been written, whatever the list says.
    pub anything: bool,
    /// In order of disk and block, not touching one another.
    pub extents: Vec<(DiskIndex, Extent)>,
}

/// Why bytes are not such a list.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DivergenceError {
    #[error(
        "the divergence list is of format version {found}, this binary knows {DIVERGENCE_VERSION}: use a newer binary, nothing was changed"
    )]
    NewerVersion { found: u32 },
    #[error("the divergence list is damaged: {0}")]
    Damaged(&'static str),
}

impl From<Short> for DivergenceError {
    fn from(_: Short) -> Self {
        DivergenceError::Damaged("it ends too early")
    }
}

impl Divergence {
    /// Bytes of all disks that the list names.
    pub fn bytes(&self) -> u64 {
        self.extents.iter().map(|(_, e)| e.bytes()).sum()
    }

    /// Make the list coarser until it has at most `most` extents: names more blocks, never fewer.
    pub fn coarsen(&mut self, most: usize) {
        let mut grain = 2u64;
        while self.extents.len() > most && grain <= limits::DISK_BYTES_MAX {
            let mut out: Vec<(DiskIndex, Extent)> = Vec::new();
            for (disk, e) in &self.extents {
                let (first, end) = (e.start.0 / grain * grain, e.end().0.next_multiple_of(grain));
                match out.last_mut() {
                    Some((d, last))
                        if d == disk && last.end().0 >= first && end - last.start.0 <= u64::from(u32::MAX) =>
                    {
                        last.blocks = (end.max(last.end().0) - last.start.0) as u32;
                    }
                    _ => out.push((
                        *disk,
                        Extent { start: Block(first), blocks: (end - first).min(u64::from(u32::MAX)) as u32 },
                    )),
                }
            }
            self.extents = out;
            grain *= 2;
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut w = Vec::with_capacity(HEADER_BYTES + self.extents.len() * EXTENT_BYTES + CRC_BYTES);
        w.put(&MAGIC);
        w.put_u32(DIVERGENCE_VERSION);
        w.put_u32(u32::from(self.anything));
        w.put(&self.pair);
        for field in [self.epoch, self.by, self.base.epoch, self.base.number.0, self.found_unix_millis] {
            w.put_u64(field);
        }
        w.put_u64(self.extents.len() as u64);
        for (disk, e) in &self.extents {
            w.put_u16(disk.0);
            w.put_u64(e.start.0);
            w.put_u32(e.blocks);
        }
        let crc = crc32(&[&w]);
        w.put_u32(crc);
        w
    }

    /// Errors: a newer version, or damage.
    pub fn decode(bytes: &[u8]) -> Result<Self, DivergenceError> {
        let mut r = Reader::new(bytes);
        if r.array::<8>()? != MAGIC {
            return Err(DivergenceError::Damaged("it does not begin with its magic"));
        }
        let found = r.u32()?;
        if found != DIVERGENCE_VERSION {
            return Err(DivergenceError::NewerVersion { found });
        }
        let Some(body) = bytes.len().checked_sub(CRC_BYTES) else {
            return Err(DivergenceError::Damaged("it ends too early"));
        };
        if Reader::new(&bytes[body..]).u32()? != crc32(&[&bytes[..body]]) {
            return Err(DivergenceError::Damaged("its checksum does not fit"));
        }
        let anything = r.u32()? != 0;
        let pair = r.array()?;
        let (epoch, by) = (r.u64()?, r.u64()?);
        let base = Generation { epoch: r.u64()?, number: GenerationNumber(r.u64()?) };
        let found_unix_millis = r.u64()?;
        let count = r.u64()? as usize;
        if count > EXTENTS_MAX || Some(r.left()) != count.checked_mul(EXTENT_BYTES).map(|n| n + CRC_BYTES) {
            return Err(DivergenceError::Damaged("its length does not fit"));
        }
        let mut extents: Vec<(DiskIndex, Extent)> = Vec::with_capacity(count);
        for _ in 0..count {
            let (disk, start, blocks) = (DiskIndex(r.u16()?), r.u64()?, r.u32()?);
            let e = Extent { start: Block(start), blocks };
            let inside = usize::from(disk.0) < limits::DISKS_MAX && start <= limits::DISK_BYTES_MAX && blocks > 0;
            let after = extents.last().is_none_or(|(d, last)| *d < disk || *d == disk && last.end().0 <= start);
            if !inside || !after {
                return Err(DivergenceError::Damaged("its extents are out of order or of no disk"));
            }
            extents.push((disk, e));
        }
        Ok(Divergence { pair, epoch, by, base, found_unix_millis, anything, extents })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    use super::*;

    fn list(extents: Vec<(u16, u64, u32)>) -> Divergence {
        let base = Generation { epoch: 1, number: GenerationNumber(7) };
        let extents = extents
            .into_iter()
            .map(|(d, start, blocks)| (DiskIndex(d), Extent { start: Block(start), blocks }))
            .collect();
        Divergence {
            pair: [3; 16],
            epoch: 1,
            by: 3,
            base,
            found_unix_millis: 1_795_500_000_000,
            anything: false,
            extents,
        }
    }

    /// Format 1 as the first program wrote it: two extents on two disks.
    const FIXTURE: &[u8] = include_bytes!("../tests/fixtures/divergence-1");

    #[test]
    fn a_list_of_format_1_is_read_and_written_bit_exact() {
        let expected = list(vec![(0, 5, 2), (1, 1 << 20, 256)]);
        assert_eq!(Divergence::decode(FIXTURE), Ok(expected.clone()));
        assert_eq!(expected.encode(), FIXTURE);
        assert_eq!(expected.bytes(), 258 * 4096);
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let mut bytes = list(vec![(0, 1, 1)]).encode();
        bytes[8] = 2;
        assert_eq!(Divergence::decode(&bytes), Err(DivergenceError::NewerVersion { found: 2 }));
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_a_changed_one_is_found(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), at in any::<prop::sample::Index>(), flip in 1u8..=255,
        ) {
            let _ = Divergence::decode(&bytes);
            let good = list(vec![(0, 1, 1), (0, 9, 300), (2, 0, 1)]).encode();
            let mut bad = good.clone();
            bad[at.index(good.len())] ^= flip;
            prop_assert!(Divergence::decode(&bad).is_err());
            prop_assert!(Divergence::decode(&good[..at.index(good.len())]).is_err());
        }

        #[test]
        fn a_coarser_list_is_shorter_and_names_at_least_as_much(gaps in proptest::collection::vec((1u64..50, 1u32..40), 1..400), most in 1usize..50) {
            let mut at = 0;
            let extents: Vec<(u16, u64, u32)> = gaps.iter().map(|(gap, blocks)| {
                let start = at + gap;
                at = start + u64::from(*blocks);
                (0, start, *blocks)
            }).collect();
            let fine = list(extents);
            let mut coarse = fine.clone();
            coarse.coarsen(most);
            prop_assert!(coarse.extents.len() <= most.max(fine.extents.len().min(most)));
            for (_, e) in &fine.extents {
                let covered = coarse.extents.iter().any(|(_, c)| c.start <= e.start && e.end() <= c.end());
                prop_assert!(covered, "{e:?} in {:?}", coarse.extents);
            }
            prop_assert_eq!(Divergence::decode(&coarse.encode()), Ok(coarse));
        }
    }
}
