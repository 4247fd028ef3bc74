//! Trouble on request, so that a test need not wait for a bad day: annotation [`QUIRKS_ANNOTATION`] of a VMI or a VMIM, `NAME=VALUE …`.
//!
//! | word | of | what happens |
//! | --- | --- | --- |
//! | `defines=2` | VMI | so many calls of OnDefineDomain at a boot (1 to 3) |
//! | `crash-while-leaving=3` | VMI | the source's launcher aborts so many seconds after a migration has begun |
//! | `late-target-pod=20` | VMIM | the target Pod is made so many seconds late |
//! | `unreachable` | VMIM | this side's synchronization controller neither calls nor answers |
//! | `fail-after-switch` | VMIM | the source calls the migration failed although the guest runs at the target |

use std::time::Duration;

use serde_json::Value;

pub const QUIRKS_ANNOTATION: &str = "standin.watari.internal/quirks";
/// Calls of OnDefineDomain at a boot with placeholder ports (`nichotplug.go:226`).
const DEFINES_PER_BOOT: usize = 3;

/// What an object asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quirks {
    pub defines: usize,
    pub crash_while_leaving: Option<Duration>,
    pub late_target_pod: Duration,
    pub unreachable: bool,
    pub fail_after_switch: bool,
}

impl Quirks {
    /// Words that are unknown or wrong are logged and have no effect.
    pub fn of(object: &Value) -> Quirks {
        let mut quirks = Quirks {
            defines: DEFINES_PER_BOOT,
            crash_while_leaving: None,
            late_target_pod: Duration::ZERO,
            unreachable: false,
            fail_after_switch: false,
        };
        let text = object["metadata"]["annotations"][QUIRKS_ANNOTATION].as_str().unwrap_or_default();
        for word in text.split_whitespace() {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let number = value.parse::<u64>();
            match (name, number) {
                ("defines", Ok(count @ 1..=3)) => quirks.defines = count as usize,
                ("crash-while-leaving", Ok(seconds)) => quirks.crash_while_leaving = Some(Duration::from_secs(seconds)),
                ("late-target-pod", Ok(seconds)) => quirks.late_target_pod = Duration::from_secs(seconds),
                ("unreachable", _) => quirks.unreachable = true,
                ("fail-after-switch", _) => quirks.fail_after_switch = true,
                _ => tracing::warn!(word, "no such quirk"),
            }
        }
        quirks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quirks_are_asked_for_by_words_and_rubbish_does_nothing() {
        let object = |text: &str| serde_json::json!({ "metadata": { "annotations": { QUIRKS_ANNOTATION: text } } });
        let quirks = Quirks::of(&object("defines=2 late-target-pod=20 unreachable"));
        assert_eq!((quirks.defines, quirks.late_target_pod, quirks.unreachable), (2, Duration::from_secs(20), true));
        assert_eq!(Quirks::of(&object("defines=0 what=1")), Quirks::of(&Value::Null));
    }
}
