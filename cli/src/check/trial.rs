//! `weft check --pre --trial IMAGE`: on each node a Pod of the agent's image loads every BPF program once, attaches none,
//! and says what the node lacks. It runs in a namespace of its own, which is removed again.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Namespace, Pod},
};
use kube::{
    Api,
    api::{DeleteParams, ListParams, PostParams},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Finding, agents::waits_for};
use crate::{Failure, cluster::Cluster};

const SECTION: &str = "Trial on each node";
const NAMESPACE: &str = "weft-trial";
/// How long the nodes may take: pulling an image included.
const PATIENCE: Duration = Duration::from_secs(180);
const LOOK: Duration = Duration::from_millis(500);
/// What a trial needs: as much as the agent for its programs, and nothing else of it.
const CAPABILITIES: [&str; 6] = ["BPF", "PERFMON", "NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE", "DAC_READ_SEARCH"];

/// A node's last word.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Report {
    kernel: String,
    loaded: usize,
    object: Option<String>,
    refused: Vec<Refused>,
    btf: Option<String>,
    bpffs: Option<String>,
    cgroup: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Refused {
    name: String,
    problem: String,
}

/// Makes the trial; what it made is removed whatever comes of it.
pub(super) async fn run(cluster: &Cluster, image: &str) -> Result<Vec<Finding>, Failure> {
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    let failed = |e: &kube::Error| cluster.failed("the trial", e);
    let namespace: Namespace = made(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {
        "name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "privileged", "app.kubernetes.io/part-of": "weft"}}}))?;
    namespaces.create(&PostParams::default(), &namespace).await.map_err(|e| match &e {
        kube::Error::Api(status) if status.code == 409 => Failure::Unable(format!(
            "the namespace {NAMESPACE} is there: another trial runs, or one was cut short (kubectl delete namespace {NAMESPACE})"
        )),
        e => failed(e),
    })?;
    let outcome = observe(cluster, image).await;
    let removed = namespaces.delete(NAMESPACE, &DeleteParams::background()).await;
    let findings = outcome?;
    removed.map(drop).map_err(|e| failed(&e))?;
    Ok(findings)
}

async fn observe(cluster: &Cluster, image: &str) -> Result<Vec<Finding>, Failure> {
    let failed = |e: &kube::Error| cluster.failed("the trial", e);
    let sets: Api<DaemonSet> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    let set: DaemonSet = made(manifest(image))?;
    sets.create(&PostParams::default(), &set).await.map_err(|e| failed(&e))?;
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    let end = Instant::now() + PATIENCE;
    loop {
        let set = sets.get("trial").await.map_err(|e| failed(&e))?;
        let status = set.status.unwrap_or_default();
        let wanted = usize::try_from(status.desired_number_scheduled).unwrap_or_default();
        let found = pods.list(&ListParams::default()).await.map_err(|e| failed(&e))?.items;
        let said = found.iter().filter(|p| last_word(p).is_some()).count();
        let all = status.observed_generation.is_some() && wanted > 0 && said >= wanted;
        if all || Instant::now() > end {
            return Ok(judged(&found));
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn made<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, Failure> {
    serde_json::from_value(value).map_err(|e| Failure::Unable(format!("this build is damaged: {e}")))
}

fn manifest(image: &str) -> Value {
    let labels = json!({"app.kubernetes.io/name": "weft-trial"});
    json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "trial", "namespace": NAMESPACE, "labels": labels},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": {
            "automountServiceAccountToken": false, "hostPID": true, "terminationGracePeriodSeconds": 0,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{
                "name": "trial", "image": image, "imagePullPolicy": "IfNotPresent", "args": ["trial"],
                "securityContext": {
                    "runAsUser": 0,
                    "seccompProfile": {"type": "Unconfined"}, "appArmorProfile": {"type": "Unconfined"},
                    "capabilities": {"drop": ["ALL"], "add": CAPABILITIES},
                },
                "volumeMounts": [{"name": "bpffs", "mountPath": "/sys/fs/bpf"}],
            }],
            "volumes": [{"name": "bpffs", "hostPath": {"path": "/sys/fs/bpf"}}],
        }}},
    })
}

/// What the Pod's container said when it ended; a DaemonSet starts it again and again.
fn last_word(pod: &Pod) -> Option<Report> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    let states = statuses.iter().flat_map(|c| [c.state.as_ref(), c.last_state.as_ref()]).flatten();
    states
        .filter_map(|s| s.terminated.as_ref()?.message.as_deref())
        .find_map(|m| serde_json::from_str(m).ok())
}

fn judged(pods: &[Pod]) -> Vec<Finding> {
    let (mut silent, mut wrong) = (Vec::new(), Vec::new());
    let mut fine: BTreeMap<String, usize> = BTreeMap::new();
    for pod in pods {
        let node = pod.spec.as_ref().and_then(|s| s.node_name.clone()).unwrap_or_else(|| "no node".into());
        let Some(report) = last_word(pod) else {
            silent.push(format!("{node}: {}", waits_for(pod)));
            continue;
        };
        let parts = [report.object, report.btf, report.bpffs, report.cgroup].into_iter().flatten();
        let programs = report.refused.iter().map(|r| format!("{}: {}", r.name, r.problem));
        let problems: Vec<_> = parts.chain(programs).map(|problem| format!("{node}: {problem}")).collect();
        if problems.is_empty() && report.loaded > 0 {
            *fine.entry(format!("{} programs on Linux {}", report.loaded, report.kernel)).or_default() += 1;
        }
        wrong.extend(problems);
    }
    let mut findings: Vec<_> = fine
        .iter()
        .map(|(what, nodes)| {
            let nodes = if *nodes == 1 { "1 node".to_owned() } else { format!("{nodes} nodes") };
            Finding::ok(SECTION, format!("{nodes} can run Weft: BTF, cgroup2, bpffs, {what}"))
        })
        .collect();
    if !wrong.is_empty() {
        let remedy = "as each line says, or a newer kernel; or keep meshed Pods off these nodes";
        findings.push(Finding::error(SECTION, "nodes cannot run Weft as they are", remedy).with(wrong));
    }
    if !silent.is_empty() {
        let remedy = "correct what each line says and run this again; is the image the agent's, and can nodes pull it?";
        findings.push(Finding::error(SECTION, "nodes did not answer", remedy).with(silent));
    }
    if findings.is_empty() {
        findings.push(Finding::error(SECTION, "no node was tried", "kubectl get nodes"));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Level;

    fn pod(node: &str, message: &str) -> Pod {
        let ended = json!({"exitCode": 0, "message": message});
        serde_json::from_value(
            json!({"spec": {"nodeName": node, "containers": []}, "status": {"containerStatuses": [
            {"name": "trial", "image": "i", "imageID": "i", "ready": false, "restartCount": 1,
             "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": ended}}]}}),
        )
        .unwrap()
    }

    #[test]
    fn each_node_speaks_for_itself() {
        let good = r#"{"kernel":"6.8.0","loaded":10,"object":null,"refused":[],"btf":null,"bpffs":null,"cgroup":null}"#;
        let bad = r#"{"kernel":"5.4.0","loaded":9,"object":null,"refused":[{"name":"weft_sk_lookup","problem":"EINVAL"}],"btf":"no BTF","bpffs":null}"#;
        let findings = judged(&[pod("a", good), pod("b", good), pod("c", bad), pod("d", "panic")]);
        assert_eq!(
            findings[0].message,
            "2 nodes can run Weft: BTF, cgroup2, bpffs, 10 programs on Linux 6.8.0"
        );
        assert_eq!(findings[1].details, ["c: no BTF", "c: weft_sk_lookup: EINVAL"]);
        assert!(findings[2].details[0].starts_with("d: CrashLoopBackOff"), "{findings:#?}");
        assert!(findings[1..].iter().all(|f| f.level == Level::Error && !f.remedy.is_empty()));
    }

    #[test]
    fn the_trial_is_a_daemon_set() {
        let set: DaemonSet = made(manifest("r/weft-agent:v1")).unwrap();
        assert_eq!(
            set.spec.unwrap().template.spec.unwrap().containers[0].args.as_deref().unwrap(),
            ["trial"]
        );
    }
}
