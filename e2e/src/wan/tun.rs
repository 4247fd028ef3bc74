//! A TUN device inside a network namespace, read and written from outside it.
//!
//! Frames carry a virtio-net header, so that the kernel may hand over packets without a checksum and, where pacing allows
//! it, up to 64 KiB of a TCP stream as one frame. The header goes to the other device unchanged.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::Error;
use super::link::Packet;
use crate::netns;

/// Bytes of `struct virtio_net_hdr` (linux/virtio_net.h), the TUN default.
const VNET_HEADER_BYTES: usize = 10;
/// Largest frame: header and the largest IP packet.
pub const FRAME_BYTES_MAX: usize = VNET_HEADER_BYTES + 65_536;
/// Packets that the kernel keeps for us while we sleep: 1 Gbit/s of 1500-byte packets for 50 ms.
const KERNEL_QUEUE_PACKETS: u32 = 4096;

// linux/if_tun.h; libc has the flags but not the requests.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETCARRIER: libc::c_ulong = 0x4004_54e2;
const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;

/// One end of the emulated link.
pub struct Tun {
    file: File,
}

impl Tun {
    /// Makes device `name` in the namespace, with an address (`10.0.0.1/30`), up.
    pub fn create(netns_path: &Path, name: &str, address: &str, mtu: u32) -> Result<Tun, Error> {
        let (mtu, queue) = (mtu.to_string(), KERNEL_QUEUE_PACKETS.to_string());
        netns::enter(netns_path, || {
            let tun = Tun::open(name).map_err(Error::Tun)?;
            // The command inherits this thread's namespace, which need not have a name.
            netns::ip(&["address", "add", address, "dev", name])?;
            netns::ip(&["link", "set", name, "mtu", &mtu, "txqueuelen", &queue, "up"])?;
            Ok(tun)
        })?
    }

    /// Opens the device in the calling thread's namespace.
    fn open(name: &str) -> io::Result<Tun> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        // SAFETY: ifreq is plain data for which zeroes are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()).take(libc::IFNAMSIZ - 1) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq that lives across the call.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &mut request) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Tun { file })
    }

    /// May the kernel hand over many TCP segments as one frame?
    pub fn set_segmentation(&self, on: bool) -> io::Result<()> {
        let flags = TUN_F_CSUM | if on { TUN_F_TSO4 | TUN_F_TSO6 } else { 0 };
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, flags) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Plugs the cable in or out, as the namespace sees it.
    pub fn set_carrier(&self, on: bool) -> io::Result<()> {
        let on = libc::c_int::from(on);
        // SAFETY: TUNSETCARRIER reads one int that lives across the call.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETCARRIER, &on) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    pub fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The next frame, or `None` when there is none now. `buffer` has [`FRAME_BYTES_MAX`] bytes.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Option<Packet>> {
        match io::Read::read(&mut &self.file, buffer) {
            Ok(count) if count > VNET_HEADER_BYTES => Ok(Some(count_packets(&buffer[..count]))),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Hands a frame to the namespace.
    pub fn write(&self, frame: &[u8]) -> io::Result<()> {
        io::Write::write(&mut &self.file, frame).map(drop)
    }
}

/// How many IP packets, and bytes on a wire, a frame stands for.
fn count_packets(frame: &[u8]) -> Packet {
    let half = |at: usize| u64::from(u16::from_le_bytes([frame[at], frame[at + 1]]));
    let total = (frame.len() - VNET_HEADER_BYTES) as u64;
    let (kind, headers, segment) = (frame[1], half(2), half(4));
    let (packets, bytes) = match kind {
        0 => (1, total),
        // Each segment repeats the headers.
        _ if segment > 0 && headers < total => {
            let segments = (total - headers).div_ceil(segment);
            (segments, total + (segments - 1) * headers)
        }
        _ => (1, total),
    };
    Packet { frame: frame.to_vec(), packets, bytes }
}
