use rustls::{
    CertificateError, ClientConfig, HandshakeKind, NamedGroup, ProtocolVersion,
    crypto::aws_lc_rs::{default_provider, kx_group},
    version::TLS12,
};
use time::{Duration as Days, OffsetDateTime};

use super::*;
use crate::{
    IdentityError, PeerError, TrustDomain,
    ca::EmbeddedCa,
    peer_identity,
    testing::{Forged, ca, connected, credentials, domain, handshake, id, leaf},
    verify::Purpose,
};

const WEB: &str = "spiffe://mesh.test/ns/shop/sa/web";

fn rustls_error(error: &std::io::Error) -> &rustls::Error {
    error
        .get_ref()
        .and_then(|inner| inner.downcast_ref())
        .unwrap_or_else(|| panic!("not a TLS error: {error}"))
}

/// The server refuses a client that presents this, for this reason.
async fn server_refuses(forged: &Forged, ca: &EmbeddedCa) -> rustls::Error {
    let api = credentials(ca, &id("api"));
    let (client, server) = handshake(forged.client_config(api.id()), api.server_config()).await;
    assert!(client.is_err(), "the client was let in");
    rustls_error(&server.unwrap_err()).clone()
}

/// The client refuses a server that presents this although it expects `web`, for this reason.
async fn client_refuses(forged: &Forged, ca: &EmbeddedCa) -> rustls::Error {
    let api = credentials(ca, &id("api"));
    let (client, server) = handshake(api.client_config(&id("web")), forged.server_config()).await;
    assert!(server.is_err(), "the server got through");
    rustls_error(&client.unwrap_err()).clone()
}

#[tokio::test]
async fn both_sides_know_each_other_over_post_quantum_tls13() {
    let ca = ca();
    let (web, api) = (credentials(&ca, &id("web")), credentials(&ca, &id("api")));
    let (client, server) = connected(web.client_config(api.id()), api.server_config()).await;
    let (client, server) = (client.get_ref().1, server.get_ref().1);
    assert_eq!(client.negotiated_key_exchange_group().unwrap().name(), NamedGroup::X25519MLKEM768);
    assert_eq!(server.negotiated_key_exchange_group().unwrap().name(), NamedGroup::X25519MLKEM768);
    assert_eq!(server.handshake_kind(), Some(HandshakeKind::Full));
    assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(
        client.negotiated_cipher_suite().unwrap().suite(),
        rustls::CipherSuite::TLS13_AES_128_GCM_SHA256
    );
    assert_eq!((client.alpn_protocol(), server.alpn_protocol()), (Some(ALPN), Some(ALPN)));
    assert_eq!(peer_identity(server.peer_certificates().unwrap()).unwrap(), id("web"));
    assert_eq!(peer_identity(client.peer_certificates().unwrap()).unwrap(), id("api"));
}

#[tokio::test]
async fn nothing_is_resumed() {
    let ca = ca();
    let (web, api) = (credentials(&ca, &id("web")), credentials(&ca, &id("api")));
    let config = web.client_config(api.id());
    for _ in 0..2 {
        let (client, server) = connected(Arc::clone(&config), api.server_config()).await;
        assert_eq!(client.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(client.get_ref().1.tls13_tickets_received(), 0);
        assert_eq!(server.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
    }
    assert!(!config.enable_early_data);
    assert_eq!((api.server_config().max_early_data_size, api.server_config().send_tls13_tickets), (0, 0));
    assert!(!api.server_config().session_storage.can_cache() && !api.server_config().ticketer.enabled());
}

#[tokio::test]
async fn a_peer_without_post_quantum_exchange_is_served() {
    let ca = ca();
    let (web, api) = (credentials(&ca, &id("web")), credentials(&ca, &id("api")));
    let mut client = ClientConfig::clone(&web.client_config(api.id()));
    let classical = CryptoProvider { kx_groups: vec![kx_group::X25519], ..(*provider()).clone() };
    let builder =
        ClientConfig::builder_with_provider(Arc::new(classical)).with_protocol_versions(&[&TLS13]).unwrap();
    let bundle = Arc::new(TrustBundle::new(domain(), &ca.roots(), provider()).unwrap());
    let mut other = builder
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ExpectedWorkload { bundle, expected: id("api") }))
        .with_client_cert_resolver(Arc::clone(&client.client_auth_cert_resolver));
    other.alpn_protocols = std::mem::take(&mut client.alpn_protocols);
    let (client, _server) = connected(Arc::new(other), api.server_config()).await;
    assert_eq!(client.get_ref().1.negotiated_key_exchange_group().unwrap().name(), NamedGroup::X25519);
}

#[tokio::test]
async fn tls12_is_refused() {
    let ca = ca();
    let api = credentials(&ca, &id("api"));
    let bundle = Arc::new(TrustBundle::new(domain(), &ca.roots(), provider()).unwrap());
    let client = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS12])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ExpectedWorkload { bundle, expected: id("api") }))
        .with_no_client_auth();
    let (_, server) = handshake(Arc::new(client), api.server_config()).await;
    let error = server.unwrap_err();
    assert!(matches!(rustls_error(&error), rustls::Error::PeerIncompatible(_)), "{error}");
}

#[tokio::test]
async fn another_alpn_is_refused() {
    let ca = ca();
    let (web, api) = (credentials(&ca, &id("web")), credentials(&ca, &id("api")));
    let mut config = ClientConfig::clone(&web.client_config(api.id()));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let (_, server) = handshake(Arc::new(config), api.server_config()).await;
    assert_eq!(rustls_error(&server.unwrap_err()), &rustls::Error::NoApplicationProtocol);
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let ca = ca();
    let api = credentials(&ca, &id("api"));
    let bundle = Arc::new(TrustBundle::new(domain(), &ca.roots(), provider()).unwrap());
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ExpectedWorkload { bundle, expected: id("api") }))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    let (client, server) = handshake(Arc::new(config), api.server_config()).await;
    assert_eq!(rustls_error(&server.unwrap_err()), &rustls::Error::NoCertificatesPresented);
    assert!(client.is_err());
}

#[tokio::test]
async fn another_workload_than_expected_is_refused() {
    let ca = ca();
    let (web, api) = (credentials(&ca, &id("web")), credentials(&ca, &id("api")));
    let (client, server) = handshake(web.client_config(&id("billing")), api.server_config()).await;
    assert!(server.is_err());
    let error = client.unwrap_err();
    let expected = IdentityError::Unexpected { peer: id("api"), expected: id("billing") };
    assert_eq!(IdentityError::find(&error), Some(&expected));
    assert!(error.to_string().contains("spiffe://mesh.test/ns/shop/sa/billing"), "{error}");
}

#[tokio::test]
async fn a_foreign_authority_is_refused_by_both_sides() {
    let (ours, theirs) = (ca(), ca());
    let (web, api) = (credentials(&theirs, &id("web")), credentials(&ours, &id("api")));
    let (client, _) = handshake(web.client_config(api.id()), api.server_config()).await;
    let unknown = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
    // Both roots bear the same name, so the chain fails at the signature.
    let bad_signature = rustls::Error::InvalidCertificate(CertificateError::BadSignature);
    let is_refusal = |error: &rustls::Error| *error == unknown || *error == bad_signature;
    assert!(is_refusal(rustls_error(&client.unwrap_err())));
    // The server's side, against a client that would accept any server of ours.
    let forged = Forged::new(&theirs, &leaf(&[WEB]));
    let mut lenient = ClientConfig::clone(&forged.client_config(api.id()));
    let bundle = Arc::new(TrustBundle::new(domain(), &ours.roots(), provider()).unwrap());
    lenient.dangerous().set_certificate_verifier(Arc::new(ExpectedWorkload { bundle, expected: id("api") }));
    let (_, server) = handshake(Arc::new(lenient), api.server_config()).await;
    assert!(is_refusal(rustls_error(&server.unwrap_err())));
}

#[tokio::test]
async fn another_trust_domain_is_refused_by_both_sides() {
    let ca = ca();
    let forged = Forged::new(&ca, &leaf(&["spiffe://other.test/ns/shop/sa/web"]));
    for error in [server_refuses(&forged, &ca).await, client_refuses(&forged, &ca).await] {
        assert!(matches!(IdentityError::find(&error), Some(IdentityError::TrustDomain { .. })), "{error}");
    }
}

#[tokio::test]
async fn two_ids_in_one_certificate_are_refused_by_both_sides() {
    let ca = ca();
    let forged = Forged::new(&ca, &leaf(&[WEB, "spiffe://mesh.test/ns/shop/sa/admin"]));
    for error in [server_refuses(&forged, &ca).await, client_refuses(&forged, &ca).await] {
        assert_eq!(
            IdentityError::find(&error),
            Some(&IdentityError::Peer(PeerError::ManyUris(2))),
            "{error}"
        );
    }
}

#[tokio::test]
async fn expired_and_early_certificates_are_refused_by_both_sides() {
    let ca = ca();
    let now = OffsetDateTime::now_utc();
    let mut expired = leaf(&[WEB]);
    (expired.not_before, expired.not_after) = (now - Days::days(2), now - Days::seconds(2));
    let mut early = leaf(&[WEB]);
    (early.not_before, early.not_after) = (now + Days::days(1), now + Days::days(2));
    for (params, alert_is_expiry) in [(expired, true), (early, false)] {
        let forged = Forged::new(&ca, &params);
        for error in [server_refuses(&forged, &ca).await, client_refuses(&forged, &ca).await] {
            let rustls::Error::InvalidCertificate(reason) = &error else { panic!("{error}") };
            let expiry = matches!(reason, CertificateError::ExpiredContext { .. });
            let not_yet = matches!(reason, CertificateError::NotValidYetContext { .. });
            assert!(if alert_is_expiry { expiry } else { not_yet }, "{error}");
        }
    }
}

#[tokio::test]
async fn the_extended_key_usage_is_kept() {
    let ca = ca();
    let mut only_server = leaf(&[WEB]);
    only_server.extended_key_usages.truncate(1);
    let error = server_refuses(&Forged::new(&ca, &only_server), &ca).await;
    assert!(matches!(error, rustls::Error::InvalidCertificate(_)), "{error}");
    let mut only_client = leaf(&[WEB]);
    only_client.extended_key_usages.remove(0);
    let error = client_refuses(&Forged::new(&ca, &only_client), &ca).await;
    assert!(matches!(error, rustls::Error::InvalidCertificate(_)), "{error}");
}

#[tokio::test]
async fn the_operators_server_certificate_is_no_workload() {
    let ca = ca();
    let mut params = leaf(&[]);
    params.subject_alt_names = vec![rcgen::SanType::DnsName("weft-operator".try_into().unwrap())];
    let error = client_refuses(&Forged::new(&ca, &params), &ca).await;
    assert_eq!(IdentityError::find(&error), Some(&IdentityError::Peer(PeerError::NoUri)), "{error}");
}

#[test]
fn a_bundle_of_another_domain_does_not_match_by_prefix() {
    let ca = ca();
    let bundle = |name| {
        let domain = TrustDomain::new(name).unwrap();
        TrustBundle::new(domain, &ca.roots(), provider()).unwrap()
    };
    let leaf = credentials(&ca, &id("web"));
    let verify = |bundle: &TrustBundle, chain: &[_]| {
        let now = rustls_pki_types::UnixTime::now();
        bundle.verify(&leaf.chain()[0], chain, now, Purpose::Client)
    };
    assert_eq!(verify(&bundle("mesh.test"), &[]).unwrap(), id("web"));
    assert!(verify(&bundle("mesh.tes"), &[]).is_err());
    assert!(verify(&bundle("mesh.test.evil"), &[]).is_err());
    // A peer may not make us search through a heap of certificates.
    assert!(verify(&bundle("mesh.test"), &vec![leaf.chain()[0].clone(); 9]).is_err());
}
