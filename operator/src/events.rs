//! What changed, told as Events of the object: `kubectl events --for syncpair/shop`.

use kube::Resource;
use kube::runtime::events::{Event, EventType};
use watari_crds::conditions::{Condition, Finding, Kind, Status, changed};

use crate::context::Context;

/// Kubernetes refuses longer notes, bytes.
const NOTE_MAX: usize = 1024;

/// Tells of conditions that say something else than `before`. An Event that cannot be written is only logged: the conditions hold what
/// it would have said.
pub async fn tell(
    context: &Context,
    object: &impl Resource<DynamicType = ()>,
    before: &[Condition],
    findings: &[Finding],
) {
    let reference = object.object_ref(&());
    let mut events: Vec<Event> = changed(before, findings).into_iter().filter_map(event).collect();
    // Two conditions often say the same thing; the warning says it.
    events.sort_by_key(|event| (event.note.clone(), matches!(event.type_, EventType::Normal)));
    events.dedup_by(|later, earlier| later.note == earlier.note);
    for event in events {
        if let Err(error) = context.recorder.publish(&event, &reference).await {
            tracing::warn!(%error, reason = event.reason, "an Event could not be written");
        }
    }
}

/// `Ready` is told both ways, of the others that they began: their end is what `Ready` says next.
fn event(finding: &Finding) -> Option<Event> {
    let holds = finding.status == Status::True;
    let warns = match finding.kind {
        Kind::Ready => !holds && !finding.reason.next_step().is_empty(),
        Kind::Reconciling | Kind::RestartRequired => false,
        Kind::Stalled | Kind::Attention | Kind::SiteDiffers | Kind::Diverged => true,
    };
    (holds || finding.kind == Kind::Ready).then(|| Event {
        type_: if warns { EventType::Warning } else { EventType::Normal },
        reason: if finding.is_as_asked() { finding.kind.name() } else { finding.reason.name() }.to_owned(),
        note: Some(shortened(finding.words())),
        action: "Reconcile".to_owned(),
        secondary: None,
    })
}

fn shortened(mut note: String) -> String {
    note.truncate(note.floor_char_boundary(NOTE_MAX));
    note
}

#[cfg(test)]
mod tests {
    use super::*;
    use watari_crds::conditions::Reason;

    #[test]
    fn ready_is_told_both_ways_and_only_what_asks_for_something_warns() {
        let told = |kind, status, reason| {
            event(&Finding::new(kind, status, reason, "Words.")).map(|event| {
                let warns = matches!(event.type_, EventType::Warning);
                (event.reason, warns, event.note.unwrap_or_default())
            })
        };
        let normal = |reason: &str, note: &str| Some((reason.to_owned(), false, note.to_owned()));
        assert_eq!(told(Kind::Ready, true, Reason::AsAsked), normal("Ready", "Words."));
        assert_eq!(told(Kind::Ready, false, Reason::Synchronizing), normal("Synchronizing", "Words."));
        let (reason, warns, note) = told(Kind::Ready, false, Reason::LinkDown).expect("an Event");
        assert!(reason == "LinkDown" && warns && note.starts_with("Words. Check the gateway"), "{reason} {note}");
        assert_eq!(told(Kind::Stalled, false, Reason::AsAsked), None);
        assert_eq!(told(Kind::Diverged, true, Reason::WroteAlone).map(|(_, warns, _)| warns), Some(true));
    }

    #[test]
    fn a_long_note_is_cut_between_characters() {
        let note = shortened("渡".repeat(500));
        assert!(note.len() <= NOTE_MAX && note.len() > NOTE_MAX - 3 && note.chars().all(|it| it == '渡'));
    }
}
