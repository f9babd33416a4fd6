//! The operator: reads what users write, compiles it, streams each node its share, signs identities, writes status.
//!
//! Data goes one way: [`source`] → [`index`] → [`distribution`] → [`grpc`]; acks come back and end in [`status`].
#![forbid(unsafe_code)]

pub mod app;
pub mod auth;
pub mod authority;
pub mod cli;
mod controller;
pub mod distribution;
pub mod grpc;
pub mod index;
pub mod kubernetes;
pub mod last_good;
pub mod metrics;
pub mod objects;
pub mod relay;
pub mod serve;
pub mod source;
pub mod status;

pub use distribution::Distribution;
