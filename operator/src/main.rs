//! `weft-operator`.
#![forbid(unsafe_code)]

use clap::Parser;
use weft_operator::{app, cli::Cli};

fn main() -> anyhow::Result<()> {
    app::main(Cli::parse())
}
