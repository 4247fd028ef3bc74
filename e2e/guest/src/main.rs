//! The test guest's init: mounts what it needs, loads the virtio modules, runs the workload and obeys the control line.
//!
//! ```text
//! host ──"#7 verify\n"──▶ virtio-serial "io.watari.control", or ttyS0 where that is missing
//!      ◀─"@7 {…}\n"──────  one JSON object per line, [`watari_guest::report`]
//! ```
//!
//! Settings come from the kernel command line as `watari.NAME=VALUE` (see [`settings::Settings`]). There is no shell and
//! no other program. As process 1 it never returns: a panic ends the machine, visibly.
//!
//! It may be stopped between any two instructions for any time, moved to another host and continued: it never assumes
//! that two readings of a clock are close, and every wait is bounded by counting, not by deadlines alone.

mod boot;
mod churn;
mod control;
mod direct;
mod gaps;
mod settings;
mod workload;

use std::sync::Arc;

fn main() {
    if std::process::id() != 1 {
        eprintln!("watari-guest is the init process of the test guest; the harness packs it into an initramfs");
        std::process::exit(2);
    }
    boot::mount_and_load_modules();
    let settings = settings::Settings::from_command_line(&boot::read_or_empty("/proc/cmdline"));
    let gaps = Arc::new(gaps::Recorder::default());
    gaps::start_heartbeat(Arc::clone(&gaps));
    let churn = churn::Churn::start(settings.churn);
    let workload = workload::Workload::open(&settings, gaps);
    if settings.start {
        workload.resume();
    }
    println!("WATARI-GUEST ready, {:.2} s after the kernel started", boot::uptime_seconds());
    control::serve(&workload, &churn, settings.control.as_deref())
}
