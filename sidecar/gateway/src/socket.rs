//! How a TCP connection notices that its other end is gone: the same at the gateway and at the sidecars on both sides of it.

use std::{io, time::Duration};

use rustix::net::sockopt;
use tokio::net::TcpStream;

/// How long sent data may stay unacknowledged before the kernel gives the connection up. Longer than the outages that
/// TCP should ride out, shorter than a person's patience; the heartbeat of the sidecars' stream notices earlier.
const TCP_UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(30);
const TCP_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const TCP_KEEPALIVE_PROBES: u32 = 4;

/// Small frames at once, and a dead peer noticed even when nothing is sent: about 20 s after `keepalive_idle` of silence.
pub fn tune(stream: &TcpStream, keepalive_idle: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_tcp_user_timeout(stream, TCP_UNACKNOWLEDGED_MAX.as_millis() as u32)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, keepalive_idle)?;
    sockopt::set_tcp_keepintvl(stream, TCP_KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, TCP_KEEPALIVE_PROBES)?;
    Ok(())
}
