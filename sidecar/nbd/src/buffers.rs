//! Payload buffers of one connection, used again and again.
//!
//! Invariants: sizes are powers of two from 4 KiB to a part, and that size is what a buffer is accounted with, so that
//! the connection's byte limit bounds real memory; what is kept for reuse is bounded by the same limit and given back
//! when the connection idles.

use crate::limits::PART_BYTES;

/// Smallest buffer, in bytes, as a power of two.
const SMALLEST_LOG2: u32 = 12;
/// One list per power of two.
const CLASSES: usize = (PART_BYTES.ilog2() - SMALLEST_LOG2 + 1) as usize;

pub(crate) struct Buffers {
    free: [Vec<Vec<u8>>; CLASSES],
    kept_bytes: usize,
    kept_bytes_max: usize,
}

impl Buffers {
    pub fn new(kept_bytes_max: usize) -> Self {
        Buffers { free: [const { Vec::new() }; CLASSES], kept_bytes: 0, kept_bytes_max }
    }

    /// What a payload of `length` (at most a part) is accounted with, in bytes.
    pub fn accounted(length: u32) -> usize {
        if length == 0 { 0 } else { 1 << class(length as usize).1 }
    }

    /// A buffer of exactly `length` bytes (at most a part); its content is unspecified.
    pub fn take(&mut self, length: u32) -> Vec<u8> {
        let length = length as usize;
        if length == 0 {
            return Vec::new();
        }
        let (class, log2) = class(length);
        let mut buffer = match self.free[class].pop() {
            Some(buffer) => {
                self.kept_bytes -= 1 << log2;
                buffer
            }
            None => vec![0; 1 << log2],
        };
        // Same length as last time, which is the steady state: neither line does anything.
        buffer.truncate(length);
        buffer.resize(length, 0);
        buffer
    }

    /// Take a buffer back. One that does not look like ours is dropped.
    pub fn give(&mut self, buffer: Vec<u8>) {
        let capacity = buffer.capacity();
        if !capacity.is_power_of_two() || capacity > PART_BYTES as usize || capacity < 1 << SMALLEST_LOG2 {
            return;
        }
        if self.kept_bytes + capacity <= self.kept_bytes_max {
            self.kept_bytes += capacity;
            self.free[class(capacity).0].push(buffer);
        }
    }

    /// Give everything back to the system.
    pub fn trim(&mut self) {
        self.free = [const { Vec::new() }; CLASSES];
        self.kept_bytes = 0;
    }
}

/// Index of the list, and the logarithm of the size, for a length above 0.
fn class(length: usize) -> (usize, u32) {
    let log2 = length.next_power_of_two().ilog2().max(SMALLEST_LOG2);
    ((log2 - SMALLEST_LOG2) as usize, log2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_for_the_same_length_and_what_is_kept_is_bounded() {
        let mut buffers = Buffers::new(64 << 10);
        let first = buffers.take(4096);
        let address = first.as_ptr();
        buffers.give(first);
        let again = buffers.take(4096);
        assert_eq!((again.as_ptr(), again.len()), (address, 4096));
        for _ in 0..100 {
            buffers.give(vec![1; 32 << 10]);
        }
        assert_eq!(buffers.kept_bytes, 64 << 10);
        buffers.trim();
        assert_eq!(buffers.kept_bytes, 0);
    }

    #[test]
    fn every_length_up_to_a_part_is_accounted_with_what_it_occupies() {
        let mut buffers = Buffers::new(0);
        for length in [1, 511, 4096, 4097, 65536, 65537, PART_BYTES - 1, PART_BYTES] {
            let buffer = buffers.take(length);
            assert_eq!(buffer.len(), length as usize);
            assert_eq!(buffer.capacity(), Buffers::accounted(length));
        }
        assert_eq!(Buffers::accounted(0), 0);
    }
}
