//! From the file as written to a valid [`Config`]: defaults, bounds, and every refusal in words.
//!
//! A [`Reader`] collects refusals and goes on, so that a person sees all of them at once; a field that was refused
//! yields a placeholder, and no [`Config`] leaves this module while there is any refusal.

mod fields;

use std::{
    collections::HashMap,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use watari_core::{
    geometry::BLOCK_BYTES,
    limits::{DISK_BYTES_MAX, DISKS_MAX, FRAME_BYTES_MAX},
};

use super::{
    Config, ConfigError, Disk, FILE_BYTES_MAX, Hook, Metrics, Nbd, Overrides, Pair, Peer, Preserve, Retention,
    StartWithoutPeer, TlsFiles, raw,
};
use crate::{
    identity::PairId,
    throttle::{
        Limit,
        schedule::{Days, Schedule, TimeOfDay, Window},
    },
};
use fields::{At, Field, Reader};

const INTERVAL_DEFAULT: Duration = Duration::from_secs(10);
/// Shorter and a generation costs more in commits than in data.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
const INTERVAL_MAX: Duration = Duration::from_secs(7 * 86_400);
const DATA_STREAMS_DEFAULT: u64 = 2;
/// Each stream costs windows and a task at both sides; beyond 16 nothing gets faster.
const DATA_STREAMS_MAX: u64 = 16;
const JOURNAL_DEFAULT: u64 = 2 << 30;
/// Low enough not to be noticed, high enough for 1 TiB in three days.
const VERIFY_DEFAULT: u64 = 4 << 20;
/// The most that one step compares.
const VERIFY_MAX: u64 = 256 << 20;
/// A reserve of 256 MiB is held before a seal (design §3.5, 1).
const JOURNAL_MIN: u64 = 256 << 20;
const PRESERVE_MEMORY_DEFAULT: u64 = 64 << 20;
/// A few frames in flight must fit, or nothing could ever be read ahead.
const PRESERVE_MEMORY_MIN: u64 = 4 * FRAME_BYTES_MAX;
const PRESERVE_MEMORY_MAX: u64 = 64 << 30;
const PRESERVE_SPILL_DEFAULT: u64 = 1 << 30;
const RETENTION_COUNT_DEFAULT: u64 = 3;
const RETENTION_COUNT_MAX: u64 = 10_000;
const RETENTION_AGE_MIN: Duration = Duration::from_secs(60);
const RETENTION_AGE_MAX: Duration = Duration::from_secs(366 * 86_400);
/// Slower than this a single frame would take minutes; a pause is said with `paused`.
const BANDWIDTH_MIN_BITS: u64 = 64_000;
const SOCKET_MODE_DEFAULT: u32 = 0o660;
/// A week has 168 hours; more windows than that are a mistake.
const WINDOWS_MAX: usize = 168;
const PEER_ADDRESSES_MAX: usize = 16;

/// The whole text of a bounded, regular file.
pub fn file_text(file: &Path) -> Result<String, ConfigError> {
    let refuse = |found: String, remedy| ConfigError::File {
        file: file.to_owned(),
        found,
        expected: "a readable TOML file of at most 1 MiB",
        remedy,
    };
    let cannot = |error: std::io::Error| refuse(error.to_string(), "name an existing file with --config");
    let opened = fs::File::open(file).map_err(cannot)?;
    if !opened.metadata().map_err(cannot)?.is_file() {
        return Err(refuse("no regular file".to_owned(), "name the file itself with --config"));
    }
    let mut text = String::new();
    opened
        .take(FILE_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(|error| refuse(error.to_string(), "save it as UTF-8 text"))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(refuse("a larger file".to_owned(), "is this the right file?"));
    }
    Ok(text)
}

/// See [`Config::parse`].
pub fn config(file: &Path, text: &str, overrides: &Overrides) -> Result<Config, ConfigError> {
    let raw: raw::File = toml::from_str(text).map_err(|error| {
        let line = error.span().map_or(1, |span| fields::line_of(text, span.start));
        ConfigError::Syntax { file: file.to_owned(), line, message: error.message().replace('\n', "; ") }
    })?;
    let mut reader = Reader::new(file, text);
    let config = build(&mut reader, raw, overrides);
    let refusals = reader.into_refusals();
    if refusals.is_empty() { Ok(config) } else { Err(ConfigError::Refused(refusals)) }
}

fn build(r: &mut Reader<'_>, raw: raw::File, overrides: &Overrides) -> Config {
    let pair = pair(r, raw.pair.unwrap_or_default());
    let site_field = r.field("site", raw.site);
    let site = r.parsed(site_field, "tokyo", "a site name: lower-case letters, digits and `-`, at most 63");
    let folder = {
        let field = r.field("folder", raw.folder);
        r.path(field, None)
    };
    let runtime_dir = {
        let field = r.field("runtime_dir", raw.runtime_dir);
        r.path(field, Some(PathBuf::from(format!("/dev/shm/watari/{}-{site}", pair.id))))
    };
    let nbd = nbd(r, raw.nbd.unwrap_or_default());
    let disks = disks(r, raw.disk, &nbd);
    let listen = {
        let field = r.field_or_flag("listen", raw.listen, "--listen", overrides.listen.as_deref());
        r.parsed(field, "0.0.0.0:7070", "an address and port such as \"0.0.0.0:7070\" or \"[::]:7070\"")
    };
    let peer = peer(r, raw.peer.unwrap_or_default(), pair.id, overrides);
    let tls = tls(r, raw.tls.unwrap_or_default());
    let interval = {
        let field = r.field_or_flag("interval", raw.interval, "--interval", overrides.interval.as_deref());
        r.duration(field, Some(INTERVAL_DEFAULT), INTERVAL_MIN, INTERVAL_MAX).unwrap_or(INTERVAL_DEFAULT)
    };
    let base = {
        let field = r.field_or_flag("bandwidth", raw.bandwidth, "--bandwidth", overrides.bandwidth.as_deref());
        r.limit(field, Some(Limit::Unlimited), BANDWIDTH_MIN_BITS)
    };
    let windows = windows(r, raw.window);
    let data_streams = {
        let field = r.field("data_streams", raw.data_streams);
        r.integer(field, DATA_STREAMS_DEFAULT, 1, DATA_STREAMS_MAX) as u32
    };
    let preserve = preserve(r, raw.preserve.unwrap_or_default());
    let journal_bytes = {
        let field = r.field("journal", raw.journal);
        r.size(field, Some(JOURNAL_DEFAULT), JOURNAL_MIN, DISK_BYTES_MAX).unwrap_or(JOURNAL_DEFAULT)
    };
    let verify_bytes_per_second = {
        let field = r.field("verify", raw.verify);
        r.size(field, Some(VERIFY_DEFAULT), 0, VERIFY_MAX).unwrap_or(VERIFY_DEFAULT)
    };
    let retention = retention(r, raw.retention.unwrap_or_default());
    let hook = raw.hook.map(|hook| {
        let dir = r.field("hook.dir", hook.dir);
        let outside = r.field("hook.outside_kubernetes", hook.outside_kubernetes);
        Hook { dir: r.path(dir, None), outside_kubernetes: r.boolean(outside, false) }
    });
    let control_socket = {
        let field = r.field("control.socket", raw.control.unwrap_or_default().socket);
        r.socket(field, Some(folder.join("control.sock")))
    };
    let metrics = raw.metrics.and_then(|metrics| self::metrics(r, metrics));
    let start_without_peer = {
        let field = r.field("start_without_peer", raw.start_without_peer);
        r.choice(
            field,
            StartWithoutPeer::Allow,
            &[("allow", StartWithoutPeer::Allow), ("deny", StartWithoutPeer::Deny)],
        )
    };
    distinct_sockets(r, &disks, &control_socket, metrics.as_ref());
    Config {
        file: r.file().to_owned(),
        pair,
        site,
        folder,
        runtime_dir,
        disks,
        nbd,
        listen,
        peer,
        tls,
        interval,
        bandwidth: Schedule { base, windows },
        data_streams,
        preserve,
        journal_bytes,
        verify_bytes_per_second,
        retention,
        hook,
        control_socket,
        metrics,
        start_without_peer,
    }
}

fn pair(r: &mut Reader<'_>, raw: raw::Pair) -> Pair {
    let id = r.field("pair.id", raw.id);
    let name = r.field("pair.name", raw.name);
    Pair {
        id: r.parsed(id, "00000000-0000-0000-0000-000000000001", "a UUID, the same at both sites"),
        name: r.name(name, 253, true),
    }
}

fn nbd(r: &mut Reader<'_>, raw: raw::Nbd) -> Nbd {
    let dir = r.field("nbd.dir", raw.dir);
    let mode = r.field("nbd.mode", raw.mode);
    Nbd { dir: r.path(dir, None), mode: r.mode(mode, SOCKET_MODE_DEFAULT) }
}

fn disks(r: &mut Reader<'_>, raw: Vec<toml::Spanned<raw::Disk>>, nbd: &Nbd) -> Vec<Disk> {
    if raw.is_empty() || raw.len() > DISKS_MAX {
        r.refuse(
            &Field::missing("disk"),
            format!("{} disks", raw.len()),
            format!("1 to {DISKS_MAX}"),
            "add a [[disk]] table",
        );
    }
    let (mut names, mut paths) = (HashMap::new(), HashMap::new());
    let mut disks = Vec::new();
    for (index, spanned) in raw.into_iter().enumerate() {
        let at = At::Line(r.line(spanned.span().start));
        let raw = spanned.into_inner();
        let key = |name: &str| format!("disk[{index}].{name}");
        let name_field = r.field_in(&key("name"), raw.name, &at);
        let name = r.name(name_field.clone(), 63, false);
        let path_field = r.field_in(&key("path"), raw.path, &at);
        let path = r.path(path_field.clone(), None);
        let size_field = r.field_in(&key("size"), raw.size, &at);
        let size_bytes = r.size(size_field.clone(), None, BLOCK_BYTES, DISK_BYTES_MAX);
        if size_bytes.is_some_and(|bytes| !bytes.is_multiple_of(512)) {
            r.refuse(
                &size_field,
                "a broken sector".to_owned(),
                "a multiple of 512B".to_owned(),
                "use the size of the image",
            );
        }
        let socket_field = r.field_in(&key("socket"), raw.socket, &at);
        let socket = r.socket(socket_field, Some(nbd.dir.join(format!("{name}.sock"))));
        if let Some(other) = names.insert(name.clone(), index) {
            r.refuse(
                &name_field,
                format!("the name of disk[{other}]"),
                "a name of its own".to_owned(),
                "rename one of them",
            );
        }
        if let Some(other) = paths.insert(path.clone(), index) {
            r.refuse(
                &path_field,
                format!("the path of disk[{other}]"),
                "a path of its own".to_owned(),
                "remove one of them",
            );
        }
        disks.push(Disk { name, path, size_bytes, socket });
    }
    disks
}

fn peer(r: &mut Reader<'_>, raw: raw::Peer, pair: PairId, overrides: &Overrides) -> Peer {
    let addresses_field = r.field("peer.addresses", raw.addresses);
    let addresses = if overrides.peer.is_empty() {
        r.addresses(addresses_field, PEER_ADDRESSES_MAX)
    } else {
        r.addresses(Field::from_flag("peer.addresses", "--peer", &overrides.peer), PEER_ADDRESSES_MAX)
    };
    let name_field = r.field("peer.server_name", raw.server_name);
    Peer { addresses, server_name: r.server_name(name_field, pair.server_name()) }
}

fn tls(r: &mut Reader<'_>, raw: raw::Tls) -> TlsFiles {
    let (ca, certificate, key) =
        (r.field("tls.ca", raw.ca), r.field("tls.certificate", raw.certificate), r.field("tls.key", raw.key));
    TlsFiles { ca: r.path(ca, None), certificate: r.path(certificate, None), key: r.path(key, None) }
}

fn windows(r: &mut Reader<'_>, raw: Vec<toml::Spanned<raw::Window>>) -> Vec<Window> {
    if raw.len() > WINDOWS_MAX {
        r.refuse(
            &Field::missing("window"),
            raw.len().to_string(),
            format!("at most {WINDOWS_MAX}"),
            "join some of them",
        );
    }
    let mut windows = Vec::new();
    for (index, spanned) in raw.into_iter().enumerate() {
        let at = At::Line(r.line(spanned.span().start));
        let raw = spanned.into_inner();
        let key = |name: &str| format!("window[{index}].{name}");
        let days = r.field_in(&key("days"), raw.days, &at);
        let (from, to) = (r.field_in(&key("from"), raw.from, &at), r.field_in(&key("to"), raw.to, &at));
        let bandwidth = r.field_in(&key("bandwidth"), raw.bandwidth, &at);
        let time = "a time of day in UTC such as \"08:00\" (\"24:00\" is the end of the day)";
        windows.push(Window {
            days: r.parsed_or(days, Days::ALL, "days such as \"mon-fri\", \"sat,sun\" or \"daily\""),
            from: r.parsed_with(from, TimeOfDay(0), time),
            to: r.parsed_with(to, TimeOfDay(0), time),
            limit: r.limit_or_pause(bandwidth, BANDWIDTH_MIN_BITS),
        });
    }
    windows
}

fn preserve(r: &mut Reader<'_>, raw: raw::Preserve) -> Preserve {
    let (memory, spill) = (r.field("preserve.memory", raw.memory), r.field("preserve.spill", raw.spill));
    let memory_bytes = r.size(memory, Some(PRESERVE_MEMORY_DEFAULT), PRESERVE_MEMORY_MIN, PRESERVE_MEMORY_MAX);
    let spill_bytes = r.size(spill, Some(PRESERVE_SPILL_DEFAULT), 0, DISK_BYTES_MAX);
    Preserve {
        memory_bytes: memory_bytes.unwrap_or(PRESERVE_MEMORY_DEFAULT),
        spill_bytes: spill_bytes.unwrap_or(PRESERVE_SPILL_DEFAULT),
    }
}

fn retention(r: &mut Reader<'_>, raw: raw::Retention) -> Retention {
    let (count, age) = (r.field("retention.count", raw.count), r.field("retention.age", raw.age));
    Retention {
        count: r.integer(count, RETENTION_COUNT_DEFAULT, 1, RETENTION_COUNT_MAX) as u32,
        age: r.duration(age, None, RETENTION_AGE_MIN, RETENTION_AGE_MAX),
    }
}

fn metrics(r: &mut Reader<'_>, raw: raw::Metrics) -> Option<Metrics> {
    let listen = r.field("metrics.listen", raw.listen);
    let socket = r.field("metrics.socket", raw.socket);
    match (listen.is_given(), socket.is_given()) {
        (true, false) => {
            Some(Metrics::Tcp(r.parsed(listen, "127.0.0.1:9090", "an address and port such as \"127.0.0.1:9100\"")))
        }
        (false, true) => Some(Metrics::Unix(r.socket(socket, None))),
        (both, _) => {
            let found = if both { "both" } else { "neither" };
            let field = if both { &listen } else { &Field::missing("metrics") };
            r.refuse(
                field,
                found.to_owned(),
                "either `listen` or `socket`".to_owned(),
                "give one, or remove [metrics]",
            );
            None
        }
    }
}

/// Two servers on one path would remove each other's socket.
fn distinct_sockets(r: &mut Reader<'_>, disks: &[Disk], control: &Path, metrics: Option<&Metrics>) {
    let mut sockets: Vec<(String, &Path)> = disks
        .iter()
        .enumerate()
        .map(|(index, disk)| (format!("disk[{index}].socket"), disk.socket.as_path()))
        .collect();
    sockets.push(("control.socket".to_owned(), control));
    if let Some(Metrics::Unix(path)) = metrics {
        sockets.push(("metrics.socket".to_owned(), path));
    }
    let mut seen: HashMap<&Path, String> = HashMap::new();
    for (name, path) in sockets {
        if let Some(other) = seen.insert(path, name.clone()) {
            let found = format!("{}, which is `{other}` too", path.display());
            r.refuse(&Field::missing(&name), found, "a socket of its own".to_owned(), "give one of them another path");
        }
    }
}
