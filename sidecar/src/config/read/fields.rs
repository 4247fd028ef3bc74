//! One field at a time: its value, where it stands, and the refusal when it is not what was expected.

use std::{
    fmt::Display,
    path::{Component, Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use toml::{Spanned, Value};

use super::super::{Refusal, SOCKET_PATH_BYTES_MAX, raw::Leaf, units};
use crate::throttle::Limit;

/// Where a value was given.
#[derive(Clone, Debug)]
pub enum At {
    Line(usize),
    Flag(&'static str),
    /// Nowhere.
    File,
}

/// A named value that may be absent.
#[derive(Clone, Debug)]
pub struct Field {
    name: String,
    value: Option<Value>,
    at: At,
}

impl Field {
    pub fn missing(name: &str) -> Field {
        Field { name: name.to_owned(), value: None, at: At::File }
    }

    pub fn from_flag(name: &str, flag: &'static str, values: &[String]) -> Field {
        let values = values.iter().cloned().map(Value::String).collect();
        Field { name: name.to_owned(), value: Some(Value::Array(values)), at: At::Flag(flag) }
    }

    pub fn is_given(&self) -> bool {
        self.value.is_some()
    }

    fn text(&self) -> Option<&str> {
        self.value.as_ref().and_then(Value::as_str)
    }

    fn found(&self) -> String {
        match &self.value {
            None => "nothing".to_owned(),
            Some(Value::String(text)) => format!("{text:?}"),
            Some(Value::Table(_)) => "a table".to_owned(),
            Some(Value::Array(values)) => format!("an array of {}", values.len()),
            Some(other) => other.to_string(),
        }
    }
}

/// Reads fields and collects refusals.
pub struct Reader<'a> {
    file: &'a Path,
    text: &'a str,
    refusals: Vec<Refusal>,
}

/// The 1-based line of a byte offset.
pub fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
}

impl<'a> Reader<'a> {
    pub fn new(file: &'a Path, text: &'a str) -> Self {
        Reader { file, text, refusals: Vec::new() }
    }

    pub fn file(&self) -> &'a Path {
        self.file
    }

    pub fn line(&self, offset: usize) -> usize {
        line_of(self.text, offset)
    }

    pub fn into_refusals(self) -> Vec<Refusal> {
        self.refusals
    }

    pub fn field(&self, name: &str, leaf: Leaf) -> Field {
        self.field_in(name, leaf, &At::File)
    }

    /// A field of a table that begins at `at`: that is the place to name when the field is missing.
    pub fn field_in(&self, name: &str, leaf: Leaf, at: &At) -> Field {
        let name = name.to_owned();
        match leaf {
            Some(spanned) => {
                let at = At::Line(self.line(Spanned::span(&spanned).start));
                Field { name, value: Some(spanned.into_inner()), at }
            }
            None => Field { name, value: None, at: at.clone() },
        }
    }

    pub fn field_or_flag(&self, name: &str, leaf: Leaf, flag: &'static str, given: Option<&str>) -> Field {
        match given {
            Some(text) => {
                Field { name: name.to_owned(), value: Some(Value::String(text.to_owned())), at: At::Flag(flag) }
            }
            None => self.field(name, leaf),
        }
    }

    pub fn refuse(&mut self, field: &Field, found: String, expected: String, remedy: &str) {
        let place = match &field.at {
            At::Line(line) => format!("{}:{line}", self.file.display()),
            At::Flag(flag) => (*flag).to_owned(),
            At::File => self.file.display().to_string(),
        };
        self.refusals.push(Refusal { place, field: field.name.clone(), found, expected, remedy: remedy.to_owned() });
    }

    fn unfit(&mut self, field: &Field, expected: impl Display) {
        let remedy = if field.is_given() { "correct it" } else { "add it" };
        self.refuse(field, field.found(), expected.to_string(), remedy);
    }

    fn out_of_bounds(&mut self, field: &Field, least: String, most: String) {
        self.refuse(field, field.found(), format!("{least} to {most}"), "choose a value within these bounds");
    }

    /// A required text of type `T`. `stand_in` is a valid text, used only to go on after a refusal.
    pub fn parsed<T: FromStr>(&mut self, field: Field, stand_in: &str, expected: &str) -> T {
        match field.text().and_then(|text| text.parse().ok()) {
            Some(value) => value,
            None => {
                self.unfit(&field, expected);
                stand_in.parse().ok().expect("the stand-in is a valid text by construction")
            }
        }
    }

    /// A required text of type `T`; `stand_in` is used only to go on after a refusal.
    pub fn parsed_with<T: FromStr>(&mut self, field: Field, stand_in: T, expected: &str) -> T {
        match field.text().and_then(|text| text.parse().ok()) {
            Some(value) => value,
            None => {
                self.unfit(&field, expected);
                stand_in
            }
        }
    }

    /// An optional text of type `T`.
    pub fn parsed_or<T: FromStr>(&mut self, field: Field, default: T, expected: &str) -> T {
        if field.is_given() { self.parsed_with(field, default, expected) } else { default }
    }

    /// An absolute path without `.` and `..`: the supervisor, the worker and a person must mean the same file.
    pub fn path(&mut self, field: Field, default: Option<PathBuf>) -> PathBuf {
        if let (false, Some(default)) = (field.is_given(), default) {
            return default;
        }
        let plain = |path: &Path| {
            path.is_absolute()
                && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
        };
        match field.text().map(PathBuf::from).filter(|path| plain(path)) {
            Some(path) => path,
            None => {
                self.unfit(&field, "an absolute path without `..`");
                PathBuf::from(format!("/nonexistent/{}", field.name))
            }
        }
    }

    pub fn socket(&mut self, field: Field, default: Option<PathBuf>) -> PathBuf {
        let path = self.path(field.clone(), default);
        let length = path.as_os_str().len();
        if length > SOCKET_PATH_BYTES_MAX {
            let found = format!("{} ({length} bytes)", path.display());
            let expected = format!("a socket path of at most {SOCKET_PATH_BYTES_MAX} bytes (unix(7))");
            self.refuse(
                &field,
                found,
                expected,
                "choose a shorter path for it or for the directory it is derived from",
            );
        }
        path
    }

    /// Letters, digits, `.`, `_`, `-`, beginning with a letter or digit (so a disk's name is a file name too);
    /// `slashes` also allows `/` between such parts.
    pub fn name(&mut self, field: Field, bytes_max: usize, slashes: bool) -> String {
        let part = |part: &str| {
            part.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric())
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        };
        let fits = |text: &str| text.len() <= bytes_max && if slashes { text.split('/').all(part) } else { part(text) };
        match field.text() {
            Some(text) if fits(text) => text.to_owned(),
            _ => {
                let between = if slashes { ", and `/` between" } else { "" };
                self.unfit(&field, format!("at most {bytes_max} letters, digits, `.`, `_`, `-`{between}"));
                format!("refused-{}", field.name)
            }
        }
    }

    pub fn size(&mut self, field: Field, default: Option<u64>, least: u64, most: u64) -> Option<u64> {
        if !field.is_given() {
            return default;
        }
        match field.text().and_then(|text| units::size(text).ok()) {
            Some(bytes) if (least..=most).contains(&bytes) => return Some(bytes),
            Some(_) => self.out_of_bounds(&field, units::show_size(least), units::show_size(most)),
            None => self.unfit(&field, units::SIZE),
        }
        default
    }

    pub fn duration(
        &mut self,
        field: Field,
        default: Option<Duration>,
        least: Duration,
        most: Duration,
    ) -> Option<Duration> {
        if !field.is_given() {
            return default;
        }
        match field.text().and_then(|text| units::duration(text).ok()) {
            Some(duration) if (least..=most).contains(&duration) => return Some(duration),
            Some(_) => self.out_of_bounds(&field, units::show_duration(least), units::show_duration(most)),
            None => self.unfit(&field, units::DURATION),
        }
        default
    }

    pub fn limit(&mut self, field: Field, default: Option<Limit>, least_bits: u64) -> Limit {
        if let (false, Some(default)) = (field.is_given(), default) {
            return default;
        }
        match field.text().and_then(|text| units::rate(text).ok()) {
            Some(Limit::BitsPerSecond(bits)) if bits < least_bits => {
                self.out_of_bounds(&field, Limit::BitsPerSecond(least_bits).to_string(), "unlimited".to_owned());
                Limit::Unlimited
            }
            Some(limit) => limit,
            None => {
                self.unfit(&field, units::RATE);
                Limit::Unlimited
            }
        }
    }

    /// A window may also stop the stream: `paused`.
    pub fn limit_or_pause(&mut self, field: Field, least_bits: u64) -> Limit {
        if field.text() == Some("paused") {
            return Limit::Paused;
        }
        self.limit(field, None, least_bits)
    }

    pub fn integer(&mut self, field: Field, default: u64, least: u64, most: u64) -> u64 {
        let Some(value) = &field.value else { return default };
        match value.as_integer().and_then(|value| u64::try_from(value).ok()) {
            Some(value) if (least..=most).contains(&value) => return value,
            Some(_) => self.out_of_bounds(&field, least.to_string(), most.to_string()),
            None => self.unfit(&field, format!("a whole number, {least} to {most}")),
        }
        default
    }

    pub fn boolean(&mut self, field: Field, default: bool) -> bool {
        let Some(value) = &field.value else { return default };
        value.as_bool().unwrap_or_else(|| {
            self.unfit(&field, "true or false");
            default
        })
    }

    pub fn choice<T: Copy>(&mut self, field: Field, default: T, choices: &[(&str, T)]) -> T {
        if !field.is_given() {
            return default;
        }
        match choices.iter().find(|(name, _)| field.text() == Some(name)) {
            Some((_, value)) => *value,
            None => {
                let names: Vec<String> = choices.iter().map(|(name, _)| format!("{name:?}")).collect();
                self.unfit(&field, names.join(" or "));
                default
            }
        }
    }

    /// Permission bits, written as octal digits in a string: a bare 660 would be read as decimal.
    pub fn mode(&mut self, field: Field, default: u32) -> u32 {
        if !field.is_given() {
            return default;
        }
        match field.text().filter(|text| text.len() <= 4).and_then(|text| u32::from_str_radix(text, 8).ok()) {
            Some(mode) if mode <= 0o777 && mode & 0o600 == 0o600 => mode,
            _ => {
                self.unfit(&field, "octal permission bits as a string, such as \"0660\", at least 0600");
                default
            }
        }
    }

    /// `host:port` texts; an IPv6 address stands in brackets. Names are not resolved here.
    pub fn addresses(&mut self, field: Field, count_max: usize) -> Vec<String> {
        let expected = "an array of 1 to 16 addresses such as [\"peer.example:7070\"] or [\"[2001:db8::1]:7070\"]";
        let texts: Option<Vec<String>> = match &field.value {
            Some(Value::String(text)) => Some(vec![text.clone()]),
            Some(Value::Array(values)) => values.iter().map(|value| value.as_str().map(str::to_owned)).collect(),
            _ => None,
        };
        match texts {
            Some(texts)
                if !texts.is_empty() && texts.len() <= count_max && texts.iter().all(|text| is_address(text)) =>
            {
                texts
            }
            Some(texts) => {
                let wrong = texts.iter().find(|text| !is_address(text));
                let found = wrong.map_or_else(|| field.found(), |text| format!("{text:?}"));
                self.refuse(&field, found, expected.to_owned(), "correct it");
                Vec::new()
            }
            None => {
                self.unfit(&field, expected);
                Vec::new()
            }
        }
    }

    pub fn server_name(&mut self, field: Field, default: String) -> String {
        if !field.is_given() {
            return default;
        }
        match field.text().filter(|text| is_host_name(text)) {
            Some(text) => text.to_owned(),
            None => {
                self.unfit(&field, "a DNS name such as \"vm1.osaka.example\"");
                default
            }
        }
    }
}

fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let port = !port.starts_with('+') && port.parse::<u16>().is_ok_and(|port| port > 0);
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    port && match bracketed {
        Some(host) => host.parse::<std::net::Ipv6Addr>().is_ok(),
        None => is_host_name(host),
    }
}

/// Labels of letters, digits and `-`, joined by dots (IPv4 addresses fit as well).
fn is_host_name(text: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    !text.is_empty() && text.len() <= 253 && text.split('.').all(label)
}
