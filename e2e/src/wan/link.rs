//! One direction of the emulated link, as pure arithmetic over a clock that is passed in.
//!
//! ```text
//! offer ─▶ cut? ─▶ lost? ─▶ queue (bytes bounded) ─▶ serialised at the rate ─▶ in flight for delay ± jitter ─▶ deliver
//! ```
//!
//! Times are exact: a packet leaves the queue when its last bit would, whatever the instant at which anyone looks. So the
//! rate does not depend on how punctually the forwarding thread wakes up; only the moment of delivery does.
//! Order is kept unless `reorder` is set (then jitter may let packets overtake each other, as netem does).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Nanoseconds on a monotonic clock.
pub type Nanos = u64;

/// How one direction behaves. May change at any time; what is already under way keeps the delay it was given.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// Bits per second of whole IP packets; `None` is as fast as the machine forwards.
    pub rate: Option<u64>,
    /// One-way delay.
    pub delay: Duration,
    /// Each packet's delay is drawn evenly from `delay ± jitter`.
    pub jitter: Duration,
    /// Share of packets lost, 0 to 1, independent of each other.
    pub loss: f64,
    /// Bytes that may wait for a busy link; more are dropped at the tail.
    pub queue_bytes: u64,
    /// Let jitter change the order of packets.
    pub reorder: bool,
    /// The link is cut: nothing is accepted, and what was under way is lost.
    pub cut: bool,
}

impl Default for Shape {
    fn default() -> Shape {
        Shape {
            rate: None,
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
            queue_bytes: 1 << 20,
            reorder: false,
            cut: false,
        }
    }
}

impl Shape {
    /// A link of `rate` bits per second and half of `rtt` per direction, with a queue of 100 ms (at least 64 KiB), as
    /// access routers have.
    pub fn wan(rate: u64, rtt: Duration) -> Shape {
        Shape { rate: Some(rate), delay: rtt / 2, queue_bytes: (rate / 8 / 10).max(64 << 10), ..Shape::default() }
    }
}

/// What happened to packets so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counters {
    /// Packets and bytes (of IP) that were offered.
    pub offered_packets: u64,
    pub offered_bytes: u64,
    /// Packets and bytes that came out at the other end.
    pub delivered_packets: u64,
    pub delivered_bytes: u64,
    /// Packets dropped by chance, by the full queue, by the cut link, by a closed device at the far end.
    pub lost_packets: u64,
    pub overflow_packets: u64,
    pub cut_packets: u64,
    pub undeliverable_packets: u64,
}

/// A packet as it came from one device and will go to the other.
pub struct Packet {
    pub frame: Vec<u8>,
    /// IP packets that the frame stands for (more than one with segmentation offload), and their bytes on a wire.
    pub packets: u64,
    pub bytes: u64,
}

struct Flying {
    due: Nanos,
    /// Breaks ties, so that equal times keep their order.
    order: u64,
    packet: Packet,
}

impl PartialEq for Flying {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Flying {}
impl PartialOrd for Flying {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Flying {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.order).cmp(&(other.due, other.order))
    }
}

/// One direction.
pub struct Link {
    shape: Shape,
    waiting: VecDeque<Packet>,
    waiting_bytes: u64,
    /// When the head of `waiting` has been put on the wire completely.
    head_done: Nanos,
    /// When the wire became free after the last packet.
    free_at: Nanos,
    flying: BinaryHeap<Reverse<Flying>>,
    order: u64,
    last_due: Nanos,
    random: u64,
    counters: Counters,
}

impl Link {
    /// `seed` makes loss and jitter repeatable.
    pub fn new(shape: Shape, seed: u64) -> Link {
        Link {
            shape,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            head_done: 0,
            free_at: 0,
            flying: BinaryHeap::new(),
            order: 0,
            last_due: 0,
            random: seed | 1,
            counters: Counters::default(),
        }
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Changes the behaviour from `now` on.
    pub fn set_shape(&mut self, shape: Shape, now: Nanos) {
        self.advance(now);
        self.shape = shape;
        if let Some(head) = self.waiting.front() {
            self.head_done = now + self.wire_time(head.bytes);
        }
        if shape.cut {
            let gone = self.waiting.drain(..).chain(self.flying.drain().map(|Reverse(flying)| flying.packet));
            self.counters.cut_packets += gone.map(|packet| packet.packets).sum::<u64>();
            self.waiting_bytes = 0;
        }
    }

    /// A packet arrives at the near end.
    pub fn offer(&mut self, packet: Packet, now: Nanos) {
        self.advance(now);
        self.counters.offered_packets += packet.packets;
        self.counters.offered_bytes += packet.bytes;
        if self.shape.cut {
            self.counters.cut_packets += packet.packets;
        } else if self.shape.loss > 0.0 && self.uniform() < self.shape.loss {
            self.counters.lost_packets += packet.packets;
        } else if self.shape.rate.is_none() && self.waiting.is_empty() {
            self.launch(packet, now);
        } else if self.waiting_bytes + packet.bytes > self.shape.queue_bytes && !self.waiting.is_empty() {
            self.counters.overflow_packets += packet.packets;
        } else {
            if self.waiting.is_empty() {
                self.head_done = now.max(self.free_at) + self.wire_time(packet.bytes);
            }
            self.waiting_bytes += packet.bytes;
            self.waiting.push_back(packet);
        }
    }

    /// The next packet that has arrived at the far end by `now`, if any.
    pub fn deliver(&mut self, now: Nanos) -> Option<Packet> {
        self.advance(now);
        if self.flying.peek().is_none_or(|Reverse(first)| first.due > now) {
            return None;
        }
        let packet = self.flying.pop().map(|Reverse(first)| first.packet)?;
        self.counters.delivered_packets += packet.packets;
        self.counters.delivered_bytes += packet.bytes;
        Some(packet)
    }

    /// A delivered packet could not be handed to the far device.
    pub fn undeliverable(&mut self, packet: &Packet) {
        self.counters.delivered_packets -= packet.packets;
        self.counters.delivered_bytes -= packet.bytes;
        self.counters.undeliverable_packets += packet.packets;
    }

    /// When something will happen next, if nothing arrives until then.
    pub fn next_event(&self) -> Option<Nanos> {
        let arrival = self.flying.peek().map(|Reverse(first)| first.due);
        let departure = (!self.waiting.is_empty()).then_some(self.head_done);
        arrival.into_iter().chain(departure).min()
    }

    /// Moves everything whose last bit is on the wire by `now` from the queue into flight.
    fn advance(&mut self, now: Nanos) {
        while !self.waiting.is_empty() && self.head_done <= now {
            let packet = self.waiting.pop_front().expect("not empty");
            self.waiting_bytes -= packet.bytes;
            let departed = self.head_done;
            self.free_at = departed;
            if let Some(head) = self.waiting.front() {
                self.head_done = departed + self.wire_time(head.bytes);
            }
            self.launch(packet, departed);
        }
    }

    fn launch(&mut self, packet: Packet, departed: Nanos) {
        let (delay, jitter) = (self.shape.delay.as_nanos() as u64, self.shape.jitter.as_nanos() as u64);
        let mut due = departed + delay;
        if jitter > 0 {
            let swing = (self.uniform() * 2.0 * jitter as f64) as u64;
            due = (due + swing).saturating_sub(jitter).max(departed);
        }
        if !self.shape.reorder {
            due = due.max(self.last_due);
        }
        self.last_due = due;
        self.order += 1;
        self.flying.push(Reverse(Flying { due, order: self.order, packet }));
    }

    fn wire_time(&self, bytes: u64) -> Nanos {
        self.shape.rate.map_or(0, |rate| (bytes * 8).saturating_mul(1_000_000_000) / rate.max(1))
    }

    /// Evenly from 0 to 1 (xorshift64*).
    fn uniform(&mut self) -> f64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn packet(number: u32, bytes: u64) -> Packet {
        Packet { frame: number.to_le_bytes().to_vec(), packets: 1, bytes }
    }

    fn deliver_all(link: &mut Link, now: Nanos) -> Vec<u32> {
        std::iter::from_fn(|| link.deliver(now))
            .map(|p| u32::from_le_bytes(p.frame.try_into().expect("four bytes")))
            .collect()
    }

    #[test]
    fn a_packet_takes_its_wire_time_plus_the_delay_whenever_one_looks() {
        let mut link = Link::new(Shape::wan(8_000_000, Duration::from_millis(100)), 1);
        link.offer(packet(1, 1000), 0); // 1 ms on the wire
        link.offer(packet(2, 1000), 0);
        assert!(deliver_all(&mut link, 51 * MS - 1).is_empty());
        assert_eq!(deliver_all(&mut link, 51 * MS), [1]);
        assert_eq!(link.next_event(), Some(52 * MS));
        assert_eq!(deliver_all(&mut link, 500 * MS), [2]);
    }

    #[test]
    fn the_queue_holds_its_bytes_and_drops_the_rest_at_the_tail() {
        let mut link = Link::new(Shape { rate: Some(8_000_000), queue_bytes: 3000, ..Shape::default() }, 1);
        (0..5).for_each(|number| link.offer(packet(number, 1000), 0));
        assert_eq!(deliver_all(&mut link, 100 * MS), [0, 1, 2]);
        assert_eq!(link.counters().overflow_packets, 2);
    }

    #[test]
    fn loss_is_as_often_as_asked_and_repeatable() {
        let lost = |seed| {
            let mut link = Link::new(Shape { loss: 0.03, ..Shape::default() }, seed);
            (0..100_000).for_each(|number| link.offer(packet(number, 100), 0));
            link.counters().lost_packets
        };
        assert!((2800..3200).contains(&lost(7)), "{}", lost(7));
        assert_eq!(lost(7), lost(7));
    }

    #[test]
    fn order_is_kept_under_jitter_unless_reordering_is_asked_for() {
        for reorder in [false, true] {
            let shape = Shape {
                delay: Duration::from_millis(20),
                jitter: Duration::from_millis(10),
                reorder,
                ..Shape::default()
            };
            let mut link = Link::new(shape, 3);
            (0..1000).for_each(|number| link.offer(packet(number, 100), u64::from(number) * 1000));
            let arrived = deliver_all(&mut link, 1000 * MS);
            assert_eq!(arrived.len(), 1000);
            assert_eq!(arrived.is_sorted(), !reorder);
        }
    }

    #[test]
    fn a_cut_loses_what_is_under_way_and_a_restored_link_works_again() {
        let shape = Shape::wan(8_000_000, Duration::from_millis(100));
        let mut link = Link::new(shape, 1);
        (0..10).for_each(|number| link.offer(packet(number, 1000), 0));
        link.set_shape(Shape { cut: true, ..shape }, 5 * MS);
        link.offer(packet(10, 1000), 6 * MS);
        assert!(deliver_all(&mut link, 900 * MS).is_empty());
        assert_eq!(link.counters().cut_packets, 11);
        link.set_shape(shape, 1000 * MS);
        link.offer(packet(11, 1000), 1000 * MS);
        assert_eq!(deliver_all(&mut link, 1051 * MS), [11]);
    }

    #[test]
    fn a_changed_rate_applies_to_what_still_waits() {
        let slow = Shape { rate: Some(8_000), ..Shape::default() };
        let mut link = Link::new(slow, 1);
        (0..3).for_each(|number| link.offer(packet(number, 1000), 0)); // one second each
        link.set_shape(Shape { rate: Some(8_000_000), ..slow }, 10 * MS);
        assert_eq!(deliver_all(&mut link, 13 * MS), [0, 1, 2]);
    }
}
