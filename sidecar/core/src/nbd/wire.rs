//! The numbers of the NBD protocol ("Values" in `proto.md`) and the limits that this server puts on a client.
//!
//! Numbers on the wire are big-endian. Names follow the specification without its `NBD_` prefix.

use crate::front::Errno;

/// "NBDMAGIC", the first eight bytes of a server.
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": the newstyle marker of the server and the magic of every option of a client.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Magic of an option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of a transmission request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake and client flag, bit 0: fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake and client flag, bit 1: no 124 zeroes after EXPORT_NAME.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

pub const OPT_EXPORT_NAME: u32 = 1;
pub const OPT_ABORT: u32 = 2;
pub const OPT_LIST: u32 = 3;
pub const OPT_STARTTLS: u32 = 5;
pub const OPT_INFO: u32 = 6;
pub const OPT_GO: u32 = 7;
pub const OPT_STRUCTURED_REPLY: u32 = 8;
pub const OPT_LIST_META_CONTEXT: u32 = 9;
pub const OPT_SET_META_CONTEXT: u32 = 10;

pub const REP_ACK: u32 = 1;
pub const REP_SERVER: u32 = 2;
pub const REP_INFO: u32 = 3;
pub const REP_META_CONTEXT: u32 = 4;
pub const REP_ERR_UNSUP: u32 = (1 << 31) + 1;
pub const REP_ERR_POLICY: u32 = (1 << 31) + 2;
pub const REP_ERR_INVALID: u32 = (1 << 31) + 3;
pub const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;
pub const REP_ERR_SHUTDOWN: u32 = (1 << 31) + 7;
pub const REP_ERR_TOO_BIG: u32 = (1 << 31) + 9;

pub const INFO_EXPORT: u16 = 0;
pub const INFO_NAME: u16 = 1;
pub const INFO_BLOCK_SIZE: u16 = 3;

pub const TRANSMIT_HAS_FLAGS: u16 = 1 << 0;
pub const TRANSMIT_READ_ONLY: u16 = 1 << 1;
pub const TRANSMIT_SEND_FLUSH: u16 = 1 << 2;
pub const TRANSMIT_SEND_FUA: u16 = 1 << 3;
pub const TRANSMIT_SEND_TRIM: u16 = 1 << 5;
pub const TRANSMIT_SEND_WRITE_ZEROES: u16 = 1 << 6;
pub const TRANSMIT_SEND_DF: u16 = 1 << 7;
pub const TRANSMIT_CAN_MULTI_CONN: u16 = 1 << 8;
pub const TRANSMIT_SEND_CACHE: u16 = 1 << 10;
pub const TRANSMIT_SEND_FAST_ZERO: u16 = 1 << 11;

pub const CMD_READ: u16 = 0;
pub const CMD_WRITE: u16 = 1;
pub const CMD_DISC: u16 = 2;
pub const CMD_FLUSH: u16 = 3;
pub const CMD_TRIM: u16 = 4;
pub const CMD_CACHE: u16 = 5;
pub const CMD_WRITE_ZEROES: u16 = 6;
pub const CMD_BLOCK_STATUS: u16 = 7;

pub const CMD_FLAG_FUA: u16 = 1 << 0;
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
pub const CMD_FLAG_DF: u16 = 1 << 2;
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
pub const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;

pub const REPLY_FLAG_DONE: u16 = 1 << 0;
pub const REPLY_TYPE_NONE: u16 = 0;
pub const REPLY_TYPE_OFFSET_DATA: u16 = 1;
pub const REPLY_TYPE_OFFSET_HOLE: u16 = 2;
pub const REPLY_TYPE_BLOCK_STATUS: u16 = 5;
pub const REPLY_TYPE_ERROR: u16 = (1 << 15) + 1;

pub const STATE_HOLE: u32 = 1 << 0;
pub const STATE_ZERO: u32 = 1 << 1;

/// The one metadata context of this server.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Its id on the wire, once selected. Any number is as good; not 0, so that a client that forgot it is noticed.
pub const BASE_ALLOCATION_ID: u32 = 1;

/// Bytes of a transmission request header.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of an option header.
pub const OPTION_HEADER_BYTES: usize = 16;

/// Smallest addressable unit, in bytes: unaligned requests are accepted.
pub const BLOCK_BYTES_MIN: u32 = 1;
/// Where requests are efficient, in bytes: the page and the block of tracking.
pub const BLOCK_BYTES_PREFERRED: u32 = 4096;
/// Largest payload of one request, in bytes. "Size constraints": payloads up to 2^25 should not be refused.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Longest string, in bytes ("Conventions").
pub const STRING_BYTES_MAX: usize = 4096;
/// Longest option that is looked at, in bytes: a name of 4096, and room for thousands of queries that nobody sends.
pub const OPTION_BYTES_MAX: u32 = 32 << 10;
/// A longer option is skipped and answered with TOO_BIG up to this many bytes; beyond, the client is cut off.
pub const OPTION_SKIP_BYTES_MAX: u32 = 1 << 20;
/// Options in one handshake. `qemu-nbd --list` asks three per export; a client that exceeds this never meant to finish.
pub const OPTIONS_MAX: u32 = 4096;

/// Error value on the wire ("Error values").
pub fn errno_on_wire(errno: Errno) -> u32 {
    match errno {
        Errno::Perm => 1,
        Errno::Io => 5,
        Errno::NoMem => 12,
        Errno::Invalid => 22,
        Errno::NoSpace => 28,
        Errno::Overflow => 75,
        Errno::NotSupported => 95,
        Errno::ShuttingDown => 108,
    }
}

/// Transmission flags of an export ("Transmission flags"). CAN_MULTI_CONN is true by construction: all connections of
/// an export end at one disk, and a flush on any of them covers what was acknowledged on all of them.
pub fn transmission_flags(read_only: bool, structured: bool) -> u16 {
    let mut flags =
        TRANSMIT_HAS_FLAGS | TRANSMIT_SEND_FLUSH | TRANSMIT_SEND_FUA | TRANSMIT_CAN_MULTI_CONN | TRANSMIT_SEND_CACHE;
    if read_only {
        flags |= TRANSMIT_READ_ONLY;
    } else {
        flags |= TRANSMIT_SEND_TRIM | TRANSMIT_SEND_WRITE_ZEROES | TRANSMIT_SEND_FAST_ZERO;
    }
    if structured {
        flags |= TRANSMIT_SEND_DF;
    }
    flags
}

/// Big-endian `u16` at `at`, `None` past the end.
pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk::<2>()?))
}

/// Big-endian `u32` at `at`, `None` past the end.
pub(crate) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk::<4>()?))
}

/// Big-endian `u64` at `at`, `None` past the end.
pub(crate) fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk::<8>()?))
}
