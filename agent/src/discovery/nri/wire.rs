//! What NRI is spoken over: one unix connection that carries several logical ones (containerd/nri,
//! pkg/net/multiplex: connection id and payload length, both 32 bit big-endian, then the payload), and on each of
//! these ttrpc (containerd/ttrpc, PROTOCOL.md: length and stream id, 32 bit big-endian, type, flags, then the data).
//! Frames of the first cut the second's byte stream anywhere.

use std::io;

use bytes::{Buf as _, BytesMut};
use prost::Message as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use weft_proto::ttrpc::{Request, Response, Status};

/// Longest data of one ttrpc message (PROTOCOL.md).
const MAX_DATA: usize = 4 << 20;
/// Length of a ttrpc header.
const HEADER: usize = 10;
/// Longest payload of one frame.
const MAX_FRAME: usize = HEADER + MAX_DATA;
/// Longest payload that is sent in one frame: the runtime's reader takes no longer one where a message begins.
const SENT_FRAME: usize = 4096;

const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;

/// The logical connections: who serves on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// The plugin serves, the runtime calls.
    Plugin,
    /// The runtime serves, the plugin calls.
    Runtime,
}

impl Side {
    fn id(self) -> u32 {
        match self {
            Self::Plugin => 1,
            Self::Runtime => 2,
        }
    }
}

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub(in crate::discovery) enum WireError {
    /// It broke or ended.
    #[error("the connection to the runtime ended")]
    Io(#[from] io::Error),
    /// More than the protocol allows.
    #[error("the runtime sent {length} bytes at once; the protocol allows {MAX_FRAME}")]
    TooLong {
        /// What it announced.
        length: usize,
    },
    /// Bytes that are no message.
    #[error("the runtime sent what is no ttrpc message")]
    Malformed(#[from] prost::DecodeError),
}

/// A message that arrived.
#[derive(Debug)]
pub(super) enum Incoming {
    /// The runtime calls.
    Request {
        /// To be given back with the answer.
        stream: u32,
        /// The call.
        request: Request,
    },
    /// The runtime answers.
    Response {
        /// Of the call that is answered.
        stream: u32,
        /// The answer.
        response: Response,
    },
}

/// The connection.
#[derive(Debug)]
pub(super) struct Wire<S> {
    io: S,
    plugin: BytesMut,
    runtime: BytesMut,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    /// Over a stream that nothing was sent on.
    pub(super) fn new(io: S) -> Self {
        Self { io, plugin: BytesMut::new(), runtime: BytesMut::new() }
    }

    /// The next message; kinds that a plugin without streams has no use for are passed over.
    pub(super) async fn receive(&mut self) -> Result<Incoming, WireError> {
        loop {
            for (side, buffer) in [(Side::Plugin, &mut self.plugin), (Side::Runtime, &mut self.runtime)] {
                while let Some((stream, kind, data)) = take(buffer)? {
                    match (side, kind) {
                        (Side::Plugin, REQUEST) => {
                            return Ok(Incoming::Request { stream, request: Request::decode(data)? });
                        }
                        (Side::Runtime, RESPONSE) => {
                            return Ok(Incoming::Response { stream, response: Response::decode(data)? });
                        }
                        _ => tracing::debug!(?side, kind, "passed over"),
                    }
                }
            }
            self.frame().await?;
        }
    }

    async fn frame(&mut self) -> Result<(), WireError> {
        let mut header = [0; 8];
        self.io.read_exact(&mut header).await?;
        let [a, b, c, d, rest @ ..] = header;
        let (id, length) = (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes(rest));
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > MAX_FRAME {
            return Err(WireError::TooLong { length });
        }
        let mut unknown = BytesMut::new();
        let buffer = match id {
            1 => &mut self.plugin,
            2 => &mut self.runtime,
            _ => &mut unknown,
        };
        let held = buffer.len();
        buffer.resize(held + length, 0);
        self.io.read_exact(buffer.get_mut(held..).unwrap_or_default()).await?;
        Ok(())
    }

    /// Calls the runtime.
    pub(super) async fn call(&mut self, stream: u32, request: &Request) -> Result<(), WireError> {
        self.send(Side::Runtime, stream, REQUEST, &request.encode_to_vec()).await
    }

    /// Answers the runtime.
    pub(super) async fn answer(
        &mut self,
        stream: u32,
        answer: Result<Vec<u8>, Status>,
    ) -> Result<(), WireError> {
        let response = match answer {
            Ok(payload) => Response { status: None, payload },
            Err(status) => Response { status: Some(status), payload: Vec::new() },
        };
        self.send(Side::Plugin, stream, RESPONSE, &response.encode_to_vec()).await
    }

    async fn send(&mut self, side: Side, stream: u32, kind: u8, data: &[u8]) -> Result<(), WireError> {
        let mut message = Vec::with_capacity(HEADER + data.len());
        message.extend_from_slice(&u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
        message.extend_from_slice(&stream.to_be_bytes());
        message.extend_from_slice(&[kind, 0]);
        message.extend_from_slice(data);
        let mut bytes = Vec::with_capacity(message.len() + 8);
        for part in message.chunks(SENT_FRAME) {
            bytes.extend_from_slice(&side.id().to_be_bytes());
            bytes.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
            bytes.extend_from_slice(part);
        }
        self.io.write_all(&bytes).await?;
        self.io.flush().await?;
        Ok(())
    }
}

/// Takes the first whole message out of a byte stream: stream id, type, data.
fn take(buffer: &mut BytesMut) -> Result<Option<(u32, u8, BytesMut)>, WireError> {
    let Some(header) = buffer.first_chunk::<HEADER>() else { return Ok(None) };
    let [a, b, c, d, e, f, g, h, kind, _flags] = *header;
    let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    if length > MAX_DATA {
        return Err(WireError::TooLong { length });
    }
    if buffer.len() < HEADER + length {
        return Ok(None);
    }
    buffer.advance(HEADER);
    Ok(Some((u32::from_be_bytes([e, f, g, h]), kind, buffer.split_to(length))))
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A frame as the runtime sends it.
    pub(in super::super) fn frame(id: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = id.to_be_bytes().to_vec();
        bytes.extend_from_slice(&u32::try_from(payload.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    /// A ttrpc message.
    pub(in super::super) fn message(stream: u32, kind: u8, data: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(data.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend_from_slice(&stream.to_be_bytes());
        bytes.extend_from_slice(&[kind, 0]);
        bytes.extend_from_slice(data);
        bytes
    }

    fn request(method: &str) -> Request {
        Request { service: "s".into(), method: method.into(), payload: vec![7; 5000], timeout_nano: 0 }
    }

    async fn methods(bytes: &[u8]) -> (Vec<(u32, String)>, WireError) {
        let mut wire = Wire::new(tokio::io::join(bytes, tokio::io::sink()));
        let mut seen = Vec::new();
        loop {
            match wire.receive().await {
                Ok(Incoming::Request { stream, request }) => seen.push((stream, request.method)),
                Ok(Incoming::Response { .. }) => panic!("no response was sent"),
                Err(error) => return (seen, error),
            }
        }
    }

    #[tokio::test]
    async fn frames_cut_messages_anywhere() {
        let messages =
            [message(1, 1, &request("A").encode_to_vec()), message(3, 1, &request("B").encode_to_vec())];
        let stream = messages.concat();
        for cut in [1, 9, 10, 11, 4096, stream.len() - 1] {
            let (first, second) = stream.split_at(cut);
            // A frame of a connection nobody knows lies between them.
            let bytes = [frame(1, first), frame(9, b"ignored"), frame(1, second)].concat();
            let (seen, end) = methods(&bytes).await;
            assert_eq!(seen, [(1, "A".to_owned()), (3, "B".to_owned())], "cut at {cut}");
            assert!(matches!(end, WireError::Io(e) if e.kind() == io::ErrorKind::UnexpectedEof));
        }
    }

    #[tokio::test]
    async fn nothing_is_reserved_for_an_announced_length_beyond_the_limit() {
        let huge = [1_u32.to_be_bytes(), u32::MAX.to_be_bytes()].concat();
        assert!(matches!(methods(&huge).await.1, WireError::TooLong { .. }));
        let mut header = message(1, 1, b"");
        header[..4].copy_from_slice(&u32::try_from(MAX_DATA + 1).unwrap().to_be_bytes());
        assert!(matches!(methods(&frame(1, &header)).await.1, WireError::TooLong { .. }));
        let garbage = frame(1, &message(1, 1, &[0xff; 20]));
        assert!(matches!(methods(&garbage).await.1, WireError::Malformed(_)));
    }

    #[tokio::test]
    async fn long_messages_are_sent_in_frames_the_runtime_can_read() {
        let (near, far) = tokio::io::duplex(64 << 10);
        let mut wire = Wire::new(near);
        wire.call(1, &request("A")).await.unwrap();
        drop(wire);
        let mut bytes = Vec::new();
        let mut far = far;
        far.read_to_end(&mut bytes).await.unwrap();
        assert_eq!(bytes[..8], [0, 0, 0, 2, 0, 0, 0x10, 0]);
        let second = 8 + SENT_FRAME;
        assert_eq!(bytes[second..second + 4], [0, 0, 0, 2]);
    }

    proptest! {
        #[test]
        fn any_bytes_end_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let mut wire = Wire::new(tokio::io::join(&*bytes, tokio::io::sink()));
                while wire.receive().await.is_ok() {}
            });
        }
    }
}
