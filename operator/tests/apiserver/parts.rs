//! The CA's Secret, its rotation, the trust bundle, agents' tokens and the lease, each against the API server.

use std::{sync::Arc, time::Duration};

use aws_lc_rs::{
    encoding::{AsDer, EcPrivateKeyRfc5915Der},
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use k8s_openapi::{
    ByteString,
    api::{
        authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
        coordination::v1::Lease as LeaseObject,
        core::v1::{ConfigMap, Pod, Secret, ServiceAccount},
    },
};
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};
use serde_json::json;
use tokio::time::{Instant, sleep, timeout};
use weft_core::{SpiffeId, TrustDomain};
use weft_identity::{SvidKey, ca::EmbeddedCa};
use weft_operator::{
    authority::Authority,
    kubernetes::{
        BUNDLE, BUNDLE_KEY, CA_SECRET, Cluster, LEASE,
        bundle::BundleWriter,
        lease::Lease,
        review::{ReviewError, Reviewer},
        secret::{CaSecret, Place},
    },
};
use weft_runtime::{Tasks, drain};

use crate::{objects::apply, server::ApiServer};

const WAIT: Duration = Duration::from_secs(60);
const NAMESPACE: &str = "weft-system";

fn domain() -> TrustDomain {
    TrustDomain::new("cluster.local").unwrap()
}

fn cluster(server: &ApiServer, pod: &str) -> Cluster {
    Cluster { client: server.client(), namespace: NAMESPACE.into(), pod: pod.into() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts() {
    let Some(server) = ApiServer::start().await else { return };
    apply(&server.client(), "{apiVersion: v1, kind: Namespace, metadata: {name: weft-system}}").await;
    tokens_prove_a_node(&server).await;
    one_replica_holds_the_lease(&server).await;
    replicas_agree_on_one_ca(&server).await;
    a_ca_of_cert_managers_form_is_taken(&server).await;
    a_rotation_refuses_no_handshake(&server).await;
}

async fn tokens_prove_a_node(server: &ApiServer) {
    let client = server.client();
    let pod = |name: &str, account: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: weft-system}}, \
             spec: {{nodeName: node-a, serviceAccountName: {account}, containers: [{{name: a, image: a}}]}}}}"
        )
    };
    for object in [
        "{apiVersion: v1, kind: ServiceAccount, metadata: {name: weft-agent, namespace: weft-system}}",
        "{apiVersion: v1, kind: ServiceAccount, metadata: {name: other, namespace: weft-system}}",
        "{apiVersion: v1, kind: Node, metadata: {name: node-a}}",
        &pod("weft-agent-1", "weft-agent"),
        &pod("other-1", "other"),
    ] {
        apply(&client, object).await;
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let token = async |account: &str, pod: Option<&str>, audience: &str| {
        let uid = match pod {
            Some(pod) => pods.get(pod).await.unwrap().metadata.uid,
            None => None,
        };
        let bound_object_ref = pod.map(|pod| BoundObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            name: Some(pod.into()),
            uid,
        });
        let spec = TokenRequestSpec {
            audiences: vec![audience.into()],
            bound_object_ref,
            expiration_seconds: Some(600),
        };
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), NAMESPACE);
        let request = TokenRequest { spec, ..TokenRequest::default() };
        let answer = accounts.create_token_request(account, &PostParams::default(), &request).await.unwrap();
        answer.status.unwrap().token
    };
    let reviewer = Reviewer::new(&cluster(server, "operator-0"));
    let good = token("weft-agent", Some("weft-agent-1"), "weft-operator").await;
    assert_eq!(reviewer.node(&good).await.unwrap(), "node-a".into());
    for (bad, words) in [
        (
            token("weft-agent", Some("weft-agent-1"), "https://kubernetes.default.svc").await,
            "does not accept",
        ),
        (token("other", Some("other-1"), "weft-operator").await, "not of the agents' ServiceAccount"),
        (token("weft-agent", None, "weft-operator").await, "not bound to a Pod"),
        (format!("{good}x"), "does not accept"),
        (String::new(), "empty"),
    ] {
        let Err(ReviewError::Refused(why)) = reviewer.node(&bad).await else { panic!("taken: {words}") };
        assert!(why.contains(words), "{why}");
    }
    // A new reviewer has nothing cached: with its Pod, the token is gone.
    pods.delete("weft-agent-1", &kube::api::DeleteParams::default().grace_period(0)).await.unwrap();
    let refused = async {
        while Reviewer::new(&cluster(server, "operator-0")).node(&good).await.is_ok() {
            sleep(Duration::from_millis(200)).await;
        }
    };
    timeout(WAIT, refused).await.unwrap();
}

async fn one_replica_holds_the_lease(server: &ApiServer) {
    let (one, first) = Lease::new(&cluster(server, "operator-0"));
    let (two, second) = Lease::new(&cluster(server, "operator-1"));
    let ((trigger, watcher), (second_trigger, second_watcher)) = (drain::channel(), drain::channel());
    let (first_tasks, tasks) = (Tasks::new(), Tasks::new());
    first_tasks.spawn("lease", one.run(watcher));
    timeout(WAIT, first.clone().acquired()).await.unwrap();
    let two = tasks.spawn("lease", two.run(second_watcher));
    // Several terms go by; one holds it, the other does not.
    let end = Instant::now() + Duration::from_secs(4);
    while Instant::now() < end {
        assert!(!second.held(), "both hold the lease");
        sleep(Duration::from_millis(20)).await;
    }
    assert!(first.held());
    // Given back, it goes over at once.
    trigger.drain(Duration::from_secs(5)).await;
    assert_eq!(first_tasks.join(WAIT).await, 0);
    let given = Instant::now();
    timeout(WAIT, second.clone().acquired()).await.unwrap();
    assert!(given.elapsed() < Duration::from_secs(1), "{:?}", given.elapsed());
    assert!(!first.held());
    // A holder that crashes: its task is aborted, nothing is given back.
    two.abort();
    let crashed = Instant::now();
    let (three, third) = Lease::new(&cluster(server, "operator-2"));
    let (third_trigger, third_watcher) = drain::channel();
    tasks.spawn("lease", three.run(third_watcher));
    timeout(WAIT, third.clone().acquired()).await.unwrap();
    assert!(crashed.elapsed() < Duration::from_millis(2500), "{:?}", crashed.elapsed());
    let leases: Api<LeaseObject> = Api::namespaced(server.client(), NAMESPACE);
    let spec = leases.get(LEASE).await.unwrap().spec.unwrap();
    assert_eq!((spec.holder_identity.as_deref(), spec.lease_transitions), (Some("operator-2"), Some(2)));
    third_trigger.drain(Duration::from_secs(5)).await;
    assert_eq!(tasks.join(WAIT).await, 0);
    drop(second_trigger);
}

async fn replicas_agree_on_one_ca(server: &ApiServer) {
    let cluster = cluster(server, "operator-0");
    let open = || async { CaSecret::new(&cluster, Place::own(&cluster), domain()).open().await.unwrap() };
    let all = futures_util::future::join_all((0..8).map(|_| open())).await;
    let roots = all[0].roots();
    assert!(all.iter().all(|ca| ca.roots() == roots));
    let secrets: Api<Secret> = Api::namespaced(server.client(), NAMESPACE);
    let secret = secrets.get(CA_SECRET).await.unwrap();
    assert_eq!(secret.type_.as_deref(), Some("kubernetes.io/tls"));
    let keys: Vec<String> = secret.data.unwrap().into_keys().collect();
    assert_eq!(keys, ["ca.crt", "tls.crt", "tls.key"]);
    // One that is not Weft's is never made.
    let place = Place { namespace: NAMESPACE.into(), name: "mine".into(), own: false };
    let error = CaSecret::new(&cluster, place, domain()).open().await.err().unwrap().to_string();
    assert!(error.contains("weft-system/mine does not exist; create it"), "{error}");
}

/// The Secret's data for a CA.
fn data(key_pem: &str, certificate_pem: &str) -> serde_json::Value {
    let encode = |text: &str| json!(ByteString(text.as_bytes().to_vec()));
    json!({"data": {
        "tls.key": encode(key_pem), "tls.crt": encode(certificate_pem), "ca.crt": encode(certificate_pem),
    }})
}

async fn a_ca_of_cert_managers_form_is_taken(server: &ApiServer) {
    // cert-manager writes SEC 1 unless it is asked for PKCS#8.
    let key = KeyPair::generate().unwrap();
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &key.serialize_der()).unwrap();
    let der: EcPrivateKeyRfc5915Der<'_> = pair.private_key().as_der().unwrap();
    let body = STANDARD.encode(der.as_ref());
    let key_pem = format!("-----BEGIN EC PRIVATE KEY-----\n{body}\n-----END EC PRIVATE KEY-----\n");
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "mesh");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate_pem = params.self_signed(&key).unwrap().pem();
    let secrets: Api<Secret> = Api::namespaced(server.client(), NAMESPACE);
    let mut secret = data(&key_pem, &certificate_pem);
    secret["metadata"] = json!({"name": "mine"});
    secret["type"] = "kubernetes.io/tls".into();
    secrets.create(&PostParams::default(), &serde_json::from_value(secret).unwrap()).await.unwrap();
    let place = Place { namespace: NAMESPACE.into(), name: "mine".into(), own: false };
    let cluster = cluster(server, "operator-0");
    let ca = CaSecret::new(&cluster, place.clone(), domain()).open().await.unwrap();
    assert_eq!(ca.roots().len(), 1);
    let broken = Patch::Merge(data(&key_pem, "no certificate"));
    secrets.patch("mine", &PatchParams::default(), &broken).await.unwrap();
    let error = CaSecret::new(&cluster, place, domain()).open().await.err().unwrap().to_string();
    assert!(error.contains("weft-system/mine") && error.contains("certificate"), "{error}");
}

/// What a node holds: its certificate, and the roots by which it verifies others.
struct Node {
    chain: rustls_pki_types::CertificateDer<'static>,
    roots: Vec<rustls_pki_types::CertificateDer<'static>>,
}

impl Node {
    fn new(ca: &EmbeddedCa) -> Self {
        let id = SpiffeId::service_account(&domain(), "shop", "web");
        let request = SvidKey::generate().unwrap().request(&id).unwrap();
        let signed = ca.sign(&id, &request, Duration::from_secs(3600)).unwrap();
        Self { chain: signed.chain[0].clone(), roots: signed.roots }
    }

    fn accepts(&self, other: &Self) -> bool {
        let anchors: Vec<_> =
            self.roots.iter().map(|r| webpki::anchor_from_trusted_cert(r).unwrap()).collect();
        let leaf = webpki::EndEntityCert::try_from(&other.chain).unwrap();
        leaf.verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &anchors,
            &[],
            rustls_pki_types::UnixTime::now(),
            webpki::KeyUsage::server_auth(),
            None,
            None,
        )
        .is_ok()
    }
}

async fn a_rotation_refuses_no_handshake(server: &ApiServer) {
    const PROPAGATION: Duration = Duration::from_secs(4);
    let client = server.client();
    let cluster = cluster(server, "operator-0");
    let secret = CaSecret::new(&cluster, Place::own(&cluster), domain());
    let ca = secret.open().await.unwrap();
    let old = ca.roots()[0].clone();
    let authority = Arc::new(Authority::new(ca, PROPAGATION));
    let (trigger, watcher) = drain::channel();
    let (lease, leadership) = Lease::new(&cluster);
    let bundle = BundleWriter::new(&cluster);
    bundle.adopt(&authority).await.unwrap();
    let tasks = Tasks::new();
    tasks.spawn("lease", lease.run(watcher.clone()));
    tasks.spawn("CA secret", secret.run(Arc::clone(&authority), leadership.clone(), watcher.clone()));
    tasks.spawn("trust bundle", bundle.run(Arc::clone(&authority), leadership.clone(), watcher));
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), NAMESPACE);
    let published = async |count: usize| {
        let wait = async {
            loop {
                let map = maps.get_opt(BUNDLE).await.unwrap().unwrap_or_default();
                let text = map.data.and_then(|mut d| d.remove(BUNDLE_KEY)).unwrap_or_default();
                if text.matches("BEGIN CERTIFICATE").count() == count {
                    return map.metadata.annotations.unwrap_or_default();
                }
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(WAIT, wait).await.unwrap()
    };
    published(1).await;

    let new = EmbeddedCa::generate(domain()).unwrap();
    let whole = new.to_pem();
    let key = whole.split("-----BEGIN CERTIFICATE-----").next().unwrap();
    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    let changed = Patch::Merge(data(key, &new.roots_pem()));
    let mut nodes: Vec<Node> = (0..4).map(|_| Node::new(&authority.ca().unwrap())).collect();
    secrets.patch(CA_SECRET, &PatchParams::default(), &changed).await.unwrap();
    // All the while nodes renew in turn, and each must accept each.
    let end = Instant::now() + WAIT;
    let mut turn = 0;
    loop {
        for (i, one) in nodes.iter().enumerate() {
            assert!(nodes.iter().all(|other| one.accepts(other)), "node {i} refuses");
        }
        if authority.ca().unwrap().roots()[0] != old && turn > 4 {
            break;
        }
        assert!(Instant::now() < end, "the new root does not sign");
        // Roots reach every node well within the propagation; certificates change one by one.
        let signed = Node::new(&authority.ca().unwrap());
        for node in &mut nodes {
            node.roots.clone_from(&signed.roots);
        }
        let at = turn % nodes.len();
        nodes[at] = signed;
        turn += 1;
        sleep(Duration::from_millis(250)).await;
    }
    assert_eq!(authority.ca().unwrap().roots()[0], new.roots()[0]);
    let annotations = published(2).await;
    let retired = async {
        while !maps.get(BUNDLE).await.unwrap().metadata.annotations.unwrap_or_default()["weft.mesh/retire-at"]
            .contains(':')
        {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(WAIT, retired).await.unwrap();
    drop(annotations);
    // A replica that starts now trusts both, though the Secret holds only the new one.
    let late = Authority::new(
        CaSecret::new(&cluster, Place::own(&cluster), domain()).open().await.unwrap(),
        PROPAGATION,
    );
    BundleWriter::new(&cluster).adopt(&late).await.unwrap();
    assert_eq!(late.ca().unwrap().roots(), [new.roots()[0].clone(), old]);
    // Deleted, it is made anew, and the one in memory goes on until the new one is known.
    secrets.delete(CA_SECRET, &Default::default()).await.unwrap();
    let again = async {
        while secrets.get_opt(CA_SECRET).await.unwrap().is_none() {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(WAIT, again).await.unwrap();
    published(3).await;
    trigger.drain(Duration::from_secs(5)).await;
    assert_eq!(tasks.join(WAIT).await, 0);
}
