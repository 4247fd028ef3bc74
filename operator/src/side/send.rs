//! The side that the VM leaves: a pure, total function of what was seen.

use watari_crds::crossing::{Crossing, CrossingStatus, MigrationEnd, Stage};
use watari_wire::report::Report;

use super::observe::Side;
use super::{Progress, Step, accepts_writes, trust};

/// KubeVirt's migration begins when what remains is sent in this time, seconds: its target waits less than 240 s at the gate, and what the
/// guest writes meanwhile comes on top.
const REMAINDER_SECONDS_MAX: f64 = 10.0;
/// Less than this never holds a move up, whatever the link was measured to be: bytes.
const REMAINDER_SMALL: u64 = 4 << 20;

/// What the sender knows of the receiver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Receiver {
    pub stage: Stage,
    /// Where its KubeVirt is reached, once it waits.
    pub connect: Option<String>,
    pub message: String,
}

impl Receiver {
    /// What the peer says, if it speaks of this attempt.
    pub fn at_peer(attempt: &Crossing, said: Option<&CrossingStatus>) -> Receiver {
        match said.filter(|said| said.id == attempt.id) {
            Some(said) => Receiver { stage: said.stage, connect: said.connect.clone(), message: said.message.clone() },
            None => Receiver { message: "The peer has not answered yet.".to_owned(), ..Receiver::default() },
        }
    }

    /// What the home wrote.
    pub fn at_home(attempt: &Crossing) -> Receiver {
        let stage = if attempt.connect.is_some() { Stage::Ready } else { Stage::Preparing };
        Receiver { stage, connect: attempt.connect.clone(), message: "The home prepares itself.".to_owned() }
    }
}

/// `other` is the receiver's end of migrations.
pub fn decide(attempt: &Crossing, other: &MigrationEnd, receiver: &Receiver, seen: &Side) -> Progress {
    if seen.role() == Some("Replica") {
        return Progress::waits(Stage::Done, "The VM has left; its disks here are the replica.");
    }
    let migration = seen.migration(&attempt.id);
    let over = attempt.cancelled || receiver.stage == Stage::Failed;
    match migration.map(|migration| (migration.phase.as_str(), migration.deleting)) {
        Some(("Failed", _)) => ended("KubeVirt's migration failed.", seen),
        Some(("Succeeded", _)) => {
            Progress::waits(Stage::Migrating, "KubeVirt is done; what remains of the disks is on its way.")
        }
        Some((_, false)) if over => {
            let text = "The move is called off.";
            Progress::new(Stage::Migrating, text, vec![Step::DeleteMigration(attempt.id.clone())])
        }
        Some((phase, _)) => Progress::waits(Stage::Migrating, format!("KubeVirt's migration is in phase {phase}.")),
        None if over => ended(&receiver.message, seen),
        None => begin(attempt, other, receiver, seen),
    }
}

/// The attempt is over. While the handover is open the receiver must still give it up.
fn ended(why: &str, seen: &Side) -> Progress {
    match seen.role() {
        Some("Serving") => Progress::waits(Stage::Failed, why),
        Some(_) | None => {
            Progress::waits(Stage::Migrating, format!("{why} Waiting for the other site to give the handover up."))
        }
    }
}

fn begin(attempt: &Crossing, other: &MigrationEnd, receiver: &Receiver, seen: &Side) -> Progress {
    let preparing = |text: String| Progress::waits(Stage::Preparing, text);
    let Some(report) = seen.report.as_ref().filter(|report| accepts_writes(&report.role)) else {
        let why = seen.silence.clone().unwrap_or_else(|| "no Pod has the disks".to_owned());
        return preparing(format!("No word from the sidecar that has the right to write: {why}."));
    };
    if !report.link.connected {
        return preparing("The two sidecars are not connected.".to_owned());
    }
    if attempt.stopped {
        return offer(attempt, report);
    }
    let Some(kubevirt) = &seen.kubevirt else { return preparing("There is no KubeVirt here.".to_owned()) };
    if let Some(missing) = trust::missing(&kubevirt.end.authorities, &other.authorities) {
        let text = "KubeVirt here does not trust the other site's yet.";
        return Progress::new(Stage::Preparing, text, vec![Step::Trust(missing)]);
    }
    let Some(connect) = receiver.connect.clone().filter(|_| receiver.stage != Stage::Preparing) else {
        return preparing(format!("Waiting for the other site. {}", receiver.message));
    };
    let Some(vmi) = &seen.vmi else { return preparing("The VM does not run any more.".to_owned()) };
    if report.role != "Converging" {
        let step = Step::OpenHandover { vmi_uid: vmi.uid.clone() };
        return Progress::new(Stage::Converging, "Opening the handover.", vec![step]);
    }
    match too_much_left(report) {
        Some(text) => Progress::waits(Stage::Converging, text),
        None => {
            let step = Step::Send { id: attempt.id.clone(), connect };
            Progress::new(Stage::Migrating, "KubeVirt is told to migrate.", vec![step])
        }
    }
}

/// A stopped VM writes nothing: its handover is opened when little is left, and the receiver takes the rest.
fn offer(attempt: &Crossing, report: &Report) -> Progress {
    match (report.role.as_str(), too_much_left(report)) {
        ("Converging", _) => Progress::waits(Stage::Ready, "The stopped VM's disks are offered to the other site."),
        (_, Some(text)) => Progress::waits(Stage::Converging, text),
        (_, None) => {
            let step = Step::OpenHandover { vmi_uid: attempt.id.clone() };
            Progress::new(Stage::Converging, "Offering the stopped VM's disks.", vec![step])
        }
    }
}

/// What must be sent before, in words; `None`: little enough remains.
fn too_much_left(report: &Report) -> Option<String> {
    let bytes = report.generations.lag_bytes;
    let seconds = bytes as f64 / report.link.rate_bytes_per_second.max(1.0);
    let little = bytes <= REMAINDER_SMALL || seconds <= REMAINDER_SECONDS_MAX;
    (!little).then(|| format!("{} MiB are left to send, about {} s.", bytes >> 20, seconds.ceil()))
}
