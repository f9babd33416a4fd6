//! The frames of a hostile peer, open to the fuzzer.

use std::time::Instant;

use super::{
    Settings,
    core::{Core, Role},
    frame,
};

const SETTINGS: Settings = Settings { window: 64 * 1024, streams: 8, frame: 16 * 1024 };

/// Takes bytes in as a server that was greeted, or as a client, which has opened streams.
///
/// # Panics
/// When it makes a difference how the bytes are cut.
pub fn frames(bytes: &[u8]) {
    let Some((first, rest)) = bytes.split_first() else { return };
    let role = if first & 1 == 0 { Role::Server } else { Role::Client };
    let size = usize::from(first >> 1) + 1;
    let now = Instant::now();
    let run = |size: usize| {
        let mut core = Core::new(role, SETTINGS, now);
        let mut greeting = Vec::new();
        if role == Role::Server {
            greeting.extend_from_slice(frame::PREFACE);
        }
        frame::settings(&mut greeting, &[]);
        let mut outcome = core.receive(greeting.into());
        if role == Role::Client {
            for _ in 0..3 {
                let _ = core.open(([10, 0, 0, 1], 80).into(), &http::HeaderMap::new());
            }
        }
        for part in rest.chunks(size) {
            if outcome.is_err() {
                break;
            }
            outcome = core.receive(bytes::Bytes::copy_from_slice(part));
        }
        let mut out = Vec::new();
        core.take_out(&mut out);
        (outcome, out)
    };
    let (whole, cut) = (run(rest.len().max(1)), run(size));
    assert!(whole.0 == cut.0, "{:?} in one piece, {:?} in pieces of {size}", whole.0, cut.0);
    assert!(whole.1 == cut.1, "the answers differ in pieces of {size}");
}
