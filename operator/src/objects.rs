//! Objects as a source reads them: documents of YAML, parsed kind by kind.

use std::{fmt, sync::Arc};

use gateway_api::{httproutes::HttpRoute, referencegrants::ReferenceGrant};
use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod, Service},
    discovery::v1::EndpointSlice,
    networking::v1::{NetworkPolicy, ServiceCIDR},
};
use serde::{Deserialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};
use weft_api::{
    AuthorizationPolicy, MeshConfig, TrafficPolicy, authorization::TargetRef, convert::unknown_fields,
};

mod broken;

/// The kinds that the operator reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `v1` Namespace.
    Namespace,
    /// `v1` Node.
    Node,
    /// `networking.k8s.io/v1` ServiceCIDR.
    ServiceCidr,
    /// `v1` Pod.
    Pod,
    /// `v1` Service.
    Service,
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice,
    /// `networking.k8s.io/v1` NetworkPolicy.
    NetworkPolicy,
    /// `gateway.networking.k8s.io/v1` HTTPRoute.
    HttpRoute,
    /// `gateway.networking.k8s.io/v1` ReferenceGrant (v1beta1 is read too).
    ReferenceGrant,
    /// `weft.mesh/v1alpha1` AuthorizationPolicy.
    AuthorizationPolicy,
    /// `weft.mesh/v1alpha1` TrafficPolicy.
    TrafficPolicy,
    /// `weft.mesh/v1alpha1` MeshConfig.
    MeshConfig,
}

impl Kind {
    /// The kind's name as YAML has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::HttpRoute => "HTTPRoute",
            Self::ReferenceGrant => "ReferenceGrant",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::TrafficPolicy => "TrafficPolicy",
            Self::MeshConfig => "MeshConfig",
        }
    }

    /// The `apiVersion` that status files carry.
    pub fn api_version(self) -> &'static str {
        match self {
            Self::Namespace | Self::Node | Self::Pod | Self::Service => "v1",
            Self::ServiceCidr | Self::NetworkPolicy => "networking.k8s.io/v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::HttpRoute | Self::ReferenceGrant => "gateway.networking.k8s.io/v1",
            Self::AuthorizationPolicy | Self::TrafficPolicy | Self::MeshConfig => "weft.mesh/v1alpha1",
        }
    }

    fn namespaced(self) -> bool {
        !matches!(self, Self::Namespace | Self::Node | Self::ServiceCidr | Self::MeshConfig)
    }

    /// `Ok(None)` for a kind that is none of ours; an error for one that looks like ours and is not.
    fn find(api_version: &str, kind: &str) -> Result<Option<Self>, String> {
        const ALL: [Kind; 12] = [
            Kind::Namespace,
            Kind::Node,
            Kind::ServiceCidr,
            Kind::Pod,
            Kind::Service,
            Kind::EndpointSlice,
            Kind::NetworkPolicy,
            Kind::HttpRoute,
            Kind::ReferenceGrant,
            Kind::AuthorizationPolicy,
            Kind::TrafficPolicy,
            Kind::MeshConfig,
        ];
        if api_version == "gateway.networking.k8s.io/v1beta1" && kind == "ReferenceGrant" {
            return Ok(Some(Self::ReferenceGrant));
        }
        match ALL.into_iter().find(|k| k.as_str() == kind) {
            Some(found) if found.api_version() == api_version => Ok(Some(found)),
            Some(found) => Err(format!(
                "apiVersion: {kind} is read as {:?}, not as {api_version:?}; change apiVersion",
                found.api_version()
            )),
            None if kind == "List" => Err("kind: a List is not read; write its items as documents".into()),
            None if api_version.starts_with("weft.mesh/") => Err(format!(
                "kind: weft.mesh has no kind {kind:?}; write AuthorizationPolicy, TrafficPolicy or MeshConfig"
            )),
            None if api_version.starts_with("gateway.networking.k8s.io/") && kind.ends_with("Route") => {
                Err(format!("kind: {kind} is not supported by this version yet; HTTPRoute is"))
            }
            None => Ok(None),
        }
    }
}

/// Which object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace; empty for cluster-scoped kinds.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.kind.as_str())?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

/// An object of a kind that the operator reads.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "each variant is its kind")]
pub enum Object {
    Namespace(Box<Namespace>),
    Node(Box<Node>),
    ServiceCidr(Box<ServiceCIDR>),
    Pod(Box<Pod>),
    Service(Box<Service>),
    EndpointSlice(Box<EndpointSlice>),
    NetworkPolicy(Box<NetworkPolicy>),
    HttpRoute(Box<HttpRoute>),
    ReferenceGrant(Box<ReferenceGrant>),
    AuthorizationPolicy(Box<AuthorizationPolicy>),
    TrafficPolicy(Box<TrafficPolicy>),
    MeshConfig(Box<MeshConfig>),
}

/// A document that was understood.
#[derive(Debug, Clone)]
pub struct Document {
    /// Which object.
    pub key: ObjectKey,
    /// A number made of the content: a file may be edited without a new `metadata.generation`.
    pub generation: i64,
    /// The object.
    pub object: Object,
    /// The text that it was read from.
    pub text: Arc<str>,
}

/// Where there are no Secrets, as in a folder: what is wrong with an object that names one.
pub(crate) fn without_secrets(object: &Object) -> Option<String> {
    let Object::MeshConfig(config) = object else { return None };
    let named = config.spec.issuer.embedded.secret_ref.as_ref()?;
    Some(format!(
        "spec.issuer.embedded.secretRef: there is no Secret {}/{} beside a folder of objects; take the field out, and put a CA \
         of your own into ca.pem of --state-dir (mode 0600: the key, its certificate, those above it) before the start",
        named.namespace, named.name
    ))
}

/// A document that was not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadDocument {
    /// Which object, where that much could be read.
    pub key: Option<ObjectKey>,
    /// A number made of the content.
    pub generation: i64,
    /// The line on which the document begins, from 1.
    pub line: usize,
    /// The field, what is wrong with it, and what to do.
    pub message: String,
    /// True where the text is no YAML: the key was read from its beginning, and what the rest holds is unknown.
    pub torn: bool,
    /// The targets of an AuthorizationPolicy, where they could be read whole.
    pub target_refs: Option<Box<[TargetRef]>>,
}

#[derive(Deserialize)]
struct Head {
    #[serde(rename = "apiVersion", default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    metadata: HeadMeta,
}

#[derive(Deserialize, Default)]
struct HeadMeta {
    name: Option<String>,
    namespace: Option<String>,
}

/// Reads every document of a file. Documents are told apart by their `---` lines before anything is parsed, so that a
/// broken one does not take the others with it. Documents of foreign kinds are left out.
pub fn parse(text: &str) -> Vec<Result<Document, BadDocument>> {
    split(text).into_iter().filter_map(|(line, text)| document(line, text).transpose()).collect()
}

fn split(text: &str) -> Vec<(usize, String)> {
    let mut documents = vec![(1, String::new())];
    for (number, line) in text.lines().enumerate() {
        if line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '#']))
        {
            documents.push((number + 2, String::new()));
        } else if let Some((_, document)) = documents.last_mut() {
            document.push_str(line);
            document.push('\n');
        }
    }
    let blank = |d: &str| d.lines().all(|l| l.trim().is_empty() || l.trim_start().starts_with('#'));
    documents.retain(|(_, d)| !blank(d));
    documents
}

fn document(line: usize, text: String) -> Result<Option<Document>, BadDocument> {
    let generation = content_number(&text);
    let bad = |key: Option<ObjectKey>, message: String| BadDocument {
        key,
        generation,
        line,
        message,
        torn: false,
        target_refs: None,
    };
    let head: Head = serde_yaml_ng::from_str(&text).map_err(|e| BadDocument {
        torn: true,
        ..bad(broken::torn_key(&text, generation), in_file(&e.to_string(), line))
    })?;
    let kind = match Kind::find(&head.api_version, &head.kind) {
        Ok(Some(kind)) => kind,
        Ok(None) if head.kind.is_empty() => {
            return Err(bad(
                None,
                "kind: is missing; every document needs apiVersion, kind and metadata".into(),
            ));
        }
        Ok(None) => return Ok(None),
        Err(message) => {
            let key = broken::guarded_key(&head, generation);
            let target_refs = broken::target_refs(&text);
            let name = head.metadata.name.unwrap_or_default();
            let message = format!("{} {name}: {message}", head.kind);
            return Err(BadDocument { target_refs, ..bad(key, message) });
        }
    };
    let Some(name) = head.metadata.name.clone().filter(|n| is_object_name(n)) else {
        let message = "metadata.name: is missing or no name; use a-z, 0-9, '-' and '.'";
        let key = broken::guarded_key(&head, generation);
        let target_refs = broken::target_refs(&text);
        return Err(BadDocument { target_refs, ..bad(key, format!("{}: {message}", kind.as_str())) });
    };
    let namespace = if kind.namespaced() {
        head.metadata.namespace.unwrap_or_else(|| "default".into())
    } else {
        String::new()
    };
    if kind.namespaced() && !is_object_name(&namespace) {
        let message = format!("{} {name}: metadata.namespace: {namespace:?} is no name", kind.as_str());
        return Err(bad(None, message));
    }
    let key = ObjectKey { kind, namespace, name };
    let object = object(kind, &text).map_err(|message| {
        let message = in_file(&message, line);
        let policy = kind == Kind::AuthorizationPolicy;
        let target_refs = policy.then(|| broken::target_refs(&text)).flatten();
        BadDocument { target_refs, ..bad(Some(key.clone()), message) }
    })?;
    Ok(Some(Document { key, generation, object, text: text.into() }))
}

/// Makes the parser's line numbers those of the file, in which the document begins at `first`.
fn in_file(message: &str, first: usize) -> String {
    const LINE: &str = "at line ";
    let mut out = String::with_capacity(message.len() + 8);
    let mut parts = message.split(LINE);
    out.push_str(parts.next().unwrap_or_default());
    for part in parts {
        let digits = part.bytes().take_while(u8::is_ascii_digit).count();
        let (number, rest) = part.split_at(digits);
        out.push_str(LINE);
        match number.parse::<usize>() {
            Ok(number) => out.push_str(&(number + first - 1).to_string()),
            Err(_) => out.push_str(number),
        }
        out.push_str(rest);
    }
    out
}

fn object(kind: Kind, text: &str) -> Result<Object, String> {
    fn read<T: DeserializeOwned>(text: &str) -> Result<Box<T>, String> {
        serde_yaml_ng::from_str(text).map(Box::new).map_err(|e| e.to_string())
    }
    Ok(match kind {
        Kind::Namespace => Object::Namespace(read(text)?),
        Kind::Node => Object::Node(read(text)?),
        Kind::ServiceCidr => Object::ServiceCidr(read(text)?),
        Kind::Pod => Object::Pod(read(text)?),
        Kind::Service => Object::Service(read(text)?),
        Kind::EndpointSlice => Object::EndpointSlice(read(text)?),
        Kind::NetworkPolicy => Object::NetworkPolicy(read(text)?),
        Kind::HttpRoute => {
            let route: Box<HttpRoute> = read(text)?;
            refuse_unknown(text, serde_json::to_value(&route.spec))?;
            Object::HttpRoute(route)
        }
        Kind::ReferenceGrant => {
            let grant: Box<ReferenceGrant> = read(text)?;
            refuse_unknown(text, serde_json::to_value(&grant.spec))?;
            Object::ReferenceGrant(grant)
        }
        Kind::AuthorizationPolicy => Object::AuthorizationPolicy(read(text)?),
        Kind::TrafficPolicy => Object::TrafficPolicy(read(text)?),
        Kind::MeshConfig => Object::MeshConfig(read(text)?),
    })
}

/// The Gateway API's types ignore what they do not know; a field that is not honoured must not look as if it were.
fn refuse_unknown(text: &str, kept: serde_json::Result<serde_json::Value>) -> Result<(), String> {
    let given: serde_json::Value = serde_yaml_ng::from_str(text).map_err(|e| e.to_string())?;
    let kept = kept.map_err(|e| e.to_string())?;
    let unknown = given.get("spec").map_or_else(Vec::new, |spec| unknown_fields("spec", spec, Some(&kept)));
    match unknown.first() {
        None => Ok(()),
        Some(field) => Err(format!(
            "{field}: is no field of the standard channel, so it would not be honoured; take it away or correct its name"
        )),
    }
}

/// 48 bits of the content's hash: positive, and exact in JSON readers that know only floating point.
fn content_number(text: &str) -> i64 {
    let hash = Sha256::digest(text.as_bytes());
    hash.iter().take(6).fold(0, |n, b| n << 8 | i64::from(*b))
}

/// A name as objects have them (DNS-1123 subdomain, some kinds allow ':'); it becomes part of file names.
pub fn is_object_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 253
        && !name.starts_with(['.', '-'])
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b))
}

#[cfg(test)]
mod tests;
