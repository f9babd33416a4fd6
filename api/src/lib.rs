//! The kinds that users write, their CRDs, and their conversion to [`weft_core`].
//!
//! Group `weft.mesh`, version `v1alpha1`. An unknown field is an error, never ignored: a misspelt field of a policy
//! must not widen it.
#![forbid(unsafe_code)]

pub mod authorization;
pub mod convert;
pub mod crdgen;
pub mod error;
pub mod labels;
pub mod mesh_config;
pub mod reference;
pub mod status;
pub mod traffic;
pub mod values;

pub use authorization::{AuthorizationPolicy, AuthorizationPolicySpec};
pub use error::{FieldError, ObjectError};
pub use mesh_config::{MeshConfig, MeshConfigSpec};
pub use status::ObjectStatus;
pub use traffic::{TrafficPolicy, TrafficPolicySpec};

/// The API group.
pub const GROUP: &str = "weft.mesh";
/// The API version.
pub const VERSION: &str = "v1alpha1";
