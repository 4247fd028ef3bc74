//! One cluster's kubectl: run, apply, get. No retries; whoever calls knows what may come to be.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

/// Who applies; conflicts are settled in our favour, because these clusters are ours.
const MANAGER: &str = "watari-clusters";

/// kubectl did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cluster {cluster}: cannot run {program}: {source}")]
    Start { cluster: String, program: PathBuf, source: std::io::Error },
    #[error("cluster {cluster}: kubectl {arguments}: {message}")]
    Failed { cluster: String, arguments: String, message: String },
    #[error("cluster {cluster}: kubectl {arguments} did not answer with an object: {source}")]
    Answer { cluster: String, arguments: String, source: serde_json::Error },
}

/// kubectl as the administrator of a cluster.
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
    cluster: String,
}

impl Kubectl {
    pub fn new(program: &Path, kubeconfig: &Path, cluster: String) -> Kubectl {
        Kubectl { program: program.to_owned(), kubeconfig: kubeconfig.to_owned(), cluster }
    }

    /// Runs it to its end with `input` as its standard input; answers what it printed.
    pub fn run(&self, arguments: &[&str], input: &[u8]) -> Result<String, Error> {
        let start = |source| Error::Start { cluster: self.cluster.clone(), program: self.program.clone(), source };
        let mut command = Command::new(&self.program);
        command.args(arguments).env("KUBECONFIG", &self.kubeconfig);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(start)?;
        // It reads all of its input before it prints anything; one that ends early says why by itself.
        let _ = child.stdin.take().expect("piped above").write_all(input);
        let output = child.wait_with_output().map_err(start)?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(Error::Failed {
                cluster: self.cluster.clone(),
                arguments: arguments.join(" "),
                message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            }),
        }
    }

    /// Server-side apply of everything in `text` (YAML or JSON).
    pub fn apply(&self, text: &str) -> Result<(), Error> {
        let manager = format!("--field-manager={MANAGER}");
        self.run(&["apply", "--server-side", "--force-conflicts", &manager, "-f", "-"], text.as_bytes()).map(drop)
    }

    /// One object; nothing if there is none.
    pub fn get(&self, what: &[&str]) -> Result<Option<Value>, Error> {
        let arguments = [&["get", "--ignore-not-found", "-o", "json"], what].concat();
        let text = self.run(&arguments, b"")?;
        let fail = |source| Error::Answer { cluster: self.cluster.clone(), arguments: arguments.join(" "), source };
        match text.trim().is_empty() {
            true => Ok(None),
            false => serde_json::from_str(&text).map(Some).map_err(fail),
        }
    }
}
