//! Memory that changes at a given rate, so that a live migration of memory has as much to do as with a real load.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The area that changes. Larger than what a thin link moves in a second, small beside the smallest guest.
const AREA_BYTES: usize = 32 << 20;
const PAGE_BYTES: usize = 4096;
/// Pages are touched in steps of this length.
const STEP: Duration = Duration::from_millis(10);

/// The thread that touches memory, and its rate.
pub struct Churn(Arc<AtomicU64>);

impl Churn {
    /// Bytes per second; 0 touches nothing and costs no memory.
    pub fn start(bytes_per_second: u64) -> Churn {
        let rate = Arc::new(AtomicU64::new(bytes_per_second));
        let shared = Arc::clone(&rate);
        std::thread::Builder::new()
            .name("churn".into())
            .spawn(move || run(&shared))
            .expect("a booted guest has memory for one more thread");
        Churn(rate)
    }

    pub fn set_rate(&self, bytes_per_second: u64) {
        self.0.store(bytes_per_second, Ordering::Relaxed);
    }
}

fn run(rate: &AtomicU64) {
    let mut area = Vec::new();
    let (mut page, mut debt) = (0, 0.0);
    loop {
        std::thread::sleep(STEP);
        let rate = rate.load(Ordering::Relaxed);
        if rate == 0 {
            continue;
        }
        area.resize(AREA_BYTES, 0u8);
        debt += rate as f64 * STEP.as_secs_f64() / PAGE_BYTES as f64;
        while debt >= 1.0 {
            debt -= 1.0;
            area[page] = area[page].wrapping_add(1);
            page = (page + PAGE_BYTES) % AREA_BYTES;
        }
        black_box(&area);
    }
}
