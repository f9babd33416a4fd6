//! Records of TLS 1.3 after the handshake (RFC 8446 section 5), and the messages that may still come in them: alerts,
//! KeyUpdate, tickets that nobody asked for.

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use bytes::{Buf as _, BytesMut};
use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, Error, ExtractedSecrets, HandshakeType,
    InvalidMessage, PeerMisbehaved, SupportedCipherSuite, client::ClientConnectionData,
    kernel::KernelConnection, server::ServerConnectionData,
};

#[cfg(feature = "fuzzing")]
pub mod fuzzing;
#[cfg(any(test, feature = "fuzzing"))]
mod made_up;
#[cfg(test)]
mod tests;

/// Bytes of a record's header.
pub(crate) const HEADER: usize = 5;
/// Most that a record carries (section 5.1).
pub const MAX_PLAIN: usize = 16_384;
/// Most that comes after a header (section 5.2).
pub(crate) const MAX_SEALED: usize = MAX_PLAIN + 256;
const TAG: usize = 16;
/// What a record is longer than what it carries: header, content type and tag.
pub const OVERHEAD: usize = HEADER + 1 + TAG;
/// Bytes of a record with an alert.
pub const ALERT: usize = 2 + OVERHEAD;
/// Bytes of a handshake message that is not complete: what may come is a ticket, which is small.
const MAX_MESSAGE: usize = 16_384;
/// Records in a row that carry no data.
const MAX_IDLE: u32 = 32;
/// A KeyUpdate that wants none in return (section 4.6.3).
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];

/// What a record was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Bytes for the layer above.
    Data,
    /// Something of TLS' own, which was dealt with.
    Control,
    /// The peer says that it will send no more.
    Closed,
}

/// The protection of a connection in both directions.
pub struct Records {
    seal: Key,
    open: Key,
    keys: Box<dyn Keys>,
    /// How many records a key may seal.
    limit: u64,
    /// A server may send tickets.
    tickets: bool,
    /// A handshake message that is not complete.
    message: Vec<u8>,
    idle: u32,
    /// The peer wants a KeyUpdate.
    asked: bool,
}

impl std::fmt::Debug for Records {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Records").field("sealed", &self.seal.next).field("opened", &self.open.next).finish()
    }
}

/// Where the next traffic secrets come from.
trait Keys: Send + Sync {
    fn next_seal(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error>;
    fn next_open(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error>;
}

impl<D: Send + Sync> Keys for KernelConnection<D> {
    fn next_seal(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        self.update_tx_secret()
    }

    fn next_open(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        self.update_rx_secret()
    }
}

impl Records {
    pub(super) fn client(
        secrets: ExtractedSecrets,
        keys: KernelConnection<ClientConnectionData>,
    ) -> Result<Self, Error> {
        let suite = keys.negotiated_cipher_suite();
        Self::new(secrets, suite, Box::new(keys), true)
    }

    pub(super) fn server(
        secrets: ExtractedSecrets,
        keys: KernelConnection<ServerConnectionData>,
    ) -> Result<Self, Error> {
        let suite = keys.negotiated_cipher_suite();
        Self::new(secrets, suite, Box::new(keys), false)
    }

    fn new(
        secrets: ExtractedSecrets,
        suite: SupportedCipherSuite,
        keys: Box<dyn Keys>,
        tickets: bool,
    ) -> Result<Self, Error> {
        let limit =
            suite.tls13().map(|s| s.common.confidentiality_limit).ok_or(Error::HandshakeNotComplete)?;
        Ok(Self {
            seal: Key::new(secrets.tx)?,
            open: Key::new(secrets.rx)?,
            keys,
            limit,
            tickets,
            message: Vec::new(),
            idle: 0,
            asked: false,
        })
    }

    #[cfg(test)]
    pub(super) fn wears_out_after(&mut self, records: u64) {
        self.limit = records;
    }

    #[cfg(test)]
    pub(super) fn sealed_under_this_key(&self) -> u64 {
        self.seal.next
    }

    /// Whether there is something to seal without data: the answer to a KeyUpdate.
    pub fn due(&self) -> bool {
        self.asked
    }

    /// Seals what fits of `plain` into full records; how much was taken, and how much written.
    ///
    /// # Errors
    /// When there are no further keys.
    pub fn seal(&mut self, plain: &[u8], out: &mut [u8]) -> Result<(usize, usize), Error> {
        let (mut taken, mut written) = (0, 0);
        loop {
            let room = out.len() - written;
            if self.asked || self.seal.next >= self.limit {
                let length = KEY_UPDATE.len() + OVERHEAD;
                if room < length {
                    return Ok((taken, written));
                }
                self.seal.seal(ContentType::Handshake, &KEY_UPDATE, &mut out[written..written + length])?;
                self.seal = Key::new(self.keys.next_seal()?)?;
                self.asked = false;
                written += length;
                continue;
            }
            let length = (plain.len() - taken).min(MAX_PLAIN).min(room.saturating_sub(OVERHEAD));
            if length == 0 {
                return Ok((taken, written));
            }
            let end = written + length + OVERHEAD;
            self.seal.seal(
                ContentType::ApplicationData,
                &plain[taken..taken + length],
                &mut out[written..end],
            )?;
            taken += length;
            written = end;
        }
    }

    /// Seals an alert, the last record, into [`ALERT`] bytes; how much was written.
    ///
    /// # Errors
    /// When the record cannot be sealed, or there is less room.
    pub fn alert(&mut self, alert: AlertDescription, out: &mut [u8]) -> Result<usize, Error> {
        let level = if alert == AlertDescription::CloseNotify { 1 } else { 2 };
        let out = out.get_mut(..ALERT).ok_or(Error::EncryptError)?;
        self.seal.seal(ContentType::Alert, &[level, alert.into()], out)?;
        Ok(ALERT)
    }

    /// How long the record is that `bytes` begin with; `None` before its header is there.
    ///
    /// # Errors
    /// When it is too long.
    pub fn length(bytes: &[u8]) -> Result<Option<usize>, Error> {
        let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
        match usize::from(u16::from_be_bytes([header[3], header[4]])) {
            length if length > MAX_SEALED => Err(Error::PeerSentOversizedRecord),
            length => Ok(Some(HEADER + length)),
        }
    }

    /// Opens a whole record, in place; `record` is then what it carried.
    ///
    /// # Errors
    /// When it was not sealed by the peer, or carries what may not come: the connection must end.
    pub fn open(&mut self, record: &mut BytesMut) -> Result<Content, Error> {
        let kind = self.open.open(record)?;
        if kind != ContentType::Handshake && !self.message.is_empty() {
            return Err(PeerMisbehaved::MessageInterleavedWithHandshakeMessage.into());
        }
        if kind == ContentType::ApplicationData && !record.is_empty() {
            self.idle = 0;
            return Ok(Content::Data);
        }
        self.idle += 1;
        if self.idle > MAX_IDLE {
            return Err(PeerMisbehaved::TooManyEmptyFragments.into());
        }
        match kind {
            ContentType::ApplicationData => {}
            ContentType::Alert => return alert(record),
            ContentType::Handshake => self.messages(record)?,
            other => return Err(inappropriate(other)),
        }
        Ok(Content::Control)
    }

    /// Handshake messages after the handshake, of which one record may hold several, and several records one.
    fn messages(&mut self, part: &[u8]) -> Result<(), Error> {
        let mut bytes = std::mem::take(&mut self.message);
        bytes.extend_from_slice(part);
        let mut rest = bytes.as_slice();
        while let Some(([kind, length @ ..], body)) = rest.split_first_chunk::<4>() {
            let [a, b, c] = *length;
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            if length > MAX_MESSAGE {
                return Err(InvalidMessage::HandshakePayloadTooLarge.into());
            }
            let Some((body, after)) = body.split_at_checked(length) else { break };
            match HandshakeType::from(*kind) {
                HandshakeType::KeyUpdate => {
                    let [wanted @ (0 | 1)] = body else {
                        return Err(InvalidMessage::InvalidKeyUpdate.into());
                    };
                    // What follows must be under the new key (section 5.1).
                    if !after.is_empty() {
                        return Err(PeerMisbehaved::KeyEpochWithPendingFragment.into());
                    }
                    self.open = Key::new(self.keys.next_open()?)?;
                    self.asked |= *wanted == 1;
                }
                // Not used: each connection proves both ends anew.
                HandshakeType::NewSessionTicket if self.tickets => {}
                got_type => {
                    let expect_types = vec![HandshakeType::KeyUpdate];
                    return Err(Error::InappropriateHandshakeMessage { expect_types, got_type });
                }
            }
            rest = after;
        }
        self.message = rest.to_vec();
        Ok(())
    }
}

/// What the peer is told of an error; nothing where it told us.
pub fn answer(error: &Error) -> Option<AlertDescription> {
    Some(match error {
        Error::AlertReceived(_) => return None,
        Error::DecryptError => AlertDescription::BadRecordMac,
        Error::PeerSentOversizedRecord => AlertDescription::RecordOverflow,
        Error::InvalidMessage(_) => AlertDescription::DecodeError,
        Error::PeerMisbehaved(_)
        | Error::InappropriateMessage { .. }
        | Error::InappropriateHandshakeMessage { .. } => AlertDescription::UnexpectedMessage,
        _ => AlertDescription::InternalError,
    })
}

fn inappropriate(got_type: ContentType) -> Error {
    Error::InappropriateMessage { expect_types: vec![ContentType::ApplicationData], got_type }
}

fn alert(record: &[u8]) -> Result<Content, Error> {
    let &[_, description] = record else { return Err(InvalidMessage::InvalidContentType.into()) };
    match AlertDescription::from(description) {
        AlertDescription::CloseNotify => Ok(Content::Closed),
        // It announces a close (section 6.1).
        AlertDescription::UserCanceled => Ok(Content::Control),
        other => Err(Error::AlertReceived(other)),
    }
}

/// One direction's key.
struct Key {
    key: LessSafeKey,
    iv: [u8; 12],
    /// The number of the next record.
    next: u64,
}

impl Key {
    fn new((next, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(Error::General("a cipher suite whose records are not known here".into())),
        };
        let unusable = || Error::General("traffic secrets of a wrong length".into());
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| unusable())?;
        let iv = iv.as_ref().try_into().map_err(|_| unusable())?;
        Ok(Self { key: LessSafeKey::new(key), iv, next })
    }

    /// The next record's nonce (section 5.3).
    fn nonce(&mut self) -> Result<Nonce, Error> {
        let number = self.next;
        // Never comes: keys are changed long before. A nonce must not be used again all the same.
        self.next = number.checked_add(1).ok_or(Error::EncryptError)?;
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(number.to_be_bytes()) {
            *byte ^= number;
        }
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    /// Seals `plain` into `out`, which is longer by [`OVERHEAD`].
    fn seal(&mut self, kind: ContentType, plain: &[u8], out: &mut [u8]) -> Result<(), Error> {
        let [a, b] = ((plain.len() + 1 + TAG) as u16).to_be_bytes();
        let header = [ContentType::ApplicationData.into(), 3, 3, a, b];
        let nonce = self.nonce()?;
        let (start, rest) = out.split_first_chunk_mut::<HEADER>().ok_or(Error::EncryptError)?;
        *start = header;
        let (sealed, end) = rest.split_at_mut_checked(plain.len()).ok_or(Error::EncryptError)?;
        self.key
            .seal_out_of_place_scatter(nonce, Aad::from(header), plain, sealed, &[kind.into()], end)
            .map_err(|_| Error::EncryptError)
    }

    /// Opens a whole record where it lies, and leaves what it carried.
    fn open(&mut self, record: &mut BytesMut) -> Result<ContentType, Error> {
        let (header, sealed) = record.split_first_chunk_mut::<HEADER>().ok_or(Error::DecryptError)?;
        let outer = ContentType::from(header[0]);
        if outer != ContentType::ApplicationData {
            return Err(inappropriate(outer));
        }
        let nonce = self.nonce()?;
        let opened = self.key.open_in_place(nonce, Aad::from(*header), sealed);
        let opened = opened.map_err(|_| Error::DecryptError)?;
        if opened.len() > MAX_PLAIN + 1 {
            return Err(Error::PeerSentOversizedRecord);
        }
        // The content type comes after the content, and zeros may come after it (section 5.4).
        let end =
            opened.iter().rposition(|byte| *byte != 0).ok_or(PeerMisbehaved::IllegalTlsInnerPlaintext)?;
        let kind = ContentType::from(opened[end]);
        record.advance(HEADER);
        record.truncate(end);
        Ok(kind)
    }
}
