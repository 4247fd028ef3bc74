//! Two sites with a WAN between them, for trying things by hand; `--vm` boots the test guest at site A.
//!
//! Prints what it made, one `name value` per line, then `ready`, and keeps it until it is ended in whatever way:
//! nothing remains.

use std::io::Write;

use clap::Parser;
use watari_e2e::qemu::{Backing, Machine, Qemu, Start};
use watari_e2e::site::TestBed;
use watari_e2e::wan::{Shape, control::Setting};

#[derive(Parser)]
#[command(about = "Two sites in namespaces with an emulated WAN between them")]
struct Arguments {
    /// Boot the test guest at site A, with this many disks of 64 MiB.
    #[arg(long, default_value_t = 0)]
    vm: usize,
    /// rate=100M delay=85ms jitter=2ms loss=0.1% queue=256K, for both directions.
    settings: Vec<String>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mut shape = Shape::default();
    for setting in &arguments.settings {
        setting.parse::<Setting>().map_err(anyhow::Error::msg)?.apply(&mut shape);
    }
    let bed = TestBed::new("testbed", shape)?;
    let mut out = std::io::stdout();
    for site in [&bed.a, &bed.b] {
        writeln!(
            out,
            "netns-{0} {1}\naddress-{0} {2}\ndir-{0} {3}",
            site.name,
            site.netns.name(),
            site.address,
            site.dir.display()
        )?;
    }
    writeln!(out, "wan-control {}", bed.dir.join("wan.sock").display())?;
    let mut vm = None;
    if arguments.vm > 0 {
        let machine = Machine::small(arguments.vm).with("start=1");
        let disks = (0..arguments.vm)
            .map(|number| {
                let path = bed.a.dir.join(format!("{number}.img"));
                std::fs::File::create(&path)?.set_len(64 << 20)?;
                Ok(Backing::File(path))
            })
            .collect::<std::io::Result<Vec<_>>>()?;
        let qemu = Qemu::start(&bed.a, "vm", &machine, &disks, Start::Boot)?;
        writeln!(out, "vm-pid {}\nvm-control {}", qemu.process.pid(), qemu.control_socket().display())?;
        vm = Some(qemu);
    }
    writeln!(out, "ready")?;
    out.flush()?;
    loop {
        std::thread::park();
        // A park may end by itself; the machine stays until the process does.
        let _ = &vm;
    }
}
