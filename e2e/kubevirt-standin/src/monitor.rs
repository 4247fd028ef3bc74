//! virt-launcher-monitor: process 1 of the compute container. It passes SIGTERM on to the launcher, reaps whatever is orphaned (QEMU
//! above all: libvirt waits 40 s for one that nobody reaps) and ends as the launcher did.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Runs `command` to its end; answers its exit code.
pub fn run(mut command: Command) -> io::Result<i32> {
    // SAFETY: an empty set is filled with two signals and given to this thread, which is the only one yet.
    let signals = unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut signals);
        libc::sigaddset(&mut signals, libc::SIGTERM);
        libc::sigaddset(&mut signals, libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, &signals, std::ptr::null_mut());
        signals
    };
    // SAFETY: one system call between fork and exec, on a copy of the set.
    unsafe {
        command.pre_exec(move || {
            libc::sigprocmask(libc::SIG_UNBLOCK, &signals, std::ptr::null_mut());
            Ok(())
        });
    }
    let launcher = command.spawn()?.id() as libc::pid_t;
    loop {
        let mut signal = 0;
        // SAFETY: waits for one of the blocked signals and writes its number.
        unsafe { libc::sigwait(&signals, &mut signal) };
        if signal == libc::SIGTERM {
            // SAFETY: the launcher has not been reaped: only the loop below does that, and then returns.
            unsafe { libc::kill(launcher, libc::SIGTERM) };
        }
        loop {
            let mut status = 0;
            // SAFETY: writes one status.
            let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
            if pid == launcher {
                return Ok(if libc::WIFEXITED(status) {
                    libc::WEXITSTATUS(status)
                } else {
                    128 + libc::WTERMSIG(status)
                });
            }
            if pid <= 0 {
                break;
            }
        }
    }
}
