//! Names: SPIFFE ids, policy subjects, namespaced names.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

/// Longest SPIFFE id accepted, in bytes (SPIFFE-ID specification, section 2.3).
pub const MAX_SPIFFE_ID: usize = 2048;

/// A string that is not a SPIFFE id of the mesh's form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{id:?} is no SPIFFE id: {reason}")]
pub struct InvalidSpiffeId {
    /// What was given, cut to 120 characters.
    pub id: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

/// The name of a trust domain, e.g. `cluster.local`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Checks and takes a trust domain name (SPIFFE-ID specification, section 2.1).
    ///
    /// # Errors
    /// When it is empty, longer than 255 bytes or holds a character outside `[a-z0-9._-]`.
    pub fn new(name: &str) -> Result<Self, InvalidSpiffeId> {
        let ok = !name.is_empty()
            && name.len() <= 255
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b));
        if ok {
            Ok(Self(name.into()))
        } else {
            Err(invalid(name, "the trust domain may hold a-z, 0-9, '.', '_' and '-' only"))
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A SPIFFE id, `spiffe://<trust domain>/<path>`; for Pods `spiffe://<trust domain>/ns/<namespace>/sa/<account>`.
///
/// Cheap to clone; always valid.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId(Arc<str>);

impl SpiffeId {
    /// The id of a Kubernetes service account.
    pub fn service_account(domain: &TrustDomain, namespace: &str, account: &str) -> Self {
        Self(format!("spiffe://{domain}/ns/{namespace}/sa/{account}").into())
    }

    /// The id of a node itself, for what runs in its network namespace.
    pub fn node(domain: &TrustDomain, node: &str) -> Self {
        Self(format!("spiffe://{domain}/node/{node}").into())
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The trust domain's name.
    pub fn trust_domain(&self) -> &str {
        self.split().0
    }

    /// The path, with its leading slash.
    pub fn path(&self) -> &str {
        self.split().1
    }

    /// Namespace and service account where the path is of the form `/ns/<namespace>/sa/<account>`.
    pub fn as_service_account(&self) -> Option<(&str, &str)> {
        let mut parts = self.path().strip_prefix("/ns/")?.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(namespace), Some("sa"), Some(account), None) => Some((namespace, account)),
            _ => None,
        }
    }

    /// The node's name where the path is of the form `/node/<node>`.
    pub fn as_node(&self) -> Option<&str> {
        self.path().strip_prefix("/node/").filter(|name| !name.is_empty() && !name.contains('/'))
    }

    fn split(&self) -> (&str, &str) {
        let rest = &self.0["spiffe://".len()..];
        rest.split_at(rest.find('/').unwrap_or(rest.len()))
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;

    fn from_str(id: &str) -> Result<Self, Self::Err> {
        if id.len() > MAX_SPIFFE_ID {
            return Err(invalid(id, "it is longer than 2048 bytes"));
        }
        let rest =
            id.strip_prefix("spiffe://").ok_or_else(|| invalid(id, "it does not begin with spiffe://"))?;
        let (domain, path) = rest.split_once('/').ok_or_else(|| invalid(id, "it has no path"))?;
        TrustDomain::new(domain)?;
        let segment_ok = |s: &str| {
            !s.is_empty()
                && s != "."
                && s != ".."
                && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        if !path.split('/').all(segment_ok) {
            return Err(invalid(
                id,
                "a path segment is empty, '.', '..' or holds a character outside [a-zA-Z0-9._-]",
            ));
        }
        Ok(Self(id.into()))
    }
}

impl TryFrom<String> for SpiffeId {
    type Error = InvalidSpiffeId;
    fn try_from(id: String) -> Result<Self, Self::Error> {
        id.parse()
    }
}

impl From<SpiffeId> for String {
    fn from(id: SpiffeId) -> Self {
        id.0.as_ref().into()
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn invalid(id: &str, reason: &'static str) -> InvalidSpiffeId {
    InvalidSpiffeId { id: id.chars().take(120).collect(), reason }
}

/// The number by which the kernel knows a *policy subject*: a SPIFFE id together with the set of policies that
/// select the Pod, or a class of addresses outside the mesh. Given out by the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SubjectId(pub u32);

impl SubjectId {
    /// Nobody: an address or namespace that is not described.
    pub const UNKNOWN: Self = Self(0);
    /// The node itself (hubble's reserved identity `host`).
    pub const HOST: Self = Self(1);
    /// Everything outside the mesh that no CIDR of a policy names (hubble's reserved identity `world`).
    pub const WORLD: Self = Self(2);
    /// Numbers below this one are reserved.
    pub const FIRST: u32 = 256;
}

impl fmt::Display for SubjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A Pod's UID.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkloadUid(pub Arc<str>);

impl fmt::Display for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl WorkloadUid {
    /// The uid of a node's own network; no Pod can have it.
    pub fn node(name: &str) -> Self {
        Self(format!("node/{name}").into())
    }
}

impl From<&str> for WorkloadUid {
    fn from(uid: &str) -> Self {
        Self(uid.into())
    }
}

/// `namespace/name` of an object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NamespacedName {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl NamespacedName {
    /// Puts the two together.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}
