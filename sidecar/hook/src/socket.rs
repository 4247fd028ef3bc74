//! The hook socket: one file in the folder that virt-launcher scans, there only while somebody answers behind it.
//!
//! Invariants:
//! - I1: the folder never holds a temporary file, and no file of ours before somebody listens at it: virt-launcher dials every
//!   non-directory in it and treats an error as fatal (`pkg/hooks/manager.go:106-151`). The socket is bound in a nested folder, which
//!   virt-launcher skips, and moved into place when it is being served. Only between a crash and the restart nobody listens.
//! - I2: the name is unique among a Pod's sidecars (virt-launcher counts sockets by file name) and stays the same across restarts of
//!   this container: virt-launcher remembers the path and dials it anew for every call.

use std::{
    io,
    os::unix::{fs::FileTypeExt, fs::PermissionsExt},
    path::{Path, PathBuf},
};

use tokio::net::UnixListener;

/// How our sockets begin and end.
const PREFIX: &str = "watari-";
const SUFFIX: &str = ".sock";
/// Random bytes in the name.
const NAME_BYTES: usize = 8;

/// A listening socket that virt-launcher cannot see yet.
#[derive(Debug)]
pub(crate) struct HiddenSocket {
    nested: PathBuf,
    hidden: PathBuf,
    public: PathBuf,
}

impl HiddenSocket {
    /// Bind and listen inside a nested folder of `folder`.
    pub fn bind(folder: &Path) -> io::Result<(Self, UnixListener)> {
        let name = match ours(folder)? {
            Some(name) => name,
            None => format!("{PREFIX}{}{SUFFIX}", random_hex()?),
        };
        let nested = folder.join(format!(".{}", name.trim_end_matches(SUFFIX)));
        match std::fs::create_dir(&nested) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let hidden = nested.join("s");
        match std::fs::remove_file(&hidden) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&hidden)?;
        // virt-launcher may run under another uid than we do.
        std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o666))?;
        Ok((HiddenSocket { nested, hidden, public: folder.join(name) }, listener))
    }

    /// Move the socket to where virt-launcher looks, atomically, over the one of an earlier life of this container.
    pub fn publish(self) -> io::Result<PathBuf> {
        std::fs::rename(&self.hidden, &self.public)?;
        std::fs::remove_dir(&self.nested)?;
        Ok(self.public)
    }
}

/// The name of a socket of ours that is already in the folder. The folder belongs to this container alone (KubeVirt mounts it with
/// a `subPath`), so such a socket is from an earlier life of it.
fn ours(folder: &Path) -> io::Result<Option<String>> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if let Some(name) = name.to_str()
            && name.starts_with(PREFIX)
            && name.ends_with(SUFFIX)
            && entry.file_type()?.is_socket()
        {
            return Ok(Some(name.to_owned()));
        }
    }
    Ok(None)
}

fn random_hex() -> io::Result<String> {
    let mut bytes = [0; NAME_BYTES];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).expect("readable").map(|e| e.expect("entry"));
        entries.filter(|e| !e.path().is_dir()).map(|e| e.file_name().into_string().expect("text")).collect()
    }

    #[tokio::test]
    async fn no_file_is_visible_before_publishing_and_the_name_survives_a_restart() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (hidden, first) = HiddenSocket::bind(folder.path()).expect("bound");
        assert_eq!(files(folder.path()), Vec::<String>::new());
        let path = hidden.publish().expect("published");
        assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 1, "the nested folder is gone");
        tokio::net::UnixStream::connect(&path).await.expect("listening");

        drop(first);
        let (again, _second) = HiddenSocket::bind(folder.path()).expect("bound");
        assert_eq!(again.publish().expect("published"), path);
        assert_eq!(files(folder.path()).len(), 1);
        tokio::net::UnixStream::connect(&path).await.expect("the new one listens");
    }

    #[tokio::test]
    async fn two_sidecars_never_choose_the_same_name() {
        let (a, b) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let (hidden_a, _la) = HiddenSocket::bind(a.path()).expect("bound");
        let (hidden_b, _lb) = HiddenSocket::bind(b.path()).expect("bound");
        assert_ne!(hidden_a.public.file_name(), hidden_b.public.file_name());
    }
}
