//! The agents' listener: TLS of which the certificate is renewed in place, and limits on what callers can hold open.

use std::{
    collections::HashMap,
    fmt, io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use futures_util::{FutureExt, Stream, StreamExt, future::BoxFuture, stream, stream::FuturesUnordered};
use parking_lot::{Mutex, RwLock};
use rustls::{
    ServerConfig,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
    version::TLS13,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::{Connected, TlsConnectInfo};
use weft_identity::ca::{CaError, EmbeddedCa};
use weft_runtime::DrainWatcher;

use crate::authority::Signing;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The longest time between two certificates, whatever their life.
const MAX_AGE: Duration = Duration::from_secs(24 * 3600);
/// Bytes of a connection that wait encrypted for a caller who does not read.
const UNSENT: usize = 32 << 10;
/// The wait after a failed renewal or accept.
const RETRY: Duration = Duration::from_secs(1);

/// What callers can hold open.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections, those in a handshake included.
    pub connections: usize,
    /// Connections of one address.
    pub per_address: usize,
}

impl Default for Limits {
    /// Room for some thousand agents, each with a successor beside it, two connections each.
    fn default() -> Self {
        Self { connections: 8192, per_address: 64 }
    }
}

/// A certificate cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The CA does not sign.
    #[error("the operator's own certificate cannot be signed: {0}")]
    Ca(#[from] CaError),
    /// What it signed cannot be used.
    #[error("the operator's own certificate cannot be used: {0}")]
    Tls(#[from] rustls::Error),
    /// Its text cannot be read.
    #[error("the operator's own certificate cannot be read: {0}")]
    Pem(#[from] rustls::pki_types::pem::Error),
}

/// The certificate that the listener shows; cheap to clone.
#[derive(Clone)]
pub struct Certificate {
    names: Arc<[String]>,
    ca: Signing,
    provider: Arc<CryptoProvider>,
    current: Arc<Current>,
}

/// None where no CA has signed one yet: then no handshake succeeds.
struct Current(RwLock<Option<(Arc<CertifiedKey>, SystemTime)>>);

impl Certificate {
    /// A first one for the DNS names, signed by the CA that signs now. Where none does, [`Self::renew`] makes it later.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(names: &[&str], ca: Signing) -> Result<Self, ServeError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let names: Arc<[String]> = names.iter().map(|n| (*n).to_owned()).collect();
        let signing = ca.borrow().clone();
        let first = signing.map(|ca| make(&names, &ca, &provider)).transpose()?;
        Ok(Self { names, ca, provider, current: Arc::new(Current(RwLock::new(first))) })
    }

    /// The TLS configuration: TLS 1.3, HTTP/2.
    ///
    /// # Errors
    /// When the library refuses it.
    pub fn config(&self) -> Result<Arc<ServerConfig>, ServeError> {
        let resolver: Arc<Current> = Arc::clone(&self.current);
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(resolver);
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    /// Renews at half life, and at once when another CA signs, until the process drains. Connections that stand keep
    /// what they were opened with.
    pub async fn renew(mut self, drain: DrainWatcher) {
        // Without a sender there will be no other CA; time goes on.
        let mut changes = true;
        loop {
            let not_after = self.current.0.read().as_ref().map(|(_, not_after)| *not_after);
            let left = not_after.map(|end| end.duration_since(SystemTime::now()).unwrap_or_default());
            tokio::select! {
                () = drain.draining() => return,
                changed = self.ca.changed(), if changes => if changed.is_err() {
                    changes = false;
                    continue;
                },
                () = sleep(left.map_or(MAX_AGE, |left| (left / 2).min(MAX_AGE))) => {}
            }
            let Some(ca) = self.ca.borrow_and_update().clone() else { continue };
            match make(&self.names, &ca, &self.provider) {
                Ok(next) => *self.current.0.write() = Some(next),
                Err(error) => {
                    tracing::error!("{error}; the present certificate goes on and it is tried again");
                    self.ca.mark_changed();
                    sleep(RETRY).await;
                }
            }
        }
    }
}

fn make(
    names: &[String],
    ca: &EmbeddedCa,
    provider: &CryptoProvider,
) -> Result<(Arc<CertifiedKey>, SystemTime), ServeError> {
    let made = ca.server_credentials(names)?;
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(made.chain_pem.as_bytes()).collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(made.key_pem.as_bytes())?;
    Ok((Arc::new(CertifiedKey::from_der(chain, key, provider)?), made.not_after))
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.read().as_ref().map(|(certificate, _)| Arc::clone(certificate))
    }
}

impl fmt::Debug for Current {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Current").field("not_after", &self.0.read().as_ref().map(|(_, end)| *end)).finish()
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate").field("names", &self.names).field("current", &self.current).finish()
    }
}

/// Places for connections, by address.
#[derive(Debug)]
struct Places {
    limits: Limits,
    taken: Mutex<(usize, HashMap<IpAddr, usize>)>,
}

#[derive(Debug)]
struct Place {
    places: Arc<Places>,
    address: IpAddr,
}

impl Places {
    fn take(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let mut taken = self.taken.lock();
        let (all, by_address) = &mut *taken;
        let own = by_address.get(&address).copied().unwrap_or(0);
        if *all >= self.limits.connections || own >= self.limits.per_address {
            return None;
        }
        *all += 1;
        by_address.insert(address, own + 1);
        Some(Place { places: Arc::clone(self), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock();
        let (all, by_address) = &mut *taken;
        *all = all.saturating_sub(1);
        if let Some(own) = by_address.get_mut(&self.address) {
            *own = own.saturating_sub(1);
            if *own == 0 {
                by_address.remove(&self.address);
            }
        }
    }
}

/// A connection whose handshake is done; it gives its place back when it is dropped.
#[derive(Debug)]
pub struct Connection {
    stream: TlsStream<TcpStream>,
    _place: Place,
}

struct Incoming {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    places: Arc<Places>,
    handshakes: FuturesUnordered<BoxFuture<'static, Option<Connection>>>,
}

/// Connections whose handshake is done. A connection beyond the limits is closed at once, and a handshake that fails
/// or stalls holds up no other.
pub fn incoming(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    limits: Limits,
) -> impl Stream<Item = io::Result<Connection>> + Send {
    let places = Arc::new(Places { limits, taken: Mutex::default() });
    let state =
        Incoming { listener, acceptor: TlsAcceptor::from(tls), places, handshakes: FuturesUnordered::new() };
    stream::unfold(state, async |mut state| {
        loop {
            tokio::select! {
                accepted = state.listener.accept() => match accepted {
                    Ok((tcp, peer)) => state.begin(tcp, peer),
                    Err(error) => {
                        tracing::error!("cannot accept a connection: {error}; raise the limit of open files");
                        sleep(RETRY).await;
                    }
                },
                Some(done) = state.handshakes.next() => {
                    if let Some(connection) = done {
                        return Some((Ok(connection), state));
                    }
                }
            }
        }
    })
}

impl Incoming {
    fn begin(&self, tcp: TcpStream, peer: SocketAddr) {
        let Some(place) = self.places.take(peer.ip().to_canonical()) else {
            tracing::warn!(%peer, "a connection is closed: too many are open, of this address or together");
            return;
        };
        let handshake = self.acceptor.accept(tcp);
        let work = async move {
            match timeout(HANDSHAKE, handshake).await {
                Ok(Ok(mut stream)) => {
                    let (tcp, tls) = stream.get_mut();
                    drop(tcp.set_nodelay(true));
                    tls.set_buffer_limit(Some(UNSENT));
                    Some(Connection { stream, _place: place })
                }
                Ok(Err(error)) => {
                    tracing::debug!(%peer, "a handshake failed: {error}");
                    None
                }
                Err(_) => {
                    tracing::debug!(%peer, "a handshake took too long");
                    None
                }
            }
        };
        self.handshakes.push(work.boxed());
    }
}

impl Connected for Connection {
    type ConnectInfo = TlsConnectInfo<<TcpStream as Connected>::ConnectInfo>;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
