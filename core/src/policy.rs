//! Policy as data, and the interpreter that judges with it. The interpreter is the reference: the kernel's rows
//! ([`kernel`]) and the proxy's decisions must agree with it on every flow.

use std::{net::IpAddr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    id::NamespacedName,
    route::{PathMatch, ValueMatch},
};

pub mod eval;
pub mod kernel;

/// An AuthorizationPolicy, resolved. Which Pods it selects is written on the Pods
/// ([`Workload::policies`](crate::Workload::policies)).
///
/// Here and below, a field that this version does not know is an error: an operator of a later version may have narrowed
/// a rule by it, and an agent that passed over it would let through what the rule refuses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Namespace and name.
    pub name: NamespacedName,
    /// What a match means.
    pub action: Action,
    /// Any of these.
    pub rules: Vec<Rule>,
}

/// What a matching rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Action {
    /// Lets it pass; a Pod selected by at least one such policy denies the rest.
    Allow,
    /// Refuses it, whatever ALLOW says.
    Deny,
    /// Decides nothing, is recorded.
    Audit,
}

/// A rule: any source AND the network attributes AND any HTTP entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// `None`: any authenticated source (for DENY: any source). Empty: none.
    pub sources: Option<Vec<Source>>,
    /// Ports at the Pod; empty: all.
    pub ports: Vec<PortRef>,
    /// The IP protocols.
    pub protocol: Protocol,
    /// True for `plaintext: Allowed`: may cross nodes in strict mode without mTLS (not TCP).
    pub plaintext: bool,
    /// Any of these; empty: not an HTTP rule.
    pub http: Vec<HttpRule>,
}

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Source {
    /// A service account of the mesh's own trust domain; `None` is every account of the namespace.
    ServiceAccount {
        /// Its namespace.
        namespace: Arc<str>,
        /// Its name.
        name: Option<Arc<str>>,
    },
    /// A SPIFFE id pattern: `*` stands for one path segment, a trailing `/*` for everything below.
    Spiffe(Arc<str>),
    /// A peer without identity whose address lies in one of the ranges (empty: any address).
    Unauthenticated(Vec<Cidr>),
}

/// A port, by number or by the container port's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PortRef {
    /// A number.
    Number(u16),
    /// A name, looked up in each selected Pod; a Pod without it does not match.
    Name(String),
}

/// Which IP protocols a rule speaks of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and ICMPv6.
    Icmp,
    /// Every protocol.
    Any,
}

/// An HTTP entry of a rule: every part that is not empty must hold.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpRule {
    /// Any of these methods, upper case.
    pub methods: Vec<Arc<str>>,
    /// Any of these paths, compared after normalisation.
    pub paths: Vec<PathMatch>,
    /// Any of these hosts, lower case, without port; a leading `*.` stands for one or more labels.
    pub hosts: Vec<Arc<str>>,
    /// All of these headers.
    pub headers: Vec<ValueMatch>,
}

/// An address range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    /// The network address, host bits zero.
    pub address: IpAddr,
    /// Prefix length.
    pub prefix: u8,
}

/// Text that is not an address range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address range; write one like 10.0.0.0/8 or fd00::/64")]
pub struct InvalidCidr(pub String);

impl Cidr {
    /// A range; host bits are cleared.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V4(a) if prefix <= 32 => {
                IpAddr::V4((u32::from(a) & u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)).into())
            }
            IpAddr::V6(a) if prefix <= 128 => IpAddr::V6(
                (u128::from(a) & u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)).into(),
            ),
            _ => return None,
        };
        Some(Self { address, prefix })
    }

    /// Whether `address` lies in it. A v4-mapped v6 address is its v4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.address.is_ipv4()
            && Self::new(address, self.prefix).is_some_and(|c| c.address == self.address)
    }
}

impl std::str::FromStr for Cidr {
    type Err = InvalidCidr;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (address, prefix) = text.split_once('/')?;
            Self::new(address.parse().ok()?, prefix.parse().ok()?)
        };
        parse().ok_or_else(|| InvalidCidr(text.chars().take(80).collect()))
    }
}

impl TryFrom<String> for Cidr {
    type Error = InvalidCidr;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}
