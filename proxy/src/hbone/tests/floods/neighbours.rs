//! Each flood over TLS, beside another connection of the same thread: the offender's ends, the neighbour goes on.

use std::{pin::pin, time::Instant};

use super::*;

/// What a round trip of the neighbour may take, with the flood on the same core in a debug build.
const UNNOTICED: Duration = Duration::from_secs(2);

/// Answers what comes with the same, until the connection ends.
async fn echo(mut requests: Requests) {
    while let Some(request) = requests.next().await {
        let Ok(mut stream) = request.accept() else { continue };
        start(async move {
            let (mut read, mut write) = tokio::io::split(&mut stream);
            let _ = tokio::io::copy(&mut read, &mut write).await;
        });
    }
}

async fn round_trip(stream: &mut Stream) {
    let since = Instant::now();
    stream.write_all(b"are you there").await.unwrap();
    let mut back = [0; 13];
    soon(stream.read_exact(&mut back)).await.unwrap();
    assert_eq!(&back, b"are you there");
    assert!(since.elapsed() < UNNOTICED, "it took {:?}", since.elapsed());
}

/// Sends the flood after a greeting; nothing that comes back is read.
async fn ends_the_offender(flood: impl FnOnce(&mut Peer)) {
    let Ends { opener, requests, driven, .. } = ends().await;
    start(echo(requests));
    let (_, mut neighbour) = soon(opener.open(authority(), &headers()).unwrap().answer()).await.unwrap();
    round_trip(&mut neighbour).await;

    let (mut offender, (socket, tls)) = stranger().await;
    let (requests, _control, connection) = Connection::server(socket, tls, SETTINGS);
    start(echo(requests));
    let judged = start(connection);
    let mut peer = Peer::new();
    peer.bytes.extend_from_slice(PREFACE);
    settings(&mut peer.bytes, &[]);
    flood(&mut peer);
    let sending = start(async move {
        let _ = offender.write_all(&peer.bytes).await;
        offender
    });
    let mut judged = pin!(judged.end());
    let verdict = soon(async {
        loop {
            tokio::select! {
                verdict = &mut judged => break verdict,
                () = round_trip(&mut neighbour) => {}
            }
        }
    })
    .await;
    assert!(
        matches!(verdict, Err(Error::Protocol { code: Code::ENHANCE_YOUR_CALM, .. })),
        "the offender's connection: {verdict:?}"
    );
    drop(soon(sending.end()).await);

    // The stream from before, a new one, and an end in order.
    drop(neighbour);
    let (_, mut neighbour) = soon(opener.open(authority(), &headers()).unwrap().answer()).await.unwrap();
    round_trip(&mut neighbour).await;
    neighbour.shutdown().await.unwrap();
    drop((neighbour, opener));
    for end in driven {
        assert_eq!(end.end().await, Ok(()));
    }
}

#[tokio::test]
async fn rapid_resets() {
    ends_the_offender(|peer| {
        for n in 0..20_000 {
            let id = 1 + 2 * n;
            peer.connect(id).frame(kind::RST_STREAM, 0, id, &Code::CANCEL.0.to_be_bytes());
        }
    })
    .await;
}

/// CVE-2025-8671: the peer makes us reset.
#[tokio::test]
async fn streams_that_have_to_be_reset() {
    ends_the_offender(|peer| {
        for n in 0..20_000 {
            let id = 1 + 2 * n;
            peer.connect(id).frame(kind::WINDOW_UPDATE, 0, id, &[0; 4]);
        }
    })
    .await;
}

#[tokio::test]
async fn settings_frames() {
    let values = [[0, 4, 0, 0, 0xff, 0xff], [0, 4, 0, 0, 0, 0]].concat();
    ends_the_offender(|peer| {
        for _ in 0..20_000 {
            peer.frame(kind::SETTINGS, 0, 0, &values);
        }
    })
    .await;
}

#[tokio::test]
async fn pings() {
    ends_the_offender(|peer| {
        for _ in 0..20_000 {
            peer.frame(kind::PING, 0, 0, &[0; 8]);
        }
    })
    .await;
}

#[tokio::test]
async fn empty_data() {
    ends_the_offender(|peer| {
        peer.connect(1);
        for _ in 0..20_000 {
            peer.frame(kind::DATA, 0, 1, &[]);
        }
    })
    .await;
}

/// Padding only: it uses up windows, and carries nothing.
#[tokio::test]
async fn data_of_padding() {
    ends_the_offender(|peer| {
        peer.connect(1);
        for _ in 0..20_000 {
            peer.frame(kind::DATA, flag::PADDED, 1, &[2, 0, 0]);
        }
    })
    .await;
}

#[tokio::test]
async fn continuations() {
    ends_the_offender(|peer| {
        peer.frame(kind::HEADERS, 0, 1, &[]);
        for _ in 0..20_000 {
            peer.frame(kind::CONTINUATION, 0, 1, &[]);
        }
    })
    .await;
}

#[tokio::test]
async fn window_updates() {
    ends_the_offender(|peer| {
        peer.connect(1);
        for _ in 0..20_000 {
            peer.frame(kind::WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1]);
            peer.frame(kind::WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]);
        }
    })
    .await;
}

#[tokio::test]
async fn priorities_and_unknown_frames() {
    ends_the_offender(|peer| {
        for _ in 0..10_000 {
            peer.frame(kind::PRIORITY, 0, 1, &[0; 5]).frame(0xfe, 0, 0, &[]);
        }
    })
    .await;
}
