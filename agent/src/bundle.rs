//! The way to the operator: a channel that exists from the start and is usable once the trust bundle is there. On a
//! new cluster the operator writes the bundle after the agents start, and it changes when the operator's CA does.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tokio::{sync::mpsc, time::sleep};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, channel::Change};

/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How often a missing file is complained about.
const COMPLAIN: Duration = Duration::from_secs(60);
/// Largest bundle, in bytes.
const MAX_BUNDLE: u64 = 1 << 20;
const CONNECT: Duration = Duration::from_secs(5);
const KEEPALIVE: Duration = Duration::from_secs(20);
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

/// Keeps the channel's roots as the file has them.
#[derive(Debug)]
pub struct Keeper {
    way: Way,
    changes: mpsc::Sender<Change<u8, Endpoint>>,
}

/// A channel to the operator. Calls wait until the bundle is there; [`Keeper::run`] brings it.
pub fn channel(way: Way) -> (Channel, Keeper) {
    let (channel, changes) = Channel::balance_channel(1);
    (channel, Keeper { way, changes })
}

impl Keeper {
    /// Puts each new content of the file into use. Connections that stand go on until the operator ends them.
    pub async fn run(self) {
        let mut held: Option<Vec<u8>> = None;
        let mut complained: Option<Instant> = None;
        loop {
            let way = self.way.clone();
            let looked = tokio::task::spawn_blocking(move || read(&way.bundle)).await;
            let new = match looked {
                Ok(Ok(content)) if held.as_ref() == Some(&content) => None,
                Ok(Ok(content)) => Some(endpoint(&self.way, &content).map(|e| (e, content))),
                Ok(Err(error)) => Some(Err(error)),
                Err(_) => None,
            };
            match new {
                Some(Ok((endpoint, content))) => {
                    if self.changes.send(Change::Insert(OPERATOR, endpoint)).await.is_err() {
                        return;
                    }
                    tracing::info!(file = %self.way.bundle.display(), renewed = held.is_some(), "the trust bundle is in use");
                    (held, complained) = (Some(content), None);
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
            sleep(LOOK).await;
        }
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
