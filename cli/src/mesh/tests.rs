use http::{Request, Response, StatusCode};
use kube::client::Body;

use super::*;

/// An API server that makes tokens of `weft-viewer` in these namespaces, and knows of no such account in `empty`.
fn api_server(may: &'static [&'static str]) -> Cluster {
    let service = tower::service_fn(move |request: Request<Body>| async move {
        let namespace = request.uri().path().split('/').nth(4).unwrap_or_default().to_owned();
        let failed = |code: u16, reason: &str, message: &str| {
            let status = serde_json::json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
                "reason": reason, "message": message});
            (StatusCode::from_u16(code).unwrap(), status)
        };
        let (code, body) = if may.contains(&&*namespace) {
            let made = serde_json::json!({"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "metadata": {},
                "spec": {"audiences": [AUDIENCE]},
                "status": {"token": namespace, "expirationTimestamp": "2030-01-01T00:00:00Z"}});
            (StatusCode::CREATED, made)
        } else if namespace == "empty" {
            failed(404, "NotFound", "serviceaccounts \"weft-viewer\" not found")
        } else {
            failed(403, "Forbidden", "jane cannot create resource \"serviceaccounts/token\"")
        };
        let body = Body::from(body.to_string().into_bytes());
        Ok::<_, std::convert::Infallible>(Response::builder().status(code).body(body).unwrap())
    });
    Cluster { client: kube::Client::new(service, "default"), server: "https://api.test".into() }
}

#[tokio::test]
async fn the_widest_right_that_the_caller_has_is_used() {
    let given = async |may, namespace| {
        let pass = pass(&api_server(may), namespace).await.unwrap();
        let text = |value: &MetadataValue<Ascii>| value.to_str().unwrap().to_owned();
        (text(&pass.token), pass.namespace.as_ref().map(text))
    };
    assert_eq!(given(&["weft-system", "shop"], None).await, ("Bearer weft-system".into(), None));
    // Who may see everything is not held to the namespace: it narrows by filters, as before.
    assert_eq!(given(&["weft-system", "shop"], Some("shop")).await, ("Bearer weft-system".into(), None));
    assert_eq!(given(&["shop"], Some("shop")).await, ("Bearer shop".into(), Some("shop".into())));
}

#[tokio::test]
async fn what_to_ask_for_is_said() {
    let refused = async |namespace| match pass(&api_server(&["shop"]), namespace).await.err() {
        Some(Failure::Unable(why)) => why,
        other => panic!("{namespace:?}: {other:?}"),
    };
    let all = refused(None).await;
    assert!(all.contains("-n NAMESPACE") && all.contains("--role=weft-viewer"), "{all}");
    for namespace in ["bank", "empty"] {
        let one = refused(Some(namespace)).await;
        assert!(one.starts_with(&format!("you may not see the flows of namespace {namespace}: ")), "{one}");
        assert!(
            one.contains("--clusterrole=weft-flows-viewer") && one.contains("--role=weft-connect"),
            "{one}"
        );
    }
}
