//! Finding agents and talking to them.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use tonic::transport::{Channel, Endpoint};

use crate::{Failure, args::ServerArgs};

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

/// The agents that the arguments name, or every one of this machine.
pub(crate) fn addresses(args: &ServerArgs) -> Result<Vec<Address>, Failure> {
    let mut found = Vec::new();
    if args.servers.is_empty() {
        found = sockets_in(Path::new(RUN_DIR));
        if found.is_empty() {
            return Err(Failure::Unable(format!(
                "no agent here: nothing at {RUN_DIR}/*/{SOCKET}; name one with --server unix:PATH (or a folder)"
            )));
        }
    }
    for server in &args.servers {
        if server.starts_with("http://") {
            found.push(Address::Http(server.clone()));
            continue;
        }
        let path = Path::new(server.strip_prefix("unix:").unwrap_or(server));
        if path.is_dir() {
            let sockets = sockets_in(path);
            if sockets.is_empty() {
                return Err(Failure::Unable(format!("no agent's {SOCKET} in {}", path.display())));
            }
            found.extend(sockets);
        } else if path.exists() || server.starts_with("unix:") {
            found.push(Address::Unix(path.into()));
        } else {
            return Err(Failure::Usage(format!(
                "{server:?} is no agent's address: write unix:PATH, a folder, or http://HOST:PORT"
            )));
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

fn sockets_in(dir: &Path) -> Vec<Address> {
    let own = dir.join(SOCKET);
    let below = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path().join(SOCKET));
    let mut found: Vec<_> =
        std::iter::once(own).chain(below).filter(|p| p.exists()).map(Address::Unix).collect();
    found.sort();
    found
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

fn chain(e: &dyn std::error::Error) -> String {
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
        let found = addresses(&ServerArgs { servers }).unwrap();
        assert_eq!(
            found,
            [
                Address::Unix(dir.path().join("node-a").join(SOCKET)),
                Address::Unix(dir.path().join("node-b").join(SOCKET)),
                Address::Http("http://127.0.0.1:4244".into()),
            ]
        );
        let nothing = ServerArgs { servers: vec!["no-such-thing".into()] };
        assert!(matches!(addresses(&nothing), Err(Failure::Usage(_))));
    }
}
