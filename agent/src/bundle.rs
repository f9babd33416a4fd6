//! The way to the operator: a channel that exists from the start and is usable once the trust bundle is there. On a
//! new cluster the operator writes the bundle after the agents start, and it changes when the operator's CA does.
//!
//! The operator's Service gives each connection to one of its replicas. One that answers `UNAVAILABLE` is turned away
//! from: calls from then on go over a new connection, which another replica may get.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::mpsc, time::sleep};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, channel::Change};
use weft_runtime::Backoff;

pub use self::operator::Operator;
use self::operator::Replicas;

mod operator;

/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How often a missing file is complained about.
const COMPLAIN: Duration = Duration::from_secs(60);
/// Largest bundle, in bytes.
const MAX_BUNDLE: u64 = 1 << 20;
const CONNECT: Duration = Duration::from_secs(5);
const KEEPALIVE: Duration = Duration::from_secs(20);
/// How soon after a new connection that was of no use the next one may come: at least the first, at most the second.
const ANEW: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));
/// The one endpoint of the channel.
const OPERATOR: u8 = 0;

/// A bundle that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// It is not there, or cannot be read.
    #[error(
        "the trust bundle {path} cannot be read; the operator writes it (ConfigMap weft-trust-bundle), see --bundle-file"
    )]
    File {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It holds no certificate, or the operator's address is none.
    #[error(
        "the trust bundle {path} or the operator's address {uri:?} is not usable; see --bundle-file and --operator"
    )]
    Content {
        /// The bundle.
        path: PathBuf,
        /// The address.
        uri: String,
        /// Why.
        source: tonic::transport::Error,
    },
    /// It holds no certificate.
    #[error("the trust bundle {path} holds no certificate (PEM)")]
    Empty {
        /// Where.
        path: PathBuf,
    },
}

/// What leads to the operator.
#[derive(Debug, Clone)]
pub struct Way {
    /// `https://host:port`.
    pub uri: String,
    /// The name in its certificate.
    pub server_name: String,
    /// The file with the certificates (PEM) that its own must lead to.
    pub bundle: PathBuf,
}

/// Keeps the channel's roots as the file has them, and its connection one to a replica that serves.
#[derive(Debug)]
pub struct Keeper {
    way: Way,
    changes: mpsc::Sender<Change<u8, Endpoint>>,
    replicas: Arc<Replicas>,
}

/// A way to the operator. Calls wait until the bundle is there; [`Keeper::run`] brings it.
pub fn channel(way: Way) -> (Operator, Keeper) {
    let (channel, changes) = Channel::balance_channel(1);
    let replicas = Arc::new(Replicas::default());
    (Operator::new(channel, replicas.clone()), Keeper { way, changes, replicas })
}

impl Keeper {
    /// Puts each new content of the file into use, and a new connection where a replica cannot serve. Streams that
    /// stand go on over the connection that they have.
    pub async fn run(self) {
        let mut held: Option<(Vec<u8>, Endpoint)> = None;
        let mut complained: Option<Instant> = None;
        let mut backoff = Backoff::new(ANEW.0, ANEW.1);
        let mut next = Instant::now();
        loop {
            let way = self.way.clone();
            let looked = tokio::task::spawn_blocking(move || read(&way.bundle)).await;
            let new = match looked {
                Ok(Ok(content)) if held.as_ref().is_some_and(|(held, _)| *held == content) => None,
                Ok(Ok(content)) => Some(endpoint(&self.way, &content).map(|e| (content, e))),
                Ok(Err(error)) => Some(Err(error)),
                Err(_) => None,
            };
            match new {
                Some(Ok((content, endpoint))) => {
                    if !self.connect(endpoint.clone()).await {
                        return;
                    }
                    tracing::info!(file = %self.way.bundle.display(), renewed = held.is_some(), "the trust bundle is in use");
                    (held, complained) = (Some((content, endpoint)), None);
                }
                Some(Err(error)) if complained.is_none_or(|at| at.elapsed() > COMPLAIN) => {
                    let error = crate::enrolment::chain(&error);
                    let goes_on = held.is_some();
                    tracing::warn!(
                        error,
                        goes_on,
                        "no new trust bundle; without one the operator is not spoken to"
                    );
                    complained = Some(Instant::now());
                }
                None | Some(Err(_)) => {}
            }
            tokio::select! {
                () = sleep(LOOK) => continue,
                () = self.replicas.turned_away() => {}
            }
            let Some((_, endpoint)) = &held else { continue };
            if self.replicas.served() {
                backoff.reset();
            }
            sleep(next.saturating_duration_since(Instant::now())).await;
            if !self.connect(endpoint.clone()).await {
                return;
            }
            tracing::debug!("the operator's replica cannot serve; the next call goes over a new connection");
            next = Instant::now() + backoff.next();
        }
    }

    /// Lets calls from now on go over a new connection; false when the channel is gone.
    async fn connect(&self, endpoint: Endpoint) -> bool {
        let sent = self.changes.send(Change::Insert(OPERATOR, endpoint)).await.is_ok();
        self.replicas.changed();
        sent
    }
}

fn read(path: &Path) -> Result<Vec<u8>, BundleError> {
    let mut content = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_BUNDLE).read_to_end(&mut content));
    read.map_err(|source| BundleError::File { path: path.into(), source })?;
    Ok(content)
}

fn endpoint(way: &Way, pem: &[u8]) -> Result<Endpoint, BundleError> {
    if !pem.windows(BEGIN.len()).any(|w| w == BEGIN) {
        return Err(BundleError::Empty { path: way.bundle.clone() });
    }
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(pem))
        .domain_name(way.server_name.clone());
    Endpoint::from_shared(way.uri.clone())
        .and_then(|endpoint| endpoint.tls_config(tls))
        .map(|endpoint| {
            endpoint
                .connect_timeout(CONNECT)
                .http2_keep_alive_interval(KEEPALIVE)
                .keep_alive_timeout(CONNECT)
                .keep_alive_while_idle(true)
        })
        .map_err(|source| BundleError::Content { path: way.bundle.clone(), uri: way.uri.clone(), source })
}

const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE-----";

#[cfg(test)]
mod tests;
