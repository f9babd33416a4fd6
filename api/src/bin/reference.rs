//! Writes the reference of the kinds: `reference` in the repository's root.
#![forbid(unsafe_code)]

use std::{error::Error, fs, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = Path::new("docs/reference");
    fs::create_dir_all(folder)?;
    for (name, text) in weft_api::reference::all()? {
        fs::write(folder.join(name), text)?;
    }
    Ok(())
}
