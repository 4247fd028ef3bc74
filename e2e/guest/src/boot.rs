//! What an init has to do before anything else works: file systems, kernel modules, and little readings of /proc.

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::Path;

/// Mounts /proc, /sys and /dev and loads every module of `/modules/list` in order.
///
/// A failure is printed and survived: what is missing shows up as a missing disk or control line, with a better message.
pub fn mount_and_load_modules() {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        if let Err(error) = mount(kind, target, kind) {
            println!("WATARI-GUEST cannot mount {target}: {error}");
        }
    }
    for module in read_or_empty("/modules/list").lines() {
        let path = format!("/modules/{module}");
        if let Err(error) = load_module(&path) {
            println!("WATARI-GUEST cannot load {path}: {error}");
        }
    }
}

/// Mounts `source` (a device, or anything for virtual file systems) at `target`, creating the folder.
pub fn mount(source: &str, target: &str, kind: &str) -> io::Result<()> {
    fs::create_dir_all(target)?;
    let text = |text: &str| CString::new(text).map_err(io::Error::other);
    let (source, target, kind) = (text(source)?, text(target)?, text(kind)?);
    // SAFETY: three valid C strings, no flags, and null data, which these file systems accept.
    let result = unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn load_module(path: &str) -> io::Result<()> {
    let image = fs::read(path)?;
    // SAFETY: the kernel reads `image.len()` bytes from a live buffer and an empty C string of parameters.
    let result = unsafe { libc::syscall(libc::SYS_init_module, image.as_ptr(), image.len(), c"".as_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The file's text, or nothing when it cannot be read.
pub fn read_or_empty(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Seconds since the kernel started, by the kernel's own clock.
pub fn uptime_seconds() -> f64 {
    read_or_empty("/proc/uptime").split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(0.0)
}
