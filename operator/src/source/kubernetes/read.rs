//! One object of the API server to one change.

use std::hash::{DefaultHasher, Hash, Hasher};

use kube::api::DynamicObject;
use serde::de::DeserializeOwned;

use super::trim::Trimmed;
use crate::{
    objects::{self, Document, Kind, Object, ObjectKey, is_object_name},
    source::Change,
};

/// The object's key; `None` for a name that could not be one of the API server's.
pub(super) fn key(kind: Kind, object: &DynamicObject) -> Option<ObjectKey> {
    let meta = &object.metadata;
    let name = meta.name.clone().filter(|n| is_object_name(n))?;
    let namespace = meta.namespace.clone().unwrap_or_default();
    (namespace.is_empty() || is_object_name(&namespace)).then_some(ObjectKey { kind, namespace, name })
}

/// Tells whether an object's short form changed.
pub(super) fn hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// Reads an object. The API server's own kinds are read leniently, since newer versions of it have fields that this one
/// does not know; kinds of users are read by the very code that reads documents of a folder.
pub(super) fn change(key: ObjectKey, trimmed: &Trimmed) -> Change {
    let text = &trimmed.json;
    let number = i64::try_from(hash(text) >> 16).unwrap_or_default();
    let generation = trimmed.generation.unwrap_or(number);
    let object = match key.kind {
        Kind::Namespace => read(text).map(Object::Namespace),
        Kind::Node => read(text).map(Object::Node),
        Kind::ServiceCidr => read(text).map(Object::ServiceCidr),
        Kind::Pod => read(text).map(Object::Pod),
        Kind::Service => read(text).map(Object::Service),
        Kind::EndpointSlice => read(text).map(Object::EndpointSlice),
        Kind::NetworkPolicy => read(text).map(Object::NetworkPolicy),
        Kind::HttpRoute
        | Kind::ReferenceGrant
        | Kind::AuthorizationPolicy
        | Kind::TrafficPolicy
        | Kind::MeshConfig => return of_users(key, generation, text),
    };
    match object {
        Ok(object) => Change::Apply(Document { key, generation, object, text: text.as_str().into() }),
        Err(message) => Change::Bad { key, generation, message, target_refs: None },
    }
}

fn read<T: DeserializeOwned>(text: &str) -> Result<Box<T>, String> {
    serde_json::from_str(text).map(Box::new).map_err(|e| plain(&e.to_string()))
}

fn of_users(key: ObjectKey, generation: i64, text: &str) -> Change {
    match objects::parse(text).pop() {
        Some(Ok(document)) => Change::Apply(Document { key, generation, ..document }),
        Some(Err(bad)) => {
            let message = plain(&bad.message);
            Change::Bad { key, generation, message, target_refs: bad.target_refs }
        }
        None => {
            let message = "it is not of a kind that this version reads".into();
            Change::Bad { key, generation, message, target_refs: None }
        }
    }
}

/// Without the place in a text that the user never sees.
fn plain(message: &str) -> String {
    match message.rsplit_once(" at line ") {
        Some((start, rest)) if rest.chars().all(|c| c.is_ascii_digit() || " column".contains(c)) => {
            start.to_owned()
        }
        _ => message.to_owned(),
    }
}
