//! Where the workspace's binaries are; built with cargo when they are missing or old.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

/// Why a binary is not there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot run cargo: {0}")]
    NoCargo(std::io::Error),
    #[error("cargo build of {name} failed:\n{output}")]
    Failed { name: String, output: String },
    #[error("cargo built {name}, but {path} is not there")]
    Missing { name: String, path: PathBuf },
}

/// The target triple of static programs: gnu with a static C library, which every Rust tool chain has.
const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

/// The workspace's root folder.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("e2e lies in the workspace")
}

/// Cargo's target folder.
pub fn target_folder() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => workspace().join(folder),
        None => workspace().join("target"),
    }
}

/// The profile of the running program's binaries: `WATARI_E2E_PROFILE=release` for benchmarks.
fn profile() -> String {
    std::env::var("WATARI_E2E_PROFILE").unwrap_or_else(|_| "dev".into())
}

/// Cargo's folder for a profile.
fn folder(profile: &str) -> &str {
    if profile == "dev" { "debug" } else { profile }
}

/// Path of a workspace binary (e.g. `watari-sidecar`), freshly built in [`profile`]. Cargo is asked once per process and binary, about the
/// whole workspace: with the features that one package alone needs, it would build all libraries once more.
pub fn binary(name: &str) -> Result<PathBuf, Error> {
    let profile = profile();
    let path = target_folder().join(folder(&profile)).join(name);
    build(name, &["--workspace", "--profile", &profile, "--bin", name], None, path)
}

/// Path of the binary of the package of the same name, as one static, stripped file.
pub fn static_binary(name: &str, profile: &str) -> Result<PathBuf, Error> {
    let path = target_folder().join(STATIC_TARGET).join(folder(profile)).join(name);
    // `--target` keeps these flags away from build scripts and from everybody else's artifacts.
    let arguments = ["--package", name, "--profile", profile, "--target", STATIC_TARGET, "--bin", name];
    build(name, &arguments, Some("-C target-feature=+crt-static -C strip=symbols"), path)
}

/// Path of the static guest program.
pub fn guest_binary() -> Result<PathBuf, Error> {
    static_binary("watari-guest", "release")
}

fn build(name: &str, arguments: &[&str], rustflags: Option<&str>, path: PathBuf) -> Result<PathBuf, Error> {
    static BUILT: OnceLock<Mutex<Vec<PathBuf>>> = OnceLock::new();
    let mut built = BUILT.get_or_init(Mutex::default).lock().expect("a failed build returns, it does not panic");
    if built.contains(&path) {
        return Ok(path);
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet"]).args(arguments).current_dir(workspace());
    if let Some(flags) = rustflags {
        command.env("RUSTFLAGS", flags);
    }
    let output = command.output().map_err(Error::NoCargo)?;
    if !output.status.success() {
        let output = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Error::Failed { name: name.to_owned(), output });
    }
    if !path.exists() {
        return Err(Error::Missing { name: name.to_owned(), path });
    }
    built.push(path.clone());
    Ok(path)
}
