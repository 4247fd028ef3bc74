//! virt-handler's migration proxies, played by the two launchers themselves: libvirt and QEMU know unix sockets only, the Pod network
//! carries TCP, one port per channel. No TLS.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::AbortHandle;

use watari_e2e::libvirt::proxy::{DISKS, LIBVIRT, MEMORY};

use super::libvirt;
use crate::render::PRIVATE_FOLDER;
use crate::talk::Ports;

/// Where the sockets are, at the same place on both sides: libvirt gives one path for the source to dial and for the target's QEMU to
/// listen at.
pub fn folder() -> PathBuf {
    Path::new(PRIVATE_FOLDER).join("migration")
}

/// Open doors; shut with the value.
pub struct Doors(Vec<AbortHandle>);

impl Drop for Doors {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

/// The target's side: TCP in, unix out.
pub async fn open_target() -> std::io::Result<(Doors, Ports)> {
    std::fs::create_dir_all(folder())?;
    let mut doors = Doors(Vec::new());
    let mut door = async |out: PathBuf| {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
        let port = listener.local_addr()?.port();
        let serve = async move {
            while let Ok((stream, _)) = listener.accept().await {
                let out = out.clone();
                tokio::spawn(async move { join(stream_ready(stream)?, UnixStream::connect(&out).await?).await });
            }
        };
        doors.0.push(tokio::spawn(serve).abort_handle());
        std::io::Result::Ok(port)
    };
    let libvirt = door(libvirt::SOCKET.into()).await?;
    let (memory, disks) = (door(folder().join(MEMORY)).await?, door(folder().join(DISKS)).await?);
    Ok((doors, Ports { libvirt, memory, disks }))
}

/// The source's side: unix in, TCP out.
pub fn open_source(address: IpAddr, ports: Ports) -> std::io::Result<Doors> {
    std::fs::create_dir_all(folder())?;
    let mut doors = Doors(Vec::new());
    for (name, port) in [(LIBVIRT, ports.libvirt), (MEMORY, ports.memory), (DISKS, ports.disks)] {
        let socket = folder().join(name);
        // Of an earlier attempt.
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)?;
        let target = SocketAddr::new(address, port);
        let serve = async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move { join(stream_ready(TcpStream::connect(target).await?)?, stream).await });
            }
        };
        doors.0.push(tokio::spawn(serve).abort_handle());
    }
    Ok(doors)
}

/// The channels carry small questions between large pages.
fn stream_ready(stream: TcpStream) -> std::io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Both ways until both have ended. A failure hangs up, which is what virt-handler's proxy does.
async fn join(
    mut a: impl AsyncRead + AsyncWrite + Unpin,
    mut b: impl AsyncRead + AsyncWrite + Unpin,
) -> std::io::Result<()> {
    copy_bidirectional(&mut a, &mut b).await.map(drop)
}
