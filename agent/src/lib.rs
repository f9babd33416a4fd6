//! The node agent: attaches the datapath, enrols Pods, runs the proxy, keeps flows and says how it is.
#![deny(unsafe_code)]

pub mod app;
pub mod bundle;
pub mod config;
pub mod control;
pub mod datapath;
pub mod discovery;
pub mod enrolment;
pub mod events;
pub mod files;
pub mod flow;
pub mod guard;
pub mod handover;
pub mod hostpods;
pub mod issuers;
pub mod kubelet;
pub mod metrics;
pub mod node;
pub mod probe;
pub mod ready;
pub mod relay;
pub mod snapshot;
pub mod status;
#[cfg(test)]
mod testing;
