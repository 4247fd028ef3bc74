//! Small files that are replaced whole: trust record, list of divergent blocks, kept settings.
//!
//! A crash leaves the old content or the new one. It reads nothing: what a file holds is its reader's format.

use std::{
    fs::{File, OpenOptions, rename},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// Make `folder/name` hold `bytes` durably: a new file `name.new` (mode 0600), synced, renamed, the folder synced.
pub fn replace(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let new = folder.join(format!("{name}.new"));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    rename(&new, folder.join(name))?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_shorter_content_replaces_a_longer_one_whole_and_leaves_no_other_file() {
        let dir = tempfile::tempdir().unwrap();
        super::replace(dir.path(), "a", b"a longer content").unwrap();
        super::replace(dir.path(), "a", b"short").unwrap();
        assert_eq!(std::fs::read(dir.path().join("a")).unwrap(), b"short");
        assert_eq!(std::fs::metadata(dir.path().join("a")).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
