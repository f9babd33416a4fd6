//! `weft upgrade`: the manifests of this version with what the cluster has now, and on stderr what will happen.

use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment},
    core::v1::PodTemplateSpec,
};
use kube::Api;

use super::{Choice, own_tag, render};
use crate::{
    Failure, Outcome,
    args::UpgradeArgs,
    cluster::{Cluster, SYSTEM},
    text,
};

/// What runs now.
#[derive(Debug, PartialEq, Eq)]
struct Running {
    operator: Image,
    agent: Image,
    replicas: u32,
    trust_domain: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Image {
    registry: String,
    tag: String,
}

/// Runs the command.
pub(crate) async fn run(args: &UpgradeArgs) -> Result<Outcome, Failure> {
    let cluster = Cluster::connect(&args.cluster).await?;
    let running = running(&cluster).await?;
    let new = Choice {
        registry: running.operator.registry.clone(),
        tag: own_tag(),
        trust_domain: running.trust_domain.clone(),
        replicas: running.replicas,
    }
    .with(&args.install)?;
    for line in notes(&running, &new) {
        eprintln!("weft: {}", text::clean(&line));
    }
    text::print(&render(&new)?);
    Ok(Outcome::Fine)
}

async fn running(cluster: &Cluster) -> Result<Running, Failure> {
    let missing = |what: &str| {
        Failure::Unable(format!(
            "{what} is not installed in {SYSTEM}; run `weft install | kubectl apply -f -`"
        ))
    };
    let deployments: Api<Deployment> = Api::namespaced(cluster.client.clone(), SYSTEM);
    let found = deployments.get_opt("weft-operator").await.map_err(|e| cluster.failed("the operator", &e))?;
    let operator = found.and_then(|d| d.spec).ok_or_else(|| missing("the operator"))?;
    let sets: Api<DaemonSet> = Api::namespaced(cluster.client.clone(), SYSTEM);
    let found = sets.get_opt("weft-agent").await.map_err(|e| cluster.failed("the agents", &e))?;
    let agent = found.and_then(|d| d.spec).ok_or_else(|| missing("the agent"))?;
    Ok(Running {
        operator: image(&operator.template),
        agent: image(&agent.template),
        replicas: operator.replicas.and_then(|r| u32::try_from(r).ok()).filter(|r| *r > 0).unwrap_or(1),
        trust_domain: argument(&operator.template, "--trust-domain="),
    })
}

fn image(template: &PodTemplateSpec) -> Image {
    let containers = template.spec.as_ref().map(|s| s.containers.as_slice()).unwrap_or_default();
    let name = containers.first().and_then(|c| c.image.as_deref()).unwrap_or_default();
    let (path, last) = name.rsplit_once('/').unwrap_or(("", name));
    let tag = last.split('@').next().and_then(|l| l.split_once(':')).map_or("latest", |(_, tag)| tag);
    Image { registry: path.into(), tag: tag.into() }
}

fn argument(template: &PodTemplateSpec, name: &str) -> Option<String> {
    let containers = template.spec.as_ref().map(|s| s.containers.as_slice()).unwrap_or_default();
    let mut args = containers.iter().filter_map(|c| c.args.as_ref()).flatten();
    args.find_map(|a| a.strip_prefix(name)).map(ToOwned::to_owned)
}

/// What a person should know before the output is applied.
fn notes(now: &Running, new: &Choice) -> Vec<String> {
    let mut notes = Vec::new();
    let step = |what: &str, tag: &str| {
        if tag == new.tag {
            format!("{what}: {tag} already")
        } else {
            format!("{what}: {tag} -> {}", new.tag)
        }
    };
    notes.push(step("operator", &now.operator.tag));
    notes.push(step("agents", &now.agent.tag));
    if let (Some(old), Some(to)) = (minor(&now.agent.tag), minor(&new.tag))
        && old.abs_diff(to) > 1
    {
        notes.push(
            "operator and agents may be one minor version apart: apply each version between them first"
                .into(),
        );
    }
    if now.trust_domain.is_some() && now.trust_domain != new.trust_domain {
        notes.push("another trust domain: every identity changes, and peers refuse each other until all agents know it".into());
    }
    notes.push(
        "both roll by themselves: a new replica or agent takes over before the old one ends, which keeps its connections for 30 s; follow with `kubectl -n weft-system rollout status daemonset/weft-agent`"
            .into(),
    );
    notes.push("back: `weft upgrade` of the earlier version, applied the same way".into());
    notes
}

/// `1.2` of `v1.2.3` as one number that counts minor versions.
fn minor(tag: &str) -> Option<u64> {
    let mut parts = tag.trim_start_matches('v').split('.');
    let (major, minor): (u64, u64) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    Some(major.saturating_mul(1000).saturating_add(minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(image: &str) -> PodTemplateSpec {
        let container = serde_json::json!({"name": "a", "image": image, "args": ["--x", "--trust-domain=b"]});
        serde_json::from_value(serde_json::json!({"spec": {"containers": [container]}})).unwrap()
    }

    #[test]
    fn what_runs_is_read_from_its_template() {
        let t = template("localhost:5000/weft/weft-agent:v1.2.3");
        assert_eq!(image(&t), Image { registry: "localhost:5000/weft".into(), tag: "v1.2.3".into() });
        assert_eq!(argument(&t, "--trust-domain=").as_deref(), Some("b"));
        assert_eq!(image(&template("r/weft-agent")).tag, "latest");
    }

    #[test]
    fn a_jump_over_versions_is_said() {
        let at = |tag: &str| Image { registry: "r".into(), tag: tag.into() };
        let now = Running { operator: at("v0.1.0"), agent: at("v0.1.0"), replicas: 2, trust_domain: None };
        let to = |tag: &str| Choice { tag: tag.into(), ..Choice::default() };
        assert!(!notes(&now, &to("v0.2.0")).iter().any(|n| n.contains("apart")));
        assert!(notes(&now, &to("v0.3.0")).iter().any(|n| n.contains("apart")));
        assert!(notes(&now, &to("v0.2.0"))[0].ends_with("v0.1.0 -> v0.2.0"));
    }
}
