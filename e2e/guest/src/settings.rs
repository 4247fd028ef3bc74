//! The guest's settings, from the kernel command line.

/// What `watari.NAME=VALUE` on the kernel command line can set. Unknown names are reported on the console and ignored.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `watari.raw=vda,vdb`: disks written directly. Default: every virtio disk that is not listed for ext4.
    pub raw: Option<Vec<String>>,
    /// `watari.ext4=vdc`: disks that hold an ext4 file system; the workload runs on a file there, through the page cache.
    pub ext4: Vec<String>,
    /// `watari.base=256`: first block (4 KiB) of the working set on each disk; what lies before is left alone.
    pub base: u64,
    /// `watari.blocks=4096`: working set in blocks per disk, cut down to the smallest disk.
    pub blocks: u64,
    /// `watari.streams=2`: writers per group; every second one waits for fdatasync after each write.
    pub streams: u16,
    /// `watari.rate=2500000`: bytes per second, all writers together.
    pub rate: u64,
    /// `watari.random=100`: share of a block that does not compress, in percent.
    pub random_percent: u8,
    /// `watari.zero=5`: share of operations that write zeroes, in percent.
    pub zero_percent: u8,
    /// `watari.shift=1536`: bytes by which every block lies off its 4 KiB boundary, a multiple of 512 below 4096.
    pub shift: u16,
    /// `watari.churn=10000000`: bytes of memory per second that change, so that live migration has something to do.
    pub churn: u64,
    /// `watari.start=1`: begin to write at once instead of at the first `resume`.
    pub start: bool,
    /// `watari.scan=0`: do not read the working set at boot. Then nothing is known about blocks not yet written.
    pub scan: bool,
    /// `watari.control=ttyS0`: the control line's device, instead of looking for the virtio-serial port.
    pub control: Option<String>,
}

impl Settings {
    /// Parses `/proc/cmdline`.
    pub fn from_command_line(line: &str) -> Settings {
        let mut settings = Settings {
            raw: None,
            ext4: Vec::new(),
            base: 256,
            blocks: 4096,
            streams: 2,
            rate: 2_500_000,
            random_percent: 100,
            zero_percent: 5,
            shift: 0,
            churn: 0,
            start: false,
            scan: true,
            control: None,
        };
        for word in line.split_whitespace() {
            if let Some((name, value)) = word.strip_prefix("watari.").and_then(|setting| setting.split_once('='))
                && settings.set(name, value).is_none()
            {
                println!("WATARI-GUEST ignores watari.{name}={value}: unknown name or bad value");
            }
        }
        settings
    }

    fn set(&mut self, name: &str, value: &str) -> Option<()> {
        let list = || value.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect::<Vec<_>>();
        match name {
            "raw" => self.raw = Some(list()),
            "ext4" => self.ext4 = list(),
            "base" => self.base = value.parse().ok()?,
            "blocks" => self.blocks = value.parse().ok()?,
            "streams" => self.streams = value.parse().ok().filter(|n| (1..=64).contains(n))?,
            "rate" => self.rate = value.parse().ok()?,
            "random" => self.random_percent = value.parse().ok().filter(|p| *p <= 100)?,
            "zero" => self.zero_percent = value.parse().ok().filter(|p| *p <= 100)?,
            "shift" => self.shift = value.parse().ok().filter(|shift| shift % 512 == 0 && *shift < 4096)?,
            "churn" => self.churn = value.parse().ok()?,
            "start" => self.start = value == "1",
            "scan" => self.scan = value != "0",
            "control" => self.control = Some(value.to_owned()),
            _ => return None,
        }
        Some(())
    }
}
