//! The snapshot that an agent starts from, and applying it.
#![no_main]

use std::path::PathBuf;

use weft_core::MeshState;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // In memory: the fuzzer's own process, many times a second.
    let path = PathBuf::from(format!("/dev/shm/weft-fuzz-snapshot-{}", std::process::id()));
    if std::fs::write(&path, bytes).is_err() {
        return;
    }
    let loaded = weft_agent::snapshot::load(&path);
    drop(std::fs::remove_file(&path));
    if let Ok(Some(delta)) = loaded {
        let state = MeshState::default().apply(&delta);
        // Read again from what is written, it is the same state.
        assert_eq!(MeshState::default().apply(&state.to_delta()).to_delta(), state.to_delta());
    }
});
