use std::{
    fs::{Permissions, metadata, read_dir, set_permissions},
    os::unix::fs::PermissionsExt,
    thread,
};

use rcgen::PKCS_ECDSA_P384_SHA384;
use rustls_pki_types::{PrivatePkcs8KeyDer, pem::PemObject};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName};

use super::*;
use crate::{
    SvidKey,
    testing::{HOUR, ca, domain, id},
};

fn request_for(id: &SpiffeId) -> Vec<u8> {
    SvidKey::generate().unwrap().request(id).unwrap()
}

fn seconds(time: SystemTime) -> i64 {
    i64::try_from(time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()).unwrap()
}

#[test]
fn an_svid_is_as_the_specification_says() {
    let ca = ca();
    let before = seconds(SystemTime::now());
    let signed = ca.sign(&id("web"), &request_for(&id("web")), HOUR).unwrap();
    let after = seconds(SystemTime::now());
    assert_eq!((signed.chain.len(), &signed.roots), (1, &ca.roots()));
    let (_, leaf) = X509Certificate::from_der(&signed.chain[0]).unwrap();
    let san = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(san.critical);
    assert!(
        matches!(&san.value.general_names[..], [GeneralName::URI("spiffe://mesh.test/ns/shop/sa/web")]),
        "{san:?}"
    );
    assert_eq!(leaf.subject().iter().count(), 0);
    let usage = leaf.key_usage().unwrap().unwrap();
    assert!(usage.critical);
    assert_eq!(usage.value.flags, 1, "digitalSignature and nothing else");
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth && !extended.any && extended.other.is_empty());
    assert!(!leaf.basic_constraints().unwrap().unwrap().value.ca);
    let (from, to) = (leaf.validity().not_before.timestamp(), leaf.validity().not_after.timestamp());
    assert!((before - 60..=after - 60).contains(&from), "not back-dated by a minute");
    assert!((before + 3600..=after + 3600).contains(&to));
    let (_, root) = X509Certificate::from_der(&signed.roots[0]).unwrap();
    leaf.verify_signature(Some(root.public_key())).unwrap();
    root.verify_signature(None).unwrap();
    assert_eq!(leaf.issuer(), root.subject());
    assert!(root.basic_constraints().unwrap().unwrap().value.ca);
    let years = (root.validity().not_after.timestamp() - after) / (365 * 24 * 3600 - 120);
    assert_eq!(years, 10);
}

#[test]
fn serial_numbers_differ() {
    let (ca, request) = (ca(), request_for(&id("web")));
    let mut serials = std::collections::HashSet::new();
    for _ in 0..50 {
        let signed = ca.sign(&id("web"), &request, HOUR).unwrap();
        let (_, leaf) = X509Certificate::from_der(&signed.chain[0]).unwrap();
        assert!(leaf.raw_serial().len() == 16 && leaf.raw_serial()[0] & 0x80 == 0);
        assert!(serials.insert(leaf.raw_serial().to_vec()));
    }
}

#[test]
fn only_the_key_of_a_request_is_used() {
    let ca = ca();
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = CertificateParams::new(vec!["admin.shop".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "admin");
    params.subject_alt_names.push(uri("spiffe://mesh.test/ns/shop/sa/admin").unwrap());
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let csr = params.serialize_request(&key).unwrap();
    match ca.sign(&id("web"), csr.der(), HOUR) {
        Ok(signed) => {
            assert_eq!(crate::peer_identity(&signed.chain).unwrap(), id("web"));
            let (_, leaf) = X509Certificate::from_der(&signed.chain[0]).unwrap();
            assert_eq!(leaf.subject().iter().count(), 0);
            assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn the_lifetime_is_capped() {
    let ca = ca();
    let end = |lifetime| {
        let signed = ca.sign(&id("web"), &request_for(&id("web")), lifetime).unwrap();
        let (_, leaf) = X509Certificate::from_der(&signed.chain[0]).unwrap();
        leaf.validity().not_after.timestamp()
    };
    assert!(end(Duration::from_secs(u64::from(u32::MAX))) <= seconds(SystemTime::now() + MAX_SVID_LIFETIME));
    assert!(matches!(ca.sign(&id("web"), &request_for(&id("web")), Duration::ZERO), Err(CaError::Lifetime)));
    // Near its end the root gives what it has left, and then nothing.
    let near = ca.not_after() - Duration::from_secs(100);
    let signed = ca.sign_at(&id("web"), &request_for(&id("web")), HOUR, near).unwrap();
    let (_, leaf) = X509Certificate::from_der(&signed.chain[0]).unwrap();
    assert_eq!(leaf.validity().not_after.timestamp(), seconds(ca.not_after()));
    let past = ca.not_after() + Duration::from_secs(1);
    assert!(matches!(ca.sign_at(&id("web"), &request_for(&id("web")), HOUR, past), Err(CaError::Lifetime)));
}

#[test]
fn ids_of_other_trust_domains_are_not_signed() {
    let foreign: SpiffeId = "spiffe://mesh.test.evil/ns/shop/sa/web".parse().unwrap();
    assert!(matches!(ca().sign(&foreign, &request_for(&foreign), HOUR), Err(CaError::Foreign(..))));
}

#[test]
fn bad_requests_are_refused() {
    let ca = ca();
    let good = request_for(&id("web"));
    let refuse = |csr: &[u8]| {
        let result = ca.sign(&id("web"), csr, HOUR);
        assert!(matches!(result, Err(CaError::Request(_))), "{result:?}");
    };
    // The last byte belongs to the signature; one in the middle to the key.
    for place in [good.len() - 1, good.len() / 2] {
        let mut spoiled = good.clone();
        spoiled[place] ^= 1;
        refuse(&spoiled);
    }
    refuse(&[]);
    refuse(b"no request");
    refuse(&[good.as_slice(), &[0]].concat());
    refuse(&vec![0x30; MAX_REQUEST + 1]);
    for length in 0..good.len() {
        refuse(&good[..length]);
    }
    let p384 = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    refuse(CertificateParams::default().serialize_request(&p384).unwrap().der());
    let ed25519 = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    refuse(CertificateParams::default().serialize_request(&ed25519).unwrap().der());
}

#[test]
fn the_file_is_private_and_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ca.pem");
    let made = EmbeddedCa::open_or_create(&path, domain()).unwrap();
    assert_eq!(metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let opened = EmbeddedCa::open_or_create(&path, domain()).unwrap();
    assert_eq!(made.roots(), opened.roots());
    let signed = opened.sign(&id("web"), &request_for(&id("web")), HOUR).unwrap();
    let (_, leaf) = X509Certificate::from_der(&signed.chain[0]).unwrap();
    let roots = made.roots();
    let (_, root) = X509Certificate::from_der(&roots[0]).unwrap();
    leaf.verify_signature(Some(root.public_key())).unwrap();
    assert_eq!(read_dir(folder.path()).unwrap().count(), 1, "a temporary file was left");
}

#[test]
fn a_file_that_others_can_read_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ca.pem");
    EmbeddedCa::open_or_create(&path, domain()).unwrap();
    for mode in [0o640, 0o604, 0o660, 0o610] {
        set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        let error = EmbeddedCa::open_or_create(&path, domain()).unwrap_err().to_string();
        assert!(error.contains(&format!("chmod 600 {}", path.display())), "{error}");
    }
    set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
    EmbeddedCa::open_or_create(&path, domain()).unwrap();
}

#[test]
fn two_processes_that_start_together_share_one_root() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ca.pem");
    let roots: Vec<_> = thread::scope(|scope| {
        let open = || scope.spawn(|| EmbeddedCa::open_or_create(&path, domain()).unwrap().roots());
        let threads: Vec<_> = (0..8).map(|_| open()).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(roots.iter().all(|root| *root == roots[0]));
    assert_eq!(read_dir(folder.path()).unwrap().count(), 1, "a temporary file was left");
}

#[test]
fn a_folder_that_is_missing_is_named() {
    let error = EmbeddedCa::open_or_create(Path::new("/nonexistent/ca.pem"), domain()).unwrap_err();
    assert!(error.to_string().starts_with("/nonexistent/ca.pem: "), "{error}");
}

#[test]
fn the_root_of_another_mesh_is_refused() {
    let other = TrustDomain::new("other.test").unwrap();
    let error = EmbeddedCa::from_pem(&ca().to_pem(), other).unwrap_err();
    assert!(matches!(error, CaError::TrustDomain { .. }), "{error}");
}

#[test]
fn a_second_root_is_trusted_but_does_not_sign() {
    let (old, new) = (ca(), ca());
    let pem = format!("{}{}", old.roots_pem(), new.to_pem().as_str());
    let both = EmbeddedCa::from_pem(&pem, domain()).unwrap();
    assert_eq!(both.roots(), [new.roots(), old.roots()].concat());
    // A workload of before the change and one of after it trust each other.
    let one = crate::testing::credentials(&both, &id("web"));
    assert_eq!(one.id(), &id("web"));
}

/// A root and an intermediate that it signed, with the intermediate's key: PEMs of key, intermediate and root.
fn intermediate(path_length: u8) -> (String, String, String) {
    let root = ca();
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let now = SystemTime::now();
    let mut params = validity(now, now + 100 * HOUR).unwrap();
    params.distinguished_name.push(DnType::CommonName, "issuing");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    let mut above = CertificateParams::default();
    above.distinguished_name = DistinguishedName::new();
    above.distinguished_name.push(DnType::CommonName, "company");
    above.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    above.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let root_pem = above.self_signed(root.signer.key()).unwrap().pem();
    let signer = Signer::from_params(&above, root.signer.key());
    let pem = params.signed_by(&key, &signer).unwrap().pem();
    (key.serialize_pem(), pem, root_pem)
}

#[test]
fn an_intermediate_signs_and_peers_trust_the_root() {
    let (key, chain, root) = intermediate(0);
    let wholes = [
        EmbeddedCa::from_parts(&key, &chain, &root, domain()).unwrap(),
        EmbeddedCa::from_parts(&key, &format!("{chain}{root}"), "", domain()).unwrap(),
        EmbeddedCa::from_pem(&format!("{key}{root}{chain}"), domain()).unwrap(),
    ];
    for ca in wholes {
        let signed = ca.sign(&id("web"), &request_for(&id("web")), HOUR).unwrap();
        assert_eq!(signed.chain.len(), 2, "the intermediate travels with the leaf");
        assert_eq!(signed.chain[1], *ca.certificate());
        assert_eq!(signed.roots.len(), 1);
        assert_ne!(signed.roots[0], *ca.certificate(), "the intermediate is trusted by itself");
        assert!(ca.not_after() <= SystemTime::now() + 100 * HOUR);
        // Under the root, both sides of a handshake.
        assert_eq!(crate::testing::credentials(&ca, &id("web")).chain().len(), 2);
        let server = ca.server_credentials(&["weft-operator"]).unwrap();
        assert_eq!(server.chain_pem.matches("BEGIN CERTIFICATE").count(), 2);
        let again = EmbeddedCa::from_pem(&ca.to_pem(), domain()).unwrap();
        assert_eq!((again.roots(), again.certificate()), (ca.roots(), ca.certificate()));
    }
}

#[test]
fn an_intermediate_that_leads_nowhere_is_refused() {
    let (key, chain, _) = intermediate(0);
    let (.., other) = intermediate(0);
    let error = EmbeddedCa::from_parts(&key, &chain, "", domain()).unwrap_err();
    assert!(error.to_string().contains("put the root into ca.crt"), "{error}");
    let error = EmbeddedCa::from_parts(&key, &chain, &other, domain()).unwrap_err();
    assert!(matches!(error, CaError::Chain(_)), "{error}");
}

#[test]
fn unusable_pem_is_refused() {
    let ca = ca();
    let (pem, roots) = (ca.to_pem(), ca.roots_pem());
    let key = pem.strip_suffix(&roots).unwrap();
    let other = crate::testing::ca();
    let leaf = ca.sign(&id("web"), &request_for(&id("web")), HOUR).unwrap();
    for bad in [
        String::new(),
        roots.clone(),
        key.to_owned(),
        format!("{key}{}", other.roots_pem()),
        format!("{key}{key}{roots}"),
        format!("{key}{}", file::certificate_pem(&leaf.chain[0])),
        format!("{key}-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
    ] {
        assert!(matches!(EmbeddedCa::from_pem(&bad, domain()), Err(CaError::Pem(_))), "accepted");
    }
}

#[test]
fn a_leaf_cannot_become_the_root() {
    let ca = ca();
    let server = ca.server_credentials(&["weft-operator"]).unwrap();
    let pem = format!("{}{}", server.key_pem.as_str(), server.chain_pem);
    assert!(matches!(EmbeddedCa::from_pem(&pem, domain()), Err(CaError::Pem(_))));
}

#[test]
fn the_operators_certificate_holds_its_names() {
    let ca = ca();
    let server = ca.server_credentials(&["weft-operator.weft-system.svc", "127.0.0.1", "::1"]).unwrap();
    let leaf = CertificateDer::from_pem_slice(server.chain_pem.as_bytes()).unwrap();
    let key = PrivatePkcs8KeyDer::from_pem_slice(server.key_pem.as_bytes()).unwrap();
    let key = KeyPair::from_pkcs8_der_and_sign_algo(&key, &PKCS_ECDSA_P256_SHA256).unwrap();
    assert_eq!(file::public_key(&leaf).unwrap(), key.subject_public_key_info());
    let (_, parsed) = X509Certificate::from_der(&leaf).unwrap();
    let names = &parsed.subject_alternative_name().unwrap().unwrap().value.general_names;
    assert!(matches!(
        names[..],
        [
            GeneralName::DNSName("weft-operator.weft-system.svc"),
            GeneralName::IPAddress([127, 0, 0, 1]),
            GeneralName::IPAddress(_)
        ]
    ));
    assert!(matches!(ca.server_credentials::<&str>(&[]), Err(CaError::Name(_))));
    assert!(matches!(ca.server_credentials(&["not a name"]), Err(CaError::Name(_))));
}

#[test]
fn debug_shows_no_key() {
    let ca = ca();
    let pem = ca.to_pem();
    let key: String = pem.lines().nth(1).unwrap().to_owned();
    let server = ca.server_credentials(&["weft-operator"]).unwrap();
    let shown = format!("{ca:?} {server:?} {:?}", SvidKey::generate().unwrap());
    assert!(!shown.contains(&key) && !shown.contains("PRIVATE"), "{shown}");
}
