//! The launcher's image: the machine's own Debian packages of libvirt and QEMU with all they need, the test guest, and this program.
//!
//! So whoever can run the whole-system tests has the image too, in the same versions, without a registry and without a download.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::json;
use watari_clusters::folders::Folders;
use watari_clusters::images::{self, Image};
use watari_e2e::guest::BootFiles;

/// What virtual machines run in.
pub const LAUNCHER_IMAGE: &str = "watari.internal/kubevirt-standin-launcher:1";
/// What the compute container runs; what they depend on comes with them.
const PACKAGES: [&str; 7] = [
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "libvirt-clients",
    "qemu-system-x86",
    "qemu-utils",
    "bash",
    "coreutils",
];
/// Of no use there, and large.
const LEFT_OUT: [&str; 5] =
    ["usr/share/doc/", "usr/share/man/", "usr/share/locale/", "usr/share/icons/", "usr/share/info/"];

fn output(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| program.to_owned())?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Paths, without the leading slash, of everything in the packages and what they depend on.
fn files() -> anyhow::Result<BTreeSet<String>> {
    let mut arguments = vec!["depends", "--recurse", "--installed", "--no-recommends", "--no-suggests"];
    arguments.extend(["--no-conflicts", "--no-breaks", "--no-replaces", "--no-enhances"]);
    arguments.extend(PACKAGES);
    let listed = output("apt-cache", &arguments)?;
    let packages: BTreeSet<&str> =
        listed.lines().filter(|line| line.starts_with(|first: char| first.is_ascii_alphanumeric())).collect();
    // Some names are virtual, and not installed under that name.
    let installed = output("dpkg-query", &["-W", "-f", "${db:Status-Status} ${Package}\n"])?;
    let installed: BTreeSet<&str> = installed.lines().filter_map(|line| line.strip_prefix("installed ")).collect();
    let names: Vec<&str> = packages.intersection(&installed).copied().collect();
    for package in PACKAGES {
        ensure!(names.contains(&package), "package {package} is not installed: run e2e/setup.sh");
    }
    let listed = output("dpkg", &[&["-L"], names.as_slice()].concat())?;
    let paths = listed.lines().filter_map(|line| line.strip_prefix('/'));
    let wanted = paths.filter(|path| LEFT_OUT.iter().all(|prefix| !path.starts_with(prefix)));
    Ok(wanted.filter(|path| Path::new("/").join(path).symlink_metadata().is_ok()).map(str::to_owned).collect())
}

/// Copies the files into `tree`, keeping what they are.
fn copy(files: &BTreeSet<String>, tree: &Path) -> anyhow::Result<()> {
    for name in ["bin", "sbin", "lib", "lib64"] {
        std::fs::create_dir_all(tree.join("usr").join(name))?;
        std::os::unix::fs::symlink(format!("usr/{name}"), tree.join(name))?;
    }
    let mut pack = Command::new("tar");
    pack.args(["-C", "/", "--no-recursion", "-T", "-", "-cf", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut pack = pack.spawn()?;
    let (mut list, stream) = (pack.stdin.take().context("piped")?, pack.stdout.take().context("piped")?);
    let mut unpack = Command::new("tar");
    let mut unpack = unpack.args(["--keep-directory-symlink", "-xf", "-", "-C"]).arg(tree).stdin(stream).spawn()?;
    let text = files.iter().map(|path| format!("{path}\n")).collect::<String>();
    list.write_all(text.as_bytes())?;
    drop(list);
    ensure!(pack.wait()?.success() && unpack.wait()?.success(), "tar failed");
    Ok(())
}

/// Packs the image; `program` is this program, built. The packages are a layer of their own, made anew when one of them changes.
pub fn ensure(folders: &Folders, program: &Path) -> anyhow::Result<PathBuf> {
    let scratch = |name: &str| folders.images().join(format!(".{name}-{}", std::process::id()));
    let base = folders.images().join(".kubevirt-standin-packages");
    let stamp = base.with_extension("stamp");
    let wanted = files()?;
    let versions = versions(&wanted)?;
    if std::fs::read_to_string(&stamp).ok().as_ref() != Some(&versions) {
        let fresh = scratch("kubevirt-standin-packages");
        std::fs::create_dir_all(&fresh)?;
        packages(&wanted, &fresh)?;
        if base.exists() {
            std::fs::remove_dir_all(&base)?;
        }
        std::fs::rename(&fresh, &base)?;
        std::fs::write(&stamp, versions)?;
    }
    let own = scratch("kubevirt-standin-own");
    std::fs::create_dir_all(&own)?;
    let result = fill(&own, program).and_then(|()| {
        let image = Image { name: LAUNCHER_IMAGE, config: json!({ "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] }) };
        Ok(images::pack(&folders.images(), "kubevirt-standin-launcher", &[&base, &own], &[image])?)
    });
    std::fs::remove_dir_all(&own)?;
    result
}

/// Changes with what is installed.
fn versions(files: &BTreeSet<String>) -> anyhow::Result<String> {
    let installed = output("dpkg-query", &["-W", "-f", "${Package} ${Version}\n"])?;
    Ok(format!("{installed}{} files\n", files.len()))
}

/// The lower layer.
fn packages(files: &BTreeSet<String>, tree: &Path) -> anyhow::Result<()> {
    copy(files, tree)?;
    for folder in ["etc", "run", "var", "tmp", "guest", "proc", "sys", "dev"] {
        std::fs::create_dir_all(tree.join(folder))?;
    }
    if tree.join("var/run").symlink_metadata().is_err() {
        std::os::unix::fs::symlink("../run", tree.join("var/run"))?;
    }
    // Everybody's: sockets of the session are made there by uid 107.
    for folder in ["run", "tmp"] {
        std::fs::set_permissions(tree.join(folder), std::os::unix::fs::PermissionsExt::from_mode(0o1777))?;
    }
    std::fs::write(
        tree.join("etc/passwd"),
        "root:x:0:0::/:/bin/sh\nqemu:x:107:107::/var/run/kubevirt-private:/bin/sh\n",
    )?;
    std::fs::write(tree.join("etc/group"), "root:x:0:\nqemu:x:107:\n")?;
    Ok(())
}

/// The upper layer: this program and the guest.
fn fill(tree: &Path, program: &Path) -> anyhow::Result<()> {
    for folder in ["guest", "usr/bin"] {
        std::fs::create_dir_all(tree.join(folder))?;
    }
    let BootFiles { kernel, initramfs } = BootFiles::prepare()?;
    std::fs::copy(kernel, tree.join("guest/vmlinuz"))?;
    std::fs::copy(initramfs, tree.join("guest/initramfs.cpio"))?;
    // Debugging it takes the unstripped one; a node need not unpack 200 MB each time.
    let strip = Command::new("strip").arg("-o").arg(tree.join("usr/bin/kubevirt-standin")).arg(program).status()?;
    ensure!(strip.success(), "strip failed");
    Ok(())
}
