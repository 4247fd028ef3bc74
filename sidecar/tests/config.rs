//! The configuration file: the samples are valid, and everything else is refused in words that help.

#![allow(clippy::unwrap_used)]

use std::{fs, path::Path, time::Duration};

use watari_sidecar::{
    config::{
        Config, ConfigError, Metrics, Overrides, Refusal, StartWithoutPeer,
        world::{self, Start},
    },
    throttle::Limit,
};

const MINIMAL: &str = r#"site = "tokyo"
folder = "/var/lib/watari/vm1"
listen = "127.0.0.1:7070"
[pair]
id = "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10"
name = "default/vm1"
[[disk]]
name = "root"
path = "/images/root.img"
[nbd]
dir = "/run/watari/vm1"
[peer]
addresses = ["osaka.example:7070"]
[tls]
ca = "/etc/watari/ca.crt"
certificate = "/etc/watari/tls.crt"
key = "/etc/watari/tls.key"
"#;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(Path::new("/etc/watari/vm1.toml"), text, &Overrides::default())
}

/// The refusals of the minimal file after `from` was replaced by `to`.
fn refusals(from: &str, to: &str) -> Vec<Refusal> {
    assert!(MINIMAL.contains(from), "{from}");
    match parse(&MINIMAL.replacen(from, to, 1)) {
        Err(ConfigError::Refused(refusals)) => refusals,
        other => panic!("{to}: {other:?}"),
    }
}

#[test]
fn every_sample_file_is_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples-config");
    let mut count = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            let config = Config::load(&path, &Overrides::default()).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(config.pair.name, "default/vm1");
            count += 1;
        }
    }
    assert!(count >= 3, "{count}");
}

#[test]
fn the_sample_of_a_primary_shows_the_defaults_it_claims() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples-config/primary.toml");
    let text = fs::read_to_string(&path).unwrap();
    let config = parse(&text).unwrap();
    // Each commented-out value with a literal default, put into force, must change nothing.
    let mut put_into_force = 0;
    for line in text.lines() {
        let Some(setting) = line.strip_prefix("# ") else { continue };
        let is_setting = setting.split_once(" = ").is_some_and(|(key, value)| {
            key.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
                && !value.contains('<')
                && !setting.starts_with("size")
                && !setting.starts_with("age")
        });
        if is_setting {
            assert_eq!(parse(&text.replacen(line, setting, 1)).unwrap(), config, "{setting}");
            put_into_force += 1;
        }
    }
    assert!(put_into_force >= 6, "{put_into_force}");
}

#[test]
fn a_minimal_file_gets_every_default() {
    let config = parse(MINIMAL).unwrap();
    assert_eq!(config.interval, Duration::from_secs(10));
    assert_eq!(config.bandwidth.base, Limit::Unlimited);
    assert_eq!(config.control_socket, Path::new("/var/lib/watari/vm1/control.sock"));
    assert_eq!(config.runtime_dir, Path::new("/dev/shm/watari/6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10-tokyo"));
    assert_eq!(config.disks[0].socket, Path::new("/run/watari/vm1/root.sock"));
    assert_eq!(config.disks[0].size_bytes, None);
    assert_eq!(config.peer.server_name, "6f1c1e0a-8a52-4c0e-9d55-0c9a3b7e4f10.pair.watari.internal");
    assert_eq!(config.start_without_peer, StartWithoutPeer::Allow);
    assert_eq!((config.metrics, config.hook), (None, None));
    assert_eq!((config.retention.count, config.retention.age), (3, None));
    assert_eq!((config.preserve.memory_bytes, config.journal_bytes), (64 << 20, 2 << 30));
    assert_eq!((config.nbd.mode, config.data_streams), (0o660, 2));
}

#[test]
fn an_unknown_key_is_refused_with_file_line_and_the_known_keys() {
    let text = MINIMAL.replace("[nbd]\n", "[nbd]\nfolder = \"/x\"\n");
    let line = text.lines().position(|line| line == "folder = \"/x\"").unwrap() + 1;
    let error = parse(&text).unwrap_err();
    let ConfigError::Syntax { line: found, .. } = &error else { panic!("{error}") };
    assert_eq!(*found, line);
    let words = error.to_string();
    for part in ["/etc/watari/vm1.toml:11", "unknown field `folder`", "`dir`", "`mode`"] {
        assert!(words.contains(part), "{words}");
    }
    let words = parse("sight = \"tokyo\"\n").unwrap_err().to_string();
    assert!(
        words.contains("vm1.toml:1") && words.contains("`site`") && words.contains("`start_without_peer`"),
        "{words}"
    );
}

#[test]
fn each_bad_value_is_refused_with_its_field_and_line() {
    let table = [
        ("site = \"tokyo\"", "site = \"Tokyo\"", "site", 1),
        ("/var/lib/watari/vm1", "var/lib", "folder", 2),
        ("/var/lib/watari/vm1", "/var/../lib", "folder", 2),
        ("127.0.0.1:7070", "localhost:7070", "listen", 3),
        ("6f1c1e0a-", "6f1c1e0a", "pair.id", 5),
        ("default/vm1", "default//vm1", "pair.name", 6),
        ("name = \"root\"", "name = \"../root\"", "disk[0].name", 8),
        ("name = \"root\"", "name = 5", "disk[0].name", 8),
        ("path = \"/images/root.img\"", "path = \"/images/root.img\"\nsize = \"1KiB\"", "disk[0].size", 10),
        ("path = \"/images/root.img\"", "path = \"/images/root.img\"\nsize = \"4100B\"", "disk[0].size", 10),
        ("path = \"/images/root.img\"", "path = \"/images/root.img\"\nsize = 1048576", "disk[0].size", 10),
        ("dir = \"/run/watari/vm1\"", "dir = \"/run/watari/vm1\"\nmode = \"0222\"", "nbd.mode", 12),
        ("osaka.example:7070", "osaka.example", "peer.addresses", 13),
        ("osaka.example:7070", "osaka.example:0", "peer.addresses", 13),
        ("[\"osaka.example:7070\"]", "[]", "peer.addresses", 13),
        ("[\"osaka.example:7070\"]", "[7070]", "peer.addresses", 13),
        ("/etc/watari/tls.key", "", "tls.key", 17),
        ("[pair]", "interval = \"1ms\"\n[pair]", "interval", 4),
        ("[pair]", "interval = 10\n[pair]", "interval", 4),
        ("[pair]", "bandwidth = \"1kbit\"\n[pair]", "bandwidth", 4),
        ("[pair]", "bandwidth = \"100MB\"\n[pair]", "bandwidth", 4),
        ("[pair]", "data_streams = 0\n[pair]", "data_streams", 4),
        ("[pair]", "data_streams = 17\n[pair]", "data_streams", 4),
        ("[pair]", "journal = \"1MiB\"\n[pair]", "journal", 4),
        ("[pair]", "start_without_peer = true\n[pair]", "start_without_peer", 4),
        ("[tls]", "[preserve]\nmemory = \"1MiB\"\n[tls]", "preserve.memory", 15),
        ("[tls]", "[retention]\ncount = 0\n[tls]", "retention.count", 15),
        ("[tls]", "[retention]\nage = \"1s\"\n[tls]", "retention.age", 15),
        ("[tls]", "[hook]\ndir = \"hooks\"\n[tls]", "hook.dir", 15),
        ("[tls]", "[metrics]\nlisten = \"9370\"\n[tls]", "metrics.listen", 15),
    ];
    for (from, to, field, line) in table {
        let refusals = refusals(from, to);
        assert_eq!(refusals.len(), 1, "{to}: {refusals:?}");
        assert_eq!(refusals[0].field, field, "{refusals:?}");
        assert_eq!(refusals[0].place, format!("/etc/watari/vm1.toml:{line}"), "{refusals:?}");
        assert!(!refusals[0].remedy.is_empty() && !refusals[0].expected.is_empty() && !refusals[0].found.is_empty());
    }
}

#[test]
fn a_missing_field_is_refused_even_when_its_whole_table_is_missing() {
    for (text, fields) in [
        ("site = \"tokyo\"\n", vec!["site"]),
        ("name = \"root\"\n", vec!["disk[0].name"]),
        ("[nbd]\ndir = \"/run/watari/vm1\"\n", vec!["nbd.dir"]),
        ("[peer]\naddresses = [\"osaka.example:7070\"]\n", vec!["peer.addresses"]),
        ("[[disk]]\nname = \"root\"\npath = \"/images/root.img\"\n", vec!["disk"]),
    ] {
        let found: Vec<String> = refusals(text, "").into_iter().map(|refusal| refusal.field).collect();
        assert_eq!(found, fields);
    }
}

#[test]
fn all_refusals_of_a_file_are_reported_together() {
    let text = MINIMAL.replace("tokyo", "TOKYO").replace("127.0.0.1:7070", "x").replace("/images/root.img", "images");
    let words = parse(&text).unwrap_err().to_string();
    assert_eq!(words.lines().count(), 3, "{words}");
}

#[test]
fn disks_and_servers_must_not_share_names_paths_or_sockets() {
    let second = |extra: &str| format!("path = \"/images/root.img\"\n[[disk]]\n{extra}");
    let table = [
        ("name = \"root\"\npath = \"/images/two.img\"", vec!["disk[1].name", "disk[1].socket"]),
        ("name = \"two\"\npath = \"/images/root.img\"", vec!["disk[1].path"]),
        ("name = \"two\"\npath = \"/images/two.img\"\nsocket = \"/run/watari/vm1/root.sock\"", vec!["disk[1].socket"]),
    ];
    for (extra, fields) in table {
        let found: Vec<String> = refusals("path = \"/images/root.img\"\n", &second(&format!("{extra}\n")))
            .into_iter()
            .map(|r| r.field)
            .collect();
        assert_eq!(found, fields);
    }
    let control = refusals("[tls]", "[control]\nsocket = \"/run/watari/vm1/root.sock\"\n[tls]");
    assert_eq!(control[0].field, "control.socket");
}

#[test]
fn a_socket_path_too_long_for_the_system_is_refused() {
    let long = format!("dir = \"/run/{}\"", "x".repeat(100));
    let refusals = refusals("dir = \"/run/watari/vm1\"", &long);
    assert_eq!(refusals[0].field, "disk[0].socket");
    assert!(refusals[0].expected.contains("107"));
}

#[test]
fn flags_win_over_the_file_and_are_named_when_they_are_wrong() {
    let overrides = Overrides {
        listen: Some("[::1]:9000".to_owned()),
        peer: vec!["10.0.0.9:7070".to_owned(), "[2001:db8::1]:7070".to_owned()],
        interval: Some("1m".to_owned()),
        bandwidth: Some("5Mbit".to_owned()),
    };
    let path = Path::new("vm1.toml");
    let config = Config::parse(path, MINIMAL, &overrides).unwrap();
    assert_eq!(config.listen, "[::1]:9000".parse().unwrap());
    assert_eq!(config.peer.addresses, overrides.peer);
    assert_eq!(config.interval, Duration::from_secs(60));
    assert_eq!(config.bandwidth.base, Limit::BitsPerSecond(5_000_000));
    let wrong = Overrides { peer: vec!["nowhere".to_owned()], ..Overrides::default() };
    let words = Config::parse(path, MINIMAL, &wrong).unwrap_err().to_string();
    assert!(words.starts_with("--peer: `peer.addresses`") && words.contains("nowhere"), "{words}");
}

#[test]
fn metrics_are_served_at_one_place_or_not_at_all() {
    let socket = MINIMAL.replace("[tls]", "[metrics]\nsocket = \"/run/m.sock\"\n[tls]");
    assert_eq!(parse(&socket).unwrap().metrics, Some(Metrics::Unix("/run/m.sock".into())));
    let both = "[metrics]\nsocket = \"/run/m.sock\"\nlisten = \"127.0.0.1:1\"\n[tls]";
    assert_eq!(refusals("[tls]", both)[0].field, "metrics.listen");
    assert_eq!(refusals("[tls]", "[metrics]\n[tls]")[0].field, "metrics");
}

#[test]
fn a_file_that_is_missing_or_a_folder_or_huge_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let huge = folder.path().join("huge.toml");
    fs::write(&huge, vec![b'#'; (1 << 20) + 1]).unwrap();
    for path in [folder.path().join("none.toml"), folder.path().to_owned(), huge] {
        let error = Config::load(&path, &Overrides::default()).unwrap_err();
        assert!(matches!(error, ConfigError::File { .. }), "{error}");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
}

#[test]
fn the_world_is_looked_at_before_anything_is_touched() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().display();
    let text = MINIMAL
        .replace("/var/lib/watari/vm1", &format!("{root}/state"))
        .replace("/images/root.img\"", &format!("{root}/root.img\"\nsize = \"2MiB\""))
        .replace("/etc/watari", &root.to_string());
    let config = parse(&text).unwrap();
    let fields = |start| match world::check(&config, start) {
        Ok(()) => Vec::new(),
        Err(ConfigError::Refused(refusals)) => refusals.into_iter().map(|refusal| refusal.field).collect(),
        Err(other) => panic!("{other}"),
    };
    assert_eq!(fields(Start::Primary), ["tls.ca", "tls.certificate", "tls.key", "disk[0].path"]);
    let astray = parse(&text.replace("/state", "/no/such/state")).unwrap();
    let words = world::check(&astray, Start::Replica).unwrap_err().to_string();
    assert!(words.contains("`folder`: found") && words.contains("/no/such: does not exist"), "{words}");
    let sizeless = parse(&text.replace("size = \"2MiB\"", "")).unwrap();
    let words = world::check(&sizeless, Start::Replica).unwrap_err().to_string();
    assert!(words.contains("disk[0].size"), "{words}");
    for name in ["ca.crt", "tls.crt", "tls.key"] {
        fs::write(folder.path().join(name), "").unwrap();
    }
    assert_eq!(fields(Start::Replica), [""; 0], "a replica makes its images");
    fs::write(folder.path().join("root.img"), vec![0; 1 << 20]).unwrap();
    assert_eq!(fields(Start::Primary), ["disk[0].size"], "smaller than recorded");
    fs::write(folder.path().join("root.img"), vec![0; 3 << 20]).unwrap();
    assert_eq!(fields(Start::Primary), [""; 0], "larger is normal");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4, "nothing was made");
}

proptest::proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in "[ -~\n\"\\[\\]=]{0,300}", cut in 0usize..MINIMAL.len(), at in 0usize..MINIMAL.len()) {
        drop(parse(&text));
        let mut mutated = MINIMAL.to_owned();
        let at = at.min(cut);
        if mutated.is_char_boundary(at) && mutated.is_char_boundary(cut) {
            mutated.replace_range(at..cut, &text);
        }
        drop(parse(&mutated));
    }
}
