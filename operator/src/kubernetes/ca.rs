//! Which Secret the CA comes from, as the MeshConfig says now, and how the CA is doing.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{Stream, StreamExt};
use k8s_openapi::jiff::Timestamp;
use kube::{
    Api,
    api::DynamicObject,
    runtime::watcher::{self, watch_object},
};
use serde_json::Value;
use tokio::sync::watch;
use weft_core::TrustDomain;
use weft_runtime::{Backoff, DrainWatcher};

use super::{
    Cluster,
    lease::Leadership,
    secret::{CaSecret, Place},
};
use crate::{
    authority::{Authority, Signing},
    index::Finding,
    objects::Kind,
    source::kubernetes::resource,
};

/// How long before its end a CA is complained about.
const SOON: Duration = Duration::from_secs(7 * 24 * 3600);

/// How the CA is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaHealth {
    /// Where it comes from.
    pub place: Place,
    /// Why what lies there now is not used; the CA of before goes on, where there was one.
    pub problem: Option<String>,
}

impl CaHealth {
    /// Taken from there.
    pub fn of(place: Place) -> Self {
        Self { place, problem: None }
    }

    /// The condition `CertificateAuthority` of the MeshConfig; the CA signs until `until`, where there is one.
    fn finding(&self, until: Option<SystemTime>, now: SystemTime) -> Finding {
        let place = &self.place;
        let Some(until) = until else {
            let problem = self.problem.clone().unwrap_or_else(|| format!("Secret {place} holds no CA yet"));
            let message = format!(
                "{problem}; nothing is signed and no agent is served until then: agents go on with what they hold, and new \
                 or expired certificates are not to be had"
            );
            return Finding { ok: false, reason: "NoAuthority", message };
        };
        let end = Timestamp::try_from(until).map(|end| format!("{end:.0}")).unwrap_or_default();
        let remedy = "put a new certificate into it, or see why cert-manager does not";
        let (ok, reason, message) = match &self.problem {
            _ if until <= now => {
                let problem = self.problem.as_deref().map(|p| format!("; {p}")).unwrap_or_default();
                (
                    false,
                    "Expired",
                    format!("the CA expired at {end}: nothing is signed; {remedy} (Secret {place}){problem}"),
                )
            }
            Some(problem) => {
                (false, "SecretRefused", format!("{problem}; the CA of before goes on, until {end}"))
            }
            None if until <= now + SOON => {
                (false, "ExpiresSoon", format!("the CA of Secret {place} expires at {end}; {remedy}"))
            }
            None => (true, "Ready", format!("Secret {place} signs until {end}")),
        };
        Finding { ok, reason, message }
    }
}

/// How the CA is doing, and when it ends.
#[derive(Debug, Clone)]
pub struct CaWatch {
    health: watch::Receiver<CaHealth>,
    ca: Signing,
}

impl CaWatch {
    /// Over a source's word and the CA that signs.
    pub fn new(health: watch::Receiver<CaHealth>, ca: Signing) -> Self {
        Self { health, ca }
    }

    /// As a condition, now.
    pub(super) fn finding(&self) -> Finding {
        let until = self.ca.borrow().as_ref().map(|ca| ca.not_after());
        self.health.borrow().finding(until, SystemTime::now())
    }

    /// Waits until any of it changes; for ever where there is none.
    pub(super) async fn changed(this: Option<&mut Self>) {
        let Some(Self { health, ca }) = this else { return std::future::pending().await };
        tokio::select! {
            Ok(()) = health.changed() => {}
            Ok(()) = ca.changed() => {}
            else => std::future::pending().await,
        }
    }
}

/// Follows the MeshConfig, and the Secret that it names.
pub struct CaSource {
    cluster: Cluster,
    domain: TrustDomain,
    health: watch::Sender<CaHealth>,
}

impl CaSource {
    /// Of a mesh whose CA is taken from `place`.
    pub fn new(cluster: &Cluster, place: Place, domain: TrustDomain) -> Self {
        Self { cluster: cluster.clone(), domain, health: watch::Sender::new(CaHealth::of(place)) }
    }

    /// Knows from the beginning why what lies there is not used.
    #[must_use]
    pub fn troubled(self, problem: Option<String>) -> Self {
        self.health.send_modify(|health| health.problem = problem);
        self
    }

    /// How the CA is doing.
    pub fn health(&self) -> watch::Receiver<CaHealth> {
        self.health.subscribe()
    }

    /// Runs until the process drains.
    pub async fn run(self, authority: Arc<Authority>, leadership: Leadership, drain: DrainWatcher) {
        let Some(resource) = resource(Kind::MeshConfig) else { return };
        let api: Api<DynamicObject> = Api::all_with(self.cluster.client.clone(), &resource);
        let mut seen = std::pin::pin!(watch_object(api, "default"));
        loop {
            let place = self.health.borrow().place.clone();
            let secret = CaSecret::new(&self.cluster, place.clone(), self.domain.clone())
                .telling(self.health.clone())
                .run(Arc::clone(&authority), leadership.clone(), drain.clone());
            tokio::select! {
                () = drain.draining() => return,
                () = secret => return,
                next = self.another(seen.as_mut(), &place) => {
                    tracing::info!("the CA is taken from Secret {next} from now on");
                    self.health.send_replace(CaHealth::of(next));
                }
            }
        }
    }

    /// Waits until the MeshConfig names another Secret.
    async fn another(
        &self,
        mut seen: std::pin::Pin<&mut impl Stream<Item = Result<Option<DynamicObject>, watcher::Error>>>,
        now: &Place,
    ) -> Place {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            match seen.next().await {
                Some(Ok(object)) => {
                    backoff.reset();
                    let named = object.and_then(|object| named(&object.data));
                    let place = named.unwrap_or_else(|| Place::own(&self.cluster));
                    if place != *now {
                        return place;
                    }
                }
                // The source tells of what is wrong with the kind.
                Some(Err(_)) => tokio::time::sleep(backoff.next()).await,
                None => std::future::pending().await,
            }
        }
    }
}

/// The Secret that a MeshConfig names.
fn named(object: &Value) -> Option<Place> {
    let reference = object.pointer("/spec/issuer/embedded/secretRef")?;
    let text = |field| reference.get(field).and_then(Value::as_str).map(str::to_owned);
    Some(Place { namespace: text("namespace")?, name: text("name")?, own: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_condition_says_what_to_do() {
        let place = Place { namespace: "pki".into(), name: "mesh".into(), own: false };
        let (now, day) = (SystemTime::now(), Duration::from_secs(86_400));
        let mut health = CaHealth::of(place);
        assert!(health.finding(Some(now + 30 * day), now).ok);
        let soon = health.finding(Some(now + 6 * day), now);
        assert!(!soon.ok && soon.message.contains("put a new certificate into it"), "{soon:?}");
        health.problem = Some("Secret pki/mesh has no tls.key".into());
        let refused = health.finding(Some(now + 30 * day), now);
        assert!(!refused.ok && refused.reason == "SecretRefused", "{refused:?}");
        assert!(
            refused.message.starts_with("Secret pki/mesh has no tls.key; the CA of before goes on"),
            "{refused:?}"
        );
        let none = health.finding(None, now);
        assert!(!none.ok && none.reason == "NoAuthority", "{none:?}");
        assert!(none.message.starts_with("Secret pki/mesh has no tls.key; nothing is signed"), "{none:?}");
        let expired = health.finding(Some(now), now);
        assert!(expired.reason == "Expired" && expired.message.contains("no tls.key"), "{expired:?}");
    }

    #[test]
    fn a_mesh_config_names_a_secret_or_none() {
        let object = serde_json::json!({"spec": {"issuer": {"embedded": {"secretRef": {"namespace": "pki", "name": "mesh"}}}}});
        assert_eq!(named(&object).map(|place| place.to_string()).as_deref(), Some("pki/mesh"));
        assert!(named(&serde_json::json!({"spec": {}})).is_none());
    }
}
