//! The status that every kind of ours carries.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Conditions `Accepted`, `ResolvedRefs` and `Programmed`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ObjectStatus {
    /// What became of the object, by type of condition.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub conditions: Vec<Condition>,
}

/// Condition type: the object is valid and taken.
pub const ACCEPTED: &str = "Accepted";
/// Condition type: everything that it refers to exists and may be referred to.
pub const RESOLVED_REFS: &str = "ResolvedRefs";
/// Condition type: every node enforces it.
pub const PROGRAMMED: &str = "Programmed";
