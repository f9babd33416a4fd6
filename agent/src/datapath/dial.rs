//! Sockets as a Pod's own programs make them, to see what becomes of their connections.

use std::net::IpAddr;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpSocket;
use weft_core::WorkloadUid;

use super::{Datapath, DatapathError, not_enrolled};

impl Datapath {
    /// An unmarked socket in the network namespace of an enrolled Pod, for an address of the family of `towards`, and
    /// its cookie. To the hooks it is the Pod's own.
    ///
    /// # Errors
    /// When the Pod is not enrolled, or its namespace is gone.
    pub fn socket_of(&self, uid: &WorkloadUid, towards: IpAddr) -> Result<(TcpSocket, u64), DatapathError> {
        let netns = {
            let pods = self.inner.pods.lock();
            pods.enrolled.get(uid).ok_or_else(|| not_enrolled(uid))?.netns.clone()
        };
        let domain = if towards.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let made = netns.run(|| {
            let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
            let cookie = socket.cookie()?;
            Ok((socket, cookie))
        });
        let (socket, cookie) =
            made.map_err(|source| DatapathError::Netns { path: netns.path().to_owned(), source })?;
        Ok((TcpSocket::from_std_stream(socket.into()), cookie))
    }
}
