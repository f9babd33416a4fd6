//! The guard of a node: a chained CNI plugin that lets no Pod of the mesh start which nobody judges.
//!
//! It is the last of the node's CNI chain and makes nothing itself. It asks the node's agent ([`wire`], [`ask`]); where
//! none answers, the namespaces that the agent wrote down decide ([`list`], [`judge`]). It lies on the node's disk, so
//! that it is there after a reboot, before any DaemonSet is. [`spec`] is what CNI 1.1 asks of a plugin
//! (<https://www.cni.dev/docs/spec/>).

#![forbid(unsafe_code)]

pub mod ask;
pub mod judge;
pub mod list;
pub mod plugin;
pub mod spec;
pub mod wire;
