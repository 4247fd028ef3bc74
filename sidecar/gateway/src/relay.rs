//! Copying between a client and the sidecar behind its route, until both directions have ended.
//!
//! One direction may end before the other (half-close), and then has [`HALF_CLOSED_MAX`] more. A buffer exists only while
//! bytes are under way, so that thousands of idle connections cost no memory beyond the kernel's; bytes are counted while
//! they flow, because these connections live for days. Dead peers are noticed by the sockets' own timeouts ([`tune`]).

use std::{future::Future, io, time::Duration};

use prometheus_client::metrics::counter::Counter;
use rustix::net::sockopt;
use tokio::{
    io::AsyncWriteExt,
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    time::timeout,
};

use crate::{limits::HALF_CLOSED_MAX, metrics::Bytes};

/// One read, one write: large enough that system calls are no cost at 1 Gbit/s, small enough for [`limits`](crate::limits).
pub const BUFFER_BYTES: usize = 32 << 10;

/// How long sent data may stay unacknowledged: what the sidecars themselves allow.
const TCP_UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(30);
const TCP_KEEPALIVE_IDLE: Duration = Duration::from_secs(20);
const TCP_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const TCP_KEEPALIVE_PROBES: u32 = 4;

/// Small frames at once, and a dead peer noticed within about 40 s even when nothing is sent.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_tcp_user_timeout(stream, TCP_UNACKNOWLEDGED_MAX.as_millis() as u32)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, TCP_KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, TCP_KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, TCP_KEEPALIVE_PROBES)?;
    Ok(())
}

/// Copies until both directions have ended; an error of one ends both.
pub async fn relay(mut client: TcpStream, mut pod: TcpStream, bytes: &Bytes) -> io::Result<()> {
    let ((client_reads, client_writes), (pod_reads, pod_writes)) = (client.split(), pod.split());
    let up = one_way(client_reads, pod_writes, &bytes.to_pods);
    let down = one_way(pod_reads, client_writes, &bytes.to_clients);
    tokio::pin!(up, down);
    tokio::select! {
        ended = &mut up => alone(ended, down).await,
        ended = &mut down => alone(ended, up).await,
    }
}

/// The other direction, after one has ended.
async fn alone(ended: io::Result<()>, other: impl Future<Output = io::Result<()>>) -> io::Result<()> {
    ended?;
    timeout(HALF_CLOSED_MAX, other).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn one_way(from: ReadHalf<'_>, mut to: WriteHalf<'_>, count: &Counter) -> io::Result<()> {
    loop {
        from.readable().await?;
        let mut buffer = Vec::with_capacity(BUFFER_BYTES);
        loop {
            buffer.clear();
            match from.try_read_buf(&mut buffer) {
                // The end, passed on as such.
                Ok(0) => return to.shutdown().await,
                Ok(read) => {
                    to.write_all(&buffer).await?;
                    count.inc_by(read as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
    }
}
