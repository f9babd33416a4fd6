//! The two-node laboratory that the demo and the end-to-end tests share: nodes, Pods and a wire made of network
//! namespaces, the real binaries in them, a capture on the wire, and the applications that run inside the Pods.

#![forbid(unsafe_code)]

pub mod app;
pub mod capture;
pub mod demo;
pub mod failure;
pub mod http;
pub mod interrupt;
pub mod lab;
pub mod long;
pub mod manifest;
pub mod mesh;
pub mod metrics;
pub mod observe;
pub mod shop;
pub mod stats;
pub mod steps;
pub mod wait;

pub use lab::{Lab, LabOptions};
