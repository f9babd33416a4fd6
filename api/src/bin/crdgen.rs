//! Writes the CRDs into a folder: `crdgen DIR`.
#![forbid(unsafe_code)]

use std::{error::Error, fs, path::PathBuf, process::ExitCode};

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let Some(dir) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: crdgen DIR");
        return Ok(ExitCode::from(2));
    };
    fs::create_dir_all(&dir)?;
    for (name, text) in weft_api::crdgen::all()? {
        fs::write(dir.join(name), text)?;
    }
    Ok(ExitCode::SUCCESS)
}
