//! Who a sidecar is: the pair it belongs to and its site, as configured and as written into certificates.
//!
//! A certificate names both in a URI subject alternative name, `watari://pair/<uuid>/site/<name>`; that name, and not
//! the host name, binds a connection to a pair. This module only parses and prints; `tls` decides who is let in.

use std::{fmt, str::FromStr};

/// Longest site name in bytes: it must fit a DNS label, because the gateway routes by server name.
pub const SITE_NAME_BYTES_MAX: usize = 63;

/// The pair's id: a UUID that both sites share.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PairId(pub [u8; 16]);

/// A site's name: lower-case letters, digits and `-`, at most [`SITE_NAME_BYTES_MAX`] bytes.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SiteName(String);

/// What a certificate says about its holder.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Identity {
    pub pair: PairId,
    pub site: SiteName,
}

/// Why a text is no identity.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("found `{0}`, expected a UUID such as 6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10")]
    PairId(String),
    #[error(
        "found `{0}`, expected a site name: 1 to {SITE_NAME_BYTES_MAX} lower-case letters, digits or `-`, with a letter or digit at both ends"
    )]
    Site(String),
    #[error("found `{0}`, expected watari://pair/<uuid>/site/<name>")]
    Uri(String),
}

impl PairId {
    /// The server name (TLS SNI) under which a gateway finds this pair, unless the configuration names another.
    pub fn server_name(self) -> String {
        format!("{self}.pair.watari.internal")
    }
}

impl fmt::Display for PairId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for PairId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PairId {
    type Err = IdentityError;

    /// Only the hyphenated form is taken: one spelling, so that names derived from it are equal at both sites.
    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let refuse = || IdentityError::PairId(text.to_owned());
        let bytes = text.as_bytes();
        if bytes.len() != 36 {
            return Err(refuse());
        }
        let mut id = [0u8; 16];
        let mut nibble = 0;
        for (index, byte) in bytes.iter().enumerate() {
            if matches!(index, 8 | 13 | 18 | 23) {
                if *byte != b'-' {
                    return Err(refuse());
                }
                continue;
            }
            let value = char::from(*byte).to_digit(16).ok_or_else(refuse)? as u8;
            id[nibble / 2] |= if nibble % 2 == 0 { value << 4 } else { value };
            nibble += 1;
        }
        if id == [0; 16] {
            return Err(refuse());
        }
        Ok(PairId(id))
    }
}

impl SiteName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SiteName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SiteName {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let edge = |byte: Option<&u8>| byte.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let bytes = text.as_bytes();
        let inner = bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-');
        if bytes.len() > SITE_NAME_BYTES_MAX || !inner || !edge(bytes.first()) || !edge(bytes.last()) {
            return Err(IdentityError::Site(text.to_owned()));
        }
        Ok(SiteName(text.to_owned()))
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "watari://pair/{}/site/{}", self.pair, self.site)
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let rest = text.strip_prefix("watari://pair/").ok_or_else(|| IdentityError::Uri(text.to_owned()))?;
        let (pair, site) = rest.split_once("/site/").ok_or_else(|| IdentityError::Uri(text.to_owned()))?;
        Ok(Identity { pair: pair.parse()?, site: site.parse()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10";

    #[test]
    fn an_identity_reads_back_what_it_prints() {
        let identity: Identity = format!("watari://pair/{UUID}/site/tokyo-1").parse().expect("valid");
        assert_eq!(identity.pair.0[..4], [0x6f, 0x1c, 0x1e, 0x0a]);
        assert_eq!(identity.site.as_str(), "tokyo-1");
        assert_eq!(identity.to_string().parse::<Identity>(), Ok(identity));
    }

    #[test]
    fn malformed_ids_names_and_uris_are_refused() {
        let mut wrong =
            vec![UUID.replace('-', ""), UUID.replace("6f", "6g"), UUID.replace('-', "+"), format!("{UUID}0")];
        wrong.push("00000000-0000-0000-0000-000000000000".to_owned());
        wrong.push(String::new());
        for text in wrong {
            assert!(text.parse::<PairId>().is_err(), "{text}");
        }
        for text in ["", "-a", "a-", "Tokyo", "a.b", "a/b", &"x".repeat(64)] {
            assert!(text.parse::<SiteName>().is_err(), "{text}");
        }
        for text in ["", "watari://pair/", "https://pair.example/x/site/y", &format!("watari://pair/{UUID}")] {
            assert!(text.parse::<Identity>().is_err(), "{text}");
        }
    }
}
