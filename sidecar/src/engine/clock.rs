//! Wall clock and random bits: what the pure core must not have.

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970; 0 before.
pub fn unix_millis() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// 128 random bits.
pub fn random_id() -> [u8; 16] {
    let mut id = [0; 16];
    let mut filled = 0;
    while filled < id.len() {
        match rustix::rand::getrandom(&mut id[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            // Without random bits two activations could not be told apart: better not to run at all.
            Err(error) => panic!("the kernel has no random bits: {error}"),
        }
    }
    id
}

/// 64 random bits, never 0.
pub fn random_u64() -> u64 {
    let id = random_id();
    u64::from_le_bytes(std::array::from_fn(|i| id[i])).max(1)
}
