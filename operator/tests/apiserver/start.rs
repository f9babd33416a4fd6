//! An operator that starts with an unusable CA: it stays, says what to mend, and goes on once it is mended.

use std::{fs, path::Path, time::Duration};

use k8s_openapi::{
    ByteString,
    api::{core::v1::Secret, events::v1::Event},
};
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::{
    objects::{api, apply, weft_crds},
    operator::{Agent, OBJECTS, Operator, agent_token, bundle, private},
    server::ApiServer,
};

const WAIT: Duration = Duration::from_secs(60);
const ROLE: &str = "
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: weft-ca, namespace: pki}
rules:
- {apiGroups: [\"\"], resources: [secrets], resourceNames: [mesh], verbs: [get, list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: weft-ca, namespace: pki}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: weft-ca}
subjects: [{kind: ServiceAccount, name: weft-operator, namespace: weft-system}]
";

/// The data of a Secret with a root made by `change` from a good one.
fn secret(key: &KeyPair, change: impl FnOnce(&mut CertificateParams)) -> Value {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "company");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    change(&mut params);
    let root = params.self_signed(key).unwrap().pem();
    let encode = |text: &str| json!(ByteString(text.as_bytes().to_vec()));
    json!({
        "metadata": {"name": "mesh"},
        "type": "kubernetes.io/tls",
        "data": {"tls.key": encode(&key.serialize_pem()), "tls.crt": encode(&root), "ca.crt": encode(&root)},
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_starts_without_a_usable_ca() {
    let Some(mut server) = ApiServer::start().await else { return };
    let client = server.client();
    weft_crds(&client).await;
    for name in ["weft-system", "pki"] {
        apply(&client, &format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}}}}}")).await;
    }
    let rbac = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kustomize/base/operator-rbac.yaml");
    apply(&client, &fs::read_to_string(rbac).unwrap()).await;
    let objects = OBJECTS.split("---").filter(|d| !d.contains("MeshConfig") && !d.contains("HTTPRoute"));
    apply(&client, &objects.collect::<Vec<_>>().join("---")).await;
    apply(
        &client,
        "{apiVersion: weft.mesh/v1alpha1, kind: MeshConfig, metadata: {name: default},
          spec: {issuer: {embedded: {secretRef: {namespace: pki, name: mesh}}}}}",
    )
    .await;
    let folder = TempDir::new().unwrap();
    let kubeconfig = server.kubeconfig_as("system:serviceaccount:weft-system:weft-operator");
    let mut operator = Operator::start(&kubeconfig, folder.path(), "operator-0");
    let mesh =
        json!({"apiVersion": "weft.mesh/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "default"}});
    let told = async |operator: &mut Operator, reason: &str, words: &str| {
        let end = Instant::now() + WAIT;
        loop {
            assert!(operator.child.try_wait().unwrap().is_none(), "the operator ended");
            let found = api(&client, &mesh).get("default").await.unwrap();
            let conditions = found.data["status"]["conditions"].clone();
            let ca =
                conditions.as_array().into_iter().flatten().find(|c| c["type"] == "CertificateAuthority");
            let message = ca.and_then(|c| c["message"].as_str()).unwrap_or_default();
            if message.contains(words) && ca.is_some_and(|c| c["reason"] == reason) {
                return;
            }
            let log = || fs::read_to_string(folder.path().join("operator-0.log")).unwrap_or_default();
            assert!(Instant::now() < end, "{words:?} is not told, but {conditions}\n{}", log());
            sleep(Duration::from_millis(50)).await;
        }
    };

    // The Secret may not be read, is not there, and is wrong in every way; none of it ends the operator.
    told(
        &mut operator,
        "NoAuthority",
        "in the namespace \"pki\"; the operator needs get, list and watch on it",
    )
    .await;
    apply(&client, ROLE).await;
    told(&mut operator, "NoAuthority", "Secret pki/mesh does not exist; create it with tls.crt").await;
    let answer = operator.get("/readyz").await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("usable CA"), "{answer}");
    let metrics = operator.get("/metrics").await;
    assert!(metrics.contains("weft_operator_ca_signs 0"), "{metrics}");
    let events: Api<Event> = Api::namespaced(client.clone(), "default");
    let end = Instant::now() + WAIT;
    loop {
        let all = events.list(&Default::default()).await.unwrap().items;
        let note = |e: &Event| e.note.clone().unwrap_or_default();
        let about =
            |e: &&Event| e.regarding.as_ref().is_some_and(|r| r.kind.as_deref() == Some("MeshConfig"));
        if all.iter().filter(about).any(|e| note(e).contains("Secret pki/mesh")) {
            break;
        }
        assert!(Instant::now() < end, "no Event: {all:?}");
        sleep(Duration::from_millis(50)).await;
    }

    let secrets: Api<Secret> = Api::namespaced(client.clone(), "pki");
    let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let good = secret(&key, |_| {});
    let with = |part: &str, value: &Value| {
        let mut changed = good.clone();
        changed["data"][part] = value.clone();
        changed
    };
    let nothing = json!(ByteString(Vec::new()));
    let bad = [
        (with("tls.key", &nothing), "Secret pki/mesh has no tls.key"),
        (with("tls.crt", &nothing), "Secret pki/mesh has no tls.crt"),
        (with("tls.key", &secret(&other, |_| {})["data"]["tls.key"]), "no certificate belongs to the key"),
        (secret(&key, |p| p.not_after = rcgen::date_time_ymd(2020, 1, 1)), "tls.crt: nothing can be signed"),
        (secret(&key, |p| p.is_ca = IsCa::ExplicitNoCa), "tls.crt: "),
    ];
    secrets.create(&PostParams::default(), &serde_json::from_value(bad[0].0.clone()).unwrap()).await.unwrap();
    for (object, words) in &bad {
        secrets.patch("mesh", &PatchParams::default(), &Patch::Merge(object)).await.unwrap();
        told(&mut operator, "NoAuthority", words).await;
    }

    // Mended, it signs without a restart.
    secrets.patch("mesh", &PatchParams::default(), &Patch::Merge(&good)).await.unwrap();
    told(&mut operator, "Ready", "Secret pki/mesh signs until").await;
    operator.ready().await;
    assert!(operator.get("/metrics").await.contains("weft_operator_ca_signs 1"));
    let token = folder.path().join("token");
    private(&token, &agent_token(&client, "weft-agent-1").await);
    let agent = Agent::connect(&operator, &bundle(&client).await, &token).await.unwrap();
    agent.sign("shop", "web").await.unwrap();

    // Without the API server: who was let in goes on, who was never seen is told to try elsewhere, not that it is nobody.
    let unseen = folder.path().join("unseen");
    private(&unseen, &agent_token(&client, "weft-agent-2").await);
    let roots = bundle(&client).await;
    server.stop_apiserver();
    Agent::connect(&operator, &roots, &token).await.unwrap();
    let refused = Agent::connect(&operator, &roots, &unseen).await.err().unwrap();
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
    assert!(refused.message().contains("cannot check tokens now"), "{refused}");
}
