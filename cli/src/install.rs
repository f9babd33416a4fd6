//! `weft install` and `weft upgrade`: the manifests, the same as in `deploy/`, with the few things in them that differ
//! between clusters.

use weft_core::TrustDomain;

use crate::{Failure, Outcome, args::InstallArgs, text};

mod upgrade;

pub(crate) use upgrade::run as upgrade;

/// What the manifests in `deploy/` say.
const REGISTRY: &str = "ghcr.io/weft-mesh";
const REPLICAS: u32 = 2;
const IMAGES: [&str; 2] = ["weft-operator", "weft-agent"];

/// In the order in which they are applied: kinds, their namespace, then what uses them.
pub(crate) const MANIFESTS: [&str; 8] = [
    include_str!("../../deploy/crds/weft.mesh_authorizationpolicies.yaml"),
    include_str!("../../deploy/crds/weft.mesh_meshconfigs.yaml"),
    include_str!("../../deploy/crds/weft.mesh_trafficpolicies.yaml"),
    include_str!("../../deploy/kustomize/base/namespace.yaml"),
    include_str!("../../deploy/kustomize/base/operator-rbac.yaml"),
    include_str!("../../deploy/kustomize/base/operator.yaml"),
    include_str!("../../deploy/kustomize/base/agent.yaml"),
    include_str!("../../deploy/kustomize/base/viewer.yaml"),
];

/// What differs between clusters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) registry: String,
    pub(crate) tag: String,
    /// `None`: MeshConfig says it, or it is cluster.local.
    pub(crate) trust_domain: Option<String>,
    pub(crate) replicas: u32,
}

impl Default for Choice {
    fn default() -> Self {
        Self { registry: REGISTRY.into(), tag: own_tag(), trust_domain: None, replicas: REPLICAS }
    }
}

impl Choice {
    /// The flags where they are given, else what is in `self`; checked, because it becomes YAML.
    fn with(mut self, args: &InstallArgs) -> Result<Self, Failure> {
        if let Some(registry) = &args.registry {
            self.registry = registry.trim_end_matches('/').into();
        }
        if let Some(tag) = &args.tag {
            self.tag.clone_from(tag);
        }
        if let Some(domain) = &args.trust_domain {
            self.trust_domain = Some(domain.clone());
        }
        if let Some(replicas) = args.operator_replicas {
            self.replicas = replicas;
        }
        let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if self.registry.is_empty() || !self.registry.chars().all(|c| word(c) || matches!(c, '/' | ':')) {
            return Err(Failure::Usage(format!(
                "--registry {:?} is none; write HOST[:PORT]/PATH, without the image's name",
                self.registry
            )));
        }
        if self.tag.is_empty() || self.tag.len() > 128 || !self.tag.chars().all(word) {
            return Err(Failure::Usage(format!("--tag {:?} is no image tag", self.tag)));
        }
        if let Some(domain) = &self.trust_domain {
            TrustDomain::new(domain)
                .map_err(|e| Failure::Usage(format!("--trust-domain {domain:?}: {e}")))?;
        }
        Ok(self)
    }
}

/// The tag of this program's own version.
fn own_tag() -> String {
    format!("v{}", env!("CARGO_PKG_VERSION"))
}

/// Runs `weft install`.
pub(crate) fn run(args: &InstallArgs) -> Result<Outcome, Failure> {
    text::print(&render(&Choice::default().with(args)?)?);
    Ok(Outcome::Fine)
}

/// The manifests as one stream of documents.
pub(crate) fn render(choice: &Choice) -> Result<String, Failure> {
    let mut out = String::new();
    for manifest in MANIFESTS {
        if !out.is_empty() {
            out.push_str("---\n");
        }
        out.push_str(manifest.trim_start_matches("---\n"));
        if !out.ends_with('\n') {
            out.push('\n');
        }
    }
    for image in IMAGES {
        let to = format!("image: {}/{image}:{}\n", choice.registry, choice.tag);
        out = replaced(&out, &format!("image: {REGISTRY}/{image}:{}\n", own_tag()), &to)?;
    }
    out =
        replaced(&out, &format!("  replicas: {REPLICAS}\n"), &format!("  replicas: {}\n", choice.replicas))?;
    if choice.replicas == 1 {
        // With one replica a budget of one would keep its node from ever being drained.
        out = replaced(&out, "  minAvailable: 1\n", "  minAvailable: 0\n")?;
    }
    if let Some(domain) = &choice.trust_domain {
        let source = "        - --source=kubernetes\n";
        out = replaced(&out, source, &format!("{source}        - --trust-domain={domain}\n"))?;
    }
    Ok(out)
}

/// `from`, which is there exactly once, as `to`.
fn replaced(text: &str, from: &str, to: &str) -> Result<String, Failure> {
    if text.matches(from).count() == 1 {
        Ok(text.replacen(from, to, 1))
    } else {
        Err(Failure::Unable(format!("this build is damaged: its manifests do not hold {from:?} once")))
    }
}

#[cfg(test)]
mod tests;
