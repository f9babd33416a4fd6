//! Writes the CRDs into a folder: `crdgen DIR`. With `--check`, writes nothing and fails where a file is stale.
#![forbid(unsafe_code)]

use std::{error::Error, fs, path::PathBuf, process::ExitCode};

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut check = false;
    let mut dir: Option<PathBuf> = None;
    for argument in std::env::args_os().skip(1) {
        if argument == "--check" { check = true } else { dir = Some(argument.into()) }
    }
    let Some(dir) = dir else {
        eprintln!("usage: crdgen DIR [--check]");
        return Ok(ExitCode::from(2));
    };
    let mut stale = false;
    for (name, text) in weft_api::crdgen::all()? {
        let path = dir.join(name);
        if fs::read_to_string(&path).is_ok_and(|old| old == text) {
            continue;
        }
        stale = true;
        if check {
            eprintln!("{} is stale: run `cargo xtask crds` and commit the result", path.display());
        } else {
            fs::create_dir_all(&dir)?;
            fs::write(&path, text)?;
        }
    }
    Ok(if check && stale { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
