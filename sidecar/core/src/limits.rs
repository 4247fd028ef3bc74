//! Every bound of the data plane in one place, each with its unit and its reason.

/// Largest content of one frame, in bytes: large enough that per-frame cost vanishes, small enough that a cut link
/// loses little (targets F8) and that a slow link still acknowledges often.
pub const FRAME_BYTES_MAX: u64 = 1 << 20;
/// Most extents in one frame: 256 single blocks fill a frame of 1 MiB.
pub const FRAME_EXTENTS_MAX: usize = 256;
/// Most disks of one VM: as many as fit a `u8`-sized admission barrier and more than KubeVirt users attach.
pub const DISKS_MAX: usize = 64;
/// Largest disk in bytes (16 TiB): bounds the dirty map and every decoded offset.
pub const DISK_BYTES_MAX: u64 = 16 << 40;
/// Most guest writes between admission and completion, all disks together. Above the sum of what front ends admit
/// (QEMU: 16 per NBD connection); a writer that finds no slot spins, so this is a backstop and not a queue.
pub const WRITES_IN_FLIGHT_MAX: usize = 512;
/// Smallest send window in bytes: keeps a slow or unmeasured link busy.
pub const WINDOW_BYTES_MIN: u64 = 1 << 20;
/// Largest send window in bytes: two bandwidth-delay products of 1 Gbit/s at 250 ms; also what unacknowledged frames may
/// cost in memory.
pub const WINDOW_BYTES_MAX: u64 = 64 << 20;
/// Added to the measured acknowledgement delay when the window is computed: the target syncs in groups.
pub const ACK_SLACK_MILLIS: f64 = 100.0;
/// Deliveries of this long ago still count for the rate, in milliseconds.
pub const RATE_WINDOW_MILLIS: u64 = 3000;
/// A rate needs at least this much time to mean anything, in milliseconds.
pub const RATE_SAMPLE_MILLIS_MIN: u64 = 200;
/// What a frame costs on the wire beside its payload, in bytes (header, protobuf, HTTP/2, TLS record).
pub const FRAME_OVERHEAD_BYTES: u64 = 160;
/// Longest read that one side serves for the other's attached guest, in bytes: QEMU's NBD client splits at 32 MiB, our
/// front end at 1 MiB.
pub const REMOTE_READ_BYTES_MAX: u64 = 4 << 20;
/// Shortest time between two cuts while converging, in milliseconds: a generation costs the target a few syncs, and a
/// handover waits for all of them to be applied.
pub const CONVERGING_PAUSE_MILLIS: u64 = 100;
/// Time between two cuts while the target's QEMU is attached and everything is staged at once, in milliseconds: what was
/// staged since the last one is what the target still has to apply after the seal.
pub const STAGING_CUT_MILLIS: u64 = 2000;
