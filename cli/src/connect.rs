//! Finding agents and talking to them.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use tonic::transport::{Channel, Endpoint};

use crate::{Failure, args::ServerArgs, cluster::Cluster};

/// Where agents put their run folders.
const RUN_DIR: &str = "/run/weft";
/// The socket's name in a run folder.
const SOCKET: &str = "observer.sock";
/// How long an agent may take to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// An agent's address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// `http://HOST:PORT`.
    Http(String),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Http(url) => f.write_str(url),
        }
    }
}

/// The agents that the arguments name, or every one of this machine; `None` where the cluster shall be asked.
pub(crate) fn addresses(args: &ServerArgs) -> Result<Option<Vec<Address>>, Failure> {
    if args.servers.is_empty() {
        if args.cluster.given() {
            return Ok(None);
        }
        let found = sockets_in(Path::new(RUN_DIR))?;
        return Ok((!found.is_empty()).then_some(found));
    }
    let mut found = Vec::new();
    for server in &args.servers {
        if server.starts_with("http://") {
            found.push(Address::Http(server.clone()));
            continue;
        }
        let path = Path::new(server.strip_prefix("unix:").unwrap_or(server));
        let there = there(path)?;
        if path.is_dir() {
            let sockets = sockets_in(path)?;
            if sockets.is_empty() {
                return Err(Failure::Unable(format!("no agent's {SOCKET} in {}", path.display())));
            }
            found.extend(sockets);
        } else if there || server.starts_with("unix:") {
            found.push(Address::Unix(path.into()));
        } else {
            return Err(Failure::Usage(format!(
                "{server:?} is no agent's address: write unix:PATH, a folder, or http://HOST:PORT"
            )));
        }
    }
    found.sort();
    found.dedup();
    Ok(Some(found))
}

/// The cluster, where this machine has no agent.
pub(crate) async fn cluster(args: &ServerArgs) -> Result<Cluster, Failure> {
    Cluster::connect(&args.cluster).await.map_err(|e| match e {
        Failure::Unable(why) if !args.cluster.given() => Failure::Unable(format!(
            "no agent here: nothing at {RUN_DIR}/*/{SOCKET} (name one with --server unix:PATH), and {why}"
        )),
        other => other,
    })
}

fn sockets_in(dir: &Path) -> Result<Vec<Address>, Failure> {
    let mut found = Vec::new();
    let mut take = |socket: PathBuf| -> Result<(), Failure> {
        if there(&socket)? {
            found.push(Address::Unix(socket));
        }
        Ok(())
    };
    take(dir.join(SOCKET))?;
    match std::fs::read_dir(dir) {
        Ok(entries) => {
            for entry in entries.flatten().filter(|e| e.path().is_dir()) {
                take(entry.path().join(SOCKET))?;
            }
        }
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => return Err(denied(dir)),
        Err(_) => {}
    }
    found.sort();
    Ok(found)
}

/// Whether something is at a path; what may not be looked at is an error, not an absence.
fn there(path: &Path) -> Result<bool, Failure> {
    match path.try_exists() {
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => Err(denied(path)),
        other => Ok(other.unwrap_or(false)),
    }
}

fn denied(path: &Path) -> Failure {
    Failure::Unable(format!("{} is for root only: run this with sudo", path.display()))
}

/// Opens a channel to an agent.
pub(crate) async fn channel(address: &Address) -> Result<Channel, Failure> {
    let unable = |e: &(dyn std::error::Error + 'static)| {
        let hint = if source_of(e).is_some_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied) {
            "; its socket is for root only: run this with sudo"
        } else {
            "; is the agent running? see its log, or /healthz of its --admin address"
        };
        Failure::Unable(format!("cannot reach the agent at {address}: {}{hint}", chain(e)))
    };
    match address {
        Address::Http(url) => {
            let endpoint = Endpoint::from_shared(url.clone())
                .map_err(|e| Failure::Usage(format!("{url:?} is no address: {e}")))?;
            endpoint.connect_timeout(CONNECT_TIMEOUT).connect().await.map_err(|e| unable(&e))
        }
        Address::Unix(path) => unix(path).await.map_err(|e| unable(e.as_ref())),
    }
}

#[cfg(unix)]
async fn unix(path: &Path) -> Result<Channel, Box<dyn std::error::Error + Send + Sync>> {
    let path = path.to_owned();
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://agent").connect_timeout(CONNECT_TIMEOUT);
    Ok(endpoint.connect_with_connector(connector).await?)
}

#[cfg(not(unix))]
async fn unix(_: &Path) -> Result<Channel, Box<dyn std::error::Error + Send + Sync>> {
    Err("this system has no Unix sockets; use --server http://HOST:PORT with a forwarded port".into())
}

fn source_of<'a>(mut e: &'a (dyn std::error::Error + 'static)) -> Option<&'a std::io::Error> {
    loop {
        if let Some(io) = e.downcast_ref() {
            return Some(io);
        }
        e = e.source()?;
    }
}

/// An error with its causes.
pub(crate) fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(e) = next {
        let more = e.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        next = e.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_stands_for_its_agents() {
        let dir = tempfile::tempdir().unwrap();
        for node in ["node-b", "node-a"] {
            std::fs::create_dir(dir.path().join(node)).unwrap();
            std::fs::write(dir.path().join(node).join(SOCKET), "").unwrap();
        }
        let servers = vec![dir.path().display().to_string(), "http://127.0.0.1:4244".into()];
        let args = |servers| ServerArgs { servers, ..ServerArgs::default() };
        let found = addresses(&args(servers)).unwrap().unwrap();
        assert_eq!(
            found,
            [
                Address::Unix(dir.path().join("node-a").join(SOCKET)),
                Address::Unix(dir.path().join("node-b").join(SOCKET)),
                Address::Http("http://127.0.0.1:4244".into()),
            ]
        );
        assert!(matches!(addresses(&args(vec!["no-such-thing".into()])), Err(Failure::Usage(_))));
        let mut elsewhere = args(Vec::new());
        elsewhere.cluster.context = Some("test".into());
        assert_eq!(addresses(&elsewhere).unwrap(), None);
    }
}
