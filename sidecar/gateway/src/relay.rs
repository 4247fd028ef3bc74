//! Copying between a client and the sidecar behind its route, until both directions have ended.
//!
//! One direction may end before the other (half-close), and then has [`HALF_CLOSED_MAX`] more. A buffer exists only while
//! bytes are under way, so that thousands of idle connections cost no memory beyond the kernel's; bytes are counted while
//! they flow, because these connections live for days. Dead peers are noticed by the sockets' own timeouts ([`socket`](crate::socket)).

use std::{future::Future, io};

use prometheus_client::metrics::counter::Counter;
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
