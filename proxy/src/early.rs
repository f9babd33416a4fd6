//! What an application says before anybody answers it. It goes along with the CONNECT, so that nobody waits a round trip
//! for the 200 before the first byte leaves. Over HTTP/2 that is safe (unlike HTTP/1, where a proxy that refuses would read
//! the bytes as a next request): they are in a stream of their own, and go with it.
//!
//! The tunnel is proven by both ends before, and a proxy passes nothing on before it has judged the connection: this is
//! no early data of TLS. What was sent so may have been heard by the application at the other end, though; it goes to
//! another one only where it surely was not.

use std::io::{self, Read as _};

use socket2::SockRef;

use crate::socket::Socket;

/// What is taken at a time; a first request fits. The rest is copied once the connection stands.
const MOST: usize = 4096;

/// An application's first bytes.
#[derive(Debug, Default)]
pub struct Early<'a> {
    app: Option<&'a Socket>,
    data: Vec<u8>,
    sent: usize,
}

impl<'a> Early<'a> {
    /// Those of an application.
    pub fn of(app: &'a Socket) -> Self {
        Self { app: Some(app), ..Self::default() }
    }

    /// What it has said by now; nothing where it waits, or where somebody else reads it.
    ///
    /// # Errors
    /// When its connection failed.
    pub fn data(&mut self) -> io::Result<&[u8]> {
        if self.data.is_empty()
            && let Some(app) = self.app
        {
            let mut room = [0; MOST];
            // Beside the runtime, which does not know yet that there is something: it looks once in vain later.
            match (&*SockRef::from(app.stream())).read(&mut room) {
                Ok(n) => self.data = room[..n].to_vec(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(&self.data)
    }

    /// So many bytes of it went out.
    pub fn sent(&mut self, bytes: usize) {
        self.sent = bytes;
    }

    /// None of it was passed on: it may go elsewhere.
    pub fn unheard(&mut self) {
        self.sent = 0;
    }

    /// Whether some application may have heard of it.
    pub fn heard(&self) -> bool {
        self.sent > 0
    }

    /// How much of it went out, and what did not.
    pub fn into_parts(mut self) -> (usize, Vec<u8>) {
        self.data.drain(..self.sent);
        (self.sent, self.data)
    }
}
