//! The engine: the pure core of `watari-core` joined to disks, sockets, clocks and the stream.

pub mod steering;
