//! Who may wait, who may stay: bounded numbers of connections, so that one client's greed is not another's outage.
//!
//! Two rooms. In the *waiting* room a connection has not named its pair yet. It never refuses a newcomer: when it is
//! full, or when the newcomer's source has all the places it may have, whoever has waited longest *of the source that
//! waits most* has to go. An honest client sends its ClientHello at once, so the oldest of the greediest is hardly ever one.
//! In the *routed* room a connection belongs to a pair; nobody is sent away from there for a newcomer, who is refused instead.
//!
//! A source is an IPv4 address or an IPv6 /64 (what one customer gets). Behind NAT or a load balancer that hides
//! addresses many clients are one source; the limits allow for that. No I/O and no clock in here.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::sync::oneshot;

use crate::limits::Limits;

/// Where a connection comes from, as far as limits go.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Source([u8; 8]);

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        let mut kept = [0; 8];
        match address.to_canonical() {
            // No global IPv6 address begins with zeroes, so the two kinds never meet.
            IpAddr::V4(v4) => kept[4..].copy_from_slice(&v4.octets()),
            IpAddr::V6(v6) => kept.copy_from_slice(&v6.octets()[..8]),
        }
        Source(kept)
    }
}

/// Why there is no place among the routed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Full {
    #[error("this gateway has all the connections it may have")]
    Gateway,
    #[error("its source has all the connections that one source may have")]
    Source,
    #[error("its pair has all the connections that one pair may have")]
    Route,
}

/// Both rooms.
pub struct Places {
    limits: Limits,
    rooms: Mutex<Rooms>,
}

#[derive(Default)]
struct Rooms {
    tickets: u64,
    /// In the order of arrival.
    waiting: BTreeMap<u64, Waiter>,
    waiting_of: HashMap<Source, usize>,
    routed: usize,
    routed_of: HashMap<Source, usize>,
    routed_to: HashMap<Arc<str>, usize>,
}

struct Waiter {
    source: Source,
    /// Dropped to send the connection away.
    _stay: oneshot::Sender<()>,
}

/// A place in the waiting room; dropping it leaves the room.
pub struct Waiting {
    places: Arc<Places>,
    ticket: u64,
    source: Source,
    /// Resolves, with an error, when this connection has to go.
    pub evicted: oneshot::Receiver<()>,
}

/// A place among the routed; dropping it leaves the room.
pub struct Routed {
    places: Arc<Places>,
    source: Source,
    route: Arc<str>,
}

impl Places {
    pub fn new(limits: Limits) -> Arc<Places> {
        Arc::new(Places { limits, rooms: Mutex::default() })
    }

    /// Connections now: waiting, routed.
    pub fn counts(&self) -> (usize, usize) {
        let rooms = self.rooms();
        (rooms.waiting.len(), rooms.routed)
    }

    /// A place for a newcomer, always. Whoever had to go for it learns so by `evicted`.
    pub fn wait(self: &Arc<Self>, source: Source) -> Waiting {
        let (stay, evicted) = oneshot::channel();
        let mut rooms = self.rooms();
        let crowded = if rooms.waiting_of.get(&source).is_some_and(|count| *count >= self.limits.hellos_per_source) {
            Some(source)
        } else if rooms.waiting.len() >= self.limits.hellos {
            rooms.greediest()
        } else {
            None
        };
        if let Some(source) = crowded {
            rooms.send_oldest_away(source);
        }
        let ticket = rooms.tickets;
        rooms.tickets += 1;
        rooms.waiting.insert(ticket, Waiter { source, _stay: stay });
        *rooms.waiting_of.entry(source).or_default() += 1;
        Waiting { places: Arc::clone(self), ticket, source, evicted }
    }

    fn rooms(&self) -> MutexGuard<'_, Rooms> {
        self.rooms.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Rooms {
    fn greediest(&self) -> Option<Source> {
        // Equal counts: any of them, but the same each time.
        self.waiting_of.iter().max_by_key(|(source, count)| (**count, **source)).map(|(source, _)| *source)
    }

    /// At most the whole waiting room is looked through, and only when it is full.
    fn send_oldest_away(&mut self, source: Source) {
        let oldest = self.waiting.iter().find(|(_, waiter)| waiter.source == source).map(|(ticket, _)| *ticket);
        if let Some(ticket) = oldest {
            self.leave(ticket);
        }
    }

    fn leave(&mut self, ticket: u64) {
        if let Some(waiter) = self.waiting.remove(&ticket) {
            decrease(&mut self.waiting_of, &waiter.source);
        }
    }
}

impl Waiting {
    /// From the waiting room to the routed, or out.
    pub fn route(self, route: Arc<str>) -> Result<Routed, Full> {
        let (places, source) = (Arc::clone(&self.places), self.source);
        drop(self);
        let mut rooms = places.rooms();
        let limits = &places.limits;
        if rooms.routed >= limits.connections {
            return Err(Full::Gateway);
        }
        if rooms.routed_of.get(&source).is_some_and(|count| *count >= limits.connections_per_source) {
            return Err(Full::Source);
        }
        if rooms.routed_to.get(&route).is_some_and(|count| *count >= limits.connections_per_route) {
            return Err(Full::Route);
        }
        rooms.routed += 1;
        *rooms.routed_of.entry(source).or_default() += 1;
        *rooms.routed_to.entry(Arc::clone(&route)).or_default() += 1;
        drop(rooms);
        Ok(Routed { places, source, route })
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.places.rooms().leave(self.ticket);
    }
}

impl Drop for Routed {
    fn drop(&mut self) {
        let mut rooms = self.places.rooms();
        rooms.routed -= 1;
        decrease(&mut rooms.routed_of, &self.source);
        decrease(&mut rooms.routed_to, &self.route);
    }
}

/// Sources and routes without connections take no memory.
fn decrease<K: Eq + std::hash::Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn source(last: u8) -> Source {
        IpAddr::from([192, 0, 2, last]).into()
    }

    fn places() -> Arc<Places> {
        Places::new(Limits {
            hellos: 6,
            hellos_per_source: 4,
            connections: 6,
            connections_per_source: 4,
            connections_per_route: 3,
        })
    }

    fn evicted(waiting: &mut Waiting) -> bool {
        matches!(waiting.evicted.try_recv(), Err(oneshot::error::TryRecvError::Closed))
    }

    #[test]
    fn a_source_that_waits_too_often_pushes_out_its_own_oldest_only() {
        let places = places();
        let mut honest = places.wait(source(1));
        let mut greedy: Vec<Waiting> = (0..10).map(|_| places.wait(source(2))).collect();
        assert!(!evicted(&mut honest));
        let gone: Vec<bool> = greedy.iter_mut().map(evicted).collect();
        assert_eq!(gone, [true, true, true, true, true, true, false, false, false, false]);
        assert_eq!(places.counts(), (5, 0));
    }

    #[test]
    fn when_the_room_is_full_the_greediest_source_makes_place() {
        let places = places();
        let mut honest = places.wait(source(1));
        let mut greedy: Vec<Waiting> = (0..4).map(|_| places.wait(source(2))).collect();
        let mut others: Vec<Waiting> = (3..6).map(|last| places.wait(source(last))).collect();
        assert!(!evicted(&mut honest) && others.iter_mut().all(|one| !evicted(one)));
        assert_eq!(greedy.iter_mut().filter_map(|one| evicted(one).then_some(())).count(), 2);
        assert_eq!(places.counts(), (6, 0));
    }

    #[test]
    fn one_who_was_sent_away_and_leaves_later_is_not_counted_twice() {
        let places = places();
        let all: Vec<Waiting> = (0..20).map(|_| places.wait(source(2))).collect();
        drop(all);
        assert_eq!(places.counts(), (0, 0));
        assert!(places.rooms().waiting_of.is_empty());
    }

    #[test]
    fn routed_connections_stay_and_newcomers_beyond_a_limit_are_refused_with_the_reason() {
        let places = places();
        let come = |last: u8, route: &str| places.wait(source(last)).route(route.into());
        let a: Vec<Routed> = (0..3).map(|_| come(1, "a").unwrap()).collect();
        assert_eq!(come(1, "a").err(), Some(Full::Route));
        let b = come(1, "b").unwrap();
        assert_eq!(come(1, "c").err(), Some(Full::Source));
        let others: Vec<Routed> = (2..4).map(|last| come(last, "c").unwrap()).collect();
        assert_eq!(come(9, "c").err(), Some(Full::Gateway));
        drop((a, b));
        assert!(come(1, "a").is_ok());
        drop(others);
        assert_eq!(places.counts(), (0, 0));
        let rooms = places.rooms();
        assert!(rooms.routed_of.is_empty() && rooms.routed_to.is_empty(), "nothing is remembered of those who left");
    }

    #[test]
    fn one_customer_of_ipv6_is_one_source_and_mapped_ipv4_is_ipv4() {
        let v6 = |text: &str| Source::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(v6("2001:db8:1:2::1"), v6("2001:db8:1:2:ffff::9"));
        assert_ne!(v6("2001:db8:1:2::1"), v6("2001:db8:1:3::1"));
        assert_eq!(v6("::ffff:192.0.2.7"), source(7));
    }
}
