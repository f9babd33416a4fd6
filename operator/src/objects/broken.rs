//! What can still be told of a broken document: whom it would have protected.
//!
//! A policy that cannot be read must not leave its Pods open, nor a Namespace its Pods outside the mesh. So for these
//! two kinds a document that fails early is still given a key.

use serde::Deserialize;
use weft_api::authorization::TargetRef;

use super::{Head, Kind, ObjectKey, is_object_name};

/// Lines of a torn document that are tried; its head stands at its beginning.
const HEAD_LINES: usize = 64;
/// Bytes of a torn document that are tried.
const HEAD_BYTES: usize = 8 << 10;

/// The key of a document that is no YAML: of the longest beginning that is. `None` where that names no policy and no
/// Namespace.
pub(super) fn torn_key(text: &str, generation: i64) -> Option<ObjectKey> {
    let mut ends: Vec<usize> = text
        .split_inclusive('\n')
        .take(HEAD_LINES)
        .scan(0, |end, line| {
            *end += line.len();
            (*end <= HEAD_BYTES).then_some(*end)
        })
        .collect();
    ends.reverse();
    let heads = ends.into_iter().filter_map(|end| serde_yaml_ng::from_str::<Head>(text.get(..end)?).ok());
    let mut head = heads.take(1).next()?;
    if head.metadata.namespace.is_none() {
        // It tears inside `metadata`: the word is looked for, so that not the Pods of `default` pay for it.
        let before_spec = text.split("\nspec:").next().unwrap_or_default();
        let rest = before_spec.split_once("namespace:").map_or("", |(_, rest)| rest);
        let word = rest.trim_start().split(|c: char| c.is_whitespace() || ",}#".contains(c)).next();
        head.metadata.namespace =
            word.map(|w| w.trim_matches(['"', '\'']).to_owned()).filter(|w| is_object_name(w));
    }
    guarded_key(&head, generation)
}

/// The key under which a policy or Namespace of this head is denied; a policy without a usable name gets one of its
/// content.
pub(super) fn guarded_key(head: &Head, generation: i64) -> Option<ObjectKey> {
    let name = head.metadata.name.clone().filter(|n| is_object_name(n));
    if head.kind == Kind::Namespace.as_str() && head.api_version == Kind::Namespace.api_version() {
        return Some(ObjectKey { kind: Kind::Namespace, namespace: String::new(), name: name? });
    }
    if head.kind != Kind::AuthorizationPolicy.as_str() || !head.api_version.starts_with("weft.mesh/") {
        return None;
    }
    let namespace = head.metadata.namespace.clone().unwrap_or_else(|| "default".into());
    let name = name.unwrap_or_else(|| format!("unnamed-{generation:x}"));
    is_object_name(&namespace).then_some(ObjectKey { kind: Kind::AuthorizationPolicy, namespace, name })
}

/// The targets of a policy that does not parse otherwise; `None` where one of them does not either.
pub(super) fn target_refs(text: &str) -> Option<Box<[TargetRef]>> {
    #[derive(Deserialize)]
    struct Policy {
        spec: Spec,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Spec {
        target_refs: Box<[TargetRef]>,
    }
    serde_yaml_ng::from_str::<Policy>(text).ok().map(|p| p.spec.target_refs)
}
