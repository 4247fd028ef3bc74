//! What `ctl set` changed, for the next worker: interval, bandwidth, pause, slow-down.
//!
//! A JSON file in the runtime folder that lives as long as the supervisor: its first worker (`--restarts 0`) drops what an
//! earlier one left, because a person who starts the sidecar anew expects what the configuration says. A file that cannot
//! be read or written costs the settings and a warning, never the worker.

use std::{fs, io, path::Path, time::Duration};

use serde::{Deserialize, Serialize};
use watari_store::whole_file;

/// Its name in the runtime folder.
const SETTINGS_NAME: &str = "settings.json";

/// What may change while running; `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    pub interval: Option<Duration>,
    /// 0: unlimited.
    pub bandwidth_bits_per_second: Option<u64>,
    pub paused: Option<bool>,
    pub slow_down: Option<bool>,
}

impl Settings {
    /// What `newer` names counts from now on.
    pub fn update(&mut self, newer: &Settings) {
        let Settings { interval, bandwidth_bits_per_second, paused, slow_down } = newer;
        self.interval = interval.or(self.interval);
        self.bandwidth_bits_per_second = bandwidth_bits_per_second.or(self.bandwidth_bits_per_second);
        self.paused = paused.or(self.paused);
        self.slow_down = slow_down.or(self.slow_down);
    }

    /// What a former worker of this supervisor was told. `restarts`: workers before this one.
    pub fn read(runtime_dir: &Path, restarts: u64) -> Settings {
        let path = runtime_dir.join(SETTINGS_NAME);
        if restarts == 0 {
            if let Err(error) = fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, path = %path.display(), "settings of an earlier run are left behind");
            }
            return Settings::default();
        }
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Settings::default(),
            Err(error) => return lost(&path, &error),
        };
        serde_json::from_slice(&text).unwrap_or_else(|error| lost(&path, &error))
    }

    /// For the next worker.
    pub fn keep(&self, runtime_dir: &Path) {
        let kept = serde_json::to_vec(self).map_err(io::Error::other);
        if let Err(error) = kept.and_then(|text| whole_file::replace(runtime_dir, SETTINGS_NAME, &text)) {
            tracing::warn!(%error, "what was set holds until this worker ends, not longer");
        }
    }
}

fn lost(path: &Path, error: &dyn std::fmt::Display) -> Settings {
    tracing::warn!(%error, path = %path.display(), "what was set is lost: the configuration counts");
    Settings::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told() -> Settings {
        Settings { interval: Some(Duration::from_millis(300)), paused: Some(true), ..Settings::default() }
    }

    #[test]
    fn the_next_worker_of_a_supervisor_goes_on_as_told_and_the_first_one_as_configured() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Settings::read(dir.path(), 1), Settings::default());
        told().keep(dir.path());
        assert_eq!(Settings::read(dir.path(), 1), told());
        assert_eq!(Settings::read(dir.path(), 0), Settings::default());
        assert_eq!(Settings::read(dir.path(), 1), Settings::default());
    }

    #[test]
    fn rubbish_costs_the_settings_only() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(SETTINGS_NAME), b"{\"interval\": \"soon\"").unwrap();
        assert_eq!(Settings::read(dir.path(), 3), Settings::default());
    }

    #[test]
    fn what_is_not_named_stays() {
        let mut settings = told();
        settings.update(&Settings { paused: Some(false), slow_down: Some(true), ..Settings::default() });
        let Settings { interval, bandwidth_bits_per_second, paused, slow_down } = settings;
        assert_eq!((interval, bandwidth_bits_per_second), (Some(Duration::from_millis(300)), None));
        assert_eq!((paused, slow_down), (Some(false), Some(true)));
    }
}
