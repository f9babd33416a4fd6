//! The records of a hostile peer, open to the fuzzer.

use super::{made_up::ends, *};

/// Opens records that the bytes describe, sealed as a peer would, and then the bytes themselves.
///
/// # Panics
/// When what was opened is not what was sealed.
pub fn records(bytes: &[u8]) {
    let (mut client, mut server) = ends();
    let mut rest = bytes;
    while let Some(([turn, kind, length], body)) = rest.split_first_chunk::<3>() {
        let (plain, after) = body.split_at(usize::from(*length).min(body.len()));
        rest = after;
        let (from, to) = if turn & 1 == 0 { (&mut client, &mut server) } else { (&mut server, &mut client) };
        let mut out = vec![0; plain.len() + OVERHEAD];
        if from.seal.seal(ContentType::from(*kind), plain, &mut out).is_err() {
            return;
        }
        let mut record = BytesMut::from(&out[..]);
        match to.open(&mut record) {
            Ok(Content::Data) if *kind == 23 => assert!(record == plain, "data that was changed"),
            Ok(_) => {}
            Err(error) => {
                let _ = answer(&error);
                break;
            }
        }
        // It changed its key with that record.
        if to.open.next == 0
            && let Ok(key) = from.keys.next_seal().and_then(Key::new)
        {
            from.seal = key;
        }
    }
    let mut input = BytesMut::from(bytes);
    while let Ok(Some(length)) = Records::length(&input)
        && length <= input.len()
    {
        let opened = server.open(&mut input.split_to(length));
        assert!(opened.is_err(), "nobody sealed it");
    }
}
