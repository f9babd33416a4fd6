use super::*;

fn only(text: &str) -> BadDocument {
    parse(text).into_iter().find_map(Result::err).unwrap()
}

#[test]
fn documents_stand_alone() {
    let text = "# head\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\n: : [broken\n--- # next\napiVersion: v1\nkind: Namespace\nmetadata: {name: b}\n---\n";
    let parsed = parse(text);
    assert_eq!(parsed.len(), 3);
    assert_eq!(parsed[0].as_ref().unwrap().key.name, "a");
    let bad = parsed[1].as_ref().unwrap_err();
    assert_eq!((bad.line, bad.key.as_ref()), (7, None));
    assert_eq!(parsed[2].as_ref().unwrap().key.name, "b");
}

#[test]
fn an_error_names_the_line_of_the_file_and_the_field() {
    let text = "---\n---\napiVersion: weft.mesh/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec:\n  targetRefs: []\n  action: PERMIT\n";
    let bad = only(text);
    assert_eq!(bad.key.as_ref().map(ToString::to_string).as_deref(), Some("AuthorizationPolicy shop/p"));
    assert!(bad.message.contains("spec.action: unknown variant `PERMIT`"), "{}", bad.message);
    assert!(bad.message.contains("line 8"), "{}", bad.message);
}

#[test]
fn kinds_that_look_like_ours_are_errors_and_others_are_left_out() {
    assert!(parse("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}").is_empty());
    let bad = only("apiVersion: weft.mesh/v1alpha1\nkind: AuthorisationPolicy\nmetadata: {name: a}");
    assert!(bad.message.contains("weft.mesh has no kind \"AuthorisationPolicy\""), "{}", bad.message);
    let bad = only("apiVersion: weft.mesh/v1\nkind: MeshConfig\nmetadata: {name: a}");
    assert!(bad.message.contains("change apiVersion"), "{}", bad.message);
    let bad = only("apiVersion: gateway.networking.k8s.io/v1\nkind: GRPCRoute\nmetadata: {name: a}");
    assert!(bad.message.contains("not supported by this version yet"), "{}", bad.message);
}

#[test]
fn a_field_that_a_route_type_would_drop_is_an_error() {
    let bad = only(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r}\nspec:\n  rules:\n  - retry: {attempts: 3}\n    backendRefs: [{name: a, port: 80}]\n",
    );
    assert!(bad.message.starts_with("spec.rules[0].retry: is no field"), "{}", bad.message);
}

#[test]
fn names_cannot_leave_a_folder() {
    let bad = only("apiVersion: v1\nkind: Namespace\nmetadata: {name: ../../etc}");
    assert!(bad.message.contains("metadata.name"), "{}", bad.message);
}

#[test]
fn the_generation_follows_the_content() {
    let one = |v: &str| {
        let text = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: a, labels: {{x: {v}}}}}");
        parse(&text).remove(0).unwrap().generation
    };
    assert_eq!(one("a"), one("a"));
    assert_ne!(one("a"), one("b"));
}
