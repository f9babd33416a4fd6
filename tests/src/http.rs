//! A minimal HTTP/1.1 client over `std`, so that what a Pod sends is exactly what is written here.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream, ToSocketAddrs as _},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

/// An answer.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Header names (lower case) and values.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The first header of that name (lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// A request.
#[derive(Debug, Clone)]
pub struct Request {
    /// Method.
    pub method: String,
    /// Path with query.
    pub path: String,
    /// Host header.
    pub host: String,
    /// Further headers.
    pub headers: Vec<(String, String)>,
    /// Body; sent with a content-length where not empty.
    pub body: Vec<u8>,
    /// Whether the connection stays open.
    pub keep_alive: bool,
}

impl Request {
    /// A GET that closes the connection.
    pub fn get(host: &str, path: &str) -> Self {
        let (method, path, host) = ("GET".into(), path.into(), host.into());
        Self { method, path, host, headers: Vec::new(), body: Vec::new(), keep_alive: false }
    }

    /// Its length on the wire, in bytes.
    #[allow(clippy::len_without_is_empty, reason = "a request is never empty")]
    pub fn len(&self) -> usize {
        self.head().len() + self.body.len()
    }

    fn head(&self) -> String {
        let mut head = format!("{} {} HTTP/1.1\r\nhost: {}\r\n", self.method, self.path, self.host);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !self.body.is_empty() {
            head.push_str(&format!("content-length: {}\r\n", self.body.len()));
        }
        if !self.keep_alive {
            head.push_str("connection: close\r\n");
        }
        head + "\r\n"
    }
}

/// The name in an `address:port` has no address: nothing was dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lookup(String);

impl std::fmt::Display for Lookup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "look up {}", self.0)
    }
}

/// Dials with a timeout that also bounds each read and write.
///
/// # Errors
/// [`Lookup`] as the context of what the resolver says, or what connect says.
pub fn dial(address: &str, timeout: Duration) -> Result<TcpStream> {
    let lookup = || Lookup(address.to_owned());
    let mut found = address.to_socket_addrs().with_context(lookup)?;
    let address: SocketAddr = found.next().context("no address").with_context(lookup)?;
    let stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Sends a request on a connection and reads its answer.
///
/// # Errors
/// When the connection fails or the answer is malformed.
pub fn exchange(stream: &TcpStream, request: &Request) -> Result<Answer> {
    let mut out = request.head().into_bytes();
    out.extend_from_slice(&request.body);
    (&*stream).write_all(&out).context("send the request")?;
    read_answer(&mut BufReader::new(stream), request.method == "HEAD")
}

/// One GET over a connection of its own.
///
/// # Errors
/// As [`dial`] and [`exchange`].
pub fn get(address: &str, host: &str, path: &str, timeout: Duration) -> Result<Answer> {
    exchange(&dial(address, timeout)?, &Request::get(host, path))
}

fn read_answer(input: &mut BufReader<&TcpStream>, head_only: bool) -> Result<Answer> {
    let mut line = String::new();
    if input.read_line(&mut line).context("read the answer")? == 0 {
        bail!("closed without an answer");
    }
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let mut answer =
        Answer { status: status.with_context(|| format!("not HTTP: {line:?}"))?, ..Answer::default() };
    loop {
        line.clear();
        if input.read_line(&mut line).context("read the headers")? == 0 {
            bail!("closed inside the headers");
        }
        let text = line.trim_end();
        if text.is_empty() {
            break;
        }
        let (name, value) = text.split_once(':').with_context(|| format!("not a header: {text:?}"))?;
        answer.headers.push((name.to_ascii_lowercase(), value.trim().into()));
    }
    if head_only || answer.status == 204 || answer.status == 304 {
        return Ok(answer);
    }
    if answer.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
        loop {
            line.clear();
            input.read_line(&mut line).context("read a chunk's size")?;
            let size =
                usize::from_str_radix(line.trim(), 16).with_context(|| format!("chunk size {line:?}"))?;
            let mut chunk = vec![0; size + 2];
            input.read_exact(&mut chunk).context("read a chunk")?;
            if size == 0 {
                return Ok(answer);
            }
            answer.body.extend_from_slice(&chunk[..size]);
        }
    }
    match answer.header("content-length").map(str::parse::<usize>) {
        Some(length) => {
            answer.body = vec![0; length.context("content-length")?];
            input.read_exact(&mut answer.body).context("read the body")?;
        }
        None => {
            input.read_to_end(&mut answer.body).context("read the body to its end")?;
        }
    }
    Ok(answer)
}
