//! Questions to name servers (RFC 1035), each asked by itself: a resolver's answer is that of whichever replica of the
//! cluster's DNS it reached.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};

const A: u16 = 1;
const AAAA: u16 = 28;
/// The largest answer over UDP without extensions.
const LARGEST: usize = 512;
const HEADER: usize = 12;
/// What a server says of a name that it does not know.
const NO_SUCH_NAME: u8 = 3;

/// Which addresses each server gives for each name.
#[derive(Debug, Clone, Args)]
pub struct Resolve {
    /// A name server; several may be asked.
    #[arg(long, required = true)]
    server: Vec<IpAddr>,
    /// A full name; several may be asked for.
    #[arg(long, required = true)]
    name: Vec<String>,
    /// Milliseconds for each question.
    #[arg(long, default_value_t = 2000)]
    timeout_ms: u64,
}

impl Resolve {
    /// For each name an object of the servers and the addresses that each gave, none for a name that it does not know.
    ///
    /// # Errors
    /// When a server does not answer, or fails.
    pub(super) fn run(self) -> Result<Value> {
        let mut names = BTreeMap::new();
        for name in &self.name {
            let mut said = BTreeMap::new();
            for server in &self.server {
                let mut addresses = BTreeSet::new();
                for kind in [A, AAAA] {
                    let asked = self.ask(*server, name, kind);
                    addresses.extend(asked.with_context(|| format!("ask {server} for {name}"))?);
                }
                said.insert(server, addresses);
            }
            names.insert(name, said);
        }
        Ok(json!(names))
    }

    fn ask(&self, server: IpAddr, name: &str, kind: u16) -> Result<Vec<IpAddr>> {
        let any: IpAddr =
            if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        socket.connect(SocketAddr::new(server, 53))?;
        socket.set_read_timeout(Some(Duration::from_millis(self.timeout_ms)))?;
        let question = question(name, kind)?;
        socket.send(&question)?;
        let mut answer = [0; LARGEST];
        let length = socket.recv(&mut answer)?;
        addresses(&question, answer.get(..length).unwrap_or_default())
    }
}

fn question(name: &str, kind: u16) -> Result<Vec<u8>> {
    // Any id does: the socket is connected and asks once. Recursion desired, one question.
    let mut out = vec![0x57, 0xef, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.trim_end_matches('.').split('.') {
        ensure!(matches!(label.len(), 1..=63), "{name} is no name");
        out.push(u8::try_from(label.len())?);
        out.extend_from_slice(label.as_bytes());
    }
    out.push(0);
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&[0, 1]);
    Ok(out)
}

fn addresses(question: &[u8], answer: &[u8]) -> Result<Vec<IpAddr>> {
    let short = "the answer is cut short";
    let head = answer.get(..HEADER).context(short)?;
    ensure!(head[..2] == question[..2] && head[2] & 0x80 != 0, "an answer to another question");
    ensure!(head[2] & 2 == 0, "the answer is too long for UDP");
    match head[3] & 0xf {
        0 => {}
        NO_SUCH_NAME => return Ok(Vec::new()),
        code => bail!("the server fails with code {code}"),
    }
    let asked = answer.get(HEADER..question.len()).context(short)?;
    ensure!(asked.eq_ignore_ascii_case(&question[HEADER..]), "another question is answered");
    let (mut at, mut found) = (question.len(), Vec::new());
    for _ in 0..u16::from_be_bytes([head[6], head[7]]) {
        at = name_end(answer, at).context(short)?;
        let fixed = answer.get(at..at + 10).context(short)?;
        let length = usize::from(u16::from_be_bytes([fixed[8], fixed[9]]));
        let data = answer.get(at + 10..at + 10 + length).context(short)?;
        match u16::from_be_bytes([fixed[0], fixed[1]]) {
            A => found.push(<[u8; 4]>::try_from(data).context(short)?.into()),
            AAAA => found.push(<[u8; 16]>::try_from(data).context(short)?.into()),
            // Names that stand for others (CNAME) are followed by what they stand for.
            _ => {}
        }
        at += 10 + length;
    }
    Ok(found)
}

/// Where the name that begins at `at` ends: after an empty label or a pointer.
fn name_end(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            pointer if pointer & 0xc0 == 0xc0 => return Some(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(code: u8, records: &[&[u8]]) -> (Vec<u8>, Vec<u8>) {
        let question = question("web.shop.svc", A).unwrap_or_default();
        let mut answer = question.clone();
        answer[2] |= 0x80;
        answer[3] = code;
        answer[7] = u8::try_from(records.len()).unwrap_or_default();
        records.iter().for_each(|record| answer.extend_from_slice(record));
        (question, answer)
    }

    #[test]
    fn addresses_are_read_past_other_records() {
        let alias = [0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 5, 0, 2, 0xc0, 12];
        let address = [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 96, 0, 9];
        let (question, answer) = answered(0, &[&alias, &address]);
        let found = addresses(&question, &answer).ok();
        assert_eq!(found, Some(vec![IpAddr::from([10, 96, 0, 9])]));
        for length in 0..answer.len() {
            assert!(addresses(&question, &answer[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn an_unknown_name_has_no_address_and_a_failure_is_one() {
        let (question, answer) = answered(NO_SUCH_NAME, &[]);
        assert_eq!(addresses(&question, &answer).ok(), Some(Vec::new()));
        let (question, answer) = answered(2, &[]);
        assert!(addresses(&question, &answer).is_err());
    }
}
