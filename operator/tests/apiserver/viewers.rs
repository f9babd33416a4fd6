//! Who may see flows, with no more rights than deploy/ gives and docs/rbac.md tells to give.

use std::{fs, path::Path, time::Duration};

use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
    rbac::v1::RoleBinding,
};
use kube::{
    Api, Client, Config,
    api::PostParams,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::time::{Instant, sleep};
use weft_operator::{
    auth::Refused,
    kubernetes::{Cluster, viewers::Reviews},
    relay::viewers::{AUDIENCE, Scope, Viewers},
};

use crate::{objects::apply, server::ApiServer};

const WAIT: Duration = Duration::from_secs(60);
const OBJECTS: &str = "
{apiVersion: v1, kind: Namespace, metadata: {name: shop}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: bank}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: weft-viewer, namespace: shop}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: weft-viewer, namespace: bank}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: grafana, namespace: bank}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: weft-viewer, namespace: shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: weft-flows-viewer}
subjects:
- {kind: ServiceAccount, name: weft-viewer, namespace: shop}
- {apiGroup: rbac.authorization.k8s.io, kind: User, name: jane}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: grafana}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: weft-flows-viewer}
subjects: [{kind: ServiceAccount, name: grafana, namespace: bank}]
";

async fn client_as(server: &ApiServer, user: &str) -> Client {
    let file = Kubeconfig::read_from(server.kubeconfig_as(user)).unwrap();
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.unwrap();
    Client::try_from(config).unwrap()
}

async fn token(client: &Client, namespace: &str, name: &str, audience: &str) -> Result<String, u16> {
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let spec = TokenRequestSpec {
        audiences: vec![audience.into()],
        expiration_seconds: Some(600),
        bound_object_ref: None,
    };
    let request = TokenRequest { spec, ..TokenRequest::default() };
    match accounts.create_token_request(name, &PostParams::default(), &request).await {
        Ok(made) => Ok(made.status.unwrap().token),
        Err(kube::Error::Api(status)) => Err(status.code),
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flows_are_divided_by_namespace() {
    let Some(server) = ApiServer::start().await else { return };
    let admin = server.client();
    apply(&admin, "{apiVersion: v1, kind: Namespace, metadata: {name: weft-system}}").await;
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kustomize/base");
    for file in ["operator-rbac.yaml", "viewer.yaml"] {
        apply(&admin, &fs::read_to_string(base.join(file)).unwrap()).await;
    }
    apply(&admin, OBJECTS).await;

    // Jane may make a token of the namespace's viewer, and of no other.
    let jane = client_as(&server, "jane").await;
    let shop = token(&jane, "shop", "weft-viewer", AUDIENCE).await.unwrap();
    for (namespace, name) in [("weft-system", "weft-viewer"), ("bank", "weft-viewer"), ("bank", "grafana")] {
        assert_eq!(token(&jane, namespace, name, AUDIENCE).await, Err(403), "{namespace}/{name}");
    }

    let client = client_as(&server, "system:serviceaccount:weft-system:weft-operator").await;
    let reviews = Reviews::new(&Cluster { client, namespace: "weft-system".into(), pod: "o".into() });
    let within = |namespace: &str| Ok(Scope::Namespace(namespace.into()));
    assert_eq!(reviews.see(&shop, Some("shop")).await, within("shop"));
    let forbidden =
        async |token: &str, namespace: Option<&str>, words: &str| match reviews.see(token, namespace).await {
            Err(Refused::Forbidden(why)) => assert!(why.contains(words), "{why}"),
            other => panic!("{namespace:?}: {other:?}"),
        };
    forbidden(&shop, None, "weft observe -n NAMESPACE").await;
    forbidden(&shop, Some("bank"), "may not see the flows of namespace bank").await;
    // An account of that name alone is not enough, wherever it is.
    let bank = token(&admin, "bank", "weft-viewer", AUDIENCE).await.unwrap();
    forbidden(&bank, Some("bank"), "weft-flows-viewer").await;
    forbidden(&bank, None, "all namespaces").await;
    let all = token(&admin, "weft-system", "weft-viewer", AUDIENCE).await.unwrap();
    let grafana = token(&admin, "bank", "grafana", AUDIENCE).await.unwrap();
    for token in [&all, &grafana] {
        assert_eq!(reviews.see(token, None).await, Ok(Scope::All));
        assert_eq!(reviews.see(token, Some("bank")).await, within("bank"));
    }
    let other = token(&admin, "shop", "weft-viewer", "weft-operator").await.unwrap();
    assert!(matches!(reviews.see(&other, Some("shop")).await, Err(Refused::NoAgent(_))));

    // Taken away, the right is gone within seconds.
    let bindings: Api<RoleBinding> = Api::namespaced(admin, "shop");
    bindings.delete("weft-viewer", &Default::default()).await.unwrap();
    let end = Instant::now() + WAIT;
    while reviews.see(&shop, Some("shop")).await.is_ok() {
        assert!(Instant::now() < end, "the right is never taken away");
        sleep(Duration::from_millis(200)).await;
    }
}
