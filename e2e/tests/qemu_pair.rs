//! Two QEMUs, two sidecars with different files, the WAN between them: live migration while the guest writes.

use std::time::Duration;

use anyhow::ensure;
use watari_e2e::{
    image,
    pair::{Pair, PairOptions},
    qemu::{Machine, Qemu, Start},
    site::TestBed,
    wan::Shape,
};

const BOOT: Duration = Duration::from_secs(180);
const ANSWER: Duration = Duration::from_secs(60);

#[test]
fn a_writing_guest_crosses_the_wan_with_its_last_delta_and_comes_back_as_a_delta() -> anyhow::Result<()> {
    let bed = TestBed::new("pair", Shape::wan(100_000_000, Duration::from_millis(170)))?;
    let mut pair = Pair::new(&bed, PairOptions::default())?;
    pair.start(1, "replica")?;
    pair.start(0, "primary")?;
    let machine = Machine::small(2).with("rate=2500000").with("start=1");
    let mut here = Qemu::start(&bed.a, "vm", &machine, &pair.backings(0), Start::Boot)?;
    let mut guest = here.control();
    guest.hello(BOOT)?;
    std::thread::sleep(Duration::from_secs(3));
    pair.cut(0)?;
    for (turn, from) in [0, 1].into_iter().enumerate() {
        guest.reset_gaps()?;
        let (there, moved) = pair.move_vm(from, &here, &machine, &format!("turn{turn}"))?;
        guest.move_to(there.control_socket());
        here.quit()?;
        here = there;
        std::thread::sleep(Duration::from_millis(2500));
        let stats = guest.stats()?;
        println!("move {turn}: {moved:?}\n  {:?}", stats.gaps);
        ensure!(stats.streams.iter().all(|s| s.errors == 0), "guest I/O errors: {stats:?}");
        // Half of the content would be seen on the link if the disks had been copied.
        pair.cut(1 - from)?;
    }
    let verdict = guest.verify(ANSWER)?;
    ensure!(verdict.clean() && verdict.groups[0].right > 500, "{verdict:?}");
    pair.cut(0)?;
    here.quit()?;
    // Both sites, offline: nothing acknowledged is missing, and they are identical.
    let acknowledged = &verdict.groups[0].acknowledged;
    for end in [0, 1] {
        pair.release(end)?;
        let tallies = image::check(&pair.images(end), Some(acknowledged))?;
        ensure!(tallies.iter().all(|t| t.clean()), "site {end}: {tallies:?}");
    }
    Ok(())
}
