//! virt-handler's migration proxies: unix socket at the source, TCP over the WAN, unix socket at the target.
//!
//! libvirt and QEMU know unix sockets only; each channel has a TCP port of its own at the target, as virt-handler's have. No TLS. Bytes
//! are counted per channel, so that memory, copied disks and libvirt's own talk can be told apart.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use serde::Serialize;

use super::{Error, LibvirtSite};

/// What a migration needs: file names below the migration's folder.
pub const LIBVIRT: &str = "libvirt.sock";
pub const MEMORY: &str = "memory.sock";
pub const DISKS: &str = "disks.sock";
const CHANNELS: [&str; 3] = [LIBVIRT, MEMORY, DISKS];
/// A site that does not answer for this long is unreachable; virt-handler's dial gives up as well.
const DIAL_TIMEOUT: Duration = Duration::from_secs(20);
/// How often an acceptor looks whether it shall end.
const POLL: Duration = Duration::from_millis(2);
const BUFFER_BYTES: usize = 128 << 10;

/// Bytes that the source sent through each channel, and what came back on all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProxyBytes {
    pub libvirt: u64,
    pub memory: u64,
    pub disks: u64,
    pub back: u64,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    sent: [AtomicU64; CHANNELS.len()],
    back: AtomicU64,
    /// Both ends of every connection, to be hung up at the end.
    open: Mutex<Vec<End>>,
}

/// One end of a connection.
enum End {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl End {
    fn again(&self) -> io::Result<End> {
        match self {
            End::Unix(stream) => stream.try_clone().map(End::Unix),
            End::Tcp(stream) => stream.try_clone().map(End::Tcp),
        }
    }
    fn shutdown(&self, how: Shutdown) {
        // Already closed by the other side is as good.
        let _ = match self {
            End::Unix(stream) => stream.shutdown(how),
            End::Tcp(stream) => stream.shutdown(how),
        };
    }
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            End::Unix(stream) => stream.read(buffer),
            End::Tcp(stream) => stream.read(buffer),
        }
    }
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            End::Unix(stream) => stream.write_all(bytes),
            End::Tcp(stream) => stream.write_all(bytes),
        }
    }
}

/// The proxies of one migration. They end, with every connection, when dropped.
pub(super) struct Proxies {
    shared: Arc<Shared>,
    acceptors: Vec<JoinHandle<()>>,
}

impl Proxies {
    /// Opens all channels for a migration whose sockets are in `folder` at both sites. The target's are connected to when a connection
    /// comes: QEMU makes them later.
    pub fn start(source: &LibvirtSite, target: &LibvirtSite, folder: &str) -> Result<Proxies, Error> {
        let mut proxies = Proxies { shared: Arc::default(), acceptors: Vec::new() };
        for (channel, name) in CHANNELS.into_iter().enumerate() {
            let inside = match name {
                LIBVIRT => PathBuf::from("/run/libvirt/libvirt-sock"),
                _ => PathBuf::from(folder).join(name),
            };
            let address = proxies.accept_tcp(target, target.inside(inside))?;
            proxies.accept_unix(source, source.inside(PathBuf::from(folder).join(name)), address, channel)?;
        }
        Ok(proxies)
    }

    /// Target side: TCP in, unix out.
    fn accept_tcp(&mut self, target: &LibvirtSite, out: PathBuf) -> Result<SocketAddr, Error> {
        let address = target.address;
        let failed = || Error::io("a proxy's port at the target", &out);
        let listener = target.enter_network(move || TcpListener::bind((address, 0)))?.map_err(failed())?;
        let address = listener.local_addr().map_err(failed())?;
        listener.set_nonblocking(true).map_err(failed())?;
        let shared = Arc::clone(&self.shared);
        self.acceptors.push(std::thread::spawn(move || {
            shared.accept(
                || listener.accept().map(|(stream, _)| stream),
                move |stream| {
                    stream.set_nonblocking(false)?;
                    stream.set_nodelay(true)?;
                    Ok((End::Tcp(stream), End::Unix(UnixStream::connect(&out)?), None))
                },
            );
        }));
        Ok(address)
    }

    /// Source side: unix in, TCP out, counted.
    fn accept_unix(
        &mut self,
        source: &LibvirtSite,
        path: PathBuf,
        address: SocketAddr,
        channel: usize,
    ) -> Result<(), Error> {
        let failed = || Error::io("a proxy's socket at the source", &path);
        let listener = UnixListener::bind(&path).map_err(failed())?;
        listener.set_nonblocking(true).map_err(failed())?;
        let netns = source.netns.clone();
        let shared = Arc::clone(&self.shared);
        self.acceptors.push(std::thread::spawn(move || {
            shared.accept(
                || listener.accept().map(|(stream, _)| stream),
                move |stream| {
                    stream.set_nonblocking(false)?;
                    let dialled = crate::netns::enter(&netns, || TcpStream::connect_timeout(&address, DIAL_TIMEOUT));
                    let dialled = dialled.map_err(io::Error::other)??;
                    dialled.set_nodelay(true)?;
                    Ok((End::Unix(stream), End::Tcp(dialled), Some(channel)))
                },
            );
        }));
        Ok(())
    }

    pub fn bytes(&self) -> ProxyBytes {
        let sent = |channel: usize| self.shared.sent[channel].load(Ordering::Relaxed);
        let back = self.shared.back.load(Ordering::Relaxed);
        ProxyBytes { libvirt: sent(0), memory: sent(1), disks: sent(2), back }
    }
}

/// What an acceptor makes of a connection: the side that dialled, the side that was dialled, and the channel to count.
type Joined = (End, End, Option<usize>);

impl Shared {
    fn accept<S: Send + 'static>(
        self: &Arc<Self>,
        mut next: impl FnMut() -> io::Result<S>,
        join: impl Fn(S) -> io::Result<Joined> + Send + Sync + 'static,
    ) {
        let join = Arc::new(join);
        while !self.stop.load(Ordering::Relaxed) {
            let Ok(stream) = next() else {
                std::thread::sleep(POLL);
                continue;
            };
            let (shared, join) = (Arc::clone(self), Arc::clone(&join));
            // Dialling may take long; the next connection must not wait for it. A failure hangs up on the caller, which is what
            // virt-handler's proxy does.
            std::thread::spawn(move || join(stream).and_then(|joined| shared.join(joined)));
        }
    }

    /// Copies both ways until both directions have ended.
    fn join(self: Arc<Self>, (dialling, dialled, channel): Joined) -> io::Result<()> {
        let mut open = self.open.lock().expect("holders only push");
        open.extend([dialling.again()?, dialled.again()?]);
        if self.stop.load(Ordering::Relaxed) {
            open.iter().for_each(|end| end.shutdown(Shutdown::Both));
        }
        drop(open);
        let (there, back) = ((dialling.again()?, dialled.again()?), (dialled, dialling));
        let shared = Arc::clone(&self);
        let returning = std::thread::spawn(move || copy(back, channel.map(|_| &shared.back)));
        copy(there, channel.map(|channel| &self.sent[channel]));
        let _ = returning.join();
        Ok(())
    }
}

fn copy((mut from, mut to): (End, End), count: Option<&AtomicU64>) {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return to.shutdown(Shutdown::Write),
            Ok(bytes) => {
                if to.write_all(&buffer[..bytes]).is_err() {
                    return from.shutdown(Shutdown::Both);
                }
                if let Some(count) = count {
                    count.fetch_add(bytes as u64, Ordering::Relaxed);
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return to.shutdown(Shutdown::Both),
        }
    }
}

impl Drop for Proxies {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for acceptor in self.acceptors.drain(..) {
            let _ = acceptor.join();
        }
        if let Ok(open) = self.shared.open.lock() {
            open.iter().for_each(|end| end.shutdown(Shutdown::Both));
        }
    }
}
