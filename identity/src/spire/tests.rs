use std::collections::HashMap;

use spire_api::pb::spire::api::{agent::delegatedidentity::v1::X509svidWithKey, types};
use tokio::time::timeout;

use super::*;
use crate::{
    SvidKey,
    testing::{HOUR, ca, id},
};

/// What SPIRE would answer for an identity, under another name where `named` gives one.
fn svid(id: &SpiffeId, named: Option<&str>, expires_at: i64) -> X509svidWithKey {
    let ca = ca();
    let key = SvidKey::generate().unwrap();
    let signed = ca.sign(id, &key.request(id).unwrap(), HOUR).unwrap();
    let path = named.unwrap_or(id.path()).to_owned();
    X509svidWithKey {
        x509_svid: Some(types::X509svid {
            id: Some(types::Spiffeid { trust_domain: id.trust_domain().to_owned(), path }),
            cert_chain: signed.chain.iter().map(|c| c.to_vec().into()).collect(),
            expires_at,
            ..Default::default()
        }),
        x509_svid_key: key.pkcs8().to_vec().into(),
    }
}

fn answer(svids: Vec<X509svidWithKey>) -> SubscribeToX509sviDsResponse {
    SubscribeToX509sviDsResponse { x509_svids: svids, federates_with: Vec::new() }
}

#[test]
fn of_several_identities_the_very_one_is_taken() {
    let (web, other) = (id("web"), id("other"));
    let late = svid(&web, None, 200);
    let key = late.x509_svid_key.clone();
    let answer = answer(vec![svid(&other, None, 300), svid(&web, None, 100), late]);
    let (taken, chain) = answer::pick(&web, &answer).unwrap();
    assert_eq!(taken.pkcs8(), &key[..], "not the one that lasts longest");
    assert_eq!(crate::peer_identity(&chain).unwrap(), web);
}

#[test]
fn what_is_not_exactly_the_identity_is_refused_with_the_fix() {
    let (web, other) = (id("web"), id("other"));
    let none = answer::pick(&web, &answer(vec![])).err().unwrap().to_string();
    let entry = "entry create -spiffeID spiffe://mesh.test/ns/shop/sa/web -parentID <this node's SPIRE agent> \
        -selector k8s:ns:shop -selector k8s:sa:web";
    assert!(none.contains(entry), "{none}");
    let wrong = answer::pick(&web, &answer(vec![svid(&other, None, 1)])).err().unwrap().to_string();
    assert!(
        wrong.contains(other.as_str()) && wrong.contains("Weft needs spiffe://mesh.test/ns/shop/sa/web"),
        "{wrong}"
    );
    // An answer that says one name and holds the certificate of another.
    let lying = answer::pick(&web, &answer(vec![svid(&other, Some(web.path()), 1)]));
    assert!(matches!(lying, Err(SpireError::OtherId { .. })));
    let mut broken = svid(&web, None, 1);
    broken.x509_svid_key = vec![1, 2, 3].into();
    assert!(matches!(answer::pick(&web, &answer(vec![broken])), Err(SpireError::Malformed(_))));
    let mut long = svid(&web, None, 1);
    let leaf = long.x509_svid.as_ref().unwrap().cert_chain[0].clone();
    long.x509_svid.as_mut().unwrap().cert_chain = vec![leaf; 9];
    assert!(matches!(answer::pick(&web, &answer(vec![long])), Err(SpireError::Malformed(_))));
}

#[test]
fn an_entry_of_service_account_pod_or_node_is_found() {
    let text = |id: &SpiffeId, pods: &[Arc<str>]| {
        let selectors = answer::selectors(id, pods.iter()).unwrap();
        selectors.iter().map(|s| format!("{}:{}", s.r#type, s.value)).collect::<Vec<_>>()
    };
    assert_eq!(text(&id("web"), &["u1".into()]), ["k8s:ns:shop", "k8s:sa:web", "k8s:pod-uid:u1"]);
    assert_eq!(text(&"spiffe://mesh.test/node/a".parse().unwrap(), &[]), ["weft:node:a"]);
    assert!(answer::selectors(&"spiffe://mesh.test/else".parse().unwrap(), std::iter::empty()).is_none());
}

#[test]
fn roots_are_told_by_trust_domain_however_it_is_written() {
    let (one, two) = (ca(), ca());
    let der = |ca: &crate::ca::EmbeddedCa| ca.roots()[0].to_vec();
    let both = [der(&one), der(&two)].concat();
    let told = |all: HashMap<String, Vec<u8>>| {
        let ca_certificates = all.into_iter().map(|(name, der)| (name, der.into())).collect();
        answer::roots(SubscribeToX509BundlesResponse { ca_certificates })
    };
    let roots = told([("spiffe://mesh.test".into(), both), ("other.test".into(), der(&two))].into()).unwrap();
    assert_eq!(roots["mesh.test"], [one.roots(), two.roots()].concat());
    assert_eq!(roots["other.test"], two.roots());
    assert!(told([("spiffe://mesh.test/path".into(), der(&one))].into()).is_err());
    assert!(told([("mesh.test".into(), vec![0x30, 0x03, 1])].into()).is_err());
    let many = (0..65).map(|i| (format!("d{i}.test"), der(&one))).collect();
    assert!(told(many).is_err());
}

#[tokio::test]
async fn without_an_agent_it_says_where_it_looked() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("admin.sock");
    let issuer = SpireIssuer::new(&socket, Arc::new(|_| Vec::new()));
    let asked = timeout(Duration::from_secs(10), issuer.issue(&id("web"))).await.unwrap().err().unwrap();
    let text = asked.to_string();
    assert!(text.contains(&socket.display().to_string()) && text.contains("admin_socket_path"), "{text}");
    let told = timeout(Duration::from_secs(10), issuer.updates().next()).await.unwrap();
    assert!(matches!(told, Some(Err(IssueError::Spire(SpireError::Unavailable { .. })))), "{told:?}");
}
