//! The CA that signs now, and the roots that are trusted: more than one while a root is replaced.
//!
//! A new root is trusted everywhere before anything is signed with it, and an old one until the last certificate that
//! it signed has expired, so that no handshake is refused in between.

use std::{
    collections::BTreeMap,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, gauge::ConstGauge},
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use weft_identity::ca::{EmbeddedCa, MAX_SVID_LIFETIME};
use zeroize::Zeroizing;

/// How long a new root is only trusted before it signs. A ConfigMap reaches the nodes within a kubelet's sync period
/// and its cache's life, a minute each.
pub const PROPAGATION: Duration = Duration::from_secs(150);
/// Most old roots that are kept.
const MAX_RETIRED: usize = 8;

/// Follows the CA that signs now; none until there is a usable one.
pub type Signing = watch::Receiver<Option<Arc<EmbeddedCa>>>;

/// The authority of the mesh.
pub struct Authority {
    propagation: Duration,
    state: Mutex<State>,
    current: watch::Sender<Option<Arc<EmbeddedCa>>>,
}

struct State {
    /// As it was given: its own certificate, and the roots that came with it. Once there is one there always is.
    signer: Option<EmbeddedCa>,
    next: Option<(EmbeddedCa, SystemTime)>,
    /// Roots that have signed, and until when they are trusted.
    retired: Vec<(CertificateDer<'static>, SystemTime)>,
}

/// The metrics of whether there is a CA that signs, and when it expires.
#[derive(Debug)]
pub struct Expiry(pub Signing);

impl Collector for Expiry {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let until = self.0.borrow().as_ref().map(|ca| ca.not_after());
        let help = "1 where a CA signs; 0 without a usable one, or with one that has expired";
        let metric = encoder.encode_descriptor("weft_operator_ca_signs", help, None, MetricType::Gauge)?;
        let signs = until.is_some_and(|until| until > SystemTime::now());
        ConstGauge::new(i64::from(signs)).encode(metric)?;
        let Some(until) = until else { return Ok(()) };
        let until = until.duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = "weft_operator_ca_expiry_timestamp_seconds";
        let metric = encoder.encode_descriptor(name, "When the CA expires", None, MetricType::Gauge)?;
        ConstGauge::new(until.as_secs_f64()).encode(metric)
    }
}

/// The roots in the form in which they are published.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bundle {
    /// All roots, the signing one first.
    pub pem: String,
    /// When a root goes (seconds of Unix time), by the SHA-256 of its certificate in hex. A root without an entry stays.
    pub retire_at: BTreeMap<String, u64>,
}

/// What became of an offered CA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offered {
    /// There was none before: it signs from now on. Nothing could be signed meanwhile, so nothing is won by waiting until
    /// everybody knows it.
    First,
    /// It is the one that signs, or the one that is about to.
    Known,
    /// It is trusted now, and signs after the propagation.
    Staged,
    /// It signs from now on: its roots were trusted before.
    Replaced,
}

impl Authority {
    /// With a CA that signs from now on. `propagation` is [`PROPAGATION`] but in tests.
    pub fn new(ca: EmbeddedCa, propagation: Duration) -> Self {
        Self::with(Some(ca), propagation)
    }

    /// Without a CA: nothing is signed until one is offered.
    pub fn vacant(propagation: Duration) -> Self {
        Self::with(None, propagation)
    }

    fn with(signer: Option<EmbeddedCa>, propagation: Duration) -> Self {
        let state = State { signer, next: None, retired: Vec::new() };
        let current = watch::Sender::new(state.publish().map(Arc::new));
        Self { propagation, state: Mutex::new(state), current }
    }

    /// The CA that signs; its roots are all that are trusted.
    pub fn ca(&self) -> Option<Arc<EmbeddedCa>> {
        self.current.borrow().clone()
    }

    /// Follows [`Self::ca`].
    pub fn subscribe(&self) -> Signing {
        self.current.subscribe()
    }

    /// Takes the CA that shall sign in the future.
    pub fn offer(&self, ca: EmbeddedCa, now: SystemTime) -> Offered {
        let mut state = self.state.lock();
        let state = &mut *state;
        let mut outcome = Offered::Known;
        let Some(signer) = &mut state.signer else {
            // What another process published may hold its root already.
            let own = ca.roots();
            state.retired.retain(|(root, _)| !own.contains(root));
            state.signer = Some(ca);
            self.publish(state);
            return Offered::First;
        };
        let trusted = signer.roots();
        if ca.certificate() == signer.certificate() {
            // The roots beside it may be others. A successor that was taken back has signed nothing here, but perhaps
            // at another replica.
            *signer = ca;
            let taken_back = state.next.take();
            state.retire(taken_back.as_ref().map(|(next, _)| next), now);
        } else if let Some((next, _)) =
            state.next.as_mut().filter(|(next, _)| next.certificate() == ca.certificate())
        {
            *next = ca;
        } else if ca.roots().iter().all(|root| trusted.contains(root)) {
            // Another intermediate below the same root: everybody trusts it already.
            let before = std::mem::replace(signer, ca);
            let taken_back = state.next.take();
            state.retire(taken_back.as_ref().map(|(next, _)| next), now);
            state.retire(Some(&before), now);
            outcome = Offered::Replaced;
        } else {
            let replaced = state.next.replace((ca, now));
            state.retire(replaced.as_ref().map(|(next, _)| next), now);
            outcome = Offered::Staged;
        }
        if state.expired(now) {
            state.advance(self.propagation, now);
        }
        self.publish(state);
        outcome
    }

    /// Takes what an earlier process or another replica published.
    pub fn adopt(&self, bundle: &Bundle, now: SystemTime) {
        let mut state = self.state.lock();
        let trusted = state.roots();
        for root in CertificateDer::pem_slice_iter(bundle.pem.as_bytes()).filter_map(Result::ok) {
            // One that is no root would make the whole bundle useless to those who get it.
            let usable = webpki::anchor_from_trusted_cert(&root).is_ok();
            if !usable || trusted.contains(&root) || state.retired.len() >= MAX_RETIRED {
                continue;
            }
            let until = match bundle.retire_at.get(&fingerprint(&root)) {
                Some(seconds) => UNIX_EPOCH + Duration::from_secs(*seconds),
                None => now + MAX_SVID_LIFETIME,
            };
            if until > now {
                state.retired.push((root, until));
            }
        }
        self.publish(&state);
    }

    /// Lets time do its work: a successor that is known everywhere begins to sign, old roots go. True where the signer
    /// changed.
    pub fn tick(&self, now: SystemTime) -> bool {
        let mut state = self.state.lock();
        let changed = state.advance(self.propagation, now);
        state.retired.retain(|(_, until)| *until > now);
        self.publish(&state);
        changed
    }

    /// What shall be published.
    pub fn bundle(&self) -> Bundle {
        let state = self.state.lock();
        let keep: Vec<_> = state.lasting();
        let retire_at = (state.retired.iter())
            .filter(|(root, _)| !keep.contains(root))
            .map(|(root, until)| {
                let seconds = until.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                (fingerprint(root), seconds)
            })
            .collect();
        Bundle { pem: state.roots().iter().map(|c| pem("CERTIFICATE", c)).collect(), retire_at }
    }

    fn publish(&self, state: &State) {
        let new = state.publish();
        let parts = |ca: &EmbeddedCa| (ca.roots(), ca.certificate().clone());
        self.current.send_if_modified(|current| {
            let changed = current.as_deref().map(parts) != new.as_ref().map(parts);
            if changed {
                *current = new.map(Arc::new);
            }
            changed
        });
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("ca", &self.ca()).finish_non_exhaustive()
    }
}

impl State {
    /// Lets the successor sign once it is known everywhere; true where it does from now on. Beside a signer that has
    /// expired it does so at once: nothing can be signed before, and waiting would only make the outage longer.
    fn advance(&mut self, propagation: Duration, now: SystemTime) -> bool {
        let expired = self.expired(now);
        let due = |(_, since): &(EmbeddedCa, SystemTime)| {
            expired || now.duration_since(*since).is_ok_and(|age| age >= propagation)
        };
        if self.next.as_ref().is_some_and(due)
            && let Some((next, _)) = self.next.take()
        {
            let before = self.signer.replace(next);
            self.retire(before.as_ref(), now);
            return true;
        }
        false
    }

    fn expired(&self, now: SystemTime) -> bool {
        self.signer.as_ref().is_some_and(|signer| signer.not_after() <= now)
    }

    /// Roots that stay for now, the signing one first.
    fn lasting(&self) -> Vec<CertificateDer<'static>> {
        let next = self.next.iter().flat_map(|(next, _)| next.roots());
        unique(self.signer.iter().flat_map(EmbeddedCa::roots).chain(next))
    }

    fn roots(&self) -> Vec<CertificateDer<'static>> {
        unique(self.lasting().into_iter().chain(self.retired.iter().map(|(root, _)| root.clone())))
    }

    fn retire(&mut self, ca: Option<&EmbeddedCa>, now: SystemTime) {
        // All of its roots: with those beside the signing one others may have signed.
        for root in ca.into_iter().flat_map(EmbeddedCa::roots) {
            if !self.retired.iter().any(|(r, _)| *r == root) {
                self.retired.push((root, now + MAX_SVID_LIFETIME));
            }
        }
        let excess = self.retired.len().saturating_sub(MAX_RETIRED);
        self.retired.drain(..excess);
    }

    /// The signer together with all roots.
    fn publish(&self) -> Option<EmbeddedCa> {
        self.signer.as_ref().map(|signer| signer.with_roots(self.roots()))
    }
}

fn unique(roots: impl Iterator<Item = CertificateDer<'static>>) -> Vec<CertificateDer<'static>> {
    let mut all: Vec<CertificateDer<'static>> = Vec::new();
    for root in roots {
        if !all.contains(&root) {
            all.push(root);
        }
    }
    all
}

/// A certificate's SHA-256 in hex.
fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    Sha256::digest(certificate).iter().map(|b| format!("{b:02x}")).collect()
}

/// PEM (RFC 7468) of some DER.
pub(crate) fn pem(label: &str, der: &[u8]) -> String {
    let encoded = Zeroizing::new(STANDARD.encode(der));
    let mut text = String::with_capacity(encoded.len() + encoded.len() / 64 + 2 * label.len() + 40);
    text.push_str(&format!("-----BEGIN {label}-----\n"));
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        let (line, next) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = next;
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}

#[cfg(test)]
mod tests {
    use weft_core::TrustDomain;

    use super::*;

    fn ca() -> EmbeddedCa {
        EmbeddedCa::generate(TrustDomain::new("cluster.local").unwrap()).unwrap()
    }

    fn own(ca: &EmbeddedCa) -> CertificateDer<'static> {
        ca.certificate().clone()
    }

    fn signer(authority: &Authority) -> Arc<EmbeddedCa> {
        authority.ca().unwrap()
    }

    fn copy(ca: &EmbeddedCa) -> EmbeddedCa {
        EmbeddedCa::from_pem(&ca.to_pem(), ca.trust_domain().clone()).unwrap()
    }

    #[test]
    fn a_new_root_is_trusted_first_and_the_old_one_lasts() {
        let (old, new, wait) = (ca(), ca(), Duration::from_secs(100));
        let (first, second) = (own(&old), own(&new));
        let authority = Authority::new(copy(&old), wait);
        let start = SystemTime::now();
        assert_eq!(authority.offer(copy(&old), start), Offered::Known);
        assert_eq!(authority.offer(copy(&new), start), Offered::Staged);
        assert_eq!(authority.offer(copy(&new), start), Offered::Known);
        assert_eq!(signer(&authority).roots(), [first.clone(), second.clone()]);
        assert!(authority.bundle().retire_at.is_empty());

        assert!(!authority.tick(start + wait / 2));
        assert!(authority.tick(start + wait));
        assert_eq!(signer(&authority).roots(), [second.clone(), first.clone()]);
        let until = start + wait + MAX_SVID_LIFETIME;
        assert_eq!(authority.bundle().retire_at.len(), 1);
        assert!(!authority.tick(until - Duration::from_secs(1)));
        assert_eq!(signer(&authority).roots().len(), 2);
        authority.tick(until);
        assert_eq!(signer(&authority).roots(), [second]);
    }

    #[test]
    fn the_successor_of_an_expired_root_signs_at_once() {
        let (old, new) = (ca(), ca());
        let authority = Authority::new(copy(&old), PROPAGATION);
        let late = old.not_after();
        authority.offer(copy(&new), late - Duration::from_secs(1));
        assert_eq!(own(&signer(&authority)), own(&old));
        assert!(authority.tick(late));
        assert_eq!(own(&signer(&authority)), own(&new));
        let authority = Authority::new(copy(&old), PROPAGATION);
        assert_eq!(authority.offer(copy(&new), late), Offered::Staged);
        assert_eq!(signer(&authority).roots(), [own(&new), own(&old)]);
    }

    #[test]
    fn a_process_that_starts_after_the_change_still_trusts_the_old_root() {
        let (old, new) = (ca(), ca());
        let before = Authority::new(copy(&old), PROPAGATION).bundle();
        let authority = Authority::new(copy(&new), PROPAGATION);
        let now = SystemTime::now();
        authority.adopt(&before, now);
        assert_eq!(signer(&authority).roots(), [own(&new), own(&old)]);
        // What it publishes says when the old root goes, and a third process keeps to that.
        let third = Authority::new(copy(&new), PROPAGATION);
        let later = now + MAX_SVID_LIFETIME / 2;
        third.adopt(&authority.bundle(), later);
        third.tick(now + MAX_SVID_LIFETIME + Duration::from_secs(1));
        assert_eq!(signer(&third).roots().len(), 1);
    }

    #[test]
    fn a_change_that_is_taken_back_changes_no_signer() {
        let (old, new) = (ca(), ca());
        let authority = Authority::new(copy(&old), PROPAGATION);
        let now = SystemTime::now();
        authority.offer(copy(&new), now);
        authority.offer(copy(&old), now);
        assert!(!authority.tick(now + PROPAGATION));
        assert_eq!(signer(&authority).roots(), [own(&old), own(&new)]);
    }

    #[test]
    fn without_a_ca_the_first_that_comes_signs() {
        let (old, new) = (ca(), ca());
        let published = Authority::new(copy(&old), PROPAGATION).bundle();
        let now = SystemTime::now();
        for (offered, roots) in [(&old, vec![own(&old)]), (&new, vec![own(&new), own(&old)])] {
            let authority = Authority::vacant(PROPAGATION);
            authority.adopt(&published, now);
            authority.tick(now);
            assert!(authority.ca().is_none());
            assert_eq!(authority.offer(copy(offered), now), Offered::First);
            assert_eq!(signer(&authority).roots(), roots);
            assert_eq!(authority.offer(copy(offered), now), Offered::Known);
        }
    }
}
