//! The cluster's programs, built by the ordinary Go client from the pinned modules in `tools/` and kept outside the work tree.
//!
//! A program is built under another name and renamed, so that an interrupted build is never taken for a finished one; what Go has
//! compiled until then is in its own cache. The folder carries the hash of the module files: another pin, another folder.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use watari_e2e::build;

use crate::folders::{self, Folders};

/// Why a program is not there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Folder(#[from] folders::Error),
    #[error("{0} names no version of k8s.io/kubernetes")]
    NoVersion(PathBuf),
    #[error("cannot run `go`: {0}; install Go (any release from 1.21 on fetches the one that the modules ask for)")]
    NoGo(std::io::Error),
    #[error("go build {package} failed; its last lines:\n{output}")]
    Failed { package: &'static str, output: String },
}

/// Which module files a program is built from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Module {
    Cluster,
    Helm,
}

/// What is called what, in the order of building: what a cluster needs first.
const PROGRAMS: [(&str, &str, Module); 8] = [
    ("etcd", "go.etcd.io/etcd/server/v3", Module::Cluster),
    ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler", Module::Cluster),
    ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver", Module::Cluster),
    ("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager", Module::Cluster),
    ("kubelet", "k8s.io/kubernetes/cmd/kubelet", Module::Cluster),
    ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy", Module::Cluster),
    ("kubectl", "k8s.io/kubernetes/cmd/kubectl", Module::Cluster),
    ("helm", "helm.sh/helm/v4/cmd/helm", Module::Helm),
];

fn folder_of(module: Module) -> PathBuf {
    let tools = build::workspace().join("e2e/clusters/tools");
    match module {
        Module::Cluster => tools,
        Module::Helm => tools.join("helm"),
    }
}

/// Where the programs are, or will be.
pub fn folder(folders: &Folders) -> Result<PathBuf, Error> {
    let mut hasher = blake3::Hasher::new();
    for module in [Module::Cluster, Module::Helm] {
        for name in ["go.mod", "go.sum"] {
            let path = folder_of(module).join(name);
            hasher.update(&std::fs::read(&path).map_err(folders::at(&path))?);
        }
    }
    Ok(folders.programs(&hasher.finalize().to_hex()[..12]))
}

/// Names of programs that have yet to be built.
pub fn missing(folder: &Path) -> Vec<&'static str> {
    PROGRAMS.iter().map(|(name, _, _)| *name).filter(|name| !folder.join(name).exists()).collect()
}

/// Builds what is missing and says so; returns the folder.
pub fn ensure(folders: &Folders) -> Result<PathBuf, Error> {
    let folder = folder(folders)?;
    std::fs::create_dir_all(&folder).map_err(folders::at(&folder))?;
    let version = kubernetes_version()?;
    for (name, package, module) in PROGRAMS {
        if !folder.join(name).exists() {
            let begin = Instant::now();
            eprintln!("building {name} (once; minutes on a small machine)");
            build_program(&folder, name, package, module, &version)?;
            eprintln!("built {name} in {:.0} s", begin.elapsed().as_secs_f64());
        }
    }
    Ok(folder)
}

fn kubernetes_version() -> Result<String, Error> {
    let path = folder_of(Module::Cluster).join("go.mod");
    let text = std::fs::read_to_string(&path).map_err(folders::at(&path))?;
    text.lines()
        .find_map(|line| line.trim().strip_prefix("k8s.io/kubernetes "))
        .and_then(|rest| Some(rest.split_whitespace().next()?.to_owned()))
        .ok_or(Error::NoVersion(path))
}

/// What Kubernetes' own build stamps in: clients read the numbers, and misbehave without them.
fn linker_flags(version: &str) -> String {
    let mut numbers = version.trim_start_matches('v').split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let set = |name: &str, value: &str| format!(" -X k8s.io/component-base/version.{name}={value}");
    [
        "-s -w".to_owned(),
        set("gitVersion", version),
        set("gitMajor", major),
        set("gitMinor", minor),
        set("gitTreeState", "clean"),
    ]
    .concat()
}

fn build_program(
    folder: &Path,
    name: &'static str,
    package: &'static str,
    module: Module,
    version: &str,
) -> Result<(), Error> {
    let fresh = folder.join(format!(".{name}.new"));
    let flags = if module == Module::Cluster { linker_flags(version) } else { "-s -w".to_owned() };
    let mut command = Command::new("go");
    command.arg("build");
    // On a machine that others use as well.
    if let Ok(jobs) = std::env::var("WATARI_CLUSTERS_BUILD_JOBS") {
        command.arg(format!("-p={jobs}")).env("GOMAXPROCS", &jobs);
    }
    command.args(["-trimpath", "-mod=readonly", "-ldflags", &flags, "-o"]).arg(&fresh).arg(package);
    command.current_dir(folder_of(module)).env("CGO_ENABLED", "0").stdin(Stdio::null());
    let output = command.output().map_err(Error::NoGo)?;
    if !output.status.success() {
        let output = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = output.lines().collect();
        return Err(Error::Failed { package, output: lines[lines.len().saturating_sub(20)..].join("\n") });
    }
    let finished = folder.join(name);
    std::fs::rename(&fresh, &finished).map_err(folders::at(&finished))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_the_module_is_what_the_programs_say_they_are() {
        let version = kubernetes_version().unwrap();
        let numbers = version.strip_prefix("v1.34.").expect("the last minor whose kubelet runs on cgroup v1");
        assert!(numbers.parse::<u32>().is_ok(), "{version}");
        assert!(linker_flags("v1.34.2").contains("version.gitMinor=34 "));
    }

    #[test]
    fn every_program_is_a_tool_of_its_module() {
        for (_, package, module) in PROGRAMS {
            let text = std::fs::read_to_string(folder_of(module).join("go.mod")).unwrap();
            assert!(text.lines().any(|line| line.trim().trim_start_matches("tool ") == package), "{package}");
        }
    }
}
