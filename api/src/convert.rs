//! From the kinds that users write to [`weft_core`]'s plain data.

pub mod authorization;
pub mod http_route;
pub mod mesh_config;
pub mod traffic;
mod unknown;

pub use unknown::unknown_fields;
