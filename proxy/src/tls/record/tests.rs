//! What a hostile peer may put into records.

use super::{made_up::ends, *};

/// A record of `sender`.
fn sealed(sender: &mut Records, kind: ContentType, plain: &[u8]) -> BytesMut {
    let mut out = vec![0; plain.len() + OVERHEAD];
    sender.seal.seal(kind, plain, &mut out).unwrap();
    BytesMut::from(&out[..])
}

fn sent(kind: ContentType, plain: &[u8]) -> Result<Content, Error> {
    let (mut client, mut server) = ends();
    server.open(&mut sealed(&mut client, kind, plain))
}

#[test]
fn records_carry_what_was_sealed_in_full_ones() {
    let (mut client, mut server) = ends();
    let plain: Vec<u8> = (0..40_000_u32).map(|n| n as u8).collect();
    let mut out = vec![0; 100_000];
    let (taken, written) = client.seal(&plain, &mut out).unwrap();
    assert_eq!((taken, written), (40_000, 40_000 + 3 * OVERHEAD));
    let mut input = BytesMut::from(&out[..written]);
    let mut came = Vec::new();
    while let Some(length) = Records::length(&input).unwrap() {
        let mut record = input.split_to(length);
        assert_eq!(server.open(&mut record), Ok(Content::Data));
        came.extend_from_slice(&record);
    }
    assert!(came == plain);
}

#[test]
fn what_does_not_fit_is_left_to_the_next_buffer() {
    let (mut client, mut server) = ends();
    let mut out = [0; 100 + OVERHEAD];
    assert_eq!(client.seal(&[1; 250], &mut out).unwrap(), (100, out.len()));
    assert_eq!(server.open(&mut BytesMut::from(&out[..])), Ok(Content::Data));
    for room in 0..=OVERHEAD {
        assert_eq!(client.seal(&[1; 250], &mut out[..room]).unwrap(), (0, 0), "{room} bytes of room");
    }
    assert!(client.alert(AlertDescription::CloseNotify, &mut out[..ALERT - 1]).is_err());
}

#[test]
fn what_was_touched_or_comes_out_of_order_does_not_open() {
    for byte in 0..30 {
        let (mut client, mut server) = ends();
        let mut record = sealed(&mut client, ContentType::ApplicationData, b"secret--");
        record[byte] ^= 1;
        let opened = server.open(&mut record);
        let touched_type = matches!(opened, Err(Error::InappropriateMessage { .. })) && byte == 0;
        assert!(touched_type || opened == Err(Error::DecryptError), "byte {byte}: {opened:?}");
    }
    let (mut client, mut server) = ends();
    let first = sealed(&mut client, ContentType::ApplicationData, b"1");
    let second = sealed(&mut client, ContentType::ApplicationData, b"2");
    assert_eq!(server.open(&mut first.clone()), Ok(Content::Data));
    assert_eq!(server.open(&mut first.clone()), Err(Error::DecryptError), "a second time");
    assert_eq!(ends().1.open(&mut second.clone()), Err(Error::DecryptError), "before the first");
    // Its own record, reflected.
    assert_eq!(client.open(&mut first.clone()), Err(Error::DecryptError));
}

#[test]
fn the_shortest_records_are_no_panic() {
    let (_, mut server) = ends();
    for length in 0..40 {
        let mut bytes = vec![23; length];
        if let Some(place) = bytes.get_mut(3..5) {
            place.copy_from_slice(&(length as u16 - 5).to_be_bytes());
        }
        assert_eq!(server.open(&mut BytesMut::from(&bytes[..])), Err(Error::DecryptError), "{length} bytes");
    }
}

#[test]
fn a_length_is_known_with_the_header_and_bounded() {
    assert_eq!(Records::length(&[23, 3, 3, 0]), Ok(None));
    assert_eq!(Records::length(&[23, 3, 3, 1, 2]), Ok(Some(5 + 258)));
    assert_eq!(Records::length(&[23, 3, 3, 0x41, 0]), Ok(Some(5 + MAX_SEALED)));
    assert_eq!(Records::length(&[23, 3, 3, 0x41, 1]), Err(Error::PeerSentOversizedRecord));
    let sent = sent(ContentType::ApplicationData, &[1; MAX_PLAIN + 1]);
    assert_eq!(sent, Err(Error::PeerSentOversizedRecord));
}

#[test]
fn padding_is_taken_off_and_nothing_but_padding_refused() {
    let (mut client, mut server) = ends();
    // The type that `seal` adds is the first zero of the padding.
    let mut record = sealed(&mut client, ContentType::Unknown(0), b"data\x17\0\0\0");
    assert_eq!(server.open(&mut record), Ok(Content::Data));
    assert_eq!(record, &b"data"[..]);
    let padding = sent(ContentType::Unknown(0), &[0; 100]);
    assert_eq!(padding, Err(PeerMisbehaved::IllegalTlsInnerPlaintext.into()));
}

#[test]
fn records_without_data_are_few() {
    let (mut client, mut server) = ends();
    let empty = |client: &mut Records| sealed(client, ContentType::ApplicationData, b"");
    for _ in 0..MAX_IDLE {
        assert_eq!(server.open(&mut empty(&mut client)), Ok(Content::Control));
    }
    let data = server.open(&mut sealed(&mut client, ContentType::ApplicationData, b"x"));
    assert_eq!(data, Ok(Content::Data));
    for _ in 0..MAX_IDLE {
        assert_eq!(server.open(&mut empty(&mut client)), Ok(Content::Control));
    }
    let error = server.open(&mut empty(&mut client));
    assert_eq!(error, Err(PeerMisbehaved::TooManyEmptyFragments.into()));
}

#[test]
fn changes_of_keys_without_data_are_few() {
    let (mut client, mut server) = ends();
    let mut change = || {
        let mut record = sealed(&mut client, ContentType::Handshake, &[24, 0, 0, 1, 1]);
        client.seal = Key::new(client.keys.next_seal().unwrap()).unwrap();
        server.open(&mut record)
    };
    for _ in 0..MAX_IDLE {
        assert_eq!(change(), Ok(Content::Control));
    }
    assert!(change().is_err());
}

#[test]
fn a_change_of_keys_is_followed_and_answered() {
    let (mut client, mut server) = ends();
    let record = &mut sealed(&mut client, ContentType::Handshake, &[24, 0, 0, 1, 1]);
    client.seal = Key::new(client.keys.next_seal().unwrap()).unwrap();
    assert_eq!(server.open(record), Ok(Content::Control));
    let data = &mut sealed(&mut client, ContentType::ApplicationData, b"under the new key");
    assert_eq!(server.open(data), Ok(Content::Data));
    assert!(server.due());
    let mut out = [0; 200];
    assert_eq!(server.seal(b"", &mut out[..26]).unwrap(), (0, 0), "no room for it");
    let (_, written) = server.seal(b"and data", &mut out).unwrap();
    assert!(!server.due());
    let mut input = BytesMut::from(&out[..written]);
    let length = Records::length(&input).unwrap().unwrap();
    assert_eq!(client.open(&mut input.split_to(length)), Ok(Content::Control));
    assert_eq!(client.open(&mut input), Ok(Content::Data));
    assert_eq!(input, &b"and data"[..]);
    assert!(!client.due(), "it wanted none in return");
}

#[test]
fn other_messages_are_refused() {
    let handshake = |bytes: &[u8]| sent(ContentType::Handshake, bytes).unwrap_err();
    assert_eq!(handshake(&[24, 0, 0, 1, 2]), InvalidMessage::InvalidKeyUpdate.into());
    assert_eq!(handshake(&[24, 0, 0, 0]), InvalidMessage::InvalidKeyUpdate.into());
    assert_eq!(handshake(&[24, 0, 0, 1, 0, 24]), PeerMisbehaved::KeyEpochWithPendingFragment.into());
    assert_eq!(handshake(&[4, 1, 0, 0]), InvalidMessage::HandshakePayloadTooLarge.into());
    for kind in [1, 2, 4, 11, 13, 20] {
        let error = handshake(&[kind, 0, 0, 0]);
        assert!(matches!(error, Error::InappropriateHandshakeMessage { .. }), "{kind}: {error:?}");
        assert_eq!(answer(&error), Some(AlertDescription::UnexpectedMessage));
    }
    for kind in [ContentType::ChangeCipherSpec, ContentType::Heartbeat, ContentType::Unknown(99)] {
        assert!(matches!(sent(kind, &[1]), Err(Error::InappropriateMessage { .. })), "{kind:?}");
    }
}

#[test]
fn a_servers_tickets_are_passed_over_however_they_are_cut() {
    let ticket: Vec<u8> = [4, 0, 0, 40].into_iter().chain([7; 40]).collect();
    for size in 1..=ticket.len() {
        let (mut client, mut server) = ends();
        for part in ticket.chunks(size.max(2)) {
            let record = &mut sealed(&mut server, ContentType::Handshake, part);
            assert_eq!(client.open(record), Ok(Content::Control));
        }
        assert!(client.message.is_empty());
        let data = &mut sealed(&mut server, ContentType::ApplicationData, b"x");
        assert_eq!(client.open(data), Ok(Content::Data));
    }
    let (mut client, mut server) = ends();
    assert_eq!(
        client.open(&mut sealed(&mut server, ContentType::Handshake, &ticket[..9])),
        Ok(Content::Control)
    );
    let error = client.open(&mut sealed(&mut server, ContentType::ApplicationData, b"x"));
    assert_eq!(error, Err(PeerMisbehaved::MessageInterleavedWithHandshakeMessage.into()));
}

#[test]
fn alerts_end_it() {
    assert_eq!(sent(ContentType::Alert, &[1, 0]), Ok(Content::Closed));
    assert_eq!(sent(ContentType::Alert, &[1, 90]), Ok(Content::Control));
    let fatal = sent(ContentType::Alert, &[2, 42]).unwrap_err();
    assert_eq!(fatal, Error::AlertReceived(AlertDescription::BadCertificate));
    assert_eq!(answer(&fatal), None, "no answer to an alert");
    assert!(sent(ContentType::Alert, &[2]).is_err());
    assert!(sent(ContentType::Alert, &[1, 0, 0]).is_err());
    let (mut client, mut server) = ends();
    let mut out = [0; ALERT];
    assert_eq!(client.alert(AlertDescription::BadRecordMac, &mut out), Ok(ALERT));
    let error = server.open(&mut BytesMut::from(&out[..]));
    assert_eq!(error, Err(Error::AlertReceived(AlertDescription::BadRecordMac)));
}
