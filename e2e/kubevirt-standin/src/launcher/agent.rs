//! The guest agent's freeze and thaw, played by the test guest's control line: its writers are paused with no write in flight and
//! everything it wrote is synced. The line takes one client at a time: whoever else holds it makes a freeze fail, as an agent that
//! does not answer would.

use std::time::Duration;

use watari_e2e::guest::{Control, Error};
use watari_guest::report::Stats;

use crate::render::PRIVATE_FOLDER;

/// KubeVirt's own default is longer; a test guest answers in milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

fn control() -> Control {
    Control::new(format!("{PRIVATE_FOLDER}/control.sock"))
}

/// True if writers were running, which a thaw then starts again.
pub fn freeze() -> Result<bool, Error> {
    let mut guest = control();
    let before: Stats = guest.ask("stats", PATIENCE)?;
    guest.pause(PATIENCE)?;
    guest.ask::<Stats>("sync", PATIENCE)?;
    Ok(!before.paused)
}

pub fn thaw() -> Result<(), Error> {
    control().ask::<Stats>("resume", PATIENCE).map(drop)
}
