use super::*;

fn way(bundle: &Path) -> Way {
    Way { uri: "https://127.0.0.1:1".into(), server_name: "weft-operator".into(), bundle: bundle.into() }
}

#[test]
fn a_bundle_without_a_certificate_says_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bundle.pem");
    let missing = read(&path).unwrap_err().to_string();
    assert!(missing.contains("weft-trust-bundle"), "{missing}");
    std::fs::write(&path, "nonsense").unwrap();
    let content = read(&path).unwrap();
    assert!(matches!(endpoint(&way(&path), &content), Err(BundleError::Empty { .. })));
}
