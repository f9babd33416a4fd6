//! What is wrong with an object: which object, which field, and what to do.

use std::fmt;

/// A problem of one field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct FieldError {
    /// The field's path, e.g. `spec.rules[0].http[0].paths[0].value`.
    pub field: String,
    /// What is wrong and what to write instead.
    pub message: String,
}

impl FieldError {
    /// Puts the two together.
    pub fn new(field: impl Into<String>, message: impl fmt::Display) -> Self {
        Self { field: field.into(), message: message.to_string() }
    }
}

/// Everything that is wrong with one object, on one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {name}: {}", join(.problems))]
pub struct ObjectError {
    /// The kind.
    pub kind: &'static str,
    /// `namespace/name`, or the name of a cluster-scoped object.
    pub name: String,
    /// At least one.
    pub problems: Vec<FieldError>,
}

fn join(problems: &[FieldError]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Collects the problems of one object, so that a person sees all of them at once.
#[derive(Debug, Default)]
pub(crate) struct Problems(Vec<FieldError>);

impl Problems {
    pub(crate) fn push(&mut self, field: impl Into<String>, message: impl fmt::Display) {
        self.0.push(FieldError::new(field, message));
    }

    /// `value`, or the error that all problems make.
    pub(crate) fn finish<T>(self, kind: &'static str, name: String, value: T) -> Result<T, ObjectError> {
        if self.0.is_empty() { Ok(value) } else { Err(ObjectError { kind, name, problems: self.0 }) }
    }
}

/// `namespace/name` of an object's metadata, `default` where it names no namespace.
pub(crate) fn object_name(meta: &kube::core::ObjectMeta) -> String {
    format!("{}/{}", namespace(meta), meta.name.as_deref().unwrap_or_default())
}

pub(crate) fn namespace(meta: &kube::core::ObjectMeta) -> &str {
    meta.namespace.as_deref().unwrap_or("default")
}
