//! Every bound of the gateway, in one place. Nothing a client sends is kept without one of these.
//!
//! Memory in the worst case: [`HELLOS_MAX`] × about 2 × [`HELLO_BYTES_MAX`] for those that have not named their pair yet (64 MiB), and
//! [`CONNECTIONS_MAX`] × 2 × [`relay::BUFFER_BYTES`](crate::relay::BUFFER_BYTES) for connections of which both ends have stopped reading (256 MiB). An
//! idle connection holds no buffer.

use std::time::Duration;

/// Largest ClientHello in bytes, framing included: one TLS record. Ours has under 2 KiB, a post-quantum key share included.
pub const HELLO_BYTES_MAX: usize = 16 << 10;
/// From the accepted connection to a whole ClientHello. As long as a sidecar waits for the whole handshake, so that no
/// link that could have worked is cut off here.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// To connect to the Service behind a route: inside one cluster this takes milliseconds or does not happen.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one direction may go on alone after the other has ended. HTTP/2, which the sidecars speak, needs none of it.
pub const HALF_CLOSED_MAX: Duration = Duration::from_secs(60);

/// Connections at once that have not named their pair. A hundred pairs that come back together after a cut need 500.
pub const HELLOS_MAX: usize = 2048;
/// Of one source among them. A whole peer cluster may come from one address (NAT), so this is not small.
pub const HELLOS_PER_SOURCE_MAX: usize = 1024;
/// Connections at once that are routed: 200 pairs with every data stream that a configuration may ask for.
pub const CONNECTIONS_MAX: usize = 4096;
/// Of one source among them; the rest is left to other peers.
pub const CONNECTIONS_PER_SOURCE_MAX: usize = 3072;
/// To one pair: its control stream, 16 data streams, and the same again while a cut link's old connections time out.
pub const CONNECTIONS_PER_ROUTE_MAX: usize = 48;

/// Descriptors that are not connections: listeners, the runtime's own, the routes file, the metrics server's clients.
const DESCRIPTORS_APART: u64 = 128;

/// The limits on numbers of connections; [`Limits::default`] takes the constants above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub hellos: usize,
    pub hellos_per_source: usize,
    pub connections: usize,
    pub connections_per_source: usize,
    pub connections_per_route: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            hellos: HELLOS_MAX,
            hellos_per_source: HELLOS_PER_SOURCE_MAX,
            connections: CONNECTIONS_MAX,
            connections_per_source: CONNECTIONS_PER_SOURCE_MAX,
            connections_per_route: CONNECTIONS_PER_ROUTE_MAX,
        }
    }
}

impl Limits {
    /// Descriptors that these limits may need: a routed connection has two.
    pub fn descriptors(&self) -> u64 {
        (self.hellos + 2 * self.connections) as u64 + DESCRIPTORS_APART
    }

    /// The same shape made small enough for `available` descriptors, and unchanged if they suffice. At least one
    /// connection of each kind stays.
    pub fn fit(self, available: u64) -> Limits {
        let (needed, room) = (self.descriptors() - DESCRIPTORS_APART, available.saturating_sub(DESCRIPTORS_APART));
        if room >= needed {
            return self;
        }
        let scale = |count: usize| ((count as u64 * room / needed.max(1)) as usize).max(1);
        Limits {
            hellos: scale(self.hellos),
            hellos_per_source: scale(self.hellos_per_source),
            connections: scale(self.connections),
            connections_per_source: scale(self.connections_per_source),
            connections_per_route: self.connections_per_route.min(scale(self.connections)),
        }
    }
}

/// Raises the number of descriptors that this process may open to what the system allows, and returns it.
pub fn raise_descriptors() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let found = getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: found.maximum, maximum: found.maximum };
    match setrlimit(Resource::Nofile, wanted) {
        Ok(()) => found.maximum.unwrap_or(u64::MAX),
        Err(_) => found.current.unwrap_or(u64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_scaled_to_the_descriptors_that_there_are() {
        let limits = Limits::default();
        assert_eq!(limits.fit(limits.descriptors()), limits);
        let small = limits.fit(1024);
        assert!(small.descriptors() <= 1024, "{small:?}");
        assert!(
            small.connections_per_source < small.connections && small.hellos_per_source < small.hellos,
            "{small:?}"
        );
        let tiny = limits.fit(0);
        assert_eq!((tiny.hellos, tiny.connections, tiny.connections_per_route), (1, 1, 1));
    }
}
