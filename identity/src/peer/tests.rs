use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose, SanType};

use super::*;
use crate::testing::leaf;

const WEB: &str = "spiffe://mesh.test/ns/shop/sa/web";

fn certificate(params: &CertificateParams) -> CertificateDer<'static> {
    params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
}

fn of(params: &CertificateParams) -> Result<SpiffeId, PeerError> {
    peer_identity(&[certificate(params)])
}

#[test]
fn one_uri_is_the_identity() {
    assert_eq!(of(&leaf(&[WEB])).unwrap().as_str(), WEB);
}

#[test]
fn only_the_leaf_counts() {
    let other = certificate(&leaf(&["spiffe://mesh.test/ns/shop/sa/admin"]));
    assert_eq!(peer_identity(&[certificate(&leaf(&[WEB])), other]).unwrap().as_str(), WEB);
}

#[test]
fn names_of_other_kinds_are_allowed_beside_it() {
    let mut params = leaf(&[WEB]);
    params.subject_alt_names.insert(0, SanType::DnsName("web.shop".try_into().unwrap()));
    assert_eq!(of(&params).unwrap().as_str(), WEB);
}

#[test]
fn no_certificate_no_uri_many_uris() {
    assert_eq!(peer_identity(&[]), Err(PeerError::NoCertificate));
    assert_eq!(of(&leaf(&[])), Err(PeerError::NoUri));
    let mut dns = leaf(&[]);
    dns.subject_alt_names = vec![SanType::DnsName("web.shop".try_into().unwrap())];
    assert_eq!(of(&dns), Err(PeerError::NoUri));
    assert_eq!(of(&leaf(&[WEB, "https://example.org"])), Err(PeerError::ManyUris(2)));
    assert_eq!(of(&leaf(&[WEB, WEB, WEB])), Err(PeerError::ManyUris(3)));
}

#[test]
fn a_uri_that_is_no_spiffe_id_is_refused() {
    for uri in [
        "https://mesh.test/ns/shop/sa/web",
        "SPIFFE://mesh.test/ns/shop/sa/web",
        "spiffe://Mesh.test/ns/shop/sa/web",
        "spiffe://mesh.test",
        "spiffe://mesh.test/",
        "spiffe://mesh.test/ns/shop/sa/../sa/admin",
        "spiffe://mesh.test/ns/shop/sa/web/",
        "spiffe://mesh.test/ns/shop/sa/web?as=admin",
        "spiffe://mesh.test/ns/shop/sa/web#admin",
        "spiffe://mesh.test/ns/shop/sa/%77eb",
        "spiffe://root@mesh.test/ns/shop/sa/web",
        "spiffe://mesh.test:443/ns/shop/sa/web",
    ] {
        assert!(matches!(of(&leaf(&[uri])), Err(PeerError::Invalid(_))), "{uri} was accepted");
    }
}

#[test]
fn an_authority_is_no_workload() {
    let mut ca = leaf(&[WEB]);
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    assert_eq!(of(&ca), Err(PeerError::Authority));
    for usage in [KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign] {
        let mut signer = leaf(&[WEB]);
        signer.key_usages.push(usage);
        assert_eq!(of(&signer), Err(PeerError::Authority));
    }
}

#[test]
fn the_key_must_be_for_signatures() {
    let mut none = leaf(&[WEB]);
    none.key_usages.clear();
    assert_eq!(of(&none), Err(PeerError::NoSignature));
    let mut other = leaf(&[WEB]);
    other.key_usages = vec![KeyUsagePurpose::KeyEncipherment];
    assert_eq!(of(&other), Err(PeerError::NoSignature));
}

#[test]
fn hostile_bytes_are_refused_without_a_panic() {
    let good = certificate(&leaf(&[WEB]));
    let mut longer = good.to_vec();
    longer.push(0);
    assert_eq!(peer_identity(&[longer.into()]), Err(PeerError::Malformed));
    for length in 0..good.len() {
        assert_eq!(peer_identity(&[good[..length].to_vec().into()]), Err(PeerError::Malformed));
    }
    for place in 0..good.len() {
        for bit in [0x01, 0x80] {
            let mut spoiled = good.to_vec();
            spoiled[place] ^= bit;
            // Any answer will do: what is not covered by the signature check here, the chain check refuses.
            let _ = peer_identity(&[spoiled.into()]);
        }
    }
}
