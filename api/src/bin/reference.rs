//! Writes the reference of the kinds: `reference` in the repository's root. With `--check`, writes nothing and fails where
//! a page is stale.
#![forbid(unsafe_code)]

use std::{error::Error, fs, path::Path, process::ExitCode};

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let check = match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => false,
        [one] if one == "--check" => true,
        _ => {
            eprintln!("usage: reference [--check]");
            return Ok(ExitCode::from(2));
        }
    };
    let folder = Path::new("docs/reference");
    let mut stale = false;
    for (name, text) in weft_api::reference::all()? {
        let path = folder.join(name);
        if fs::read_to_string(&path).is_ok_and(|old| old == text) {
            continue;
        }
        stale = true;
        if check {
            eprintln!("{} is stale: run `cargo xtask docs` and commit the result", path.display());
        } else {
            fs::create_dir_all(folder)?;
            fs::write(&path, text)?;
        }
    }
    Ok(if check && stale { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
