//! Who may see flows, by the API server's word: a token proves a ServiceAccount (TokenReview), and RBAC says of which
//! namespaces that may see flows (SubjectAccessReview of `get flows.weft.mesh`).

use std::{collections::HashMap, time::Duration};

use futures_util::future::BoxFuture;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::{Api, api::PostParams};
use parking_lot::Mutex;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};

use super::{Cluster, review::Reviewer};
use crate::{
    auth::{Authenticator, Refused},
    relay::viewers::{ACCOUNT, Scope, Viewers},
};

/// How long an answer counts.
const KEPT: Duration = Duration::from_secs(10);
/// Answers that are kept.
const MAX_KEPT: usize = 1024;
/// Questions to the API server at one time.
const MAX_ASKED: usize = 8;
/// Longest wait for an answer.
const REQUEST: Duration = Duration::from_secs(5);
const SERVICE_ACCOUNT: &str = "system:serviceaccount:";

/// Checks viewers.
#[derive(Debug)]
pub struct Reviews {
    tokens: Reviewer,
    api: Api<SubjectAccessReview>,
    system: String,
    kept: Mutex<HashMap<Question, (bool, Instant)>>,
    asked: Semaphore,
}

/// A user, and a namespace or all of them.
type Question = (String, Option<String>);

impl Reviews {
    /// Over the cluster's API server.
    pub fn new(cluster: &Cluster) -> Self {
        Self {
            tokens: Reviewer::viewers(cluster),
            api: Api::all(cluster.client.clone()),
            system: cluster.namespace.clone(),
            kept: Mutex::default(),
            asked: Semaphore::new(MAX_ASKED),
        }
    }

    async fn scope(&self, token: &str, namespace: Option<&str>) -> Result<Scope, Refused> {
        let user = Authenticator::node(&self.tokens, token).await?;
        let scope = namespace.map_or(Scope::All, |namespace| Scope::Namespace(namespace.to_owned()));
        // Whoever may make this token may see everything.
        if user == format!("{SERVICE_ACCOUNT}{}:{ACCOUNT}", self.system) || self.may(&user, namespace).await?
        {
            return Ok(scope);
        }
        Err(Refused::Forbidden(match namespace {
            None => format!(
                "{user} may not see the flows of all namespaces, nor what is not flows; name a namespace of which it may: weft \
                 observe -n NAMESPACE"
            ),
            Some(namespace) => format!(
                "{user} may not see the flows of namespace {namespace}: the ClusterRole weft-flows-viewer is to be bound to it \
                 there, see docs/rbac.md"
            ),
        }))
    }

    /// Whether RBAC lets a ServiceAccount see the flows of a namespace, or of all.
    async fn may(&self, user: &str, namespace: Option<&str>) -> Result<bool, Refused> {
        let question = (user.to_owned(), namespace.map(str::to_owned));
        if let Some((may, _)) = self.kept.lock().get(&question).filter(|(_, until)| *until > Instant::now()) {
            return Ok(*may);
        }
        let asked = async {
            let _turn = self.asked.acquire().await;
            self.api.create(&PostParams::default(), &review(user, namespace)).await
        };
        let unavailable = |why: String| {
            Refused::Unavailable(format!("the API server cannot check rights now: {why}; try again"))
        };
        let answer = timeout(REQUEST, asked).await;
        let answer = answer.map_err(|_| unavailable(format!("no answer in {REQUEST:?}")))?;
        let status = answer.map_err(|error| unavailable(error.to_string()))?.status;
        let may = status.is_some_and(|status| status.allowed && status.denied != Some(true));
        let now = Instant::now();
        let mut kept = self.kept.lock();
        if kept.len() >= MAX_KEPT {
            kept.retain(|_, (_, until)| *until > now);
        }
        if kept.len() < MAX_KEPT {
            kept.insert(question, (may, now + KEPT));
        }
        Ok(may)
    }
}

impl Viewers for Reviews {
    fn see<'a>(
        &'a self,
        token: &'a str,
        namespace: Option<&'a str>,
    ) -> BoxFuture<'a, Result<Scope, Refused>> {
        Box::pin(self.scope(token, namespace))
    }
}

/// The question; a ServiceAccount's groups follow from its name.
fn review(user: &str, namespace: Option<&str>) -> SubjectAccessReview {
    let home = user.strip_prefix(SERVICE_ACCOUNT).and_then(|name| name.split(':').next()).unwrap_or_default();
    let groups =
        ["system:serviceaccounts", &format!("system:serviceaccounts:{home}"), "system:authenticated"];
    SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(user.to_owned()),
            groups: Some(groups.map(str::to_owned).to_vec()),
            resource_attributes: Some(ResourceAttributes {
                verb: Some("get".into()),
                group: Some("weft.mesh".into()),
                resource: Some("flows".into()),
                namespace: namespace.map(str::to_owned),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    }
}
