//! The test guest in a launcher's Pod, from outside: its control line, and what its domain is. For tests on our own clusters.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use k8s_openapi::api::core::v1::Pod;
use watari_clusters::handle::Ours;
use watari_e2e::guest::Control;

/// Of a question to the guest.
pub const GUEST_PATIENCE: Duration = Duration::from_secs(60);
/// Of a long one: writing much, reading everything back.
const PATIENCE: Duration = Duration::from_secs(180);

/// The guest's control line. It takes one client at a time: drop it before the stand-in's agent is needed.
pub struct Guest {
    pub control: Control,
    /// The Pod's private folder. A socket's path has little room; a descriptor's is short.
    folder: std::fs::File,
}

impl Guest {
    /// Of the VM in this Pod; must be called on a runtime with several threads.
    pub fn of(ours: &Ours, pod: &Pod) -> anyhow::Result<Guest> {
        let node =
            pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).context("a Pod that runs has a node")?;
        let uid = pod.metadata.uid.as_deref().context("a Pod has a uid")?;
        let node = ours.folders.node(&ours.plan.node(node)?);
        let private = node.join(format!("kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/private"));
        let folder = std::fs::File::open(private)?;
        let control = Control::new(format!("/proc/self/fd/{}/control.sock", folder.as_raw_fd()));
        let mut guest = Guest { control, folder };
        tokio::task::block_in_place(|| guest.control.hello(GUEST_PATIENCE))?;
        Ok(guest)
    }

    /// Bytes that its writers have written so far.
    pub fn written(&mut self) -> anyhow::Result<u64> {
        let stats = tokio::task::block_in_place(|| self.control.stats())?;
        Ok(stats.streams.iter().map(|stream| stream.bytes).sum())
    }

    /// Waits until its writers have written so much.
    pub fn has_written(&mut self, bytes: u64) -> anyhow::Result<()> {
        let begin = Instant::now();
        loop {
            let written = self.written()?;
            if written >= bytes {
                return Ok(());
            }
            ensure!(begin.elapsed() < PATIENCE, "the guest has written {written} bytes of {bytes}");
            tokio::task::block_in_place(|| std::thread::sleep(Duration::from_millis(200)));
        }
    }

    /// What the launcher last gave to libvirt.
    pub fn domain(&self) -> std::io::Result<String> {
        std::fs::read_to_string(format!("/proc/self/fd/{}/domain.xml", self.folder.as_raw_fd()))
    }

    /// Everything the guest wrote is there, as the guest remembers it. Its writers pause from here on ([`Guest::resume`]).
    pub fn is_clean(&mut self) -> anyhow::Result<()> {
        let verdict = tokio::task::block_in_place(|| self.control.verify(PATIENCE))?;
        ensure!(verdict.clean(), "{verdict:?}");
        Ok(())
    }

    pub fn resume(&mut self) -> anyhow::Result<()> {
        tokio::task::block_in_place(|| self.control.resume())?;
        Ok(())
    }
}
