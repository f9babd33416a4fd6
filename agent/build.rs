//! Embeds the BPF object, which is built apart because it needs a BPF toolchain.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=WEFT_BPF_OBJECT");
    let default = || {
        let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
        manifest.join("../target/bpf/weft.bpf.o")
    };
    let object = env::var_os("WEFT_BPF_OBJECT").map_or_else(default, PathBuf::from);
    println!("cargo::rerun-if-changed={}", object.display());
    match object.canonicalize() {
        Ok(object) => println!("cargo::rustc-env=WEFT_BPF_OBJECT_PATH={}", object.display()),
        Err(_) => println!(
            "cargo::error=there is no BPF object at {}: run `cargo xtask build-ebpf` first",
            object.display()
        ),
    }
}
