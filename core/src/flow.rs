//! What is recorded of a connection or request: one record that joins L4, TLS, policy and L7.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::{
    id::{NamespacedName, SpiffeId, SubjectId},
    workload::Owner,
};

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verdict {
    /// It went through.
    Forwarded,
    /// It was refused by a decision.
    Denied,
    /// It failed: an upstream, a timeout, a protocol error.
    Error,
    /// A policy of action AUDIT matched; it went through.
    Audited,
}

/// Why something was refused or failed. `hubble_code` is the wire number (field notes, section 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// Nothing is wrong.
    None,
    /// No ALLOW rule matched.
    PolicyDenied,
    /// A DENY rule matched.
    PolicyDenyRule,
    /// Plaintext towards a strict Pod.
    PlaintextRefused,
    /// A forged source address.
    InvalidSource,
    /// TCP that did not come through the proxy.
    ProxyBypassed,
    /// The tunnel port was dialled by an application.
    TunnelPortDialled,
    /// A namespace or address that nobody described.
    UnknownPeer,
    /// The TLS peer is not who it should be, or the identities of one connection differ.
    IdentityMismatch,
    /// The TLS handshake failed.
    TlsFailure,
    /// No ready endpoint.
    NoEndpoint,
    /// The endpoint refused or did not answer in time.
    ConnectFailure,
    /// It is not the protocol the port speaks, or not well formed.
    ProtocolError,
    /// No credentials yet, or they expired.
    NoCredentials,
    /// A limit was reached.
    LimitReached,
    /// Closed because policy or identity changed.
    Revoked,
    /// Unsupported protocol for the mesh (fragments, extension headers, SCTP).
    Unsupported,
    /// The proxy is being replaced or stopped.
    Draining,
    /// The time allowed ran out.
    Timeout,
    /// The peer went away.
    PeerReset,
}

/// How the bytes were protected on the way that this record describes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tls {
    /// Not at all (kernel path, outside the mesh, refused before a handshake).
    None,
    /// The same node: never left it.
    Local,
    /// mTLS.
    Mutual {
        /// The negotiated key exchange group, e.g. `X25519MLKEM768`.
        key_exchange: Arc<str>,
        /// The negotiated cipher suite, e.g. `TLS13_AES_128_GCM_SHA256`.
        cipher: Arc<str>,
    },
}

/// Who saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reporter {
    /// The BPF programs of the source's node.
    KernelSource,
    /// The BPF programs of the destination's node.
    KernelDestination,
    /// The proxy of the source's node.
    ProxySource,
    /// The proxy of the destination's node.
    ProxyDestination,
}

/// One side of a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its address (source: the client's; destination: the endpoint's, or what was dialled where none was chosen).
    pub address: SocketAddr,
    /// The Pod, where known.
    pub pod: Option<NamespacedName>,
    /// What owns the Pod.
    pub owner: Option<Owner>,
    /// Its identity, where proven.
    pub identity: Option<SpiffeId>,
    /// Its policy subject.
    pub subject: SubjectId,
}

/// The HTTP part of a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpFlow {
    /// Method, upper case.
    pub method: String,
    /// `http://host/path`, with the query only where asked for.
    pub url: String,
    /// `HTTP/1.1`, `HTTP/2`.
    pub protocol: &'static str,
    /// Status code, 0 where there was none.
    pub status: u16,
    /// Recorded request headers.
    pub headers: Vec<(String, String)>,
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowRecord {
    /// When it began.
    pub time: SystemTime,
    /// Joins the records of one connection: the client's socket cookie (Linux, `SO_COOKIE`), 0 where there is none.
    pub connection: u64,
    /// Who saw it.
    pub reporter: Reporter,
    /// What became of it.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// The client.
    pub source: Peer,
    /// The server.
    pub destination: Peer,
    /// IP protocol number (6 TCP, 17 UDP, 1 ICMP, 58 ICMPv6).
    pub protocol: u8,
    /// The Service and port that was dialled.
    pub service: Option<(NamespacedName, u16)>,
    /// The policy that decided.
    pub policy: Option<NamespacedName>,
    /// How it was protected.
    pub tls: Tls,
    /// The HTTP part.
    pub http: Option<HttpFlow>,
    /// Bytes from client to server.
    pub sent: u64,
    /// Bytes from server to client.
    pub received: u64,
    /// From the beginning to the answer (HTTP) or to the end (TCP).
    pub duration: Duration,
    /// True for the record at a connection's opening, false at its end or for a request.
    pub opening: bool,
}

/// Where records go. Must not block; what cannot be kept is counted as lost by the implementation.
pub trait FlowSink: Send + Sync + 'static {
    /// Takes a record.
    fn record(&self, record: FlowRecord);
}
