//! The routes in force, and the file they come from.
//!
//! The file is read every [`POLL`] and taken up when its content differs; kubelet replaces a mounted ConfigMap by renaming a
//! link, which no watch on the file itself would see. Readers get the old routes or the new ones, never a mixture. A file
//! that is missing or bad keeps the routes that were in force and says so, once, until it changes. A route that goes
//! away ends no connection: the sidecars at its ends decide that.

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, RwLock},
    time::Duration,
};

use crate::routes::{FILE_BYTES_MAX, Routes, RoutesError};

/// How often the file is looked at. kubelet itself takes up to a minute to bring a changed ConfigMap here.
pub const POLL: Duration = Duration::from_secs(2);

/// Why the file's content is not in force.
#[derive(Debug, thiserror::Error)]
enum TableError {
    #[error("{}: {error}; mount the routes there", path.display())]
    Read { path: PathBuf, error: io::Error },
    #[error("{}: it has more than {FILE_BYTES_MAX} bytes", .0.display())]
    TooLarge(PathBuf),
    #[error("{}: {error}", path.display())]
    Bad { path: PathBuf, error: RoutesError },
}

/// What reports say about the routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableStatus {
    /// A valid file has been read since the start.
    pub loaded: bool,
    pub routes: usize,
    pub reloads: u64,
    /// Why the file as it is now is not in force.
    pub error: Option<String>,
}

/// Shared by all connections.
pub struct Table {
    path: PathBuf,
    routes: RwLock<Arc<Routes>>,
    /// The content judged last, and what became of it.
    judged: Mutex<(Option<Vec<u8>>, TableStatus)>,
}

impl Table {
    /// Reads the file once. That it is not there yet is no error: a gateway may start before the first pair.
    pub fn open(path: &Path) -> Table {
        let table = Table { path: path.to_owned(), routes: RwLock::default(), judged: Mutex::default() };
        table.refresh();
        table
    }

    pub fn routes(&self) -> Arc<Routes> {
        Arc::clone(&self.routes.read().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    pub fn status(&self) -> TableStatus {
        self.judged.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).1.clone()
    }

    /// Looks at the file every [`POLL`], for ever.
    pub async fn watch(self: Arc<Table>) {
        loop {
            tokio::time::sleep(POLL).await;
            let table = Arc::clone(&self);
            // Reading a mounted file may block; a panic there would be seen in the log and tried again.
            let _ = tokio::task::spawn_blocking(move || table.refresh()).await;
        }
    }

    /// Takes the file up if its content has changed.
    pub fn refresh(&self) {
        let read = self.read();
        let mut judged = self.judged.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (content, status) = &mut *judged;
        let outcome = match read {
            Ok(fresh) if content.as_ref() == Some(&fresh) => return,
            Ok(fresh) => {
                let parsed = Routes::parse(&fresh);
                *content = Some(fresh);
                parsed.map_err(|error| TableError::Bad { path: self.path.clone(), error })
            }
            Err(error) => {
                *content = None;
                Err(error)
            }
        };
        match outcome {
            Ok(routes) => {
                tracing::info!(file = %self.path.display(), routes = routes.len(), "routes are in force");
                let reloads = status.reloads + 1;
                *status = TableStatus { loaded: true, routes: routes.len(), reloads, error: None };
                *self.routes.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = Arc::new(routes);
            }
            Err(error) => {
                let error = error.to_string();
                if status.error.as_ref() != Some(&error) {
                    tracing::warn!(%error, kept = status.routes, "the routes file cannot be used; the former routes stay in force");
                }
                status.error = Some(error);
            }
        }
    }

    fn read(&self) -> Result<Vec<u8>, TableError> {
        let refuse = |error| TableError::Read { path: self.path.clone(), error };
        let file = std::fs::File::open(&self.path).map_err(refuse)?;
        let mut content = Vec::new();
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut content).map_err(refuse)?;
        if content.len() as u64 > FILE_BYTES_MAX {
            return Err(TableError::TooLarge(self.path.clone()));
        }
        Ok(content)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const ONE: &str = r#"{"version":1,"routes":{"a.internal":"h:1"}}"#;
    const TWO: &str = r#"{"version":1,"routes":{"a.internal":"h:2","b.internal":"h:3"}}"#;

    fn address(table: &Table, name: &str) -> Option<String> {
        table.routes().find(name).map(|route| route.address.to_string())
    }

    #[test]
    fn a_changed_file_is_taken_up_and_a_bad_one_keeps_the_former_routes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("routes.json");
        let table = Table::open(&path);
        assert!(!table.status().loaded && table.status().error.is_some(), "there is no file yet");
        std::fs::write(&path, ONE).unwrap();
        table.refresh();
        assert_eq!((address(&table, "a.internal"), table.status().error), (Some("h:1".to_owned()), None));
        for bad in ["{", r#"{"version":9}"#, &" ".repeat(FILE_BYTES_MAX as usize + 1)] {
            std::fs::write(&path, bad).unwrap();
            table.refresh();
            assert_eq!(address(&table, "a.internal"), Some("h:1".to_owned()));
            let status = table.status();
            assert!(status.loaded && status.error.unwrap().contains("routes.json"));
        }
        std::fs::write(&path, TWO).unwrap();
        table.refresh();
        assert_eq!(address(&table, "a.internal"), Some("h:2".to_owned()));
        assert_eq!(table.status(), TableStatus { loaded: true, routes: 2, reloads: 2, error: None });
    }

    /// kubelet's way: a link to a folder of the day is renamed over the old one; the file's own path never changes.
    #[test]
    fn a_config_map_replaced_by_kubelet_is_seen() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for (day, text) in [("one", ONE), ("two", TWO)] {
            std::fs::create_dir(root.join(day)).unwrap();
            std::fs::write(root.join(day).join("routes.json"), text).unwrap();
        }
        symlink("one", root.join("..data")).unwrap();
        symlink("..data/routes.json", root.join("routes.json")).unwrap();
        let table = Table::open(&root.join("routes.json"));
        assert_eq!(table.status().routes, 1);
        symlink("two", root.join("..fresh")).unwrap();
        std::fs::rename(root.join("..fresh"), root.join("..data")).unwrap();
        table.refresh();
        assert_eq!(table.status().routes, 2);
    }

    #[test]
    fn an_unchanged_file_is_not_taken_up_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("routes.json");
        std::fs::write(&path, ONE).unwrap();
        let table = Table::open(&path);
        table.refresh();
        table.refresh();
        assert_eq!(table.status().reloads, 1);
    }
}
