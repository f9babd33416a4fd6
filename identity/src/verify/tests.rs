use std::time::Duration;

use super::*;
use crate::testing::{ca, credentials, domain, id, leaf};

const WEB: &str = "spiffe://mesh.test/ns/shop/sa/web";

fn bundle(ca: &crate::ca::EmbeddedCa) -> TrustBundle {
    TrustBundle::new(domain(), &ca.roots(), crate::tls::provider()).unwrap()
}

fn signed(ca: &crate::ca::EmbeddedCa, params: &rcgen::CertificateParams) -> CertificateDer<'static> {
    params.signed_by(&rcgen::KeyPair::generate().unwrap(), ca.signer()).unwrap().der().clone()
}

fn expired(error: &Error) -> bool {
    matches!(error, Error::InvalidCertificate(CertificateError::ExpiredContext { .. }))
}

#[test]
fn a_chain_that_is_known_ends_with_its_certificates() {
    let ca = ca();
    let (bundle, web) = (bundle(&ca), credentials(&ca, &id("web")));
    let leaf = &web.chain()[0];
    let since_1970 = |time: std::time::SystemTime| time.duration_since(std::time::UNIX_EPOCH).unwrap();
    let end = since_1970(web.not_after());
    let at = |time| bundle.verify(leaf, &[], UnixTime::since_unix_epoch(time), Purpose::Server);
    for _ in 0..2 {
        assert_eq!(at(end).unwrap(), id("web"), "the last second counts");
        assert!(expired(&at(end + Duration::from_secs(1)).unwrap_err()));
    }
    assert_eq!(bundle.known.len(), 1);
    let early = at(Duration::from_secs(1)).unwrap_err();
    assert!(
        matches!(early, Error::InvalidCertificate(CertificateError::NotValidYetContext { .. })),
        "{early}"
    );
}

#[test]
fn only_the_very_chain_and_purpose_is_known() {
    let ca = ca();
    let bundle = bundle(&ca);
    let mut params = leaf(&[WEB]);
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let server_only = signed(&ca, &params);
    let verify = |leaf: &CertificateDer<'_>, purpose| bundle.verify(leaf, &[], UnixTime::now(), purpose);
    assert_eq!(verify(&server_only, Purpose::Server).unwrap(), id("web"));
    assert!(verify(&server_only, Purpose::Client).is_err());
    // One bit of the signature is another.
    let mut spoiled = server_only.to_vec();
    *spoiled.last_mut().unwrap() ^= 1;
    assert!(verify(&spoiled.into(), Purpose::Server).is_err());
    // What was refused is checked, and refused, again.
    assert!(verify(&server_only, Purpose::Client).is_err());
    assert_eq!(bundle.known.len(), 1);
    // Other roots know nothing of it.
    let other = self::bundle(&crate::testing::ca());
    assert!(other.verify(&server_only, &[], UnixTime::now(), Purpose::Server).is_err());
}

#[test]
fn chains_are_remembered_up_to_a_number_and_a_length() {
    let ca = ca();
    let bundle = bundle(&ca);
    let web = credentials(&ca, &id("web"));
    let now = UnixTime::now();
    // Intermediates that nobody needs make another chain of it.
    let padding: CertificateDer<'static> = vec![0; 4096].into();
    assert!(bundle.verify(&web.chain()[0], &[padding], now, Purpose::Server).is_ok());
    assert_eq!(bundle.known.len(), 0, "it is too long");
    let shown =
        |n: u32| Shown::new(Purpose::Server, &web.chain()[0], &vec![web.chain()[0].clone(); n as usize]);
    bundle.known.put(shown(0).unwrap(), id("web"));
    assert_eq!(bundle.known.get(&shown(0).unwrap(), now), Some(id("web")));
    assert_eq!(bundle.known.get(&shown(1).unwrap(), now), None);
    for _ in 0..600 {
        let leaf = signed(&ca, &leaf(&[WEB]));
        bundle.known.put(Shown::new(Purpose::Server, &leaf, &[]).unwrap(), id("web"));
    }
    assert!(bundle.known.len() <= 512);
}

#[test]
fn whom_an_accepted_chain_is_of_is_remembered() {
    let ca = ca();
    let (bundle, web) = (bundle(&ca), credentials(&ca, &id("web")));
    let of_web = Peer { identity: id("web"), not_after: web.not_after() };
    // Not remembered yet, so read.
    assert_eq!(bundle.known.whose(&web.chain()[0], &web.chain()[1..]), None);
    assert_eq!(bundle.peer(web.chain()), Ok(of_web.clone()));
    for purpose in Purpose::ALL {
        let bundle = self::bundle(&ca);
        bundle.verify(&web.chain()[0], &web.chain()[1..], UnixTime::now(), purpose).unwrap();
        assert_eq!(bundle.known.whose(&web.chain()[0], &web.chain()[1..]), Some(of_web.clone()));
        assert_eq!(bundle.peer(web.chain()), Ok(of_web.clone()));
    }
    assert_eq!(bundle.peer(&[]), Err(PeerError::NoCertificate));
    let mut spoiled = web.chain()[0].to_vec();
    spoiled.truncate(40);
    assert_eq!(bundle.peer(&[spoiled.into()]), Err(PeerError::Malformed));
}

#[test]
fn a_chain_ends_with_the_first_of_its_certificates() {
    use crate::{Credentials, Signed, SvidKey, testing::HOUR};

    let ca = ca();
    let (now, key) = (std::time::SystemTime::now(), SvidKey::generate().unwrap());
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    params.not_after = (now + HOUR).into();
    let signer = rcgen::KeyPair::generate().unwrap();
    let between = params.signed_by(&signer, ca.signer()).unwrap().der().clone();
    let mut params = leaf(&[WEB]);
    params.not_after = (now + HOUR * 2).into();
    let pair = rcgen::KeyPair::try_from(key.pkcs8()).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_der(&between, signer).unwrap();
    let chain = vec![params.signed_by(&pair, &issuer).unwrap().der().clone(), between];
    let ours =
        Credentials::new(&id("web"), key, Signed { chain: chain.clone(), roots: ca.roots() }, now).unwrap();
    assert!(ours.not_after() <= now + HOUR, "{:?}", ours.not_after());
    // What its peers find, whether they remember it or read it anew, is the same.
    assert_eq!(bundle(&ca).peer(&chain).unwrap().not_after, ours.not_after());
    let peer = bundle(&ca);
    peer.verify(&chain[0], &chain[1..], UnixTime::now(), Purpose::Server).unwrap();
    assert_eq!(peer.peer(&chain).unwrap().not_after, ours.not_after());
}
