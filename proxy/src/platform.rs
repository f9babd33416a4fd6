//! What the proxy needs from the machine, behind traits: the agent implements them over BPF and namespaces.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use tokio::net::{TcpSocket, TcpStream};
use weft_core::{SubjectId, WorkloadUid};

/// Address family of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address; v4-mapped v6 counts as v4.
    pub fn of(address: SocketAddr) -> Self {
        if address.ip().to_canonical().is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// What an application dialled before its connection was steered into the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OriginalDst {
    /// The address and port that it dialled.
    pub address: SocketAddr,
    /// The socket cookie of the application's socket: the connection's id in every flow record.
    pub connection: u64,
    /// The subject that the kernel took the application for.
    pub subject: SubjectId,
}

/// The network namespace of one enrolled Pod.
pub trait PodNet: Send + Sync + fmt::Debug + 'static {
    /// A new, unconnected TCP socket inside the Pod's namespace, marked in the kernel as the proxy's own so that
    /// no hook redirects it.
    ///
    /// With `shown`, the socket is for dialling the Pod's own application: it is bound to the reserved loopback
    /// source, and the application sees `shown` as its peer. Without, it leaves with the Pod's own address.
    ///
    /// # Errors
    /// When the namespace is gone or descriptors run out.
    fn socket(&self, family: Family, shown: Option<SocketAddr>) -> io::Result<TcpSocket>;

    /// What the application dialled; to be asked once for each socket. `None` where the connection was not steered here
    /// by the kernel: the proxy closes such a connection.
    ///
    /// # Errors
    /// When the kernel refuses the lookup.
    fn original_dst(&self, accepted: &TcpStream) -> io::Result<Option<OriginalDst>>;

    /// The Pod's addresses as its network has them: the API server learns of them late. Empty where only the API server
    /// knows.
    fn addresses(&self) -> &[IpAddr] {
        &[]
    }

    /// Marks a socket that was accepted from outside the Pod as the proxy's own: what ends connections beside the
    /// proxy spares it. One that is not marked can be cut when the Pod's mode is tightened, nothing else.
    fn accepted(&self, _accepted: &TcpStream) {}
}

/// Listening sockets that live in the Pod's namespace, one per family each.
#[derive(Debug)]
pub struct PodListeners {
    /// Connections that the Pod's applications opened.
    pub outbound: Vec<std::net::TcpListener>,
    /// Plaintext from outside the mesh towards the Pod; the accepted socket's local address is what was dialled.
    pub inbound: Vec<std::net::TcpListener>,
    /// Tunnels from other proxies (port 15008 of the Pod); the accepted socket's local address is the Pod's.
    pub tunnel: Vec<std::net::TcpListener>,
}

/// An enrolled Pod as the proxy gets it.
#[derive(Debug)]
pub struct PodHandle {
    /// Which Pod; everything else of it is looked up in the state.
    pub uid: WorkloadUid,
    /// Its namespace.
    pub net: Arc<dyn PodNet>,
    /// Its listeners.
    pub listeners: PodListeners,
}
