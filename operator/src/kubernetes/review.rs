//! Who an agent is: its projected ServiceAccount token, checked by the API server (TokenReview).
//!
//! A token counts when it is for Weft's audience, of the agents' ServiceAccount, and bound to a Pod and its node; the
//! node is what the API server says, never what the caller does.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::future::BoxFuture;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::{Api, api::PostParams};
use parking_lot::Mutex;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};

use super::{AGENT_ACCOUNT, Cluster};
use crate::{
    auth::{AUDIENCE, Authenticator, Refused},
    objects::is_object_name,
    relay::viewers,
};

/// How long a token that was good is not asked about again.
const GOOD: Duration = Duration::from_secs(60);
/// How long one that was not.
const BAD: Duration = Duration::from_secs(5);
/// How long a good answer counts while the API server gives none, and never longer than the token itself: nodes that it
/// knew a moment ago go on having their certificates renewed. What it would have revoked meanwhile, nobody could have
/// asked it to.
const AWAY: Duration = Duration::from_secs(3600);
/// Answers that are kept.
const MAX_KEPT: usize = 8192;
/// Questions to the API server at one time.
const MAX_ASKED: usize = 16;
/// Tokens are told apart into so many lots by their hashes, and asked about one at a time in each: an agent opens several
/// streams at once with one token, which is one question.
const LOTS: usize = 64;
/// Longest wait for an answer.
const REQUEST: Duration = Duration::from_secs(5);
/// Longest token.
const MAX_TOKEN: usize = 16 << 10;
const EXTRA: &str = "authentication.kubernetes.io/";

/// Why a caller is not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReviewError {
    /// The token is not good, or not an agent's.
    #[error("{0}")]
    Refused(&'static str),
    /// The API server did not say; the agent shall try again.
    #[error("the API server cannot check tokens now: {0}; try again")]
    Unavailable(String),
}

/// Checks tokens.
pub struct Reviewer {
    api: Api<TokenReview>,
    user: String,
    audience: &'static str,
    judge: Judge,
    kept: Mutex<HashMap<[u8; 32], Kept>>,
    asked: Semaphore,
    lots: Box<[Semaphore]>,
}

/// What an answer proves for a user.
type Judge = fn(&TokenReviewStatus, &str) -> Result<Arc<str>, ReviewError>;

#[derive(Clone)]
struct Kept {
    until: Instant,
    /// Until when it counts if the API server does not answer.
    away: Instant,
    answer: Result<Arc<str>, ReviewError>,
}

impl Reviewer {
    /// Over the cluster's API server, for agents of Weft's namespace.
    pub fn new(cluster: &Cluster) -> Self {
        Self::of(cluster, AGENT_ACCOUNT, AUDIENCE, judge)
    }

    /// For people who ask for flows, each by a ServiceAccount; the name that it gives is the ServiceAccount's user name.
    pub fn viewers(cluster: &Cluster) -> Self {
        Self::of(cluster, viewers::ACCOUNT, viewers::AUDIENCE, judge_viewer)
    }

    fn of(cluster: &Cluster, account: &str, audience: &'static str, judge: Judge) -> Self {
        Self {
            api: Api::all(cluster.client.clone()),
            user: format!("system:serviceaccount:{}:{account}", cluster.namespace),
            audience,
            judge,
            kept: Mutex::new(HashMap::new()),
            asked: Semaphore::new(MAX_ASKED),
            lots: (0..LOTS).map(|_| Semaphore::new(1)).collect(),
        }
    }

    /// The node on which the Pod runs that the token is bound to.
    ///
    /// # Errors
    /// When the token proves none, or the API server does not answer.
    pub async fn node(&self, token: &str) -> Result<Arc<str>, ReviewError> {
        if token.is_empty() || token.len() > MAX_TOKEN {
            return Err(ReviewError::Refused("the token is empty or too long"));
        }
        let key: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some(kept) = self.kept(&key) {
            return kept;
        }
        let lot = key.first().and_then(|first| self.lots.get(usize::from(*first) % LOTS));
        let turn = async {
            let lot = match lot {
                Some(lot) => Some(lot.acquire().await),
                None => None,
            };
            // Answered meanwhile: then nobody has to be asked.
            let asks = if self.kept(&key).is_none() { Some(self.asked.acquire().await) } else { None };
            (lot, asks)
        };
        let Ok(_turn) = timeout(REQUEST, turn).await else {
            return self.without(key, "too many wait for it".into());
        };
        // Another call may have asked about the same token while this one waited.
        if let Some(kept) = self.kept(&key) {
            return kept;
        }
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                audiences: Some(vec![self.audience.to_owned()]),
            },
            ..TokenReview::default()
        };
        let params = PostParams::default();
        let answer = match timeout(REQUEST, self.api.create(&params, &review)).await {
            Ok(Ok(review)) => (self.judge)(&review.status.unwrap_or_default(), &self.user),
            // Not kept: the next call asks again.
            Ok(Err(error)) if refused(&error) => return Err(ReviewError::Unavailable(error.to_string())),
            Ok(Err(error)) => return self.without(key, error.to_string()),
            Err(_) => return self.without(key, format!("no answer in {REQUEST:?}")),
        };
        let now = Instant::now();
        let kept = match &answer {
            Ok(_) => (now + GOOD.min(left(token)), now + AWAY.min(left(token))),
            Err(_) => (now + BAD, now),
        };
        self.keep(key, Kept { until: kept.0, away: kept.1, answer: answer.clone() });
        answer
    }

    /// What counts while the API server is away: its last answer, where that was good.
    fn without(&self, key: [u8; 32], why: String) -> Result<Arc<str>, ReviewError> {
        let mut kept = self.kept.lock();
        let now = Instant::now();
        match kept.get_mut(&key).filter(|k| k.away > now && k.answer.is_ok()) {
            Some(known) => {
                // Asked again soon, and not by each call: an API server that hangs would hold each up.
                known.until = known.away.min(now + BAD);
                tracing::debug!(why, "the API server cannot check a token now; its last answer counts");
                known.answer.clone()
            }
            None => Err(ReviewError::Unavailable(why)),
        }
    }

    fn kept(&self, key: &[u8; 32]) -> Option<Result<Arc<str>, ReviewError>> {
        let kept = self.kept.lock();
        kept.get(key).filter(|k| k.until > Instant::now()).map(|k| k.answer.clone())
    }

    fn keep(&self, key: [u8; 32], new: Kept) {
        let mut kept = self.kept.lock();
        if kept.len() >= MAX_KEPT {
            let now = Instant::now();
            kept.retain(|_, k| k.until.max(k.away) > now);
            // Still full: refused ones go, so that a flood of them cannot push agents out.
            if kept.len() >= MAX_KEPT {
                kept.retain(|_, k| k.answer.is_ok());
            }
            if kept.len() >= MAX_KEPT {
                return;
            }
        }
        kept.insert(key, new);
    }
}

impl Authenticator for Reviewer {
    fn node<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<String, Refused>> {
        Box::pin(async move {
            match self.node(token).await {
                Ok(node) => Ok(node.as_ref().to_owned()),
                Err(ReviewError::Refused(why)) => Err(Refused::NoAgent(why)),
                Err(error @ ReviewError::Unavailable(_)) => Err(Refused::Unavailable(error.to_string())),
            }
        })
    }
}

impl std::fmt::Debug for Reviewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reviewer").field("user", &self.user).finish_non_exhaustive()
    }
}

/// Whether the API server is there and refuses the question itself.
fn refused(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code < 500 && status.code != 429)
}

/// What a review's answer proves.
fn judge(status: &TokenReviewStatus, user: &str) -> Result<Arc<str>, ReviewError> {
    let refused = |why| Err(ReviewError::Refused(why));
    if status.authenticated != Some(true) {
        return refused(
            "the API server does not accept the token; mount a projected token with audience weft-operator",
        );
    }
    // An API server that knows nothing of audiences answers without them; its word is not enough.
    if !status.audiences.iter().flatten().any(|a| a == AUDIENCE) {
        return refused("the token is not for the audience weft-operator; set it in the projected volume");
    }
    let Some(found) = &status.user else { return refused("the token names no user") };
    if found.username.as_deref() != Some(user) {
        return refused("the token is not of the agents' ServiceAccount (weft-agent)");
    }
    let empty = BTreeMap::new();
    let extra = found.extra.as_ref().unwrap_or(&empty);
    let one = |name: &str| match extra.get(&format!("{EXTRA}{name}")).map(Vec::as_slice) {
        Some([value]) if !value.is_empty() => Some(value.as_str()),
        _ => None,
    };
    if one("pod-name").is_none() || one("pod-uid").is_none() {
        return refused(
            "the token is not bound to a Pod; use the one that is projected into the agent's Pod",
        );
    }
    match one("node-name").filter(|n| is_object_name(n)) {
        Some(node) => Ok(node.into()),
        None => refused("the token is not bound to a node; Kubernetes 1.32 or newer binds it by itself"),
    }
}

/// What a review's answer proves of a person: which ServiceAccount it speaks for.
fn judge_viewer(status: &TokenReviewStatus, _: &str) -> Result<Arc<str>, ReviewError> {
    let refused = |why| Err(ReviewError::Refused(why));
    if status.authenticated != Some(true) {
        return refused(
            "the API server does not accept the token; make one of the ServiceAccount weft-viewer",
        );
    }
    if !status.audiences.iter().flatten().any(|a| a == viewers::AUDIENCE) {
        return refused("the token is not for the audience weft-observer");
    }
    match status.user.as_ref().and_then(|u| u.username.as_deref()) {
        Some(name) if name.starts_with("system:serviceaccount:") => Ok(name.into()),
        _ => refused("the token is not of a ServiceAccount; make one of the ServiceAccount weft-viewer"),
    }
}

/// How long the token is valid. Only shortens what the API server said, so that the claim need not be verified here.
fn left(token: &str) -> Duration {
    #[derive(Deserialize)]
    struct Claims {
        exp: u64,
    }
    let claims = token.split('.').nth(1).and_then(|part| URL_SAFE_NO_PAD.decode(part).ok());
    let claims = claims.and_then(|json| serde_json::from_slice::<Claims>(&json).ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    claims.map_or(Duration::MAX, |c| Duration::from_secs(c.exp.saturating_sub(now)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const USER: &str = "system:serviceaccount:weft-system:weft-agent";

    fn status(change: impl FnOnce(&mut serde_json::Value)) -> TokenReviewStatus {
        let mut status = json!({
            "authenticated": true,
            "audiences": [AUDIENCE],
            "user": {"username": USER, "extra": {
                "authentication.kubernetes.io/pod-name": ["weft-agent-x"],
                "authentication.kubernetes.io/pod-uid": ["u"],
                "authentication.kubernetes.io/node-name": ["node-a"],
            }},
        });
        change(&mut status);
        serde_json::from_value(status).expect("status")
    }

    #[test]
    fn only_a_bound_token_of_an_agent_proves_a_node() {
        assert_eq!(judge(&status(|_| {}), USER).as_deref(), Ok("node-a"));
        let refused = |change: fn(&mut serde_json::Value), why: &str| {
            let Err(ReviewError::Refused(message)) = judge(&status(change), USER) else {
                panic!("not refused: {why}")
            };
            assert!(message.contains(why), "{message}");
        };
        refused(|s| s["authenticated"] = false.into(), "does not accept");
        refused(|s| s["audiences"] = json!([]), "audience");
        refused(|s| s["audiences"] = json!(["api"]), "audience");
        refused(
            |s| s["user"]["username"] = "system:serviceaccount:weft-system:other".into(),
            "ServiceAccount",
        );
        for (field, why) in [("pod-name", "Pod"), ("pod-uid", "Pod"), ("node-name", "node")] {
            let changed = status(|s| {
                s["user"]["extra"].as_object_mut().map(|e| e.remove(&format!("{EXTRA}{field}")));
            });
            let Err(ReviewError::Refused(message)) = judge(&changed, USER) else { panic!("{field}") };
            assert!(message.contains(why), "{message}");
        }
        refused(|s| s["user"]["extra"][format!("{EXTRA}node-name")] = json!(["a", "b"]), "node");
        refused(|s| s["user"]["extra"][format!("{EXTRA}node-name")] = json!(["../a"]), "node");
    }

    #[test]
    fn a_viewers_token_is_of_an_account_and_its_audience() {
        let user = "system:serviceaccount:weft-system:weft-viewer";
        let viewer = |audience: &str, name: &str| {
            let status = json!({"authenticated": true, "audiences": [audience], "user": {"username": name}});
            judge_viewer(&serde_json::from_value(status).expect("status"), user)
        };
        assert!(viewer("weft-observer", user).is_ok());
        assert!(viewer("weft-operator", user).is_err());
        // Another account is named: what it may see is another question.
        assert_eq!(viewer("weft-observer", USER).as_deref(), Ok(USER));
        assert!(viewer("weft-observer", "jane").is_err());
        assert!(judge_viewer(&TokenReviewStatus::default(), user).is_err());
        // Nor is a viewer an agent.
        assert!(judge(&status(|s| s["user"]["username"] = user.into()), USER).is_err());
    }

    #[tokio::test]
    async fn a_good_answer_counts_while_the_api_server_is_away() {
        let address = "http://127.0.0.1:1".parse().expect("address");
        let client = kube::Client::try_from(kube::Config::new(address)).expect("client");
        let reviewer = Reviewer::of(
            &Cluster { client, namespace: "weft-system".into(), pod: "o".into() },
            AGENT_ACCOUNT,
            AUDIENCE,
            judge,
        );
        let now = Instant::now();
        let know = |token: &str, answer: Result<Arc<str>, ReviewError>, away: Duration| {
            let key = Sha256::digest(token.as_bytes()).into();
            reviewer.keep(key, Kept { until: now, away: now + away, answer });
        };
        know("good", Ok("node-a".into()), AWAY);
        know("ended", Ok("node-a".into()), Duration::ZERO);
        know("bad", Err(ReviewError::Refused("it is bad")), AWAY);
        assert_eq!(reviewer.node("good").await, Ok("node-a".into()));
        assert!(
            reviewer.kept(&Sha256::digest(b"good").into()).is_some(),
            "it is not asked about by each call"
        );
        for token in ["ended", "bad", "unknown"] {
            assert!(matches!(reviewer.node(token).await, Err(ReviewError::Unavailable(_))), "{token}");
        }
    }

    #[test]
    fn a_tokens_end_is_respected() {
        let token = |claims: &str| format!("h.{}.s", URL_SAFE_NO_PAD.encode(claims));
        assert_eq!(left(&token(r#"{"exp":1}"#)), Duration::ZERO);
        assert!(left(&token(r#"{"exp":99999999999}"#)) > GOOD);
        assert_eq!(left("no token"), Duration::MAX);
    }
}
