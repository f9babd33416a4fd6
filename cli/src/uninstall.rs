//! `weft uninstall`: agents stop, every node is cleaned, then the objects go. Kinds (CRDs), and with them every policy,
//! and labels stay unless asked for.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::{
        apps::v1::{DaemonSet, Deployment},
        core::v1::{Namespace, Node, Pod},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams},
    core::{GroupVersionKind, TypeMeta},
    discovery::ApiResource,
};
use serde::Deserialize as _;
use serde_json::{Value, json};

use crate::{
    Failure, Outcome,
    args::UninstallArgs,
    check::{agents::waits_for, system::ready},
    cluster::{Cluster, SYSTEM},
    install::MANIFESTS,
    mesh::labelled,
    text,
};

/// How long agents have to end: their drain, and some.
const STOP: Duration = Duration::from_secs(90);
/// How long the nodes have to be cleaned.
const CLEAN: Duration = Duration::from_secs(180);
const LOOK: Duration = Duration::from_secs(1);
const CLEANER: &str = "weft-cleaner";
/// What cleans a node that the cleaner cannot reach.
const BY_HAND: &str = "run there, as root: rm -rf /sys/fs/bpf/weft /run/weft /var/lib/weft /opt/cni/bin/weft-cni /etc/cni/net.d/*00-weft.conflist";
const LABELS: [&str; 2] = ["weft.mesh/mode", "weft.mesh/fail-mode"];
/// Objects that the operator makes, beside those of the manifests.
const MADE: [(&str, &str); 4] = [
    ("Secret", "weft-ca"),
    ("ConfigMap", "weft-trust-bundle"),
    ("ConfigMap", "weft-operator-acks"),
    ("Lease", "weft-operator"),
];

/// Runs the command.
pub(crate) async fn run(args: &UninstallArgs) -> Result<Outcome, Failure> {
    let cluster = Cluster::connect(&args.cluster).await?;
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    let labelled = namespaces.list(&ListParams::default().labels(LABELS[0])).await;
    let labelled = labelled.map_err(|e| cluster.failed("namespaces", &e))?.items;
    let strict = strict(&labelled);
    if !strict.is_empty() && !args.force {
        eprintln!(
            "weft: nothing was done: {} would go plaintext, and nobody would enforce its policies any more.\n\
             weft: take them out of the mesh first (kubectl label namespace NAME weft.mesh/mode-), or say --force",
            strict.join(", ")
        );
        return Ok(Outcome::Finding);
    }
    let say = |text: &str| eprintln!("weft: {text}");
    let place = stop_agents(&cluster, &say).await?;
    let mut whole = true;
    match place {
        Some(place) => whole = clean(&cluster, &place, &say).await?,
        None => say("neither agents nor operator are installed: nodes are not cleaned"),
    }
    if !whole && !args.force {
        return Err(Failure::Unable(
            "some nodes are not clean yet, so the rest stays; run this again when they are back, or with --force".into(),
        ));
    }
    remove_objects(&cluster, args.crds, &say).await?;
    if args.labels {
        remove_labels(&cluster, &namespaces, &labelled).await?;
        say("labels of namespaces removed");
    }
    say("done");
    if !args.crds {
        say("kinds (CRDs) and policies stay; --crds removes them");
    }
    if !args.labels && !labelled.is_empty() {
        say("labels of namespaces stay; --labels removes them");
    }
    Ok(Outcome::Fine)
}

/// Namespaces that count on encryption.
fn strict(namespaces: &[Namespace]) -> Vec<String> {
    let strict = |n: &&Namespace| {
        n.metadata.labels.as_ref().and_then(|l| l.get(LABELS[0])).is_some_and(|mode| mode == "strict")
    };
    namespaces.iter().filter(strict).filter_map(|n| n.metadata.name.clone()).collect()
}

/// What a cleaner is made of: the agents' image, and the node's folders that they wrote to.
#[derive(Debug, Clone)]
struct Place {
    image: String,
    cni_conf: String,
    cni_bin: String,
}

/// The node's folder behind a volume.
fn host_path(set: &DaemonSet, volume: &str) -> Option<String> {
    let volumes = set.spec.as_ref()?.template.spec.as_ref()?.volumes.as_ref()?;
    Some(volumes.iter().find(|v| v.name == volume)?.host_path.as_ref()?.path.clone())
}

fn on(pod: &Pod) -> String {
    pod.spec.as_ref().and_then(|s| s.node_name.clone()).unwrap_or_default()
}

/// Deletes the agents' DaemonSet and waits for their end; gives their image.
async fn stop_agents(cluster: &Cluster, say: &impl Fn(&str)) -> Result<Option<Place>, Failure> {
    let sets: Api<DaemonSet> = Api::namespaced(cluster.client.clone(), SYSTEM);
    let found = sets.get_opt("weft-agent").await.map_err(|e| cluster.failed("the agents", &e))?;
    let earlier = sets.get_opt(CLEANER).await.map_err(|e| cluster.failed("the cleaner", &e))?;
    // An uninstallation that was cut short left its cleaner, which knows the image.
    let left_by = found.as_ref().or(earlier.as_ref());
    let image = match left_by.and_then(image) {
        Some(image) => image,
        // Somebody deleted the agents, which leaves their pins: the operator's image is beside theirs.
        None => {
            let deployments: Api<Deployment> = Api::namespaced(cluster.client.clone(), SYSTEM);
            let operator = deployments.get_opt("weft-operator").await;
            let operator = operator.map_err(|e| cluster.failed("the operator", &e))?;
            let spec = operator.and_then(|d| d.spec?.template.spec);
            let beside = spec.and_then(|s| s.containers.into_iter().find_map(|c| c.image));
            match beside {
                Some(beside) => beside.replace("/weft-operator:", "/weft-agent:"),
                None => return Ok(None),
            }
        }
    };
    let folder =
        |name: &str, usual: &str| left_by.and_then(|set| host_path(set, name)).unwrap_or(usual.into());
    let place = Place {
        image,
        cni_conf: folder("cni-conf", "/etc/cni/net.d"),
        cni_bin: folder("cni-bin", "/opt/cni/bin"),
    };
    if found.is_some() {
        say("agents stop");
        delete(sets.delete("weft-agent", &DeleteParams::background()).await.map(drop))
            .map_err(|e| cluster.failed("the agents", &e))?;
    }
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), SYSTEM);
    let end = Instant::now() + STOP;
    loop {
        let params = ListParams::default().labels("app.kubernetes.io/name=weft-agent");
        let left = pods.list(&params).await.map_err(|e| cluster.failed("the agents' Pods", &e))?;
        let left: Vec<_> = left.items.iter().filter(|p| labelled(p, "weft-agent")).collect();
        if left.is_empty() {
            return Ok(Some(place));
        }
        let down = down(cluster).await?;
        let away: BTreeSet<_> = left.iter().map(|p| on(p)).collect();
        if away.is_subset(&down) {
            say(&format!(
                "the agents of {} do not end, their nodes are down; it goes on",
                Vec::from_iter(away).join(", ")
            ));
            return Ok(Some(place));
        }
        if Instant::now() > end {
            say(&format!(
                "{} agents have not ended yet (kubectl -n {SYSTEM} get pods); it goes on",
                left.len()
            ));
            return Ok(Some(place));
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn image(set: &DaemonSet) -> Option<String> {
    let spec = set.spec.as_ref()?.template.spec.as_ref()?;
    spec.init_containers.iter().flatten().chain(&spec.containers).find_map(|c| c.image.clone())
}

/// The DaemonSet that takes everything of Weft off each node: what is pinned, and what lies in files.
fn cleaner(place: &Place) -> Value {
    let labels = json!({"app.kubernetes.io/name": CLEANER, "app.kubernetes.io/part-of": "weft"});
    // The folders around what goes: one that is mounted itself could not be removed.
    let mounts = [
        ("bpffs", "/sys/fs/bpf", "/sys/fs/bpf"),
        ("run", "/host/run", "/run"),
        ("state", "/host/var/lib", "/var/lib"),
        ("cni-conf", "/host/cni/net.d", &*place.cni_conf),
        ("cni-bin", "/host/cni/bin", &*place.cni_bin),
    ];
    json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet",
        "metadata": {"name": CLEANER, "namespace": SYSTEM, "labels": labels},
        "spec": {
            "selector": {"matchLabels": {"app.kubernetes.io/name": CLEANER}},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "automountServiceAccountToken": false,
                    "hostNetwork": true, "hostPID": true,
                    "priorityClassName": "system-node-critical",
                    "terminationGracePeriodSeconds": 0,
                    "tolerations": [{"operator": "Exists"}],
                    "containers": [{
                        "name": "clean", "image": place.image, "imagePullPolicy": "IfNotPresent",
                        "args": [
                            "uninstall", "--bpffs", "/sys/fs/bpf/weft",
                            "--cni-conf-dir", "/host/cni/net.d", "--cni-bin-dir", "/host/cni/bin",
                            "--state-dir", "/host/var/lib/weft", "--run-dir", "/host/run/weft",
                        ],
                        "securityContext": {
                            "runAsUser": 0,
                            "seccompProfile": {"type": "Unconfined"},
                            "appArmorProfile": {"type": "Unconfined"},
                            "capabilities": {
                                "drop": ["ALL"],
                                "add": ["BPF", "PERFMON", "NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE",
                                        "DAC_OVERRIDE", "DAC_READ_SEARCH"],
                            },
                        },
                        "volumeMounts": mounts.map(|(name, at, _)| json!({"name": name, "mountPath": at})),
                    }],
                    "volumes": mounts.map(|(name, _, path)| json!({"name": name, "hostPath": {"path": path}})),
                },
            },
        },
    })
}

/// Nodes that are down: nothing can be cleaned there now.
async fn down(cluster: &Cluster) -> Result<BTreeSet<String>, Failure> {
    let api: Api<Node> = Api::all(cluster.client.clone());
    let nodes = api.list(&ListParams::default()).await.map_err(|e| cluster.failed("nodes", &e))?;
    Ok(nodes.items.iter().filter(|n| !ready(n)).filter_map(|n| n.metadata.name.clone()).collect())
}

/// Cleans every node; false where some were not within the time.
async fn clean(cluster: &Cluster, place: &Place, say: &impl Fn(&str)) -> Result<bool, Failure> {
    let failed = |e: &kube::Error| cluster.failed("the cleaner", e);
    let sets: Api<DaemonSet> = Api::namespaced(cluster.client.clone(), SYSTEM);
    let set: DaemonSet =
        serde_json::from_value(cleaner(place)).map_err(|e| Failure::Unable(e.to_string()))?;
    match sets.create(&PostParams::default(), &set).await {
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        other => drop(other.map_err(|e| failed(&e))?),
    }
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), SYSTEM);
    let end = Instant::now() + CLEAN;
    let whole = loop {
        let set = sets.get(CLEANER).await.map_err(|e| failed(&e))?;
        let status = set.status.unwrap_or_default();
        let seen = status.observed_generation.is_some();
        let wanted = usize::try_from(status.desired_number_scheduled).unwrap_or_default();
        let params = ListParams::default().labels(&format!("app.kubernetes.io/name={CLEANER}"));
        let found = pods.list(&params).await.map_err(|e| failed(&e))?.items;
        let clean = cleaned(&found);
        let done = clean.values().filter(|done| **done).count();
        if seen && done >= wanted {
            say(&format!("{done} nodes are clean"));
            break true;
        }
        let down = down(cluster).await?;
        let waiting = |node: &String| !clean.get(node).copied().unwrap_or(false);
        let awaited = found.iter().filter(|p| waiting(&on(p)) && !down.contains(&on(p)));
        let only_down = seen && found.len() >= wanted && awaited.clone().count() == 0;
        if only_down || Instant::now() > end {
            say(&format!("{done} of {wanted} nodes are clean; not:"));
            for node in down.iter().filter(|node| waiting(node)) {
                say(&format!("  {node}: it is down"));
            }
            for pod in awaited {
                say(&format!("  {}: {}", on(pod), text::clean(&waits_for(pod))));
            }
            say(&format!(
                "a restart clears what is in their kernel and memory; the rest, and all of it without a restart: {BY_HAND}"
            ));
            break false;
        }
        tokio::time::sleep(LOOK).await;
    };
    if whole {
        delete(sets.delete(CLEANER, &DeleteParams::background()).await.map(drop)).map_err(|e| failed(&e))?;
    }
    Ok(whole)
}

/// By node, whether the cleaner ended well there. A DaemonSet starts it again and again, which does no harm.
fn cleaned(pods: &[Pod]) -> BTreeMap<String, bool> {
    let ended = |pod: &Pod| {
        let statuses = pod.status.as_ref().and_then(|s| s.container_statuses.as_ref());
        statuses.into_iter().flatten().any(|c| {
            let states = [c.state.as_ref(), c.last_state.as_ref()];
            states.into_iter().flatten().any(|s| s.terminated.as_ref().is_some_and(|t| t.exit_code == 0))
        })
    };
    let node = |pod: &Pod| pod.spec.as_ref().and_then(|s| s.node_name.clone());
    pods.iter().filter_map(|pod| Some((node(pod)?, ended(pod)))).collect()
}

/// Removes what `weft install` made, the last first, and what the operator made.
async fn remove_objects(cluster: &Cluster, kinds: bool, say: &impl Fn(&str)) -> Result<(), Failure> {
    let mut objects = Vec::new();
    for manifest in MANIFESTS {
        for document in serde_yaml_ng::Deserializer::from_str(manifest) {
            let object = Value::deserialize(document);
            objects.push(object.map_err(|e| Failure::Unable(format!("this build is damaged: {e}")))?);
        }
    }
    let made = MADE.iter().map(|(kind, name)| {
        let version = if *kind == "Lease" { "coordination.k8s.io/v1" } else { "v1" };
        json!({"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": SYSTEM}})
    });
    objects.extend(made);
    let word = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    // The namespace goes with all that is left in it, so it is the last but for the kinds.
    objects.sort_by_key(|o| match o["kind"].as_str() {
        Some("Deployment" | "DaemonSet") => 0,
        Some("Namespace") => 2,
        Some("CustomResourceDefinition") => 3,
        _ => 1,
    });
    for object in &objects {
        let (kind, name) = (word(&object["kind"]), word(&object["metadata"]["name"]));
        if kind == "CustomResourceDefinition" && !kinds {
            continue;
        }
        let types = TypeMeta { api_version: word(&object["apiVersion"]), kind: kind.clone() };
        let Ok(gvk) = GroupVersionKind::try_from(&types) else { continue };
        let resource = ApiResource::from_gvk(&gvk);
        let api: Api<DynamicObject> = match object["metadata"]["namespace"].as_str() {
            Some(namespace) => Api::namespaced_with(cluster.client.clone(), namespace, &resource),
            None => Api::all_with(cluster.client.clone(), &resource),
        };
        let what = format!("{kind} {name}");
        delete(api.delete(&name, &DeleteParams::background()).await.map(drop))
            .map_err(|e| cluster.failed(&what, &e))?;
    }
    say("objects removed");
    if kinds {
        let api: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
        let left = api.list(&ListParams::default()).await.map_err(|e| cluster.failed("kinds", &e))?.items;
        let left = left.iter().filter(|k| k.spec.group == "weft.mesh").count();
        say(&format!("kinds removed{}", if left > 0 { " (the API server still ends some)" } else { "" }));
    }
    Ok(())
}

/// What is gone already need not be deleted.
fn delete(outcome: Result<(), kube::Error>) -> Result<(), kube::Error> {
    match outcome {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => other,
    }
}

async fn remove_labels(
    cluster: &Cluster,
    api: &Api<Namespace>,
    namespaces: &[Namespace],
) -> Result<(), Failure> {
    let gone: BTreeMap<&str, Value> = LABELS.iter().map(|l| (*l, Value::Null)).collect();
    for name in namespaces.iter().filter_map(|n| n.metadata.name.as_deref()) {
        let patch = Patch::Merge(json!({"metadata": {"labels": gone}}));
        let outcome = api.patch(name, &PatchParams::default(), &patch).await.map(drop);
        delete(outcome).map_err(|e| cluster.failed("a namespace's labels", &e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_namespaces_are_found() {
        let all: Vec<Namespace> = serde_json::from_value(json!([
            {"metadata": {"name": "a", "labels": {"weft.mesh/mode": "strict"}}},
            {"metadata": {"name": "b", "labels": {"weft.mesh/mode": "permissive"}}},
            {"metadata": {"name": "c"}},
        ]))
        .unwrap();
        assert_eq!(strict(&all), ["a"]);
    }

    #[test]
    fn a_node_is_clean_when_the_cleaner_ended_well() {
        let pod = |node: &str, state: Value| {
            json!({"spec": {"nodeName": node, "containers": []}, "status": {"containerStatuses": [
            {"name": "clean", "image": "i", "imageID": "i", "ready": false, "restartCount": 1, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
             "lastState": {"terminated": state}}]}})
        };
        let pods: Vec<Pod> = serde_json::from_value(json!([
            pod("a", json!({"exitCode": 0})),
            pod("b", json!({"exitCode": 1}))
        ]))
        .unwrap();
        assert_eq!(cleaned(&pods), BTreeMap::from([("a".into(), true), ("b".into(), false)]));
    }

    #[test]
    fn the_cleaner_is_a_daemon_set_of_the_agents_image() {
        let place =
            Place { image: "r/weft-agent:v1".into(), cni_conf: "/conf".into(), cni_bin: "/bin".into() };
        let set: DaemonSet = serde_json::from_value(cleaner(&place)).unwrap();
        assert_eq!(image(&set).as_deref(), Some("r/weft-agent:v1"));
        assert_eq!(host_path(&set, "cni-conf").as_deref(), Some("/conf"));
    }
}
