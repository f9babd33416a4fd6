//! Chains that were found good. A peer shows the same one for each of its tunnels until it is renewed, and what its
//! signatures prove does not change; only the time does, which is looked at anew.

use std::collections::HashMap;

use parking_lot::Mutex;
use rustls_pki_types::{CertificateDer, UnixTime};
use weft_core::SpiffeId;
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};

use super::Purpose;
use crate::peer::{Peer, time};

/// Chains that are remembered; with one more all are forgotten.
const MAX_CHAINS: usize = 512;
/// A longer chain is checked each time, bytes.
const MAX_LENGTH: usize = 4096;

/// Chains that led to the roots of one bundle, with whom they are of. Nothing that was refused is in here.
#[derive(Default)]
pub(super) struct KnownChains(Mutex<HashMap<Shown, Known>>);

/// All that the check depends on beside the roots and the time.
#[derive(PartialEq, Eq, Hash)]
pub(super) struct Shown {
    purpose: Purpose,
    chain: Vec<Vec<u8>>,
}

struct Known {
    peer: SpiffeId,
    /// When every certificate of it is valid, seconds since 1970, both inclusive (RFC 5280 section 4.1.2.5).
    from: i64,
    until: i64,
}

impl Shown {
    /// What a peer shows; none where it is too long to be remembered.
    pub(super) fn new(
        purpose: Purpose,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Option<Self> {
        let certificates = || std::iter::once(leaf).chain(intermediates);
        let length: usize = certificates().map(|der| der.len()).sum();
        (length <= MAX_LENGTH)
            .then(|| Self { purpose, chain: certificates().map(|der| der.to_vec()).collect() })
    }

    /// When all of its certificates are valid.
    fn validity(&self) -> Option<(i64, i64)> {
        let mut both = (i64::MIN, i64::MAX);
        for der in &self.chain {
            let (_, certificate) = X509Certificate::from_der(der).ok()?;
            let validity = certificate.validity();
            both.0 = both.0.max(validity.not_before.timestamp());
            both.1 = both.1.min(validity.not_after.timestamp());
        }
        Some(both)
    }
}

impl KnownChains {
    /// Whom a chain is of that was found good before, and is valid at `now`.
    pub(super) fn get(&self, shown: &Shown, now: UnixTime) -> Option<SpiffeId> {
        let now = i64::try_from(now.as_secs()).ok()?;
        let known = self.0.lock();
        let known = known.get(shown)?;
        (known.from <= now && now <= known.until).then(|| known.peer.clone())
    }

    /// Whom a chain is of that was found good before, for whichever purpose.
    pub(super) fn whose(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Option<Peer> {
        let mut shown = Shown::new(Purpose::Client, leaf, intermediates)?;
        let all = self.0.lock();
        let known = Purpose::ALL.into_iter().find_map(|purpose| {
            shown.purpose = purpose;
            all.get(&shown)
        })?;
        Some(Peer { identity: known.peer.clone(), not_after: time(known.until) })
    }

    /// Remembers a chain that was found good.
    pub(super) fn put(&self, shown: Shown, peer: SpiffeId) {
        let Some((from, until)) = shown.validity() else { return };
        let mut known = self.0.lock();
        if known.len() >= MAX_CHAINS {
            known.clear();
        }
        known.insert(shown, Known { peer, from, until });
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.lock().len()
    }
}
