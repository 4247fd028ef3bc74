//! Decoding of LIST_META_CONTEXT and SET_META_CONTEXT ("Metadata querying").
//!
//! One context exists, `base:allocation`. Queries of foreign namespaces and unknown leaf names are ignored, as the
//! specification demands; only a syntactically broken option is an error.

use super::wire::{BASE_ALLOCATION, STRING_BYTES_MAX, be32};

/// A well-formed option: which export, and whether its queries name our context.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MetaQuery<'a> {
    pub export: &'a str,
    /// No query at all: LIST means "everything", SET means "nothing".
    pub empty: bool,
    /// A query was exactly `base:allocation`.
    pub exact: bool,
    /// A query was the wildcard `base:`.
    pub wildcard: bool,
}

impl<'a> MetaQuery<'a> {
    /// `None` is REP_ERR_INVALID: lengths that do not add up, or a name that is not a string.
    pub fn decode(data: &'a [u8]) -> Option<MetaQuery<'a>> {
        let (name, rest) = take_string(data)?;
        let export = core::str::from_utf8(name).ok()?;
        let count = be32(rest, 0)?;
        let mut rest = rest.get(4..)?;
        // Every query needs at least its length field: a count beyond that is a lie, found before looping over it.
        if u64::from(count) * 4 > rest.len() as u64 {
            return None;
        }
        let mut query = MetaQuery { export, empty: count == 0, exact: false, wildcard: false };
        for _ in 0..count {
            let (text, after) = take_string(rest)?;
            query.exact |= text == BASE_ALLOCATION.as_bytes();
            query.wildcard |= text == b"base:";
            rest = after;
        }
        rest.is_empty().then_some(query)
    }
}

/// A string with a 32-bit length before it, and what follows.
fn take_string(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = be32(data, 0)? as usize;
    if length > STRING_BYTES_MAX {
        return None;
    }
    let text = data.get(4..4 + length)?;
    if text.contains(&0) {
        return None;
    }
    Some((text, &data[4 + length..]))
}
