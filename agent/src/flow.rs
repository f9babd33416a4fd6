//! Flows: what the kernel and the proxy saw, joined, kept in a fixed-size ring and served as Hubble serves it.

pub mod access;
pub mod convert;
pub mod enrich;
pub mod filter;
mod selector;
pub mod server;
pub mod store;

pub use enrich::{Enricher, KernelFlow};
pub use store::{Entry, FlowStore, LossSource, StoredFlow};
