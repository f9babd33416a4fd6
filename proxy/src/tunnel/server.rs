//! The accepting end of tunnels.

use std::{hash::Hash, net::SocketAddr, sync::Arc};

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use http::{Method, Response, StatusCode};
use rustls_pki_types::CertificateDer;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use weft_runtime::DrainWatcher;

use super::{
    CONNECTION_WINDOW, ConnectRequest, MAX_FRAME, MAX_HEADERS, MAX_STREAMS, PARTING, STREAM_WINDOW, Session,
    SourceInfo, Stream, Times, expiry, headers, keep_alive, negotiated,
    validity::{Validities, Validity},
};

/// Why no tunnel came to be.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// The handshake took too long.
    #[error("the peer did not finish the TLS handshake in time")]
    Timeout,
    /// TLS failed: a wrong certificate, garbage, or the peer went away.
    #[error("TLS handshake with the peer failed: {0}")]
    Tls(#[source] std::io::Error),
    /// The peer speaks no HTTP/2.
    #[error("the peer speaks no HTTP/2: {0}")]
    Http(#[from] h2::Error),
    /// The peer showed no certificate, or none that can be read.
    #[error("the peer showed no certificate that can be read")]
    NoCertificate,
}

/// One accepted tunnel connection.
pub struct Server {
    connection: Connection<TlsStream<TcpStream>, Bytes>,
    pings: Option<h2::PingPong>,
    session: Session,
    certificates: Vec<CertificateDer<'static>>,
    times: Times,
}

impl Server {
    /// TLS and HTTP/2 handshake on an accepted socket.
    ///
    /// # Errors
    /// When either fails or takes too long.
    pub async fn accept(
        socket: TcpStream,
        config: Arc<rustls::ServerConfig>,
        times: Times,
    ) -> Result<Self, AcceptError> {
        let handshake = async {
            let (local, peer) = (socket.local_addr(), socket.peer_addr());
            let tls = TlsAcceptor::from(config).accept(socket).await.map_err(AcceptError::Tls)?;
            let state = tls.get_ref().1;
            let certificates: Vec<_> = state
                .peer_certificates()
                .ok_or(AcceptError::NoCertificate)?
                .iter()
                .map(|c| c.clone().into_owned())
                .collect();
            let expires = expiry(Some(&certificates)).ok_or(AcceptError::NoCertificate)?;
            let session = Session {
                local: local.map_err(AcceptError::Tls)?,
                peer: peer.map_err(AcceptError::Tls)?,
                tls: negotiated(state),
                expires,
                validity: Validity::new(expires),
            };
            let mut connection = h2::server::Builder::new()
                .initial_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_concurrent_streams(MAX_STREAMS)
                .max_frame_size(MAX_FRAME)
                .max_header_list_size(MAX_HEADERS)
                .max_send_buffer_size(STREAM_WINDOW as usize)
                .handshake(tls)
                .await?;
            let pings = connection.ping_pong();
            Ok(Self { connection, pings, session, certificates, times })
        };
        tokio::time::timeout(times.handshake, handshake).await.map_err(|_| AcceptError::Timeout)?
    }

    /// The two ends and their protection.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The chain that the peer showed, verified by the TLS configuration.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// Lets the connection share the validity of what the peer has proven with the others of the same ends: `key`
    /// must name the Pod here, the peer's identity from [`Server::certificates`] and the peer's address. All of them
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
        mut self,
        drain: DrainWatcher,
        serve: impl Fn(Incoming),
        malformed: impl Fn(&'static str),
    ) -> Result<(), h2::Error> {
        let mut alive = std::pin::pin!(keep_alive(self.pings.take(), self.times, || ()));
        let validity = self.session.validity.clone();
        let mut expired = std::pin::pin!(validity.passed());
        let mut gone = std::pin::pin!(async {
            validity.passed().await;
            tokio::time::sleep(PARTING).await;
        });
        let (mut draining, mut parting) = (false, false);
        loop {
            tokio::select! {
                request = self.connection.accept() => match request {
                    Some(Ok((request, respond))) => match parse(&request) {
                        Ok(parsed) => serve(Incoming::new(parsed, request.into_body(), respond)),
                        Err(problem) => {
                            malformed(problem);
                            refuse(respond, StatusCode::BAD_REQUEST);
                        }
                    },
                    Some(Err(error)) => return Err(error),
                    None => return Ok(()),
                },
                () = drain.draining(), if !draining => {
                    draining = true;
                    self.connection.graceful_shutdown();
                }
                () = &mut alive => return Ok(()),
                () = &mut expired, if !parting => {
                    parting = true;
                    self.connection.graceful_shutdown();
                }
                () = &mut gone => return Ok(()),
            }
        }
    }
}

struct Parsed {
    request: ConnectRequest,
    forwarded: std::net::IpAddr,
}

fn parse(request: &http::Request<h2::RecvStream>) -> Result<Parsed, &'static str> {
    if request.method() != Method::CONNECT {
        return Err("the method is not CONNECT");
    }
    let authority: SocketAddr = request
        .uri()
        .authority()
        .and_then(|a| a.as_str().parse().ok())
        .ok_or("the authority of the CONNECT is not an IP address and a port")?;
    let forwarded =
        headers::forwarded_for(request.headers()).ok_or("the forwarded header does not name one client")?;
    Ok(Parsed {
        request: ConnectRequest { authority, source: SourceInfo::read(request.headers()) },
        forwarded,
    })
}

/// A CONNECT that waits for its answer. Dropped without one, it is reset.
pub struct Incoming {
    request: ConnectRequest,
    forwarded: std::net::IpAddr,
    recv: h2::RecvStream,
    respond: SendResponse<Bytes>,
}

impl Incoming {
    fn new(parsed: Parsed, recv: h2::RecvStream, respond: SendResponse<Bytes>) -> Self {
        Self { request: parsed.request, forwarded: parsed.forwarded, recv, respond }
    }

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
    pub fn accept(mut self) -> Result<Stream, h2::Error> {
        let send = self.respond.send_response(Response::new(()), false)?;
        Ok(Stream::new(send, self.recv))
    }

    /// Says that nothing of it was done, and that it may be sent again on another connection (RFC 9113 section 8.7).
    pub fn postpone(mut self) {
        self.respond.send_reset(h2::Reason::REFUSED_STREAM);
    }

    /// Answers with another status and ends the stream.
    pub fn refuse(self, status: StatusCode) {
        refuse(self.respond, status);
    }
}

fn refuse(mut respond: SendResponse<Bytes>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    if let Err(error) = respond.send_response(response, true) {
        tracing::debug!(%error, "the peer went away before it was refused");
    }
}
