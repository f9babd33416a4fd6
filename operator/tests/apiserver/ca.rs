//! A CA of one's own: named by the MeshConfig while everything runs, an intermediate, broken, replaced, taken back.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use serde_json::{Value, json};
use tokio::time::timeout;
use weft_core::{SpiffeId, TrustDomain};
use weft_identity::{Credentials, SvidKey, ca::EmbeddedCa};
use weft_operator::{
    authority::Authority,
    kubernetes::{
        Cluster,
        ca::CaSource,
        lease::Lease,
        secret::{CaSecret, Place},
    },
};
use weft_runtime::{Tasks, drain};

use crate::{
    objects::{apply, weft_crds},
    server::ApiServer,
};

const WAIT: Duration = Duration::from_secs(60);

fn domain() -> TrustDomain {
    TrustDomain::new("cluster.local").unwrap()
}

fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// A Secret with an intermediate below `root`, whose certificate is `pem`.
fn secret(root: &CertificateParams, key: &KeyPair, pem: &str) -> Value {
    let own = KeyPair::generate().unwrap();
    let chain = authority("issuing").signed_by(&own, &Issuer::from_params(root, key)).unwrap().pem();
    let encode = |text: &str| json!(ByteString(text.as_bytes().to_vec()));
    json!({
        "metadata": {"name": "mesh"},
        "type": "kubernetes.io/tls",
        "data": {"tls.key": encode(&own.serialize_pem()), "tls.crt": encode(&chain), "ca.crt": encode(pem)},
    })
}

/// Signs as a node's request would be, and checks as a peer does.
fn signs(ca: &EmbeddedCa) -> Credentials {
    let id = SpiffeId::service_account(&domain(), "shop", "web");
    let key = SvidKey::generate().unwrap();
    let signed = ca.sign(&id, &key.request(&id).unwrap(), Duration::from_secs(3600)).unwrap();
    Credentials::new(&id, key, signed, SystemTime::now()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_mesh_config_names_the_secret_of_the_ca() {
    let Some(server) = ApiServer::start().await else { return };
    let client = server.client();
    for name in ["weft-system", "pki"] {
        apply(&client, &format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}}}}}")).await;
    }
    weft_crds(&client).await;
    let cluster =
        Cluster { client: client.clone(), namespace: "weft-system".into(), pod: "operator-0".into() };
    let place = Place::own(&cluster);
    let own = CaSecret::new(&cluster, place.clone(), domain()).open().await.unwrap();
    let first = own.certificate().clone();
    // New roots sign at the next tick: what waits for their propagation is tested elsewhere.
    let mesh = Arc::new(Authority::new(own, Duration::ZERO));
    let source = CaSource::new(&cluster, place, domain());
    let mut health = source.health();
    let (trigger, watcher) = drain::channel();
    let (lease, leadership) = Lease::new(&cluster);
    let tasks = Tasks::new();
    tasks.spawn("lease", lease.run(watcher.clone()));
    tasks.spawn("CA", source.run(Arc::clone(&mesh), leadership, watcher));
    let mut told = async |what: &str| {
        let wanted = health.wait_for(|health| match &health.problem {
            Some(problem) => !what.is_empty() && problem.contains(what),
            None => what.is_empty() && health.place.to_string() == "pki/mesh",
        });
        let found = timeout(WAIT, wanted).await;
        assert!(found.is_ok(), "{what:?} is not told");
    };

    apply(
        &client,
        "{apiVersion: weft.mesh/v1alpha1, kind: MeshConfig, metadata: {name: default},
          spec: {issuer: {embedded: {secretRef: {namespace: pki, name: mesh}}}}}",
    )
    .await;
    told("Secret pki/mesh does not exist; create it with tls.crt, tls.key and ca.crt").await;
    assert_eq!(*mesh.ca().unwrap().certificate(), first, "the CA of before goes on");

    let (root, key) = (authority("company"), KeyPair::generate().unwrap());
    // Made once: each signature differs.
    let pem = root.self_signed(&key).unwrap().pem();
    let secrets: Api<Secret> = Api::namespaced(client.clone(), "pki");
    let object = serde_json::from_value(secret(&root, &key, &pem)).unwrap();
    secrets.create(&PostParams::default(), &object).await.unwrap();
    told("").await;
    mesh.tick(SystemTime::now());
    let held = signs(&mesh.ca().unwrap());
    assert_eq!(held.chain().len(), 2, "the intermediate travels with the SVID");
    assert_eq!(held.roots().len(), 2, "the root of before is trusted still");

    // Broken in each part, in turn: it is named, and what signs goes on signing.
    let good = secret(&root, &key, &pem);
    for (part, text, said) in [
        ("tls.key", "", "has no tls.key"),
        ("tls.crt", "nothing", "no certificate belongs to the key"),
        ("ca.crt", "", "put the root into ca.crt"),
    ] {
        let mut bad = good.clone();
        bad["data"][part] = json!(ByteString(text.as_bytes().to_vec()));
        secrets.patch("mesh", &PatchParams::default(), &Patch::Merge(&bad)).await.unwrap();
        told(said).await;
        assert_eq!(signs(&mesh.ca().unwrap()).chain()[1], held.chain()[1]);
    }

    // Another intermediate below the same root signs at once.
    secrets.patch("mesh", &PatchParams::default(), &Patch::Merge(&good)).await.unwrap();
    told("").await;
    let renewed = signs(&mesh.ca().unwrap());
    assert_ne!(renewed.chain()[1], held.chain()[1]);
    assert_eq!(renewed.roots(), held.roots());

    // Without the reference it is Weft's own again.
    let configs = "{apiVersion: weft.mesh/v1alpha1, kind: MeshConfig, metadata: {name: default}, spec: {}}";
    apply(&client, configs).await;
    let back = async {
        while *mesh.ca().unwrap().certificate() != first {
            mesh.tick(SystemTime::now());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(WAIT, back).await.unwrap();
    trigger.drain(Duration::from_secs(5)).await;
}
