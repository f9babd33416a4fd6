//! The handshake, by rustls.

use std::sync::Arc;

use rustls::{
    ClientConfig, CommonState, ContentType, ServerConfig,
    client::UnbufferedClientConnection,
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, UnbufferedStatus},
};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use weft_core::flow::Tls;

use super::{
    Error, Records,
    record::{HEADER, MAX_SEALED},
};

/// What is read at least at a time.
const READ: usize = 4 * 1024;
/// What a peer may make us hold before the handshake is done; rustls takes no message of more than 64 KiB.
const MAX_INPUT: usize = 128 * 1024;

/// A handshake that is done.
#[derive(Debug)]
pub struct Established {
    /// What protects the connection from here on.
    pub records: Records,
    /// Records that came with the end of the handshake.
    pub received: Vec<u8>,
    /// The end of our part of the handshake, to be sent before anything else.
    pub unsent: Vec<u8>,
    /// What the peer showed, as the configuration verified it.
    pub certificates: Vec<CertificateDer<'static>>,
    /// What was negotiated.
    pub protection: Tls,
}

/// The dialling end's handshake.
///
/// # Errors
/// When the peer is not acceptable, does not accept us, or goes away.
pub async fn connect(
    socket: &mut TcpStream,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
) -> Result<Established, Error> {
    let mut tls = UnbufferedClientConnection::new(config, name)?;
    let left = drive(socket, |input, output| step(tls.process_tls_records(input), output)).await?;
    let known = Known::of(&tls);
    let (secrets, keys) = tls.dangerous_into_kernel_connection()?;
    Ok(known.established(Records::client(secrets, keys)?, left))
}

/// The accepting end's.
///
/// # Errors
/// As of [`connect`].
pub async fn accept(socket: &mut TcpStream, config: Arc<ServerConfig>) -> Result<Established, Error> {
    let mut tls = UnbufferedServerConnection::new(config)?;
    let left = drive(socket, |input, output| step(tls.process_tls_records(input), output)).await?;
    let known = Known::of(&tls);
    let (secrets, keys) = tls.dangerous_into_kernel_connection()?;
    Ok(known.established(Records::server(secrets, keys)?, left))
}

/// What a handshake says of the peer.
struct Known {
    certificates: Vec<CertificateDer<'static>>,
    protection: Tls,
}

impl Known {
    fn of(tls: &CommonState) -> Self {
        let name = |text: Option<String>| -> Arc<str> { text.unwrap_or_default().into() };
        let shown = tls.peer_certificates().unwrap_or_default();
        Self {
            certificates: shown.iter().map(|c| c.clone().into_owned()).collect(),
            protection: Tls::Mutual {
                key_exchange: name(tls.negotiated_key_exchange_group().map(|g| format!("{:?}", g.name()))),
                cipher: name(tls.negotiated_cipher_suite().map(|c| format!("{:?}", c.suite()))),
            },
        }
    }

    fn established(self, records: Records, left: Left) -> Established {
        let Self { certificates, protection } = self;
        Established { records, received: left.input, unsent: left.output, certificates, protection }
    }
}

/// What a handshake wants next.
enum Next {
    Again,
    Read,
    Done,
}

/// What is left at its end.
struct Left {
    input: Vec<u8>,
    output: Vec<u8>,
}

/// Offers rustls one record after the other, so that it sees none that comes after the handshake.
async fn drive(
    socket: &mut TcpStream,
    mut step: impl FnMut(&mut [u8], &mut Vec<u8>) -> (usize, Result<Next, Error>),
) -> Result<Left, Error> {
    let (mut input, mut output) = (Vec::new(), Vec::new());
    let mut offered = 0;
    loop {
        let (used, next) = step(&mut input[..offered], &mut output);
        input.drain(..used);
        offered -= used;
        match next {
            Ok(Next::Again) => {}
            Ok(Next::Done) => return Ok(Left { input, output }),
            Ok(Next::Read) => match whole(&input[offered..]) {
                Some(length) => offered += length,
                None => {
                    socket.write_all(&output).await?;
                    output.clear();
                    if input.len() >= MAX_INPUT {
                        return Err(rustls::Error::PeerSentOversizedRecord.into());
                    }
                    input.reserve(READ);
                    if socket.read_buf(&mut input).await? == 0 {
                        return Err(Error::Closed);
                    }
                }
            },
            Err(error) => {
                // The alert that tells the peer why, which comes before anything else is looked at.
                let _ = step(&mut input[..offered], &mut output);
                let _ = socket.write_all(&output).await;
                return Err(error);
            }
        }
    }
}

/// The length of the record that `bytes` begin with, where all of it is there; of everything where it is none, so that
/// rustls says what is wrong.
fn whole(bytes: &[u8]) -> Option<usize> {
    let header = bytes.first_chunk::<HEADER>()?;
    let length = HEADER + usize::from(u16::from_be_bytes([header[3], header[4]]));
    let known = !matches!(ContentType::from(header[0]), ContentType::Unknown(_));
    if known && length <= HEADER + MAX_SEALED {
        (bytes.len() >= length).then_some(length)
    } else {
        Some(bytes.len())
    }
}

fn step<D>(status: UnbufferedStatus<'_, '_, D>, output: &mut Vec<u8>) -> (usize, Result<Next, Error>) {
    let next = match status.state {
        Ok(ConnectionState::EncodeTlsData(mut state)) => {
            let start = output.len();
            let mut encoded = state.encode(&mut []);
            if let Err(EncodeError::InsufficientSize(error)) = &encoded {
                output.resize(start + error.required_size, 0);
                encoded = state.encode(&mut output[start..]);
            }
            match encoded {
                Ok(_) => Ok(Next::Again),
                Err(error) => Err(rustls::Error::General(error.to_string()).into()),
            }
        }
        // Sent before the next read, or with what comes first after the handshake.
        Ok(ConnectionState::TransmitTlsData(state)) => {
            state.done();
            Ok(Next::Again)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Next::Read),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Next::Done),
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Err(Error::Closed),
        Ok(state) => Err(rustls::Error::General(format!("{state:?} in a handshake")).into()),
        Err(error) => Err(error.into()),
    };
    (status.discard, next)
}
