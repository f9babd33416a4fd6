//! Who may do what, asked of the API server (SelfSubjectAccessReview, SubjectAccessReview).

use futures_util::future::join_all;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec, SubjectAccessReview,
    SubjectAccessReviewSpec,
};
use kube::{Api, api::PostParams};

use super::Finding;
use crate::{
    cluster::{Cluster, SYSTEM},
    mesh::VIEWER,
};

const SECTION: &str = "Rights";

/// One right: verb, group, resource, whether in Weft's namespace, name.
struct Right(&'static str, &'static str, &'static str, bool, &'static str);

impl Right {
    fn attributes(&self) -> ResourceAttributes {
        let Self(verb, group, resource, own, name) = self;
        let (resource, sub) = resource.split_once('/').map_or((*resource, None), |(r, s)| (r, Some(s)));
        ResourceAttributes {
            verb: Some((*verb).into()),
            group: Some((*group).into()),
            resource: Some(resource.into()),
            subresource: sub.map(Into::into),
            namespace: own.then(|| SYSTEM.into()),
            name: (!name.is_empty()).then(|| (*name).into()),
            ..ResourceAttributes::default()
        }
    }

    fn text(&self) -> String {
        let Self(verb, group, resource, own, name) = self;
        let group = if group.is_empty() { String::new() } else { format!(".{group}") };
        let name = if name.is_empty() { String::new() } else { format!(" {name}") };
        let place = if *own { format!(" in {SYSTEM}") } else { String::new() };
        format!("{verb} {resource}{group}{name}{place}")
    }
}

/// What `weft install` makes.
const INSTALL: [Right; 12] = [
    Right("create", "apiextensions.k8s.io", "customresourcedefinitions", false, ""),
    Right("create", "", "namespaces", false, ""),
    Right("create", "rbac.authorization.k8s.io", "clusterroles", false, ""),
    Right("create", "rbac.authorization.k8s.io", "clusterrolebindings", false, ""),
    Right("create", "rbac.authorization.k8s.io", "roles", true, ""),
    Right("create", "rbac.authorization.k8s.io", "rolebindings", true, ""),
    Right("create", "", "serviceaccounts", true, ""),
    Right("create", "", "services", true, ""),
    Right("create", "apps", "deployments", true, ""),
    Right("create", "apps", "daemonsets", true, ""),
    Right("create", "policy", "poddisruptionbudgets", true, ""),
    Right("patch", "apps", "deployments", true, ""),
];

/// What the operator cannot do without (docs/rbac.md has all).
const OPERATOR: [Right; 14] = [
    Right("watch", "", "namespaces", false, ""),
    Right("watch", "", "nodes", false, ""),
    Right("watch", "", "pods", false, ""),
    Right("watch", "", "services", false, ""),
    Right("watch", "discovery.k8s.io", "endpointslices", false, ""),
    Right("watch", "networking.k8s.io", "networkpolicies", false, ""),
    Right("watch", "weft.mesh", "authorizationpolicies", false, ""),
    Right("watch", "weft.mesh", "trafficpolicies", false, ""),
    Right("watch", "weft.mesh", "meshconfigs", false, ""),
    Right("patch", "weft.mesh", "authorizationpolicies/status", false, ""),
    Right("create", "authentication.k8s.io", "tokenreviews", false, ""),
    Right("create", "authorization.k8s.io", "subjectaccessreviews", false, ""),
    Right("update", "", "secrets", true, "weft-ca"),
    Right("update", "coordination.k8s.io", "leases", true, "weft-operator"),
];

/// What this command needs to ask the mesh.
const VIEW: [Right; 2] = [
    Right("create", "", "serviceaccounts/token", true, VIEWER),
    Right("create", "", "pods/portforward", true, ""),
];

/// Whether the caller may install.
pub(super) async fn install(cluster: &Cluster) -> Vec<Finding> {
    let all = format!("you may create what `weft install` makes ({} kinds)", INSTALL.len() - 1);
    let remedy = "let an administrator of the cluster install it, or have the rights given to you";
    vec![judged(own(cluster, &INSTALL).await, all, "you may not install Weft", remedy)]
}

/// Whether the operator may do its work, and the caller may ask it.
pub(super) async fn operator(cluster: &Cluster) -> Vec<Finding> {
    let user = format!("system:serviceaccount:{SYSTEM}:weft-operator");
    let (reviews, own) = tokio::join!(others(cluster, &user, &OPERATOR), own(cluster, &VIEW));
    let mut findings = Vec::new();
    match reviews {
        // Only who may ask about others knows; the operator's own log tells as well.
        Err(why) => {
            findings.push(Finding::info(SECTION, format!("the operator's rights are not known: {why}")));
        }
        known => findings.push(judged(
            known,
            "the operator may read and write what it needs".into(),
            "the operator lacks rights",
            "apply its roles again: weft upgrade | kubectl apply -f -",
        )),
    }
    let remedy = format!("kubectl -n {SYSTEM} create rolebinding NAME --role={VIEWER} --user=YOU");
    findings.push(judged(own, "you may see flows".into(), "you may not see flows", &remedy));
    findings
}

fn judged(denied: Result<Vec<String>, String>, good: String, bad: &str, remedy: &str) -> Finding {
    match denied {
        Ok(denied) if denied.is_empty() => Finding::ok(SECTION, good),
        Ok(denied) => {
            Finding::error(SECTION, format!("{bad}: {} missing", denied.len()), remedy).with(denied)
        }
        Err(why) => Finding::unseen(SECTION, "rights", &why),
    }
}

/// Which of the rights the caller does not have.
async fn own(cluster: &Cluster, rights: &[Right]) -> Result<Vec<String>, String> {
    let api: Api<SelfSubjectAccessReview> = Api::all(cluster.client.clone());
    let asked = rights.iter().map(|right| {
        let api = api.clone();
        async move {
            let spec = SelfSubjectAccessReviewSpec {
                resource_attributes: Some(right.attributes()),
                ..SelfSubjectAccessReviewSpec::default()
            };
            let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
            let answer = api.create(&PostParams::default(), &review).await.map_err(|e| cluster.why(&e))?;
            Ok((!answer.status.is_some_and(|s| s.allowed)).then(|| right.text()))
        }
    });
    join_all(asked).await.into_iter().filter_map(Result::transpose).collect()
}

/// Which of the rights a user does not have.
async fn others(cluster: &Cluster, user: &str, rights: &[Right]) -> Result<Vec<String>, String> {
    let api: Api<SubjectAccessReview> = Api::all(cluster.client.clone());
    let asked = rights.iter().map(|right| {
        let api = api.clone();
        async move {
            let spec = SubjectAccessReviewSpec {
                user: Some(user.to_owned()),
                resource_attributes: Some(right.attributes()),
                ..SubjectAccessReviewSpec::default()
            };
            let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
            let answer = api.create(&PostParams::default(), &review).await.map_err(|e| cluster.why(&e))?;
            Ok((!answer.status.is_some_and(|s| s.allowed)).then(|| right.text()))
        }
    });
    join_all(asked).await.into_iter().filter_map(Result::transpose).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_read_like_kubectl() {
        assert_eq!(OPERATOR[9].text(), "patch authorizationpolicies/status.weft.mesh");
        assert_eq!(VIEW[0].text(), "create serviceaccounts/token weft-viewer in weft-system");
        let attributes = VIEW[0].attributes();
        assert_eq!(attributes.subresource.as_deref(), Some("token"));
        assert_eq!(attributes.namespace.as_deref(), Some(SYSTEM));
    }
}
