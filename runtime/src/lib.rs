//! What every long-running process of the mesh needs: named tasks whose end is noticed, drain, readiness, signals,
//! backoff, logging and the admin endpoint.
#![forbid(unsafe_code)]

pub mod admin;
pub mod backoff;
pub mod drain;
pub mod durable;
pub mod readiness;
pub mod signal;
pub mod tasks;
pub mod telemetry;
pub mod workers;

pub use admin::Admin;
pub use backoff::Backoff;
pub use drain::{DrainHold, DrainTrigger, DrainWatcher};
pub use readiness::{Readiness, ReadyGuard};
pub use tasks::{Tasks, VitalEnd};
pub use workers::Workers;
