//! The outputs before foreign judges: libvirt's schema, and libvirt's own QEMU driver, which turns each into QEMU's command line.
//!
//! Needs libvirt's clients and QEMU driver; where they are missing the tests fail and say what to run.

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use common::{FIXTURES, fixture, options, synced};
use watari_hook::lossy::lossy;
use watari_hook::rewrite;

fn run(program: &str, arguments: &[&str]) -> (bool, String) {
    let output = match Command::new(program).args(arguments).output() {
        Ok(output) => output,
        Err(e) => panic!("{program}: {e}: run e2e/setup.sh"),
    };
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

/// The rewritten fixture in a file, for a machine without KVM and without the paths of a virt-launcher Pod.
fn output_file(folder: &Path, name: &str, change: impl Fn(String) -> String) -> String {
    let (_, volumes, marker) = FIXTURES.iter().find(|(n, ..)| *n == name).expect("a listed fixture");
    let done = rewrite(fixture(name).as_bytes(), &synced(volumes), &options(*marker)).expect("rewritable");
    let path = folder.join(format!("{name}.xml"));
    std::fs::write(&path, change(done.xml)).expect("written");
    path.to_str().expect("a text path").to_owned()
}

/// Remove `<tag>…</tag>` and `<tag …/>`: what libvirt's schema does not know or this machine does not have.
fn without(mut xml: String, tag: &str) -> String {
    while let Some(start) = xml.find(&format!("<{tag}")) {
        let closing = format!("</{tag}>");
        let end = match xml[start..].find(&closing) {
            Some(at) => start + at + closing.len(),
            None => start + xml[start..].find("/>").expect("a self-closing element") + 2,
        };
        xml.replace_range(start..end, "");
    }
    xml
}

/// KubeVirt's own additions to `<disk>`, which libvirt ignores but its schema refuses, and our fixtures' foreign element.
fn plain(mut xml: String) -> String {
    for tag in ["filesystemOverhead", "capacity", "expandDisksEnabled", "unknown:thing", "cpu", "sysinfo", "smbios"] {
        xml = without(xml, tag);
    }
    xml
}

#[test]
fn every_output_is_valid_by_libvirts_schema() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, ..) in FIXTURES {
        let file = output_file(folder.path(), name, plain);
        let (valid, text) = run("virt-xml-validate", &[&file, "domain"]);
        assert!(valid, "{name}: {text}");
    }
}

/// libvirt's QEMU driver inside virsh, with a root of its own: no daemon.
///
/// In a new root the driver asks each QEMU twice what it can do, so tests that run at the same time share one, and take turns.
struct Driver {
    root: tempfile::TempDir,
    turn: Mutex<()>,
}

impl Driver {
    fn shared() -> Arc<Driver> {
        static SHARED: Mutex<Weak<Driver>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(driver) = shared.upgrade() {
            return driver;
        }
        let driver = Arc::new(Driver { root: tempfile::tempdir().expect("a temporary folder"), turn: Mutex::new(()) });
        *shared = Arc::downgrade(&driver);
        driver
    }

    /// What QEMU would be started with; else the driver's objection.
    ///
    /// The driver waits until each QEMU that it asked is gone. They are nobody's children, so how soon depends on process 1, which
    /// in some containers looks every two seconds only; in a process namespace of its own it is a shell, which looks at once.
    fn native(&self, file: &str) -> (bool, String) {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let uri = format!("qemu:///embed?root={}", self.root.path().join("libvirt").display());
        let apart = ["--pid", "--fork", "--kill-child=KILL", "--mount-proc", "sh", "-c", "\"$@\"; exit $?", "sh"];
        let virsh = ["virsh", "-c", &uri, "domxml-to-native", "qemu-argv", "--xml", file];
        run("unshare", &[&apart[..], &virsh[..]].concat())
    }
}

#[test]
fn libvirt_and_qemu_take_each_served_disk_with_its_socket_delay_and_policies() {
    let (folder, driver) = (tempfile::tempdir().expect("a temporary folder"), Driver::shared());
    for (name, volumes, _) in FIXTURES.iter().filter(|(n, ..)| *n != "left_alone") {
        let file = output_file(folder.path(), name, |xml| plain(xml).replace("type=\"kvm\"", "type=\"qemu\""));
        let (taken, text) = driver.native(&file);
        assert!(taken, "{name}: {text}");
        for volume in *volumes {
            let blockdev = format!(
                "\"driver\":\"nbd\",\"server\":{{\"type\":\"unix\",\"path\":\"/var/run/watari/{volume}.sock\"}},\
                 \"export\":\"{volume}\",\"reconnect-delay\":120"
            );
            assert!(text.contains(&blockdev), "{name}: no {blockdev} in {text}");
            let device = text.split("-device").find(|d| d.contains(&format!("\"id\":\"ua-watari-{volume}\"")));
            let device = device.unwrap_or_else(|| panic!("{name}: no device ua-watari-{volume} in {text}"));
            assert!(device.contains("\"werror\":\"stop\",\"rerror\":\"stop\""), "{name}: {device}");
        }
        assert!(!text.contains("\"aio\":\"native\""), "{name}: {text}");
    }
}

#[test]
fn the_form_that_kubevirt_hands_back_is_one_that_would_go_to_a_tcp_port_if_we_did_nothing() {
    // The trap that makes rewriting fully each time necessary: libvirt accepts the lossy form, without our socket.
    let (folder, driver) = (tempfile::tempdir().expect("a temporary folder"), Driver::shared());
    let file = output_file(folder.path(), "virtio_cloudinit_disk", |xml| {
        plain(lossy(xml.as_bytes()).expect("well-formed")).replace("type=\"kvm\"", "type=\"qemu\"")
    });
    let (taken, text) = driver.native(&file);
    assert!(taken, "{text}");
    assert!(text.contains("\"type\":\"inet\"") && !text.contains("/var/run/watari/root.sock"), "{text}");
}
