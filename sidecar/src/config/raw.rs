//! The file as written: which keys exist, and where each value stands. No defaults and no meaning; `read` gives both.
//!
//! Leaves are untyped values with their span, so that a wrong kind of value is refused by the same words as a wrong
//! value. `deny_unknown_fields` everywhere: serde then names the unknown key and the known ones.

use serde::Deserialize;
use toml::{Spanned, Value};

/// A value and where it stands in the text (bytes).
pub type Leaf = Option<Spanned<Value>>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    pub site: Leaf,
    pub folder: Leaf,
    pub runtime_dir: Leaf,
    pub listen: Leaf,
    pub interval: Leaf,
    pub bandwidth: Leaf,
    pub data_streams: Leaf,
    pub journal: Leaf,
    pub verify: Leaf,
    pub start_without_peer: Leaf,
    pub pair: Option<Pair>,
    #[serde(default)]
    pub disk: Vec<Spanned<Disk>>,
    pub nbd: Option<Nbd>,
    pub peer: Option<Peer>,
    pub tls: Option<Tls>,
    #[serde(default)]
    pub window: Vec<Spanned<Window>>,
    pub preserve: Option<Preserve>,
    pub retention: Option<Retention>,
    pub hook: Option<Hook>,
    pub control: Option<Control>,
    pub metrics: Option<Metrics>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    pub id: Leaf,
    pub name: Leaf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    pub name: Leaf,
    pub path: Leaf,
    pub size: Leaf,
    pub socket: Leaf,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Nbd {
    pub dir: Leaf,
    pub mode: Leaf,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    pub addresses: Leaf,
    pub server_name: Leaf,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    pub ca: Leaf,
    pub certificate: Leaf,
    pub key: Leaf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    pub days: Leaf,
    pub from: Leaf,
    pub to: Leaf,
    pub bandwidth: Leaf,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Preserve {
    pub memory: Leaf,
    pub spill: Leaf,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Retention {
    pub count: Leaf,
    pub age: Leaf,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    pub dir: Leaf,
    pub outside_kubernetes: Leaf,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Control {
    pub socket: Leaf,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    pub listen: Leaf,
    pub socket: Leaf,
}
