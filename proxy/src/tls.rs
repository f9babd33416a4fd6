//! TLS 1.3 of the tunnel: rustls does the handshake, records are protected here.
//!
//! rustls' own record layer copies each byte twice on its way out and twice on its way in. Here a record is sealed from
//! the frames' buffer straight into what the socket is given, and opened where it was read (ADR 7). What a handshake
//! decides, and every secret of it, stays rustls' business: this takes the traffic secrets over as a kernel's TLS would
//! ([`rustls::kernel`]).

use std::io;

mod handshake;
pub mod record;
#[cfg(test)]
pub(crate) mod tests;

pub use handshake::{Established, accept, connect};
pub use record::Records;

/// Why there is no TLS connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The peer or its certificate is not acceptable, or ours is not to it.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    /// The transport failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The peer left in the middle of the handshake.
    #[error("the peer closed the connection in the TLS handshake")]
    Closed,
}
