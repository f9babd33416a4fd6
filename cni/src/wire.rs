//! What plugin and agent say to each other over the agent's socket: one line of JSON each way.

use std::io::{self, BufRead, BufReader, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Longest line, in bytes. A question holds names and paths, an answer a sentence.
pub const MAX_LINE: u64 = 8 << 10;

/// What happens to a Pod's sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Event {
    /// Its network is made, none of its processes runs; may it go on?
    Add,
    /// It ends, or did not come to be.
    Del,
}

/// What the plugin tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// What happens.
    pub event: Event,
    /// The Pod's namespace.
    pub namespace: String,
    /// The Pod's name.
    pub name: String,
    /// The Pod's UID; empty where the runtime does not tell it.
    #[serde(default)]
    pub uid: String,
    /// The runtime's id of the sandbox.
    pub sandbox: String,
    /// The path of its network namespace, as the runtime sees it; empty where it is gone.
    #[serde(default)]
    pub netns: String,
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "verdict")]
pub enum Answer {
    /// It may go on.
    Pass,
    /// It may not, now.
    Refuse {
        /// Why, and what to do.
        why: String,
    },
    /// The agent cannot judge yet: the list on the node decides.
    Unsure {
        /// Why.
        why: String,
    },
}

/// Reads a line.
///
/// # Errors
/// `UnexpectedEof` where the other end said nothing, `InvalidData` where it is too long or not what was expected.
pub fn read<T: DeserializeOwned>(from: impl Read) -> io::Result<T> {
    let mut line = Vec::new();
    BufReader::new(from.take(MAX_LINE)).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&line)?)
}

/// Writes a line.
///
/// # Errors
/// When the other end does not take it.
pub fn write(mut to: impl Write, what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    to.write_all(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_limited_and_newer_fields_are_let_be() {
        let mut line = Vec::new();
        write(&mut line, &Answer::Refuse { why: "later".into() }).unwrap();
        assert_eq!(line, b"{\"verdict\":\"refuse\",\"why\":\"later\"}\n");
        assert_eq!(read::<Answer>(&line[..]).unwrap(), Answer::Refuse { why: "later".into() });
        let newer = br#"{"event":"add","namespace":"a","name":"b","sandbox":"c","colour":1}"#;
        assert_eq!(read::<Question>(&newer[..]).unwrap().uid, "");
        assert_eq!(read::<Answer>(&b""[..]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let long = format!("{{\"verdict\":\"pass\"{}}}\n", " ".repeat(MAX_LINE as usize));
        assert_eq!(read::<Answer>(long.as_bytes()).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(read::<Answer>(&b"{}\n"[..]).is_err());
    }
}
