//! One transmission request: decoded, then judged ("Request message", "Command flags", "Error values").
//!
//! A [`RequestHeader`] is what the client said, unverified. [`RequestHeader::verify`] turns it into a [`Verdict`]: run
//! it, refuse it with the error that the specification names, say goodbye, or cut the connection because the stream
//! cannot be followed any further. No arithmetic happens on its fields before that.

use super::wire::*;
use crate::front::Errno;

/// A request as received; nothing in it has been checked but the magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    pub flags: u16,
    pub kind: u16,
    /// Opaque; goes back in every reply to this request.
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
}

/// What a connection agreed on, as far as requests are judged by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    pub size_bytes: u64,
    pub read_only: bool,
    pub structured: bool,
    pub base_allocation: bool,
    /// Longest READ with DF that is answered in one piece, in bytes; at least 65536 ("NBD_CMD_READ").
    pub unfragmented_bytes_max: u32,
}

/// A request that may run. Its range lies within the export and its length is not zero, except for Flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Read {
        /// Answer with one content chunk.
        unfragmented: bool,
    },
    /// Its `length` bytes of payload follow the header.
    Write {
        fua: bool,
    },
    Flush,
    Trim {
        fua: bool,
    },
    Cache,
    WriteZeroes {
        fua: bool,
        no_hole: bool,
        /// Fail with NotSupported rather than be as slow as writing.
        fast: bool,
    },
    BlockStatus {
        /// At most one extent, not longer than asked.
        one: bool,
    },
}

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Run(Command),
    /// Nothing to do, and that is a success (a request of length zero: unspecified, must not disconnect).
    Done,
    /// Discard `skip_bytes` of payload, then answer with the error and its text.
    Refuse {
        errno: Errno,
        why: &'static str,
        skip_bytes: u32,
    },
    /// DISC: answer what is outstanding, then close.
    Goodbye,
    /// A payload beyond any limit: close, there is nothing to wait for.
    Cut,
}

impl RequestHeader {
    /// `None` if the magic is wrong: the stream is out of step and can only be closed.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<RequestHeader> {
        if be32(bytes, 0)? != REQUEST_MAGIC {
            return None;
        }
        Some(RequestHeader {
            flags: be16(bytes, 4)?,
            kind: be16(bytes, 6)?,
            cookie: be64(bytes, 8)?,
            offset: be64(bytes, 16)?,
            length: be32(bytes, 24)?,
        })
    }

    /// Judge the request. Total: every combination of fields has a verdict.
    pub fn verify(&self, session: &Session) -> Verdict {
        let skip_bytes = match self.kind {
            CMD_WRITE if self.length > PAYLOAD_BYTES_MAX => return Verdict::Cut,
            CMD_WRITE => self.length,
            CMD_DISC => return Verdict::Goodbye,
            _ => 0,
        };
        match self.judge(session) {
            Ok(command) if self.length == 0 && !matches!(command, Command::Flush) => Verdict::Done,
            Ok(command) => Verdict::Run(command),
            Err((errno, why)) => Verdict::Refuse { errno, why, skip_bytes },
        }
    }

    fn judge(&self, session: &Session) -> Result<Command, (Errno, &'static str)> {
        let has = |flag: u16| self.flags & flag != 0;
        let fua = has(CMD_FLAG_FUA);
        let (command, allowed) = match self.kind {
            CMD_READ if session.structured => (Command::Read { unfragmented: has(CMD_FLAG_DF) }, CMD_FLAG_DF),
            CMD_READ => (Command::Read { unfragmented: true }, 0),
            CMD_WRITE => (Command::Write { fua }, 0),
            CMD_FLUSH => (Command::Flush, 0),
            CMD_TRIM => (Command::Trim { fua }, 0),
            CMD_CACHE => (Command::Cache, 0),
            CMD_WRITE_ZEROES => {
                let (no_hole, fast) = (has(CMD_FLAG_NO_HOLE), has(CMD_FLAG_FAST_ZERO));
                (Command::WriteZeroes { fua, no_hole, fast }, CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO)
            }
            CMD_BLOCK_STATUS => (Command::BlockStatus { one: has(CMD_FLAG_REQ_ONE) }, CMD_FLAG_REQ_ONE),
            _ => return Err((Errno::Invalid, "unknown command")),
        };
        // FUA is valid on every command, where it means nothing it is ignored.
        if self.flags & !(allowed | CMD_FLAG_FUA) != 0 {
            return Err((Errno::Invalid, "unknown command flag"));
        }
        match command {
            Command::Flush => {
                if self.offset != 0 || self.length != 0 {
                    return Err((Errno::Invalid, "a flush has no range"));
                }
                return Ok(command);
            }
            Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes { .. } if session.read_only => {
                return Err((Errno::Perm, "the export is read-only"));
            }
            Command::BlockStatus { .. } if !session.base_allocation => {
                return Err((Errno::Invalid, "no metadata context was negotiated"));
            }
            // An answer without an extent does not exist.
            Command::BlockStatus { .. } if self.length == 0 => {
                return Err((Errno::Invalid, "block status of an empty range"));
            }
            Command::Read { unfragmented } if self.length > PAYLOAD_BYTES_MAX => {
                let errno = if session.structured || !unfragmented { Errno::Overflow } else { Errno::Invalid };
                return Err((errno, "longer than the maximum payload"));
            }
            Command::Read { unfragmented: true }
                if session.structured && self.length > session.unfragmented_bytes_max =>
            {
                return Err((Errno::Overflow, "too long to answer unfragmented"));
            }
            Command::Read { .. }
            | Command::Write { .. }
            | Command::Trim { .. }
            | Command::Cache
            | Command::WriteZeroes { .. }
            | Command::BlockStatus { .. } => {}
        }
        let inside = self.offset.checked_add(u64::from(self.length)).is_some_and(|end| end <= session.size_bytes);
        if !inside {
            let writes = matches!(command, Command::Write { .. } | Command::WriteZeroes { .. });
            let errno = if writes { Errno::NoSpace } else { Errno::Invalid };
            return Err((errno, "beyond the end of the export"));
        }
        Ok(command)
    }
}
