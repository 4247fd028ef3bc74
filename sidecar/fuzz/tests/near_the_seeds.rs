//! A short run of every target on stable Rust: its seeds, everything cut short, and seeded mutations of them. A panic is a
//! failure, and so is an allocation beyond a bound that no honest input needs.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use watari_fuzz::{TARGETS, seeds};

/// More than this at once is an allocation by an unchecked length: the largest honest one is a frame of 1 MiB, with room for
/// a table of extents beside it.
const ALLOCATION_BYTES_MAX: usize = 64 << 20;
const MUTATIONS: u32 = 20_000;

struct Watched;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Relaxed);
        // SAFETY: the caller's promises are those that `System` needs.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// xorshift64*: the same inputs each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n.max(1)
    }
}

fn mutate(dice: &mut Dice, seed: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=dice.below(4) {
        let at = dice.below(bytes.len());
        match dice.below(7) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << dice.below(8),
            1 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][dice.below(5)],
            2 => bytes.truncate(at),
            3 => drop(bytes.splice(at..at, other.iter().copied().take(dice.below(64)))),
            // A length field in either byte order, made as large as it goes.
            4 if at + 4 <= bytes.len() => bytes[at..at + 4].copy_from_slice(&[0xff; 4]),
            5 if at + 8 <= bytes.len() => bytes[at..at + 8].copy_from_slice(&[0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0]),
            _ => {
                let end = (at + dice.below(40)).min(bytes.len());
                drop(bytes.drain(at..end));
            }
        }
    }
    bytes
}

#[test]
fn no_decoder_panics_or_allocates_without_measure_near_its_seeds() {
    for target in TARGETS {
        let seeds = seeds(target.name);
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
        let mut inputs = 0u32;
        let mut feed = |bytes: &[u8]| {
            LARGEST.store(0, Relaxed);
            (target.feed)(bytes);
            let largest = LARGEST.load(Relaxed);
            assert!(
                largest <= ALLOCATION_BYTES_MAX,
                "{}: {largest} bytes at once for {} bytes",
                target.name,
                bytes.len()
            );
            inputs += 1;
        };
        for seed in &seeds {
            let step = (seed.len() / 500).max(1);
            (0..=seed.len()).step_by(step).for_each(|end| feed(&seed[..end]));
        }
        for _ in 0..MUTATIONS {
            let (one, other) = (dice.below(seeds.len()), dice.below(seeds.len()));
            let bytes = mutate(&mut dice, &seeds[one], &seeds[other]);
            feed(&bytes);
        }
        println!("{:13} {inputs} inputs", target.name);
    }
}
