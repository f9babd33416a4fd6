//! Settings of the proxy.

use std::time::Duration;

use crate::tunnel::Times;

/// Settings of the proxy; the defaults are for production.
#[derive(Debug, Clone)]
pub struct ProxyConfig {
    /// The port that tunnels are dialled at and listened on in every Pod.
    pub tunnel_port: u16,
    /// This node's name, told to peers for their flow records.
    pub node: String,
    /// Times of tunnels.
    pub tunnel: Times,
    /// For a TCP connection to an application.
    pub connect_timeout: Duration,
    /// How long a connection waits for the state to describe an address or an identity.
    pub state_timeout: Duration,
    /// An opaque connection on which nothing moves for this long is reset.
    pub idle_timeout: Duration,
    /// Connections that one Pod may have open outbound.
    pub outbound_limit: usize,
    /// Plain connections towards one Pod.
    pub inbound_limit: usize,
    /// Tunnel connections towards one Pod, those in their handshake included.
    pub tunnel_limit: usize,
    /// Source and destination pairs that metrics tell apart; further ones share one series.
    pub metric_pairs: usize,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            tunnel_port: 15008,
            node: String::new(),
            tunnel: Times::default(),
            connect_timeout: Duration::from_secs(5),
            state_timeout: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(24 * 3600),
            outbound_limit: 60_000,
            inbound_limit: 20_000,
            tunnel_limit: 4_096,
            metric_pairs: 4_096,
        }
    }
}
