//! Numbers that stand for names: verdicts, reasons, flags, counters. Values are part of the maps' version; they are
//! appended to, never renumbered.

/// Names of the maps in the object. A change of a map's types changes [`MAP_VERSION`].
pub mod map {
    /// Network namespace cookie to [`crate::Pod`].
    pub const PODS: &str = "PODS";
    /// Host-side interface index to [`crate::Pod`].
    pub const VETHS: &str = "VETHS";
    /// Address to [`crate::Pod`], local enrolled Pods only.
    pub const POD_ADDRS: &str = "POD_ADDRS";
    /// Socket storage: [`crate::SkMeta`].
    pub const SK_META: &str = "SK_META";
    /// [`crate::Tuple`] to [`crate::OrigDst`]: what a redirected connection dialled.
    pub const ORIG_DST: &str = "ORIG_DST";
    /// [`crate::Tuple`] to [`crate::OrigDst`]: the real client of a connection the proxy dialled.
    pub const CLIENT_OF: &str = "CLIENT_OF";
    /// [`crate::ListenerKey`] to a listening socket.
    pub const LISTENERS: &str = "LISTENERS";
    /// Address to [`crate::AddrInfo`].
    pub const ADDRS: &str = "ADDRS";
    /// Prefix to [`crate::AddrInfo`]; IPv4 under `::ffff:0:0/96`.
    pub const CIDRS: &str = "CIDRS";
    /// [`crate::VipKey`] to the policy that denies every endpoint, or to [`super::VIP_NO_ENDPOINT`].
    pub const VIP_DENIED: &str = "VIP_DENIED";
    /// [`crate::PolicyKey`] to [`crate::PolicyVal`].
    pub const POLICY: &str = "POLICY";
    /// [`crate::Tuple`], lower end first, to [`crate::FlowSeen`]: allowed flows that are not TCP.
    pub const FLOW_PAIRS: &str = "FLOW_PAIRS";
    /// [`crate::FragKey`] to the time (ns, monotonic clock) its first fragment passed.
    pub const FRAGS: &str = "FRAGS";
    /// [`crate::CountKey`] to a number per CPU.
    pub const COUNTS: &str = "COUNTS";
    /// [`super::stat`] index to a number per CPU.
    pub const STATS: &str = "STATS";
    /// Index 0: [`crate::Config`].
    pub const CONFIG: &str = "CONFIG";
    /// Ring buffer of [`crate::Event`].
    pub const EVENTS: &str = "EVENTS";
    /// cgroup2 id to 1: where the node's kubelet runs.
    pub const KUBELETS: &str = "KUBELETS";
    /// [`crate::Tuple`] to [`crate::Probe`]: the kubelet's SYNs on their way into a Pod.
    pub const PROBES: &str = "PROBES";
    /// [`crate::FrontKey`] to [`crate::Front`]: ports outside the cluster's own ranges that are a Service's.
    pub const FRONTS: &str = "FRONTS";
    /// cgroup2 id to [`super::cgroup`].
    pub const CGROUPS: &str = "CGROUPS";
    /// Every map that is pinned, in the order they are created.
    pub const ALL: [&str; 21] = [
        PODS, VETHS, POD_ADDRS, SK_META, ORIG_DST, CLIENT_OF, LISTENERS, ADDRS, CIDRS, VIP_DENIED, POLICY,
        FLOW_PAIRS, FRAGS, COUNTS, STATS, CONFIG, EVENTS, KUBELETS, PROBES, FRONTS, CGROUPS,
    ];
}

/// The version of the maps' layout; part of the name of a pin (`PODS_v1`).
pub const MAP_VERSION: u32 = 1;

/// Names of the programs in the object.
pub mod program {
    /// `cgroup/connect4`.
    pub const CONNECT4: &str = "weft_connect4";
    /// `cgroup/connect6`.
    pub const CONNECT6: &str = "weft_connect6";
    /// `cgroup/getpeername4`.
    pub const GETPEERNAME4: &str = "weft_getpeername4";
    /// `cgroup/getpeername6`.
    pub const GETPEERNAME6: &str = "weft_getpeername6";
    /// `cgroup/getsockname4`.
    pub const GETSOCKNAME4: &str = "weft_getsockname4";
    /// `cgroup/getsockname6`.
    pub const GETSOCKNAME6: &str = "weft_getsockname6";
    /// `sock_ops`.
    pub const SOCK_OPS: &str = "weft_sock_ops";
    /// `sk_lookup`, one link per Pod namespace.
    pub const SK_LOOKUP: &str = "weft_sk_lookup";
    /// `tcx/ingress` of the host-side veth: what leaves a Pod.
    pub const FROM_POD: &str = "weft_from_pod";
    /// `tcx/egress` of the host-side veth: what enters a Pod.
    pub const TO_POD: &str = "weft_to_pod";
    /// The programs of the cgroup that are `sock_addr` programs.
    pub const SOCK_ADDR: [&str; 6] =
        [CONNECT4, CONNECT6, GETPEERNAME4, GETPEERNAME6, GETSOCKNAME4, GETSOCKNAME6];
    /// Every program of the object.
    pub const ALL: [&str; 10] = [
        CONNECT4,
        CONNECT6,
        GETPEERNAME4,
        GETPEERNAME6,
        GETSOCKNAME4,
        GETSOCKNAME6,
        SOCK_OPS,
        SK_LOOKUP,
        FROM_POD,
        TO_POD,
    ];
}

/// The object's global that switches debug lines on (`u8`, 0 or 1), to be set before loading.
pub const LOG_GLOBAL: &str = "WEFT_LOG";

/// IP protocol numbers (IANA).
pub mod proto {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMPv6.
    pub const ICMP6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// The port of the mesh's tunnels.
pub const TUNNEL_PORT: u16 = 15_008;

/// Stands in [`map::VIP_DENIED`] for the policy where a Service's port has no endpoint that takes connections.
pub const VIP_NO_ENDPOINT: u32 = u32::MAX;

/// Policy subjects that are not Pods; as `weft_core::SubjectId`.
pub mod subject {
    /// Nobody.
    pub const UNKNOWN: u32 = 0;
    /// The node itself.
    pub const HOST: u32 = 1;
    /// Outside the mesh, in no policy's CIDR.
    pub const WORLD: u32 = 2;
}

/// What a policy row says ([`crate::PolicyVal::verdict`]).
pub mod verdict {
    /// May pass.
    pub const ALLOW: u8 = 1;
    /// May pass between nodes without mTLS too.
    pub const ALLOW_PLAINTEXT: u8 = 2;
    /// Refused.
    pub const DENY: u8 = 3;
    /// The proxy judges.
    pub const PROXY: u8 = 4;
}

/// What became of it ([`crate::Event::verdict`], [`crate::CountKey::verdict`]).
pub mod outcome {
    /// Passed in the kernel.
    pub const FORWARDED: u8 = 1;
    /// Refused.
    pub const DENIED: u8 = 2;
    /// Sent to the proxy.
    pub const REDIRECTED: u8 = 3;
}

/// Why ([`crate::Event::reason`]): the positions of `weft_core::flow::Reason`.
pub mod reason {
    /// Nothing is wrong.
    pub const NONE: u8 = 0;
    /// No ALLOW rule matched.
    pub const POLICY_DENIED: u8 = 1;
    /// A DENY rule matched.
    pub const POLICY_DENY_RULE: u8 = 2;
    /// Plaintext towards a strict Pod.
    pub const PLAINTEXT_REFUSED: u8 = 3;
    /// A forged source address.
    pub const INVALID_SOURCE: u8 = 4;
    /// TCP that did not come through the proxy.
    pub const PROXY_BYPASSED: u8 = 5;
    /// The tunnel port was dialled by an application.
    pub const TUNNEL_PORT_DIALLED: u8 = 6;
    /// A namespace or address that nobody described.
    pub const UNKNOWN_PEER: u8 = 7;
    /// The identities of one connection differ.
    pub const IDENTITY_MISMATCH: u8 = 8;
    /// The TLS handshake failed.
    pub const TLS_FAILURE: u8 = 9;
    /// No ready endpoint.
    pub const NO_ENDPOINT: u8 = 10;
    /// The endpoint (or the proxy's listener) did not answer.
    pub const CONNECT_FAILURE: u8 = 11;
    /// Not the protocol the port speaks.
    pub const PROTOCOL_ERROR: u8 = 12;
    /// No credentials.
    pub const NO_CREDENTIALS: u8 = 13;
    /// A limit was reached.
    pub const LIMIT_REACHED: u8 = 14;
    /// Policy or identity changed.
    pub const REVOKED: u8 = 15;
    /// Fragments, extension headers and protocols the mesh does not carry.
    pub const UNSUPPORTED: u8 = 16;
    /// The proxy is being replaced.
    pub const DRAINING: u8 = 17;
    /// Time ran out.
    pub const TIMEOUT: u8 = 18;
    /// The peer went away.
    pub const PEER_RESET: u8 = 19;
}

/// Which hook saw it ([`crate::Event::kind`]).
pub mod event {
    /// `connect4`, `connect6`.
    pub const CONNECT: u8 = 1;
    /// `sk_lookup`.
    pub const SK_LOOKUP: u8 = 2;
    /// `tc`, leaving a Pod.
    pub const TC_FROM: u8 = 3;
    /// `tc`, entering a Pod.
    pub const TC_TO: u8 = 4;
    /// A connect from a network namespace that is not in `PODS`.
    pub const UNKNOWN_NETNS: u8 = 5;
}

/// Whose point of view a count has ([`crate::CountKey::dir`]).
pub mod direction {
    /// The source's node.
    pub const OUT: u8 = 1;
    /// The destination's node.
    pub const IN: u8 = 2;
}

/// [`crate::Pod::flags`].
pub mod pod {
    /// The Pod is known and outside the mesh: everything passes.
    pub const PASS: u32 = 1;
    /// Mode strict.
    pub const STRICT: u32 = 2;
    /// Mode permissive.
    pub const PERMISSIVE: u32 = 4;
    /// Connections pass unmeshed while the proxy is away (never with strict).
    pub const FAIL_OPEN: u32 = 8;
    /// The node's own network: only processes of Pods are steered there ([`super::cgroup::PODS`]), and only towards
    /// enrolled Pods. Nothing that comes in is judged.
    pub const HOST: u32 = 16;
    /// Belongs to the mesh, and nobody has described it yet: it neither reaches the mesh nor is reached. What is outside
    /// the mesh it may dial.
    pub const HELD: u32 = 32;
    /// With [`STRICT`]: what it had open with others before it became so was not looked at yet. For agents only, of which
    /// the next one goes on where one died.
    pub const UNSETTLED: u32 = 64;
}

/// [`crate::AddrInfo::flags`].
pub mod info {
    /// An enrolled Pod's address.
    pub const ENROLLED: u32 = 1;
    /// That Pod is on this node.
    pub const LOCAL: u32 = 2;
    /// That Pod is strict; with [`SERVICE`]: an enrolled Pod of another node behind it is.
    pub const STRICT: u32 = 4;
    /// Rows exist for that Pod; a missing one means deny. With [`SERVICE`]: enrolled Pods of other nodes are behind
    /// it, and rows with its subject say what they take that is not TCP ([`crate::judge::judge_service`]).
    pub const POLICED: u32 = 8;
    /// May be reached in the kernel from a local Pod.
    pub const SHORTCUT_OK: u32 = 16;
    /// A Service's address.
    pub const SERVICE: u32 = 32;
    /// In the Pod or Service ranges of the cluster.
    pub const MESH_RANGE: u32 = 64;
    /// A class of a policy's CIDRs.
    pub const CIDR: u32 = 128;
    /// With [`SERVICE`]: an enrolled Pod is behind it.
    pub const MESHED: u32 = 256;
    /// Some ports of it are a Service's ([`crate::FrontKey`]); says nothing of the others.
    pub const FRONT: u32 = 512;
    /// With [`FRONT`]: a node's address, where the ports of every node are ([`crate::FrontKey::addr`] unspecified).
    pub const NODE: u32 = 1024;
}

/// Values of `CGROUPS`.
pub mod cgroup {
    /// The kubelet's Pods are below it.
    pub const PODS: u32 = 1;
    /// An agent's own: never steered, although its Pod is one of those.
    pub const AGENT: u32 = 2;
    /// Levels that are looked at between the hierarchy's root and a process.
    pub const LEVELS: i32 = 16;
}

/// [`crate::SkMeta::kind`].
pub mod kind {
    /// A redirected application socket; `addr`, `port` are what it dialled.
    pub const APP: u8 = 1;
    /// The proxy's own socket; `addr`, `port` the client to show, or zero.
    pub const PROXY: u8 = 2;
    /// The proxy's accepted end of a redirected connection; `addr`, `port` what was dialled.
    pub const ACCEPTED_OUT: u8 = 3;
    /// The application's accepted end of a connection of the proxy; `addr`, `port` the real client.
    pub const ACCEPTED_IN: u8 = 4;
    /// Judged in the kernel: passes beside the proxy.
    pub const DIRECT: u8 = 5;
}

/// [`crate::ListenerKey::kind`].
pub mod listener {
    /// Outgoing IPv4.
    pub const OUT4: u8 = 1;
    /// Outgoing IPv6.
    pub const OUT6: u8 = 2;
    /// Plain inbound IPv4.
    pub const IN4: u8 = 3;
    /// Plain inbound IPv6.
    pub const IN6: u8 = 4;
    /// Tunnels, IPv4.
    pub const TUN4: u8 = 5;
    /// Tunnels, IPv6.
    pub const TUN6: u8 = 6;
}

/// [`crate::Config::flags`].
pub mod config {
    /// An unknown network namespace may not connect anywhere (else: not towards the mesh).
    pub const UNKNOWN_REFUSE_ALL: u32 = 1;
    /// Debug lines; has an effect only where [`super::LOG_GLOBAL`] was set before loading.
    pub const LOG: u32 = 2;
}

/// Indexes of `STATS`.
pub mod stat {
    /// Connects sent to the proxy.
    pub const REDIRECTED: u32 = 0;
    /// Connects and inbound connections that passed in the kernel.
    pub const PASSED_KERNEL: u32 = 1;
    /// Connects refused.
    pub const DENIED_CONNECT: u32 = 2;
    /// Connects from a network namespace that nobody described.
    pub const UNKNOWN_NETNS: u32 = 3;
    /// Packets with a forged source.
    pub const SPOOFED: u32 = 4;
    /// SYNs that did not come through the proxy.
    pub const BYPASS_SYN: u32 = 5;
    /// Plaintext refused by a strict Pod.
    pub const PLAINTEXT_REFUSED: u32 = 6;
    /// Applications that dialled the tunnel port.
    pub const TUNNEL_DIALLED: u32 = 7;
    /// Events lost because the ring was full.
    pub const RING_LOST: u32 = 8;
    /// Connections of the proxy whose client is not known.
    pub const CLIENT_MISS: u32 = 9;
    /// Redirected connections whose original destination is not known.
    pub const ORIG_MISS: u32 = 10;
    /// Counts lost because `COUNTS` was full.
    pub const COUNTS_FULL: u32 = 11;
    /// Packets refused that are not TCP.
    pub const NON_TCP_DENIED: u32 = 12;
    /// Fragments without a judged first one.
    pub const FRAG_DROPPED: u32 = 13;
    /// IPv6 extension headers that are unknown, too many or encrypted; headers cut short.
    pub const EXT_HDR_DROPPED: u32 = 14;
    /// Packets with a loopback source from outside.
    pub const MARTIAN: u32 = 15;
    /// Inbound connections refused by policy.
    pub const DENIED_INBOUND: u32 = 16;
    /// Connections dropped because the proxy has no listener.
    pub const NO_LISTENER: u32 = 17;
    /// Connections passed because the proxy has no listener and the Pod fails open.
    pub const FAILED_OPEN: u32 = 18;
    /// Inbound connections sent to the proxy.
    pub const STEERED: u32 = 19;
    /// Map updates that failed (a full map, no memory).
    pub const MAP_FULL: u32 = 20;
    /// Connections of the kubelet that passed.
    pub const PROBE_PASSED: u32 = 21;
    /// The number of counters.
    pub const COUNT: u32 = 22;
    /// Their names for metrics, by index.
    pub const NAMES: [&str; COUNT as usize] = [
        "redirected",
        "passed_kernel",
        "denied_connect",
        "unknown_netns",
        "spoofed",
        "bypass_syn",
        "plaintext_refused",
        "tunnel_dialled",
        "ring_lost",
        "client_miss",
        "orig_miss",
        "counts_full",
        "non_tcp_denied",
        "frag_dropped",
        "ext_hdr_dropped",
        "martian",
        "denied_inbound",
        "no_listener",
        "failed_open",
        "steered",
        "map_full",
        "probe_passed",
    ];
}

/// A flow that is not TCP counts as gone after this long without a packet (ns).
pub const FLOW_IDLE_NS: u64 = 60_000_000_000;
/// Later fragments are taken for this long after the first one (ns); Linux reassembles for 30 s.
pub const FRAG_IDLE_NS: u64 = 30_000_000_000;
/// The kubelet's SYN is let in for this long after it was seen (ns). The way from the interface to the socket takes
/// microseconds, a SYN that is sent again is seen again; the rest is for the ACK of a SYN cookie, which is looked up
/// like a SYN.
pub const PROBE_FRESH_NS: u64 = 3_000_000_000;
