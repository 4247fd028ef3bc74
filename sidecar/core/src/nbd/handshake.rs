//! The fixed newstyle handshake ("Newstyle negotiation", "Fixed newstyle negotiation", "Option types").
//!
//! ```text
//!            greeting sent
//!                 │ client flags            unknown flag ──▶ Close
//!                 ▼
//!     ┌──────▶ Options ── EXPORT_NAME / GO accepted ──▶ Enter (transmission)
//!     │           │  └─── ABORT, bad magic, too many ──▶ Close
//!     │           │ option longer than we look at
//!     └── reply ◀─┴─ Skipping
//! ```
//!
//! Invariants: one option is answered per [`Handshake::feed`], so that the shell can write the answer before it lets
//! the client ask again (a client that never reads cannot make replies pile up); metadata contexts count only for
//! the export name they were selected for; INFO and GO with the same parameters say the same.
//!
//! Does not bound time: the shell gives a handshake a deadline.

use alloc::{string::String, vec::Vec};

use super::meta::MetaQuery;
use super::wire::*;

/// What the handshake must know about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportShape {
    /// Canonical name; differs from the asked one only for the default export (the empty name).
    pub name: String,
    pub size_bytes: u64,
    pub read_only: bool,
}

/// The exports, as the handshake sees them.
pub trait Catalogue {
    /// Names for LIST.
    fn names(&self) -> Vec<String>;
    /// The export called `name`; the empty name means the default export, if there is one.
    fn find(&self, name: &str) -> Option<ExportShape>;
    /// The client wants to enter transmission with this export. `Err(reason)` refuses, in words for the client's log.
    fn enter(&mut self, name: &str) -> Result<(), String>;
    /// The server is going down: every option but ABORT is answered with REP_ERR_SHUTDOWN.
    fn shutting_down(&self) -> bool;
}

/// What a finished handshake agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    pub export: ExportShape,
    pub structured: bool,
    /// `base:allocation` was selected for this very export.
    pub base_allocation: bool,
}

/// Why the connection ends here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The client said ABORT.
    Aborted,
    /// A flag we did not offer ("the server MUST drop the TCP connection").
    UnknownClientFlags,
    /// Not an option where one must be.
    BadMagic,
    /// EXPORT_NAME for something that we do not serve: that option has no error reply.
    ExportRefused,
    /// An option too long to skip, or an endless number of options.
    Flood,
    /// An option other than EXPORT_NAME from a client that did not ask for fixed newstyle.
    NotFixedNewstyle,
}

/// Outcome of one [`Handshake::feed`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Write what is in `out`, then feed again: with more bytes if nothing was consumed.
    Continue,
    /// Write what is in `out`; what was not consumed belongs to the transmission phase.
    Enter(Negotiated),
    /// Write what is in `out`, then close.
    Close(CloseReason),
}

#[derive(Debug)]
enum Stage {
    ClientFlags,
    Options,
    /// Discarding the rest of an option that is too long to look at.
    Skipping {
        option: u32,
        left: u32,
    },
}

/// The server's side of one handshake.
#[derive(Debug)]
pub struct Handshake {
    stage: Stage,
    fixed: bool,
    no_zeroes: bool,
    structured: bool,
    /// The export name for which `base:allocation` was last selected.
    context_for: Option<String>,
    options_seen: u32,
}

impl Default for Handshake {
    fn default() -> Self {
        Self::new()
    }
}

impl Handshake {
    pub fn new() -> Self {
        Handshake {
            stage: Stage::ClientFlags,
            fixed: false,
            no_zeroes: false,
            structured: false,
            context_for: None,
            options_seen: 0,
        }
    }

    /// The first 18 bytes, sent before anything is read.
    pub fn greeting() -> [u8; 18] {
        let mut bytes = [0; 18];
        bytes[..8].copy_from_slice(&NBD_MAGIC.to_be_bytes());
        bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes[16..].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
        bytes
    }

    /// Take at most one message from `input`, append the answer to `out`; returns the bytes consumed. Needs at most
    /// [`OPTION_HEADER_BYTES`] + [`OPTION_BYTES_MAX`] bytes of input at once.
    pub fn feed(&mut self, input: &[u8], catalogue: &mut dyn Catalogue, out: &mut Vec<u8>) -> (usize, Progress) {
        match self.stage {
            Stage::ClientFlags => {
                let Some(flags) = be32(input, 0) else { return (0, Progress::Continue) };
                let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
                if flags & !known != 0 {
                    return (4, Progress::Close(CloseReason::UnknownClientFlags));
                }
                self.fixed = flags & u32::from(FLAG_FIXED_NEWSTYLE) != 0;
                self.no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
                self.stage = Stage::Options;
                (4, Progress::Continue)
            }
            Stage::Skipping { option, left } => {
                let skipped = input.len().min(left as usize);
                let left = left - skipped as u32;
                if left == 0 {
                    reply_error(out, option, REP_ERR_TOO_BIG, "option is too long for this server");
                    self.stage = Stage::Options;
                } else {
                    self.stage = Stage::Skipping { option, left };
                }
                (skipped, Progress::Continue)
            }
            Stage::Options => self.option(input, catalogue, out),
        }
    }

    fn option(&mut self, input: &[u8], catalogue: &mut dyn Catalogue, out: &mut Vec<u8>) -> (usize, Progress) {
        let (Some(magic), Some(option), Some(length)) = (be64(input, 0), be32(input, 8), be32(input, 12)) else {
            // Nothing is gained by waiting for the rest of a header whose first bytes are already wrong.
            let wrong = input.iter().zip(OPTION_MAGIC.to_be_bytes()).any(|(have, want)| *have != want);
            let progress = if wrong { Progress::Close(CloseReason::BadMagic) } else { Progress::Continue };
            return (0, progress);
        };
        if magic != OPTION_MAGIC {
            return (0, Progress::Close(CloseReason::BadMagic));
        }
        if !self.fixed && option != OPT_EXPORT_NAME {
            return (0, Progress::Close(CloseReason::NotFixedNewstyle));
        }
        if length > OPTION_BYTES_MAX {
            self.options_seen += 1;
            let hopeless = option == OPT_EXPORT_NAME || length > OPTION_SKIP_BYTES_MAX;
            if hopeless || self.options_seen > OPTIONS_MAX {
                return (OPTION_HEADER_BYTES, Progress::Close(CloseReason::Flood));
            }
            self.stage = Stage::Skipping { option, left: length };
            return (OPTION_HEADER_BYTES, Progress::Continue);
        }
        let end = OPTION_HEADER_BYTES + length as usize;
        let Some(data) = input.get(OPTION_HEADER_BYTES..end) else { return (0, Progress::Continue) };
        self.options_seen += 1;
        if self.options_seen > OPTIONS_MAX {
            return (end, Progress::Close(CloseReason::Flood));
        }
        (end, self.answer(option, data, catalogue, out))
    }

    fn answer(&mut self, option: u32, data: &[u8], catalogue: &mut dyn Catalogue, out: &mut Vec<u8>) -> Progress {
        if option == OPT_ABORT {
            // "a server SHOULD ignore any data sent by the client".
            reply(out, option, REP_ACK, &[]);
            return Progress::Close(CloseReason::Aborted);
        }
        if catalogue.shutting_down() {
            if option == OPT_EXPORT_NAME {
                return Progress::Close(CloseReason::ExportRefused);
            }
            reply_error(out, option, REP_ERR_SHUTDOWN, "the server is shutting down");
            return Progress::Continue;
        }
        match option {
            OPT_EXPORT_NAME => return self.export_name(data, catalogue, out),
            OPT_INFO | OPT_GO => return self.info_or_go(option, data, catalogue, out),
            OPT_LIST if data.is_empty() => {
                for name in catalogue.names() {
                    let mut body = Vec::with_capacity(4 + name.len());
                    body.extend_from_slice(&(name.len() as u32).to_be_bytes());
                    body.extend_from_slice(name.as_bytes());
                    reply(out, option, REP_SERVER, &body);
                }
                reply(out, option, REP_ACK, &[]);
            }
            OPT_STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                reply(out, option, REP_ACK, &[]);
            }
            OPT_LIST | OPT_STRUCTURED_REPLY => {
                reply_error(out, option, REP_ERR_INVALID, "this option carries no data");
            }
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => self.meta_context(option, data, catalogue, out),
            OPT_STARTTLS => reply_error(out, option, REP_ERR_UNSUP, "no TLS on this local socket"),
            _ => reply_error(out, option, REP_ERR_UNSUP, "unknown option"),
        }
        Progress::Continue
    }

    fn export_name(&mut self, data: &[u8], catalogue: &mut dyn Catalogue, out: &mut Vec<u8>) -> Progress {
        let refused = Progress::Close(CloseReason::ExportRefused);
        let Some(name) = string(data) else { return refused };
        let Some(export) = catalogue.find(name) else { return refused };
        if catalogue.enter(&export.name).is_err() {
            return refused;
        }
        out.extend_from_slice(&export.size_bytes.to_be_bytes());
        out.extend_from_slice(&transmission_flags(export.read_only, self.structured).to_be_bytes());
        if !self.no_zeroes {
            out.resize(out.len() + 124, 0);
        }
        Progress::Enter(self.negotiated(name, export))
    }

    fn info_or_go(&mut self, option: u32, data: &[u8], catalogue: &mut dyn Catalogue, out: &mut Vec<u8>) -> Progress {
        let Some((name, infos)) = decode_info(data) else {
            reply_error(out, option, REP_ERR_INVALID, "malformed export name or list of information requests");
            return Progress::Continue;
        };
        let Some(export) = catalogue.find(name) else {
            reply_error(out, option, REP_ERR_UNKNOWN, "no such export");
            return Progress::Continue;
        };
        if option == OPT_GO
            && let Err(reason) = catalogue.enter(&export.name)
        {
            reply_error(out, option, REP_ERR_POLICY, &reason);
            return Progress::Continue;
        }
        let mut body = [0u8; 12];
        body[..2].copy_from_slice(&INFO_EXPORT.to_be_bytes());
        body[2..10].copy_from_slice(&export.size_bytes.to_be_bytes());
        body[10..].copy_from_slice(&transmission_flags(export.read_only, self.structured).to_be_bytes());
        reply(out, option, REP_INFO, &body);
        let asked = |info: u16| infos.chunks_exact(2).any(|pair| pair == info.to_be_bytes());
        if asked(INFO_BLOCK_SIZE) {
            let mut body = [0u8; 14];
            body[..2].copy_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
            body[2..6].copy_from_slice(&BLOCK_BYTES_MIN.to_be_bytes());
            body[6..10].copy_from_slice(&BLOCK_BYTES_PREFERRED.to_be_bytes());
            body[10..].copy_from_slice(&PAYLOAD_BYTES_MAX.to_be_bytes());
            reply(out, option, REP_INFO, &body);
        }
        if asked(INFO_NAME) {
            let mut body = Vec::with_capacity(2 + export.name.len());
            body.extend_from_slice(&INFO_NAME.to_be_bytes());
            body.extend_from_slice(export.name.as_bytes());
            reply(out, option, REP_INFO, &body);
        }
        reply(out, option, REP_ACK, &[]);
        if option == OPT_GO { Progress::Enter(self.negotiated(name, export)) } else { Progress::Continue }
    }

    fn meta_context(&mut self, option: u32, data: &[u8], catalogue: &dyn Catalogue, out: &mut Vec<u8>) {
        let set = option == OPT_SET_META_CONTEXT;
        if set {
            // "replaces all previously-set metadata contexts (including when this command fails)".
            self.context_for = None;
        }
        if !self.structured {
            return reply_error(out, option, REP_ERR_INVALID, "negotiate structured replies first");
        }
        let Some(query) = MetaQuery::decode(data) else {
            return reply_error(out, option, REP_ERR_INVALID, "malformed metadata query");
        };
        if catalogue.find(query.export).is_none() {
            return reply_error(out, option, REP_ERR_UNKNOWN, "no such export");
        }
        // The wildcard and the empty list select nothing in SET; in LIST they mean every context there is.
        let matches = query.exact || (!set && (query.wildcard || query.empty));
        if matches {
            // In LIST the id is reserved and zero.
            let id = if set { BASE_ALLOCATION_ID } else { 0 };
            let mut body = Vec::with_capacity(4 + BASE_ALLOCATION.len());
            body.extend_from_slice(&id.to_be_bytes());
            body.extend_from_slice(BASE_ALLOCATION.as_bytes());
            reply(out, option, REP_META_CONTEXT, &body);
            if set {
                self.context_for = Some(query.export.into());
            }
        }
        reply(out, option, REP_ACK, &[]);
    }

    fn negotiated(&self, asked_name: &str, export: ExportShape) -> Negotiated {
        let base_allocation = self.structured && self.context_for.as_deref() == Some(asked_name);
        Negotiated { export, structured: self.structured, base_allocation }
    }
}

/// The data of INFO and GO: a name, and the information requests as pairs of bytes.
fn decode_info(data: &[u8]) -> Option<(&str, &[u8])> {
    let length = be32(data, 0)? as usize;
    let name = data.get(4..)?.get(..length)?;
    let rest = &data[4 + length..];
    let count = usize::from(be16(rest, 0)?);
    let infos = &rest[2..];
    (infos.len() == count * 2).then_some(())?;
    Some((string(name)?, infos))
}

/// An export name: UTF-8 without NUL, at most [`STRING_BYTES_MAX`].
fn string(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > STRING_BYTES_MAX || bytes.contains(&0) {
        return None;
    }
    core::str::from_utf8(bytes).ok()
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, body: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(body.len() as u32).to_be_bytes());
    out.extend_from_slice(body);
}

/// An error reply with its text; a text longer than a string may be is cut at a character.
fn reply_error(out: &mut Vec<u8>, option: u32, kind: u32, text: &str) {
    let mut end = text.len().min(STRING_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    reply(out, option, kind, &text.as_bytes()[..end]);
}
