//! Two ends with secrets that are made up, for tests and the fuzzer.

use super::*;

/// Gives one key after the other; both ends count alike.
struct Counted {
    seal: u8,
    open: u8,
}

fn secrets(number: u8) -> (u64, ConnectionTrafficSecrets) {
    (0, ConnectionTrafficSecrets::Aes256Gcm { key: [number; 32].into(), iv: [number; 12].into() })
}

impl Keys for Counted {
    fn next_seal(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        self.seal = self.seal.wrapping_add(2);
        Ok(secrets(self.seal))
    }

    fn next_open(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        self.open = self.open.wrapping_add(2);
        Ok(secrets(self.open))
    }
}

/// A client's and a server's end of one connection.
#[expect(clippy::expect_used, reason = "for tests; the secrets have the right length")]
pub(crate) fn ends() -> (Records, Records) {
    let end = |seal: u8, open: u8, tickets| Records {
        seal: Key::new(secrets(seal)).expect("a key of 32 bytes"),
        open: Key::new(secrets(open)).expect("a key of 32 bytes"),
        keys: Box::new(Counted { seal, open }),
        limit: 1 << 24,
        tickets,
        message: Vec::new(),
        idle: 0,
        asked: false,
    };
    (end(0, 1, true), end(1, 0, false))
}
