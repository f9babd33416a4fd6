//! TCP, TLS and HTTP/2 handshake with a destination's proxy.

use rustls_pki_types::ServerName;
use weft_core::flow::Reason;
use weft_identity::Credentials;

use super::{
    super::{SETTINGS, Session, Times, validity::Validity},
    Key,
};
use crate::{
    hbone::{Connection, Control, Opener},
    l7::ConnectError,
    platform::{Family, PodNet},
    tls,
};

pub(super) type Established = (Opener, Control, Connection, Session);

/// A connection and what is known of it, not driven yet; its validity is still its own.
pub(super) async fn handshake(
    net: &dyn PodNet,
    key: &Key,
    credentials: &Credentials,
    times: Times,
) -> Result<Established, ConnectError> {
    let address = key.address;
    let unreachable = |error: std::io::Error| {
        ConnectError::new(
            Reason::ConnectFailure,
            format!(
                "no TCP connection to the proxy of {address}: {error}; is the agent running on that node, and does a \
                 NetworkPolicy block its port {}?",
                address.port()
            ),
        )
    };
    let socket = net.socket(Family::of(address), None).map_err(unreachable)?;
    let mut tcp = tokio::time::timeout(times.connect, socket.connect(address))
        .await
        .map_err(|_| {
            ConnectError::new(Reason::Timeout, format!("the proxy of {address} did not answer in time"))
        })?
        .map_err(unreachable)?;
    crate::socket::tune_noticed(&tcp);
    let local = tcp.local_addr().map_err(unreachable)?;
    let establish = async {
        let config = credentials.client_config(&key.expected);
        let name = ServerName::IpAddress(address.ip().into());
        let tls = tls::connect(&mut tcp, config, name).await.map_err(|error| {
            let text =
                format!("TLS with the proxy of {address}, expected to be {}, failed: {error}", key.expected);
            ConnectError::new(tls_reason(&error), text)
        })?;
        let peer = credentials.peer(&tls.certificates).map_err(|error| {
            ConnectError::new(Reason::TlsFailure, format!("the proxy of {address}: {error}"))
        })?;
        let expires = peer.not_after;
        let protection = tls.protection.clone();
        let session =
            Session { local, peer: address, tls: protection, expires, validity: Validity::new(expires) };
        let (opener, control, connection) = Connection::client(tcp, tls, SETTINGS);
        Ok((opener, control, connection, session))
    };
    tokio::time::timeout(times.handshake, establish).await.unwrap_or_else(|_| {
        let text = format!("the handshake with the proxy of {address} took too long");
        Err(ConnectError::new(Reason::Timeout, text))
    })
}

/// A certificate of the wrong peer is told apart from other failures.
fn tls_reason(error: &tls::Error) -> Reason {
    match error {
        tls::Error::Tls(rustls::Error::InvalidCertificate(
            rustls::CertificateError::ApplicationVerificationFailure
            | rustls::CertificateError::NotValidForName
            | rustls::CertificateError::NotValidForNameContext { .. }
            | rustls::CertificateError::Other(_),
        )) => Reason::IdentityMismatch,
        _ => Reason::TlsFailure,
    }
}
