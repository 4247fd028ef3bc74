//! A client's request as one or more disk requests, and the numbers under which these are submitted.

use crate::limits::PART_BYTES;

/// In a submitted number: look for zeroes in the data of this part.
pub(crate) const SCAN: u64 = 1 << 48;

/// The number under which a part is submitted to the disk.
pub(crate) fn part_id(slot: u16, part: u32) -> u64 {
    u64::from(slot) | u64::from(part) << 16
}

/// The way back: slot, and part.
pub(crate) fn slot_and_part(id: u64) -> (u16, u32) {
    (id as u16, ((id & !SCAN) >> 16) as u32)
}

/// How many disk requests a client's request becomes.
pub(crate) fn part_count(offset: u64, length: u32) -> u32 {
    let part = u64::from(PART_BYTES);
    if length <= PART_BYTES {
        return 1;
    }
    let (first, end) = (offset / part, offset + u64::from(length));
    (end.div_ceil(part) - first) as u32
}

/// The range of one of them: the whole request if it is short, else cut at multiples of [`PART_BYTES`].
pub(crate) fn part_range(offset: u64, length: u32, part: u32) -> (u64, u32) {
    if length <= PART_BYTES {
        return (offset, length);
    }
    let size = u64::from(PART_BYTES);
    let boundary = (offset / size + u64::from(part)) * size;
    let (start, stop) = (boundary.max(offset), (boundary + size).min(offset + u64::from(length)));
    (start, (stop - start) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_cover_the_request_in_order_and_none_is_longer_than_a_part(
            offset in 0u64..1 << 44,
            length in prop_oneof![1u32..3 << 20, 1u32..=32 << 20],
        ) {
            let mut at = offset;
            for part in 0..part_count(offset, length) {
                let (start, bytes) = part_range(offset, length, part);
                prop_assert_eq!(start, at);
                prop_assert!(bytes > 0 && bytes <= PART_BYTES);
                at += u64::from(bytes);
            }
            prop_assert_eq!(at, offset + u64::from(length));
        }

        #[test]
        fn numbers_lead_back_to_slot_and_part(slot in any::<u16>(), part in 0u32..40, scan in any::<bool>()) {
            let id = part_id(slot, part) | if scan { SCAN } else { 0 };
            prop_assert_eq!(slot_and_part(id), (slot, part));
        }
    }
}
