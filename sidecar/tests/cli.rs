//! The command line of the real binary: help, exit codes, words.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use support::{PAIR, RememberingSteering, config_text};
use watari_sidecar::{
    control,
    engine::steering::{Declined, Intent, Outcome},
};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_watari-sidecar")).args(arguments).output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn help_explains_every_subcommand_and_hides_what_is_not_for_people() {
    let help = said(&run(&["--help"]));
    for name in ["primary", "replica", "inspect", "status", "ctl", "pki", "gateway", "Exit codes"] {
        assert!(help.contains(name), "{help}");
    }
    let help = said(&run(&["primary", "--help"]));
    assert!(help.contains("--bandwidth") && !help.contains("--fake-worker") && !help.contains("--restarts"), "{help}");
    for arguments in [vec!["ctl", "--help"], vec!["ctl", "set", "--help"], vec!["pki", "new", "--help"]] {
        assert_eq!(run(&arguments).status.code(), Some(0));
    }
}

#[test]
fn a_bad_command_line_is_refused_with_exit_code_2() {
    for arguments in [
        vec![],
        vec!["primary"],
        vec!["ctl", "--socket", "/x", "set"],
        vec!["ctl", "--socket", "/x", "--config", "/y", "acquire"],
        vec!["ctl", "--socket", "/x", "set", "--bandwidth", "100MB"],
        vec!["ctl", "--socket", "/x", "promote", "--generation", "0"],
        vec!["ctl", "--socket", "/x", "cut", "--wait", "5"],
        vec!["primary", "--config", "/x", "--pass-through"],
        vec!["pki", "new", "--out", "/x", "--site", "Tokyo"],
        vec!["status", "--socket", "/x", "--log", "bogus=wrong"],
    ] {
        let output = run(&arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", said(&output));
    }
}

#[test]
fn a_refused_configuration_ends_with_exit_code_2_and_touches_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.toml");
    fs::write(&config, config_text(folder.path())).unwrap();
    let output = run(&["primary", "--config", config.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    let words = said(&output);
    for part in ["`tls.ca`", "`tls.key`", "`disk[0].path`", "does not exist", "refused"] {
        assert!(words.contains(part), "{words}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing was made");
}

/// Each is refused by the real binary, by field, with exit code 2, before a file is made.
#[test]
fn bad_input_of_the_world_is_refused_by_field_and_touches_no_file() {
    use support::{Folder, OTHER_PAIR, authority, identity};
    use watari_sidecar::pki::Validity;
    let ca = authority("both");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_text = taken.local_addr().unwrap().to_string();
    let cases: Vec<(&str, Folder, Vec<&str>)> = vec![
        (
            "size = \"1MiB\"",
            Folder::new(&ca, &ca, identity(PAIR, "tokyo"), Validity::days(1)),
            vec!["`listen`", "in use"],
        ),
        (
            "size = \"2MiB\"",
            Folder::new(&ca, &ca, identity(PAIR, "tokyo"), Validity::days(1)),
            vec!["`disk[0].size`", "found 2MiB, larger than the 1MiB of"],
        ),
        (
            "size = \"1MiB\"",
            Folder::new(&ca, &ca, identity(OTHER_PAIR, "tokyo"), Validity::days(1)),
            vec!["`tls.certificate`", OTHER_PAIR, PAIR],
        ),
        (
            "size = \"1MiB\"\nsise = 1",
            Folder::new(&ca, &ca, identity(PAIR, "tokyo"), Validity::days(1)),
            vec!["unknown field `sise`", "`socket`", "config.toml:12"],
        ),
    ];
    for (size, folder, parts) in cases {
        let text = config_text(folder.dir.path()).replace("size = \"1MiB\"", size);
        fs::write(folder.path("config.toml"), text.replace("127.0.0.1:0", &taken_text)).unwrap();
        fs::write(folder.path("root.img"), vec![0; 1 << 20]).unwrap();
        let files = || {
            let mut names: Vec<_> =
                fs::read_dir(folder.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        let before = files();
        for more in [vec![], vec!["--no-supervisor"]] {
            let config = folder.path("config.toml");
            let output = run(&[vec!["primary", "--config", config.to_str().unwrap()], more].concat());
            let words = said(&output);
            assert_eq!(output.status.code(), Some(2), "{words}");
            assert!(parts.iter().all(|part| words.contains(part)), "{parts:?}: {words}");
        }
        assert_eq!(files(), before);
    }
}

#[test]
fn certificates_made_by_hand_pass_the_check_of_both_sites() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("pki");
    let out_text = out.to_str().unwrap();
    let made = run(&["pki", "new", "--out", out_text, "--site", "tokyo", "--site", "osaka", "--pair", PAIR]);
    assert_eq!(made.status.code(), Some(0), "{}", said(&made));
    let words = said(&made);
    assert!(words.contains(&format!("id = \"{PAIR}\"")) && words.contains("ca.key off both hosts"), "{words}");
    for site in ["tokyo", "osaka"] {
        let config = folder.path().join(format!("{site}.toml"));
        let text = config_text(folder.path()).replace("site = \"tokyo\"", &format!("site = \"{site}\""));
        let root = folder.path().display();
        let text = ["ca.crt", "tls.crt", "tls.key"]
            .iter()
            .fold(text, |text, name| text.replace(&format!("{root}/{name}"), &format!("{out_text}/{site}/{name}")));
        fs::write(&config, text).unwrap();
        let check = run(&["replica", "--check", "--config", config.to_str().unwrap()]);
        assert_eq!(check.status.code(), Some(0), "{}", said(&check));
        assert!(said(&check).contains(&format!("at site {site}")));
        let files = watari_sidecar::config::TlsFiles {
            ca: out.join(site).join("ca.crt"),
            certificate: out.join(site).join("tls.crt"),
            key: out.join(site).join("tls.key"),
        };
        watari_sidecar::tls::Tls::load(files, support::identity(PAIR, site)).unwrap();
    }
    private(&out.join("authority/ca.key"));
    private(&out.join("tokyo/tls.key"));
    let again = run(&["pki", "new", "--out", out_text, "--site", "tokyo", "--site", "osaka"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(said(&again).contains("found an existing file"), "{}", said(&again));
}

fn private(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{}", path.display());
}

#[test]
fn a_renewed_certificate_is_of_the_same_pair_and_site() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    assert!(run(&["pki", "new", "--out", out, "--site", "tokyo", "--site", "osaka", "--pair", PAIR]).status.success());
    let before = fs::read(folder.path().join("tokyo/tls.crt")).unwrap();
    let renewed = run(&["pki", "renew", "--out", out, "--site", "tokyo", "--days", "10"]);
    assert!(renewed.status.success(), "{}", said(&renewed));
    assert_ne!(fs::read(folder.path().join("tokyo/tls.crt")).unwrap(), before);
    let files = watari_sidecar::config::TlsFiles {
        ca: folder.path().join("osaka/ca.crt"),
        certificate: folder.path().join("tokyo/tls.crt"),
        key: folder.path().join("tokyo/tls.key"),
    };
    let status = watari_sidecar::tls::Tls::load(files, support::identity(PAIR, "tokyo")).unwrap().status();
    assert_eq!((status.not_after_unix_seconds - status.not_before_unix_seconds) / 86_400, 10);
    assert_eq!(run(&["pki", "renew", "--out", out, "--site", "kyoto"]).status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn ctl_and_status_speak_to_a_running_sidecar_and_exit_codes_tell_a_refusal() {
    let folder = tempfile::tempdir().unwrap();
    let steering = RememberingSteering::new();
    let socket = control::serve(&folder.path().join("control.sock"), steering.clone()).unwrap();
    let config = folder.path().join("config.toml");
    fs::write(&config, config_text(folder.path())).unwrap();
    let (socket_text, config_text) = (socket.path().to_str().unwrap(), config.to_str().unwrap());
    let run = |arguments: &[&str]| {
        let arguments: Vec<String> = arguments.iter().map(|argument| argument.to_string()).collect();
        tokio::task::block_in_place(move || run(&arguments.iter().map(String::as_str).collect::<Vec<_>>()))
    };
    steering.answer(Ok(Outcome::Committed { epoch: 1, number: 4 }));
    let cut = run(&["ctl", "--config", config_text, "cut", "--wait", "2s"]);
    assert_eq!((cut.status.code(), said(&cut).as_str()), (Some(0), "generation 1.4 is committed\n"));
    assert_eq!(steering.last(), Intent::Cut { wait: std::time::Duration::from_secs(2) });
    let set = run(&["ctl", "--socket", socket_text, "set", "--bandwidth", "5Mbit", "--paused", "false"]);
    assert_eq!(set.status.code(), Some(0), "{}", said(&set));
    let Intent::Configure(settings) = steering.last() else { panic!("{:?}", steering.last()) };
    assert_eq!((settings.bandwidth_bits_per_second, settings.paused), (Some(5_000_000), Some(false)));
    assert_eq!((settings.interval, settings.slow_down), (None, None));
    steering.answer(Err(Declined("nothing to void".to_owned())));
    let void = run(&["ctl", "--socket", socket_text, "void"]);
    assert_eq!((void.status.code(), said(&void).contains("declined: nothing to void")), (Some(1), true));
    let page = run(&["status", "--socket", socket_text, "--once"]);
    assert!(said(&page).contains("default/vm1 at tokyo") && page.status.success(), "{}", said(&page));
    let json = run(&["status", "--socket", socket_text, "--once", "--json"]);
    let report: watari_wire::report::Report = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(report, *steering.report.lock().unwrap());
    drop(socket);
    let gone = run(&["status", "--config", config_text, "--once"]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(said(&gone).contains("found no running sidecar"), "{}", said(&gone));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_terminal_status_prints_a_line_for_each_change_and_ends_with_the_sidecar() {
    use std::io::{BufRead, BufReader};
    let folder = tempfile::tempdir().unwrap();
    let steering = RememberingSteering::new();
    let socket = control::serve(&folder.path().join("control.sock"), steering.clone()).unwrap();
    let mut status = Command::new(env!("CARGO_BIN_EXE_watari-sidecar"))
        .args(["status", "--every", "100ms", "--socket"])
        .arg(socket.path())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(status.stdout.take().unwrap()).lines();
    let first = tokio::task::block_in_place(|| lines.next().unwrap().unwrap());
    assert!(first.contains("Serving epoch 0"), "{first}");
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    steering.report.lock().unwrap().role = "Converging".to_owned();
    let second = tokio::task::block_in_place(|| lines.next().unwrap().unwrap());
    assert!(second.contains("Converging"), "an unchanged report prints nothing: {second}");
    drop(socket);
    let ended = tokio::task::block_in_place(|| status.wait().unwrap());
    assert!(ended.code().is_some());
}
