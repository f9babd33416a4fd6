//! The accepting end of tunnels.

use std::{hash::Hash, net::SocketAddr};

use futures_util::future::Either;
use http::{Method, StatusCode};
use tokio::net::TcpStream;
use weft_core::SpiffeId;
use weft_identity::{Credentials, PeerError};
use weft_runtime::DrainWatcher;

use super::{
    ConnectRequest, PARTING, SETTINGS, Session, SourceInfo, Stream, Times, headers, keep_alive,
    validity::{Validities, Validity},
};
use crate::{
    beside::beside,
    hbone::{self, Connection, Control, Lost, Request, Requests},
    tls,
};

/// Why no tunnel came to be.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// The handshake took too long.
    #[error("the peer did not finish the TLS handshake in time")]
    Timeout,
    /// TLS failed: a wrong certificate, garbage, or the peer went away.
    #[error("TLS handshake with the peer failed: {0}")]
    Tls(#[source] tls::Error),
    /// The peer's certificate names no identity.
    #[error(transparent)]
    Peer(#[from] PeerError),
}

/// One accepted tunnel connection.
pub struct Server {
    connection: Connection,
    requests: Requests,
    control: Control,
    session: Session,
    peer: SpiffeId,
    times: Times,
}

impl Server {
    /// The TLS handshake on an accepted socket, under these credentials.
    ///
    /// # Errors
    /// When it fails or takes too long.
    pub async fn accept(
        mut socket: TcpStream,
        credentials: &Credentials,
        times: Times,
    ) -> Result<Self, AcceptError> {
        let handshake = async {
            let addresses = (socket.local_addr(), socket.peer_addr());
            let tls =
                tls::accept(&mut socket, credentials.server_config()).await.map_err(AcceptError::Tls)?;
            let peer = credentials.peer(&tls.certificates)?;
            let expires = peer.not_after;
            let session = Session {
                local: addresses.0.map_err(|error| AcceptError::Tls(error.into()))?,
                peer: addresses.1.map_err(|error| AcceptError::Tls(error.into()))?,
                tls: tls.protection.clone(),
                expires,
                validity: Validity::new(expires),
            };
            let (requests, control, connection) = Connection::server(socket, tls, SETTINGS);
            Ok(Self { connection, requests, control, session, peer: peer.identity, times })
        };
        tokio::time::timeout(times.handshake, handshake).await.map_err(|_| AcceptError::Timeout)?
    }

    /// The two ends and their protection.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Who the peer is.
    pub fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// Lets the connection share the validity of what the peer has proven with the others of the same ends: `key`
    /// must name the Pod here, the peer's identity ([`Server::peer`]) and the peer's address. All of them
    /// last as long as the certificate of this handshake.
    pub fn share<K: Eq + Hash>(&mut self, validities: &Validities<K>, key: K) {
        self.session.validity = validities.share(key, self.session.expires);
        self.session.validity.extend(self.session.expires);
    }

    /// Hands every CONNECT to `serve` until the connection ends: by the peer, by a peer that no longer answers
    /// pings, by the end of the peer's certificate where no other connection of the same ends has proven the peer
    /// anew (see [`super::validity`]), or by drain once its streams ended. Malformed requests are answered 400 here and
    /// go to `malformed`.
    ///
    /// # Errors
    /// When the connection failed.
    pub async fn run(
        self,
        drain: DrainWatcher,
        serve: impl Fn(Incoming),
        malformed: impl Fn(&'static str),
    ) -> Result<(), hbone::Error> {
        let Self { mut connection, mut requests, control, session, times, .. } = self;
        let alive = async {
            // That the peer is there now has just been shown.
            tokio::time::sleep(times.until_next_ping()).await;
            keep_alive(control.clone(), times, || ()).await;
        };
        let left = async {
            drain.draining().await;
            control.leave();
            std::future::pending::<()>().await;
        };
        let expired = async {
            session.validity.passed().await;
            control.leave();
            tokio::time::sleep(PARTING).await;
        };
        let rare = Box::pin(async {
            tokio::select! {
                () = alive => {}
                () = left => {}
                () = expired => {}
            }
        });
        let often = std::pin::pin!(async {
            loop {
                tokio::select! {
                    ended = &mut connection => return ended,
                    Some(request) = requests.next() => match parse(&request) {
                        Ok(parsed) => serve(Incoming { request: parsed.request, forwarded: parsed.forwarded, stream: request }),
                        Err(problem) => {
                            malformed(problem);
                            request.refuse(StatusCode::BAD_REQUEST);
                        }
                    },
                }
            }
        });
        match beside(often, rare).await {
            Either::Left(ended) => ended,
            Either::Right(()) => Ok(()),
        }
    }
}

struct Parsed {
    request: ConnectRequest,
    forwarded: std::net::IpAddr,
}

fn parse(request: &Request) -> Result<Parsed, &'static str> {
    if request.method != Method::CONNECT {
        return Err("the method is not CONNECT");
    }
    let authority: SocketAddr = request
        .authority
        .as_deref()
        .and_then(|a| a.parse().ok())
        .ok_or("the authority of the CONNECT is not an IP address and a port")?;
    let forwarded =
        headers::forwarded_for(&request.headers).ok_or("the forwarded header does not name one client")?;
    Ok(Parsed {
        request: ConnectRequest { authority, source: SourceInfo::read(&request.headers) },
        forwarded,
    })
}

/// A CONNECT that waits for its answer. Dropped without one, it is reset.
pub struct Incoming {
    request: ConnectRequest,
    forwarded: std::net::IpAddr,
    stream: Request,
}

impl Incoming {
    /// What is wanted.
    pub fn request(&self) -> &ConnectRequest {
        &self.request
    }

    /// The client that the peer claims to speak for.
    pub fn forwarded(&self) -> std::net::IpAddr {
        self.forwarded
    }

    /// Answers 200.
    ///
    /// # Errors
    /// When the peer went away.
    pub fn accept(self) -> Result<Stream, Lost> {
        self.stream.accept().map(Stream::new)
    }

    /// Says that nothing of it was done, and that it may be sent again on another connection (RFC 9113 section 8.7).
    pub fn postpone(self) {
        self.stream.postpone();
    }

    /// Answers with another status and ends the stream.
    pub fn refuse(self, status: StatusCode) {
        self.stream.refuse(status);
    }
}
