//! Compiles the protocol files with a compiler written in Rust: no protoc needed.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(
        [
            "control.proto",
            "agent.proto",
            "observer.proto",
            "flow.proto",
            "relay.proto",
            "weft_flow.proto",
            "weft_relay.proto",
            "health.proto",
            "cri.proto",
            "nri.proto",
            "ttrpc.proto",
        ],
        ["proto"],
    )?;
    tonic_prost_build::configure().bytes(".weft.control.v1.Resource.json").compile_fds(files)?;
    Ok(())
}
