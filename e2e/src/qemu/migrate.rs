//! Live migration of memory between two QEMUs, and what it cost.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use super::{Error, Event, Qemu};
use crate::site::Site;

/// The TCP port at the target. Each site has a namespace of its own, so it is always free.
pub const PORT: u16 = 49152;

/// How a migration shall go. The defaults are KubeVirt's (`maxDowntimeMs` 900, no bandwidth limit, no auto-converge).
#[derive(Clone, Debug)]
pub struct Options {
    pub downtime_limit: Duration,
    /// Bytes per second, 0 for no limit.
    pub bandwidth: u64,
    /// Parallel TCP streams (multifd); 0 for the single classic stream. Both sides must agree.
    pub channels: u32,
    /// Stop before the switchover, so that the caller can finish something first; see [`Migration::wait_switchover`].
    pub pause_before_switchover: bool,
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            downtime_limit: Duration::from_millis(900),
            bandwidth: 0,
            channels: 0,
            pause_before_switchover: false,
            timeout: Duration::from_secs(300),
        }
    }
}

/// What a finished migration cost.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// From the command to the machine running at the target.
    pub total_seconds: f64,
    /// From the source's STOP to the target's RESUME, by the clock of the host that both share.
    pub pause_ms: f64,
    /// What QEMU itself calls the downtime.
    pub qemu_downtime_ms: f64,
    pub ram_bytes: u64,
    /// Memory rounds.
    pub rounds: u64,
}

/// A migration under way.
pub struct Migration<'a> {
    source: &'a Qemu,
    target: &'a Qemu,
    source_mark: usize,
    target_mark: usize,
    started: Instant,
    timeout: Duration,
}

/// Migrates and waits for the end.
pub fn migrate(source: &Qemu, target: &Qemu, site: &Site, options: &Options) -> Result<Report, Error> {
    prepare_target(target, site, options)?;
    start(source, target, site, options)?.finish()
}

fn configure(qemu: &Qemu, options: &Options) -> Result<(), Error> {
    let capabilities = json!({ "capabilities": [
        { "capability": "events", "state": true },
        { "capability": "multifd", "state": options.channels > 0 },
        { "capability": "pause-before-switchover", "state": options.pause_before_switchover },
    ] });
    qemu.qmp.execute("migrate-set-capabilities", capabilities)?;
    let mut parameters = json!({
        "downtime-limit": options.downtime_limit.as_millis() as u64,
        "max-bandwidth": options.bandwidth,
    });
    if options.channels > 0 {
        parameters["multifd-channels"] = json!(options.channels);
    }
    qemu.qmp.execute("migrate-set-parameters", parameters)?;
    Ok(())
}

/// Makes the waiting target listen at its site's address.
pub fn prepare_target(target: &Qemu, site: &Site, options: &Options) -> Result<(), Error> {
    configure(target, options)?;
    target.qmp.execute("migrate-incoming", json!({ "uri": format!("tcp:{}:{PORT}", site.address) }))?;
    Ok(())
}

/// Begins to migrate to the prepared target at `site`.
pub fn start<'a>(source: &'a Qemu, target: &'a Qemu, site: &Site, options: &Options) -> Result<Migration<'a>, Error> {
    configure(source, options)?;
    let migration = Migration {
        source,
        target,
        source_mark: source.qmp.mark(),
        target_mark: target.qmp.mark(),
        started: Instant::now(),
        timeout: options.timeout,
    };
    source.qmp.execute("migrate", json!({ "uri": format!("tcp:{}:{PORT}", site.address) }))?;
    Ok(migration)
}

fn status(event: &Event) -> &str {
    match event.name.as_str() {
        "MIGRATION" => event.data["status"].as_str().unwrap_or_default(),
        _ => "",
    }
}

impl Migration<'_> {
    /// Waits until the source has stopped and asks to go on (with `pause_before_switchover`).
    pub fn wait_switchover(&self) -> Result<(), Error> {
        self.wait_status(&["pre-switchover"])
    }

    /// Lets the switchover happen.
    pub fn proceed(&self) -> Result<(), Error> {
        self.source.qmp.execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
        Ok(())
    }

    /// Gives the migration up; the source goes on running.
    pub fn cancel(&self) -> Result<(), Error> {
        self.source.qmp.execute("migrate_cancel", json!({}))?;
        self.wait_any(&["cancelled", "failed", "completed"])?;
        Ok(())
    }

    /// Progress as QEMU reports it (`query-migrate`).
    pub fn progress(&self) -> Result<Value, Error> {
        self.source.qmp.execute("query-migrate", json!({}))
    }

    /// Waits until the machine runs at the target.
    pub fn finish(self) -> Result<Report, Error> {
        self.finish_after(|_| Ok(()))
    }

    /// The same for a target that waits for `cont`: `before_resume` runs once all memory is there.
    pub fn finish_stopped(self, before_resume: impl FnOnce(&Qemu) -> Result<(), Error>) -> Result<Report, Error> {
        self.finish_after(|target| {
            target
                .qmp
                .wait_event("MIGRATION completed", self.target_mark, self.timeout, |e| status(e) == "completed")?;
            before_resume(target)?;
            target.qmp.execute("cont", json!({})).map(drop)
        })
    }

    fn finish_after(&self, resume: impl FnOnce(&Qemu) -> Result<(), Error>) -> Result<Report, Error> {
        self.wait_status(&["completed"])?;
        resume(self.target)?;
        let resumed =
            self.target.qmp.wait_event("RESUME", self.target_mark, self.timeout, |event| event.name == "RESUME")?;
        let total_seconds = self.started.elapsed().as_secs_f64();
        let events = self.source.qmp.events_since(self.source_mark);
        let stopped =
            events.iter().rev().find(|event| event.name == "STOP").map_or(resumed.seconds, |event| event.seconds);
        let figures = self.progress()?;
        Ok(Report {
            total_seconds,
            pause_ms: (resumed.seconds - stopped) * 1000.0,
            qemu_downtime_ms: figures["downtime"].as_f64().unwrap_or(0.0),
            ram_bytes: figures["ram"]["transferred"].as_u64().unwrap_or(0),
            rounds: figures["ram"]["dirty-sync-count"].as_u64().unwrap_or(0),
        })
    }

    fn wait_any(&self, statuses: &[&str]) -> Result<String, Error> {
        let what = format!("MIGRATION {}", statuses.join(" or "));
        let event = self.source.qmp.wait_event(&what, self.source_mark, self.timeout, |event| {
            statuses.contains(&status(event)) || ["failed", "cancelled"].contains(&status(event))
        })?;
        Ok(status(&event).to_owned())
    }

    fn wait_status(&self, statuses: &[&str]) -> Result<(), Error> {
        let reached = self.wait_any(statuses)?;
        if statuses.contains(&reached.as_str()) {
            return Ok(());
        }
        let reason = self.progress().ok().and_then(|figures| figures["error-desc"].as_str().map(str::to_owned));
        let reason = reason.unwrap_or_else(|| "no reason given".into());
        Err(Error::Migration { machine: self.source.name.clone(), status: reached, reason })
    }
}
