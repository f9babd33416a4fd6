//! What is asked of the SPIRE agent, and what its answers hold.

use std::{collections::BTreeMap, sync::Arc};

use rustls_pki_types::CertificateDer;
use spiffe::{TrustDomain, X509Bundle, X509Svid};
use spire_api::{
    pb::spire::api::{
        agent::delegatedidentity::v1::{
            SubscribeToX509BundlesResponse, SubscribeToX509sviDsResponse, X509svidWithKey,
        },
        types,
    },
    selectors::{K8s, Selector},
};
use weft_core::SpiffeId;
use zeroize::Zeroizing;

use super::SpireError;
use crate::SvidKey;

/// Most certificates in a chain.
const MAX_CHAIN: usize = 8;
/// Most roots of one trust domain.
const MAX_ROOTS: usize = 32;
/// Most trust domains.
const MAX_DOMAINS: usize = 64;
/// Most identities of one answer that are looked at.
const MAX_IDENTITIES: usize = 64;

/// What SPIRE is asked by: an entry answers when all of its selectors are among these. `None` for an id that is neither
/// a service account's nor a node's.
pub(super) fn selectors<'a>(
    id: &SpiffeId,
    pods: impl Iterator<Item = &'a Arc<str>>,
) -> Option<Vec<types::Selector>> {
    let mut selectors = match (id.as_service_account(), id.as_node()) {
        (Some((namespace, account)), _) => vec![
            Selector::K8s(K8s::Namespace(namespace.to_owned())),
            Selector::K8s(K8s::ServiceAccount(account.to_owned())),
        ],
        (None, Some(node)) => vec![Selector::Generic(("weft".to_owned(), format!("node:{node}")))],
        (None, None) => return None,
    };
    // What spire-controller-manager selects by.
    selectors.extend(pods.map(|uid| Selector::Generic(("k8s".to_owned(), format!("pod-uid:{uid}")))));
    Some(selectors.into_iter().map(Into::into).collect())
}

/// The selectors of an entry for `id`, as `spire-server entry create` takes them.
fn arguments(id: &SpiffeId) -> String {
    let selectors = selectors(id, std::iter::empty()).unwrap_or_default();
    selectors.iter().map(|s| format!(" -selector {}:{}", s.r#type, s.value)).collect()
}

/// Key and chain of the identity that is exactly `id`; of several, the one that lasts longest.
pub(super) fn pick(
    id: &SpiffeId,
    answer: &SubscribeToX509sviDsResponse,
) -> Result<(SvidKey, Vec<CertificateDer<'static>>), SpireError> {
    let name = |svid: &X509svidWithKey| {
        let id = svid.x509_svid.as_ref()?.id.as_ref()?;
        Some(format!("spiffe://{}{}", id.trust_domain, id.path))
    };
    let all = answer.x509_svids.get(..MAX_IDENTITIES).unwrap_or(&answer.x509_svids);
    let ours = all.iter().filter(|svid| name(svid).as_deref() == Some(id.as_str()));
    let expiry = |svid: &&X509svidWithKey| svid.x509_svid.as_ref().map(|svid| svid.expires_at);
    let Some(svid) = ours.max_by_key(expiry) else {
        let found: Vec<String> =
            all.iter().filter_map(name).take(3).map(|name| name.chars().take(200).collect()).collect();
        return Err(if found.is_empty() {
            SpireError::NoEntry { id: id.clone(), selectors: arguments(id) }
        } else {
            SpireError::OtherId { id: id.clone(), found: found.join(", ") }
        });
    };
    let chain = svid.x509_svid.as_ref().map(|svid| svid.cert_chain.as_slice()).unwrap_or_default();
    if chain.len() > MAX_CHAIN {
        return Err(SpireError::Malformed(format!("a chain of {} certificates", chain.len())));
    }
    let parsed = X509Svid::parse_from_der(&chain.concat(), &svid.x509_svid_key)
        .map_err(|error| SpireError::Malformed(format!("the SVID of {id}: {error}")))?;
    if parsed.spiffe_id().to_string() != id.as_str() {
        let found = parsed.spiffe_id().to_string();
        return Err(SpireError::OtherId { id: id.clone(), found });
    }
    let key = SvidKey::from_pkcs8(Zeroizing::new(parsed.private_key().as_bytes().to_vec()));
    let chain = parsed.cert_chain().iter().map(|c| CertificateDer::from(c.as_bytes().to_vec())).collect();
    Ok((key, chain))
}

/// The roots by trust domain. SPIRE's agents write its SPIFFE id, the API's documentation its bare name.
pub(super) fn roots(
    answer: SubscribeToX509BundlesResponse,
) -> Result<BTreeMap<String, Vec<CertificateDer<'static>>>, SpireError> {
    let mut all = BTreeMap::new();
    for (name, der) in answer.ca_certificates {
        let cut: String = name.chars().take(255).collect();
        let failed = |why: String| SpireError::Malformed(format!("the roots of {cut:?}: {why}"));
        let bare = name.strip_prefix("spiffe://").unwrap_or(&name);
        let domain = TrustDomain::new(bare).map_err(|error| failed(error.to_string()))?;
        let bundle =
            X509Bundle::parse_from_der(domain.clone(), &der).map_err(|error| failed(error.to_string()))?;
        let roots: Vec<_> =
            bundle.authorities().iter().map(|c| CertificateDer::from(c.as_bytes().to_vec())).collect();
        if roots.len() > MAX_ROOTS {
            return Err(failed(format!("there are {}", roots.len())));
        }
        if all.len() >= MAX_DOMAINS {
            return Err(SpireError::Malformed(format!("it trusts more than {MAX_DOMAINS} trust domains")));
        }
        all.insert(domain.to_string(), roots);
    }
    Ok(all)
}
