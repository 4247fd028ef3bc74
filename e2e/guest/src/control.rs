//! The control line: one request per line in, one JSON object per line out.
//!
//! Requests are `#ID COMMAND [ARGUMENT]`, answers `@ID {…}` or `@ID {"error":"…"}`. Every command may be repeated without
//! harm, so a host that lost an answer (its end of the line changes with a migration) simply asks again.
//!
//! Does not queue: while `verify` reads, the next request waits.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use serde::Serialize;
use watari_guest::report::Verdict;

use crate::boot::read_or_empty;
use crate::churn::Churn;
use crate::workload::Workload;

/// The name of the virtio-serial port, as QEMU's `name=` gives it.
const PORT_NAME: &str = "io.watari.control";
/// Longest request line; more is noise on a serial line and is dropped.
const LINE_BYTES_MAX: usize = 4096;
/// How long an answer may wait for a host that does not read, in steps of 10 ms.
const WRITE_STEPS: u32 = 500;
const NAP: Duration = Duration::from_millis(10);

/// Answers requests for ever.
pub fn serve(workload: &Workload, churn: &Churn, device: Option<&str>) -> ! {
    let mut line = open(device);
    let mut pending = Vec::new();
    let mut bytes = [0u8; 512];
    loop {
        match line.read(&mut bytes) {
            // Nobody is connected at the other end: half a request from before is void.
            Ok(0) => {
                pending.clear();
                std::thread::sleep(NAP);
            }
            Ok(count) => pending.extend_from_slice(&bytes[..count]),
            Err(_) => std::thread::sleep(NAP),
        }
        while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
            let request: Vec<u8> = pending.drain(..=end).collect();
            if let Some(answer) = answer(workload, churn, String::from_utf8_lossy(&request).trim()) {
                write_line(&mut line, answer.as_bytes());
            }
        }
        if pending.len() > LINE_BYTES_MAX {
            pending.clear();
        }
    }
}

/// The answer to one line, or nothing when the line is not a request.
fn answer(workload: &Workload, churn: &Churn, request: &str) -> Option<String> {
    let (id, command) = request.strip_prefix('#')?.split_once(' ')?;
    let (name, argument) = command.split_once(' ').unwrap_or((command, ""));
    let outcome = match name {
        "hello" => json(&workload.hello()),
        "stats" | "report" => json(&workload.stats()),
        "resume" => {
            workload.resume();
            json(&workload.stats())
        }
        "pause" => {
            workload.pause();
            json(&workload.stats())
        }
        "rate" => rate(argument).and_then(|rate| {
            workload.set_rate(rate);
            json(&workload.stats())
        }),
        "churn" => rate(argument).and_then(|rate| {
            churn.set_rate(rate);
            json(&workload.stats())
        }),
        "reset-gaps" => {
            workload.reset_gaps();
            json(&workload.stats())
        }
        "sync" => workload.sync().map_err(|error| error.to_string()).and_then(|()| json(&workload.stats())),
        "verify" => workload.verify().map_err(|error| error.to_string()).and_then(|verdict: Verdict| json(&verdict)),
        "poweroff" => {
            let _ = workload.sync();
            // SAFETY: powers the machine off; nothing runs after it.
            unsafe { libc::reboot(libc::RB_POWER_OFF) };
            Err("the kernel refused to power off".into())
        }
        _ => Err(format!("unknown command {name}")),
    };
    let body = outcome.unwrap_or_else(|error| serde_json::json!({ "error": error }).to_string());
    Some(format!("@{id} {body}\n"))
}

fn rate(argument: &str) -> Result<u64, String> {
    argument.trim().parse().map_err(|_| format!("not a rate in bytes per second: {argument}"))
}

fn json(value: &impl Serialize) -> Result<String, String> {
    serde_json::to_string(value).map_err(|error| error.to_string())
}

fn open(device: Option<&str>) -> File {
    loop {
        let name = device.map(str::to_owned).or_else(find_port).unwrap_or_else(|| "ttyS0".to_owned());
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/dev/{name}"));
        match opened {
            Ok(line) => {
                if name.starts_with("tty") {
                    make_raw(&line);
                }
                println!("WATARI-GUEST control line is {name}");
                return line;
            }
            Err(error) => println!("WATARI-GUEST cannot open the control line {name}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn find_port() -> Option<String> {
    let ports = std::fs::read_dir("/sys/class/virtio-ports").ok()?;
    ports.flatten().find_map(|port| {
        let name = read_or_empty(port.path().join("name"));
        (name.trim() == PORT_NAME).then(|| port.file_name().to_string_lossy().into_owned())
    })
}

/// No echo, no line editing, no translation: bytes.
fn make_raw(line: &File) {
    // SAFETY: termios is plain data for which all zeroes is valid; the calls fill and read it for a descriptor we hold.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        if libc::tcgetattr(line.as_raw_fd(), &mut settings) == 0 {
            libc::cfmakeraw(&mut settings);
            libc::tcsetattr(line.as_raw_fd(), libc::TCSANOW, &settings);
        }
    }
}

/// Writes all of it, or gives up when the host has not read for a while: it will ask again.
fn write_line(line: &mut File, mut bytes: &[u8]) {
    for _ in 0..WRITE_STEPS {
        match line.write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => std::thread::sleep(NAP),
        }
        if bytes.is_empty() {
            return;
        }
    }
}
