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
