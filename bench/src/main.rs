//! `cargo xtask bench`: measures Weft's parts at scale and says whether they keep what is promised.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod control_plane;
mod dice;
mod load;
mod proxy;
mod report;

// The API server of the operator's own tests, so that there is one way to raise it.
#[path = "../../operator/tests/apiserver/objects.rs"]
#[expect(dead_code, clippy::unwrap_used, reason = "shared with the operator's tests, which use all of it")]
mod objects;
#[path = "../../operator/tests/apiserver/server.rs"]
#[expect(dead_code, clippy::unwrap_used, reason = "shared with the operator's tests, which use all of it")]
mod server;

#[derive(Parser)]
#[command(name = "cargo xtask bench", about = "Measures Weft at scale")]
struct Args {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Simulated agents against the real operator, API server and etcd
    ControlPlane(control_plane::Options),
    /// The node proxy beside Envoy and HAProxy
    Proxy(proxy::ProxyArgs),
    /// The node proxy under mixed load with random kills: nothing is lost, and nothing stays
    Soak(proxy::SoakArgs),
    /// The load generator, which the benchmarks of the proxy run inside Pods
    #[command(subcommand, hide = true)]
    Load(load::Load),
}

fn main() -> ExitCode {
    let outcome = match Args::parse().command {
        Action::ControlPlane(options) => control_plane::run(&options),
        Action::Proxy(args) => proxy::run(&args, &report::say).map(|short| short == 0),
        Action::Soak(args) => proxy::soak(&args, &report::say).map(|short| short == 0),
        Action::Load(load) => load::run(&load).map(|()| true),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            report::warn(&format!("{error:#}"));
            ExitCode::from(if error.is::<control_plane::NoParts>() { 3 } else { 1 })
        }
    }
}
