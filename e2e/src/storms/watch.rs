//! Looks at both ends of a pair again and again, and notices two writers.
//!
//! A report says what its side was when it was made, on the clock of the one host that both ends run on. A role that may write is
//! left only to a role that may not, and comes back only at a higher epoch; so between two reports that show a side writing at one
//! epoch it was writing all the time, and two such intervals of the two sides must never touch.
//!
//! It sees no more than the reports (made ten times a second); the guest's own data says the rest.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure};
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use watari_wire::{
    control::{StatusRequest, control_client::ControlClient},
    report::Report,
};

use crate::pair::Pair;

/// Between two looks at one end: well below the time between two reports.
const PAUSE: Duration = Duration::from_millis(15);
/// A side that does not answer within this time is asked anew; its supervisor may have been killed.
const ANSWER: Duration = Duration::from_secs(2);

/// From when to when (Unix milliseconds) an end was seen writing, per epoch.
type Intervals = BTreeMap<u64, (u64, u64)>;

#[derive(Default)]
struct Seen {
    last: [Option<Report>; 2],
    writing: [Intervals; 2],
    highest: u64,
}

/// A watcher of both ends. Stops when dropped.
pub struct Watch {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// Does a side in this role put the guest's writes on its disk?
pub fn writes(report: &Report) -> bool {
    ["Serving", "Converging"].contains(&report.role.as_str())
}

impl Watch {
    pub fn start(pair: &Pair) -> Watch {
        let (seen, stop) = (Arc::<Mutex<Seen>>::default(), Arc::<AtomicBool>::default());
        let threads = [0, 1].map(|end| {
            let (seen, stop, socket) = (seen.clone(), stop.clone(), pair.control_socket(end));
            std::thread::spawn(move || follow(end, &socket, &seen, &stop))
        });
        Watch { seen, stop, threads: threads.into() }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the last reports of both ends, seen in this order, satisfy `done`.
    pub fn wait(&self, what: &str, patience: Duration, done: impl Fn(&Report, &Report) -> bool) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let last = self.seen().last.clone();
            if let [Some(a), Some(b)] = &last
                && done(a, b)
            {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("waited {} s in vain for {what}; last: {last:#?}", patience.as_secs());
            }
            std::thread::sleep(PAUSE / 2);
        }
    }

    /// The newest report of one end.
    pub fn last(&self, end: usize) -> Option<Report> {
        self.seen().last[end].clone()
    }

    /// Never were both ends writing at once, and nobody began at an epoch below one that had been seen.
    pub fn check(&self) -> anyhow::Result<()> {
        let seen = self.seen();
        for (epoch_a, a) in &seen.writing[0] {
            for (epoch_b, b) in &seen.writing[1] {
                let apart = a.1 < b.0 || b.1 < a.0;
                ensure!(
                    apart,
                    "both ends write: the first at epoch {epoch_a} from {} to {}, the second at {epoch_b} from {} to {}",
                    a.0,
                    a.1,
                    b.0,
                    b.1
                );
                let rising = (a.1 < b.0) == (epoch_a < epoch_b);
                ensure!(rising, "an older epoch writes after a newer one: {:?}", seen.writing);
            }
        }
        Ok(())
    }

    /// The highest epoch seen.
    pub fn highest_epoch(&self) -> u64 {
        self.seen().highest
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        for thread in self.threads.drain(..) {
            // A watcher that panicked has said so.
            let _ = thread.join();
        }
    }
}

fn follow(end: usize, socket: &Path, seen: &Mutex<Seen>, stop: &AtomicBool) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime needs a few descriptors, which a test process has");
    let mut client: Option<ControlClient<Channel>> = None;
    while !stop.load(SeqCst) {
        let report = runtime.block_on(async {
            if client.is_none() {
                let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).ok()?;
                client = Some(ControlClient::new(timeout(ANSWER, endpoint.connect()).await.ok()?.ok()?));
            }
            let asked = client.as_mut()?.status(StatusRequest {});
            let answer = timeout(ANSWER, asked).await.ok()?.ok()?;
            serde_json::from_str::<Report>(&answer.into_inner().report_json).ok()
        });
        match report.filter(|r| !r.role.is_empty()) {
            Some(report) => note(&mut seen.lock().unwrap_or_else(PoisonError::into_inner), end, report),
            None => client = None,
        }
        std::thread::sleep(PAUSE);
    }
}

fn note(seen: &mut Seen, end: usize, report: Report) {
    seen.highest = seen.highest.max(report.epoch);
    if writes(&report) {
        let now = report.now_unix_millis;
        let interval = seen.writing[end].entry(report.epoch).or_insert((now, now));
        interval.1 = interval.1.max(now);
    }
    seen.last[end] = Some(report);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(reports: &[(usize, &str, u64, u64)]) -> anyhow::Result<()> {
        let mut seen = Seen::default();
        for (end, role, epoch, at) in reports {
            let report = Report { role: (*role).into(), epoch: *epoch, now_unix_millis: *at, ..Report::default() };
            note(&mut seen, *end, report);
        }
        Watch { seen: Arc::new(Mutex::new(seen)), stop: Arc::default(), threads: Vec::new() }.check()
    }

    #[test]
    fn two_writers_at_once_are_noticed_and_one_after_the_other_is_not() {
        let before = [(0, "Serving", 1, 10), (0, "Converging", 1, 20)];
        let moved = [(0, "Sealed", 1, 30), (1, "Serving", 2, 31), (0, "Replica", 2, 32), (1, "Serving", 2, 90)];
        assert!(watch(&[&before[..], &moved].concat()).is_ok());
        let still = [(0, "Converging", 1, 40)];
        assert!(watch(&[&before[..], &moved, &still].concat()).is_err());
    }

    #[test]
    fn an_older_epoch_that_writes_after_a_newer_one_is_noticed() {
        assert!(watch(&[(1, "Serving", 4, 10), (0, "Serving", 3, 20)]).is_err());
        assert!(watch(&[(1, "Serving", 4, 10), (0, "Serving", 6, 20)]).is_ok());
    }
}
