//! The trust bundle in a ConfigMap: agents mount it and verify the operator by it, and a replica that starts learns from
//! it which old roots are still in use.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::time::{MissedTickBehavior, interval, timeout};
use weft_runtime::DrainWatcher;

use super::{BUNDLE, BUNDLE_KEY, Cluster, MANAGER, lease::Leadership};
use crate::authority::{Authority, Bundle};

/// The annotation that says when roots go.
const RETIRE_AT: &str = "weft.mesh/retire-at";
/// How often the ConfigMap is compared with what it should be.
const LOOK: Duration = Duration::from_secs(2);
/// Longest wait for the API server.
const REQUEST: Duration = Duration::from_secs(5);

/// Keeps ConfigMap and authority in step.
pub struct BundleWriter {
    api: Api<ConfigMap>,
}

impl BundleWriter {
    /// In Weft's namespace.
    pub fn new(cluster: &Cluster) -> Self {
        Self { api: Api::namespaced(cluster.client.clone(), &cluster.namespace) }
    }

    /// Takes from the ConfigMap what an earlier process wrote.
    ///
    /// # Errors
    /// When the API server does not answer: a start without the old roots would refuse those who still use them.
    pub async fn adopt(&self, authority: &Authority) -> Result<(), kube::Error> {
        self.read(authority).await.map(drop)
    }

    /// Runs until the process drains; writes while the lease is held.
    pub async fn run(self, authority: Arc<Authority>, mut leadership: Leadership, drain: DrainWatcher) {
        let mut changed = authority.subscribe();
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failing = false;
        loop {
            let held = leadership.held();
            tokio::select! {
                () = drain.draining() => return,
                _ = ticks.tick() => {}
                _ = changed.changed() => {}
                () = leadership.acquired(), if !held => {}
            }
            if authority.tick(SystemTime::now()) {
                tracing::info!("the new root signs from now on; the old one is trusted for another day");
            }
            match timeout(REQUEST, self.step(&authority, &leadership)).await {
                Ok(Ok(())) => failing = false,
                outcome => {
                    if !std::mem::replace(&mut failing, true) {
                        let error = match outcome {
                            Ok(Err(error)) => error.to_string(),
                            _ => format!("no answer in {REQUEST:?}"),
                        };
                        tracing::warn!("ConfigMap {BUNDLE} cannot be kept: {error}");
                    }
                }
            }
        }
    }

    async fn step(&self, authority: &Authority, leadership: &Leadership) -> Result<(), kube::Error> {
        let found = self.read(authority).await?;
        // What others published stays as it is where this process knows of no root that shall stay.
        if authority.ca().is_none() {
            return Ok(());
        }
        let wanted = authority.bundle();
        if found.as_ref() != Some(&wanted) && leadership.held() {
            let annotations = BTreeMap::from([(RETIRE_AT, json!(wanted.retire_at).to_string())]);
            let object = json!({
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {
                    "name": BUNDLE,
                    "annotations": annotations,
                    "labels": {"app.kubernetes.io/part-of": "weft"},
                },
                "data": { BUNDLE_KEY: wanted.pem },
            });
            let params = PatchParams::apply(MANAGER).force();
            self.api.patch(BUNDLE, &params, &Patch::Apply(&object)).await?;
            tracing::info!("ConfigMap {BUNDLE} holds the roots as they are now");
        }
        Ok(())
    }

    async fn read(&self, authority: &Authority) -> Result<Option<Bundle>, kube::Error> {
        let Some(found) = self.api.get_opt(BUNDLE).await? else { return Ok(None) };
        let pem = found.data.and_then(|mut d| d.remove(BUNDLE_KEY)).unwrap_or_default();
        let retire_at = found.metadata.annotations.and_then(|mut a| a.remove(RETIRE_AT));
        let retire_at = retire_at.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
        let bundle = Bundle { pem, retire_at };
        authority.adopt(&bundle, SystemTime::now());
        Ok(Some(bundle))
    }
}
