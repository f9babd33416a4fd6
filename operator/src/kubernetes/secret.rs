//! The CA in a Secret of cert-manager's form: `tls.crt`, `tls.key`, `ca.crt`.
//!
//! Where there is none, the first replica makes it; of two that do so together, the API server takes one. A Secret that
//! changes rotates the CA.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use futures_util::StreamExt;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{
    Api,
    api::{ObjectMeta, PostParams},
    runtime::watcher,
};
use rustls_pki_types::{PrivatePkcs8KeyDer, PrivateSec1KeyDer, pem::PemObject};
use tokio::sync::watch;
use weft_core::TrustDomain;
use weft_identity::ca::{CaError, EmbeddedCa};
use weft_runtime::{Backoff, DrainWatcher};
use zeroize::Zeroizing;

use super::{CA_SECRET, Cluster, ca::CaHealth, is_conflict, lease::Leadership};
use crate::authority::{Authority, Offered, pem};

/// The remedy where the API server refuses.
const NEEDS: &str = "the operator needs get, list and watch on it, and update and create on its own (docs/rbac.md has the Role)";

/// Why there is no CA.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The API server refuses or does not answer.
    #[error("Secret {place}: {}; {NEEDS}", super::reason(error))]
    Api {
        /// Which Secret.
        place: Place,
        /// Why.
        error: Box<kube::Error>,
    },
    /// It is not there, and it is not Weft's to make.
    #[error(
        "Secret {0} does not exist; create it with tls.crt, tls.key and ca.crt, or take spec.issuer.embedded.secretRef out of \
         the MeshConfig"
    )]
    Missing(Place),
    /// A part is missing.
    #[error("Secret {place} has no {key}; it must hold tls.crt and tls.key, and may hold ca.crt")]
    Part {
        /// Which Secret.
        place: Place,
        /// Which key.
        key: &'static str,
    },
    /// The contents make no CA.
    #[error("Secret {place}, {key}: {error}")]
    Ca {
        /// Which Secret.
        place: Place,
        /// Which key of it is to be mended.
        key: &'static str,
        /// Why.
        error: CaError,
    },
}

/// Which Secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Whether Weft makes it where it is missing.
    pub own: bool,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Place {
    /// Weft's own.
    pub fn own(cluster: &Cluster) -> Self {
        Self { namespace: cluster.namespace.clone(), name: CA_SECRET.into(), own: true }
    }
}

/// The CA in its Secret.
pub struct CaSecret {
    api: Api<Secret>,
    place: Place,
    domain: TrustDomain,
    health: watch::Sender<CaHealth>,
}

impl CaSecret {
    /// Of a mesh; nothing is read yet.
    pub fn new(cluster: &Cluster, place: Place, domain: TrustDomain) -> Self {
        let health = watch::Sender::new(CaHealth::of(place.clone()));
        Self { api: Api::namespaced(cluster.client.clone(), &place.namespace), place, domain, health }
    }

    /// Tells there how it goes.
    #[must_use]
    pub fn telling(self, health: watch::Sender<CaHealth>) -> Self {
        Self { health, ..self }
    }

    /// Reads the CA, or makes it.
    ///
    /// # Errors
    /// When the Secret cannot be had or used.
    pub async fn open(&self) -> Result<EmbeddedCa, SecretError> {
        let failed = |error| SecretError::Api { place: self.place.clone(), error: Box::new(error) };
        if let Some(secret) = self.api.get_opt(&self.place.name).await.map_err(failed)? {
            return self.read(&secret);
        }
        if !self.place.own {
            return Err(SecretError::Missing(self.place.clone()));
        }
        let (ca, secret) = self.make()?;
        match self.api.create(&PostParams::default(), &secret).await {
            Ok(_) => {
                tracing::info!("a new CA is made and kept in Secret {}", self.place);
                Ok(ca)
            }
            // Another replica was first; its root is the mesh's.
            Err(error) if is_conflict(&error) => {
                let secret = self.api.get(&self.place.name).await.map_err(failed)?;
                self.read(&secret)
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Follows the Secret until the process drains: a changed one rotates the CA, one that is deleted is made anew.
    pub async fn run(self, authority: Arc<Authority>, leadership: Leadership, drain: DrainWatcher) {
        let mut seen = std::pin::pin!(watcher::watch_object(self.api.clone(), &self.place.name));
        let mut backoff =
            Backoff::new(std::time::Duration::from_millis(200), std::time::Duration::from_secs(10));
        let mut failing = false;
        loop {
            let next = tokio::select! {
                () = drain.draining() => return,
                next = seen.next() => next,
            };
            match next {
                None => return,
                Some(Ok(secret)) => {
                    backoff.reset();
                    failing = false;
                    self.take(secret, &authority, &leadership).await;
                }
                Some(Err(error)) => {
                    if !std::mem::replace(&mut failing, true) {
                        let why = super::watch_reason(&error);
                        self.tell(Some(format!("Secret {}: {why}; {NEEDS}", self.place)));
                    }
                    tokio::select! {
                        () = drain.draining() => return,
                        () = tokio::time::sleep(backoff.next()) => {}
                    }
                }
            }
        }
    }

    async fn take(&self, secret: Option<Secret>, authority: &Authority, leadership: &Leadership) {
        let Some(secret) = secret else {
            if !self.place.own {
                self.tell(Some(SecretError::Missing(self.place.clone()).to_string()));
                return;
            }
            if !leadership.held() {
                tracing::warn!("Secret {} is gone; the CA in memory goes on", self.place);
                return;
            }
            tracing::warn!("Secret {} is gone; a new root is made and takes over with overlap", self.place);
            if let Err(error) = self.open().await {
                self.tell(Some(error.to_string()));
            }
            // The watch brings it.
            return;
        };
        match self.read(&secret).map(|ca| authority.offer(ca, SystemTime::now())) {
            Ok(Offered::Known) => {}
            Ok(Offered::First) => tracing::info!("Secret {} holds a CA that signs from now on", self.place),
            Ok(Offered::Replaced) => tracing::info!(
                "Secret {} holds a new signing certificate below a root that is trusted: it signs from now on",
                self.place
            ),
            Ok(Offered::Staged) => tracing::info!(
                "Secret {} holds a new root: it is trusted from now on and signs once every node knows it",
                self.place
            ),
            Err(error) => return self.tell(Some(error.to_string())),
        }
        self.tell(None);
    }

    fn tell(&self, problem: Option<String>) {
        if let Some(problem) = &problem {
            tracing::error!("the CA's Secret is not used: {problem}");
        }
        self.health.send_if_modified(|health| {
            let changed = health.problem != problem;
            health.problem = problem;
            changed
        });
    }

    fn make(&self) -> Result<(EmbeddedCa, Secret), SecretError> {
        let failed = |error| SecretError::Ca { place: self.place.clone(), key: "tls.key", error };
        let ca = EmbeddedCa::generate(self.domain.clone()).map_err(failed)?;
        let whole = ca.to_pem();
        let key = whole.split("-----BEGIN CERTIFICATE-----").next().unwrap_or_default();
        let roots = ca.roots_pem();
        let data = BTreeMap::from([
            ("tls.key".to_owned(), ByteString(key.as_bytes().to_vec())),
            ("tls.crt".to_owned(), ByteString(roots.clone().into_bytes())),
            ("ca.crt".to_owned(), ByteString(roots.into_bytes())),
        ]);
        let metadata = ObjectMeta {
            name: Some(self.place.name.clone()),
            namespace: Some(self.place.namespace.clone()),
            labels: Some(BTreeMap::from([("app.kubernetes.io/part-of".to_owned(), "weft".to_owned())])),
            ..ObjectMeta::default()
        };
        let secret = Secret {
            metadata,
            data: Some(data),
            type_: Some("kubernetes.io/tls".into()),
            ..Secret::default()
        };
        Ok((ca, secret))
    }

    fn read(&self, secret: &Secret) -> Result<EmbeddedCa, SecretError> {
        let empty = BTreeMap::new();
        let data = secret.data.as_ref().unwrap_or(&empty);
        let part = |key: &'static str| {
            let found = data.get(key).map(|b| b.0.as_slice()).filter(|b| !b.is_empty());
            found.ok_or_else(|| SecretError::Part { place: self.place.clone(), key })
        };
        let failed = |key, error| SecretError::Ca { place: self.place.clone(), key, error };
        let text = |bytes: &[u8], key: &'static str| {
            let found = std::str::from_utf8(bytes).map(str::to_owned);
            found.map_err(|_| SecretError::Part { place: self.place.clone(), key })
        };
        let key = pkcs8(part("tls.key")?).map_err(|error| failed("tls.key", error))?;
        let chain = text(part("tls.crt")?, "tls.crt")?;
        let roots = text(data.get("ca.crt").map(|b| b.0.as_slice()).unwrap_or_default(), "ca.crt")?;
        EmbeddedCa::from_parts(&key, &chain, &roots, self.domain.clone()).map_err(|error| {
            let key = if matches!(error, CaError::Chain(_)) { "ca.crt" } else { "tls.crt" };
            failed(key, error)
        })
    }
}

/// The key as PKCS#8, which cert-manager writes only when asked to.
fn pkcs8(key: &[u8]) -> Result<Zeroizing<String>, CaError> {
    if let Ok(key) = PrivatePkcs8KeyDer::from_pem_slice(key) {
        return Ok(Zeroizing::new(pem("PRIVATE KEY", key.secret_pkcs8_der())));
    }
    let foreign = CaError::Pem("the key is not ECDSA P-256");
    let Ok(key) = PrivateSec1KeyDer::from_pem_slice(key) else { return Err(foreign) };
    let pair = EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_ASN1_SIGNING, key.secret_sec1_der());
    let der = pair.map_err(|_| foreign)?.to_pkcs8v1();
    let der = der.map_err(|_| CaError::Pem("the key cannot be written as PKCS#8"))?;
    Ok(Zeroizing::new(pem("PRIVATE KEY", der.as_ref())))
}
