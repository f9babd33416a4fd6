//! The CRDs in the API server: examples are taken, typing errors are refused with words that help.

use std::{fs, path::Path};

use crate::{
    objects::{apply, gateway_crd, try_apply, weft_crds},
    server::ApiServer,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn schemas() {
    let Some(server) = ApiServer::start().await else { return };
    let client = server.client();
    weft_crds(&client).await;
    gateway_crd(&client, "HTTPRoute", "v1").await;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    // The shop makes the namespace that the others are in.
    files.sort_by_key(|p| !p.ends_with("shop.yaml"));
    assert!(files.len() >= 4);
    for file in files {
        apply(&client, &fs::read_to_string(&file).unwrap()).await;
    }

    let policy = |spec: &str| {
        format!(
            "{{apiVersion: weft.mesh/v1alpha1, kind: AuthorizationPolicy, metadata: {{name: p, namespace: shop}}, spec: {spec}}}"
        )
    };
    let mesh = |name: &str, spec: &str| {
        format!(
            "{{apiVersion: weft.mesh/v1alpha1, kind: MeshConfig, metadata: {{name: {name}}}, spec: {spec}}}"
        )
    };
    let target = "targetRefs: [{group: '', kind: Pod, selector: {matchLabels: {app: web}}}]";
    for (object, words) in [
        (policy(&format!("{{{target}, acton: ALLOW}}")), vec!["acton"]),
        (policy(&format!("{{{target}, action: ALOW}}")), vec!["spec.action", "ALLOW"]),
        (
            policy(&format!(
                "{{{target}, rules: [{{sources: [{{type: ServiceAccount, serviceAcount: {{name: x}}}}]}}]}}"
            )),
            vec!["serviceAcount"],
        ),
        (mesh("other", "{trustDomain: cluster.local}"), vec!["there is one MeshConfig; call it default"]),
        (mesh("default", "{trustDomain: other.local}"), vec!["cannot change while the mesh runs"]),
        (mesh("default", "{trustDomain: cluster.local, sameNode: Shortcutt}"), vec!["sameNode", "Shortcut"]),
        (
            mesh("default", "{trustDomain: cluster.local, issuer: {type: Spire}}"),
            vec!["type Spire needs spire.socketPath"],
        ),
    ] {
        let error = try_apply(&client, &object).await.expect_err(&object).to_string();
        for word in words {
            assert!(error.contains(word), "{object}\n{error}");
        }
    }
}
