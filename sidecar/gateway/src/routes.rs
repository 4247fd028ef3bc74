//! The routes file: which server name leads to which address. Parsing only; [`table`](crate::table) watches the file.
//!
//! JSON, so that the operator writes it with what it has, mounted from a ConfigMap:
//! ```json
//! {
//!   "version": 1,
//!   "routes": {
//!     "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10.pair.watari.internal": "10.96.4.7:7070"
//!   }
//! }
//! ```
//! `version` is [`VERSION`]; a file of another one is refused, and an unknown key too, because a misspelt one would do nothing.
//! A name is a DNS name in lower case. An address is `host:port`; a host name is resolved at each connection. The address of a
//! ClusterIP Service serves best: Pods come and go behind it and no route changes. All refusals of a file are one
//! message; a refused file changes nothing.

use std::{collections::HashMap, sync::Arc};

use serde::Deserialize;

/// The format's version.
pub const VERSION: u64 = 1;
/// Largest file in bytes: a ConfigMap's own limit (Kubernetes, `MaxSecretSize`).
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// Longest name in bytes (RFC 1035, 2.3.4).
const NAME_BYTES_MAX: usize = 253;

/// Why a file is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RoutesError {
    #[error("it is no routes file: {0}; write it as sidecar/gateway/README.md says")]
    Syntax(String),
    #[error("found version {0}, expected {VERSION}; let operator and gateway be of one release")]
    Version(u64),
    #[error("route `{name}`: found {found}, expected {expected}")]
    Route { name: String, found: String, expected: &'static str },
}

/// Valid routes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Routes(HashMap<Arc<str>, Arc<str>>);

/// One of them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Route {
    pub server_name: Arc<str>,
    /// `host:port`.
    pub address: Arc<str>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "version")]
    _version: u64,
    routes: HashMap<String, String>,
}

/// Only the version: a newer file's other keys are not ours to judge.
#[derive(Deserialize)]
struct Versioned {
    version: u64,
}

impl Routes {
    pub fn parse(text: &[u8]) -> Result<Routes, RoutesError> {
        let syntax = |error: serde_json::Error| RoutesError::Syntax(error.to_string());
        let Versioned { version } = serde_json::from_slice(text).map_err(syntax)?;
        if version != VERSION {
            return Err(RoutesError::Version(version));
        }
        let File { _version, routes } = serde_json::from_slice(text).map_err(syntax)?;
        let mut parsed = HashMap::with_capacity(routes.len());
        for (name, address) in routes {
            check_name(&name)?;
            check_address(&name, &address)?;
            parsed.insert(name.into(), address.into());
        }
        Ok(Routes(parsed))
    }

    /// The route of a name in lower case.
    pub fn find(&self, server_name: &str) -> Option<Route> {
        let (name, address) = self.0.get_key_value(server_name)?;
        Some(Route { server_name: Arc::clone(name), address: Arc::clone(address) })
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn check_name(name: &str) -> Result<(), RoutesError> {
    let label = |label: &str| {
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        (1..=63).contains(&label.len()) && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    if name.len() <= NAME_BYTES_MAX && name.split('.').all(label) {
        return Ok(());
    }
    let (name, found) = (name.to_owned(), "that name".to_owned());
    Err(RoutesError::Route { name, found, expected: "a DNS name in lower case" })
}

fn check_address(name: &str, address: &str) -> Result<(), RoutesError> {
    let parts = address.rsplit_once(':').filter(|(host, _)| {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        // More than one colon is an IPv6 address, which needs its brackets.
        bare.map_or(!host.is_empty() && !host.contains(':'), |v6| v6.parse::<std::net::Ipv6Addr>().is_ok())
    });
    match parts.and_then(|(_, port)| port.parse::<u16>().ok()) {
        Some(port) if port != 0 => Ok(()),
        _ => Err(RoutesError::Route {
            name: name.to_owned(),
            found: format!("address `{address}`"),
            expected: "host:port, such as 10.96.4.7:7070 or vm1.pairs.svc:7070",
        }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn one(name: &str, address: &str) -> Result<Routes, RoutesError> {
        Routes::parse(format!(r#"{{"version":1,"routes":{{"{name}":"{address}"}}}}"#).as_bytes())
    }

    #[test]
    fn a_route_is_found_by_its_whole_name_and_nothing_else() {
        let routes = one("a.pair.watari.internal", "10.96.4.7:7070").unwrap();
        assert_eq!(&*routes.find("a.pair.watari.internal").unwrap().address, "10.96.4.7:7070");
        for other in ["b.pair.watari.internal", "pair.watari.internal", "x.a.pair.watari.internal", ""] {
            assert_eq!(routes.find(other), None, "{other}");
        }
        assert!(Routes::parse(br#"{"version":1,"routes":{}}"#).unwrap().is_empty());
    }

    #[test]
    fn the_sample_in_the_documents_is_a_routes_file() {
        let readme = include_str!("../README.md");
        let sample = readme.split("```json").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
        assert_eq!(Routes::parse(sample.as_bytes()).unwrap().len(), 2);
    }

    #[test]
    fn addresses_of_every_kind_are_taken_and_others_are_refused_by_name() {
        for good in ["10.96.4.7:7070", "[fd00::7]:7070", "vm1.pairs.svc.cluster.local:7070", "localhost:1"] {
            assert!(one("a.internal", good).is_ok(), "{good}");
        }
        for bad in ["", "10.96.4.7", ":7070", "10.96.4.7:0", "10.96.4.7:65536", "fd00::7:7070", "[fd00::g]:1", "a:b"] {
            let error = one("a.internal", bad).unwrap_err().to_string();
            assert!(error.contains("a.internal") && error.contains("host:port"), "{bad}: {error}");
        }
    }

    #[test]
    fn names_that_no_hello_can_carry_are_refused() {
        for bad in ["", "A.internal", "a..b", "a_b.internal", "-a.internal", &"a.".repeat(130)] {
            assert!(matches!(one(bad, "h:1"), Err(RoutesError::Route { .. })), "{bad}");
        }
    }

    #[test]
    fn another_version_a_misspelt_key_and_rubbish_are_refused() {
        assert_eq!(Routes::parse(br#"{"version":2,"tunnels":[]}"#), Err(RoutesError::Version(2)));
        for bad in [r#"{"version":1,"route":{}}"#, r#"{"version":1}"#, "[]", "", "\u{0}", r#"{"version":1,"routes":{}"#]
        {
            assert!(matches!(Routes::parse(bad.as_bytes()), Err(RoutesError::Syntax(_))), "{bad}");
        }
    }
}
