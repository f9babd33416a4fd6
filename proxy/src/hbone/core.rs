//! One connection's protocol state, without a socket: bytes in, bytes out, and streams in between.
//!
//! The connection's credit is given back on receipt and a stream's on delivery (see [`Core::read`]): however many
//! streams stall, the others find credit, and what a stalled one makes us hold is its own window.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasherDefault, Hasher},
    io,
    task::Waker,
    time::Instant,
};

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};

use super::{
    Settings,
    flood::Flood,
    frame::{self, Code, setting},
    hpack::{self, Decoder},
    pace::{self, Pace},
    reader::Reader,
    received::Received,
    window::Window,
};

mod owner;
mod peer;

/// Bytes of frames that wait for TLS before streams are made to wait.
const BACKLOG: usize = 512 * 1024;
/// What streams that seldom send may add to a full backlog: a request passes the bulk that waits.
const PRIORITY: usize = 128 * 1024;
/// Most that one stream gives at a time; while others wait, in a turn.
const QUANTUM: usize = 64 * 1024;
/// What it may give in a turn however many wait.
const SHARE: usize = 16 * 1024;
/// Streams from which on what one has to say waits for the others.
const CROWD: usize = 16;
/// The connection's own window: larger than what is ever under way.
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;
/// What both ends begin with (RFC 9113 section 6.9.2).
const DEFAULT_WINDOW: u32 = 65_535;
/// Frame size that every peer takes.
const DEFAULT_FRAME: usize = 16_384;
/// Streams that we reset and remember.
const FORGOTTEN: usize = 64;
/// Answers (to PING, SETTINGS, refused streams) that wait for a peer that does not read.
const MAX_ANSWERS: usize = 64 * 1024;

/// Which end we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The one that opens streams.
    Client,
    /// The one that takes them.
    Server,
}

/// Why a connection is over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The peer broke the protocol.
    #[error("the peer broke HTTP/2 ({code:?}): {what}")]
    Protocol {
        /// What it is told.
        code: Code,
        /// What it did.
        what: &'static str,
    },
    /// The peer says so.
    #[error("the peer ended the connection ({0:?})")]
    Goaway(Code),
    /// The transport failed.
    #[error("the connection failed: {0}")]
    Io(String),
    /// It ended in order.
    #[error("the connection is closed")]
    Closed,
}

/// Why a stream is over before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// It was reset.
    #[error("the stream was reset ({0:?})")]
    Reset(Code),
    /// Nothing of it was done: it may be tried on another connection.
    #[error("the stream was refused")]
    Refused,
    /// The connection ended.
    #[error("the stream's connection ended")]
    Connection,
}

impl From<Lost> for io::Error {
    fn from(lost: Lost) -> Self {
        let kind = match lost {
            Lost::Connection => io::ErrorKind::BrokenPipe,
            Lost::Reset(_) | Lost::Refused => io::ErrorKind::ConnectionReset,
        };
        Self::new(kind, lost)
    }
}

/// Stream ids are what they are: nothing to mix.
#[derive(Debug, Default)]
pub(super) struct Ids(u64);

impl Hasher for Ids {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0 << 8 | u64::from(*byte);
        }
    }

    fn write_u32(&mut self, id: u32) {
        // The table takes its buckets from the low bits and its tags from the high ones.
        self.0 = u64::from(id >> 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// One stream.
#[derive(Debug)]
struct Stream {
    /// Not delivered yet.
    received: Received,
    window: Window,
    /// What the peer takes.
    credit: i64,
    /// The peer will send no more.
    ended: bool,
    /// We will send no more.
    finished: bool,
    /// The peer has answered in full and reads no more, which fails only what is sent (RFC 9113 section 8.1).
    deaf: bool,
    lost: Option<Lost>,
    /// The answer to a CONNECT that we sent.
    answer: Option<StatusCode>,
    /// The CONNECT was answered, by either end.
    answered: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
    /// The turn in which it sent last.
    sent: u64,
    /// It could not send when it wanted to, and has not since.
    held: bool,
    /// It is among those that wait.
    waits: bool,
    pace: Pace,
}

/// A header list of a request or response, checked for its form.
#[derive(Debug, Default)]
pub(super) struct Fields {
    pub(super) method: Option<Method>,
    pub(super) authority: Option<String>,
    pub(super) status: Option<StatusCode>,
    pub(super) headers: HeaderMap,
    /// A `:scheme` or a `:path`, which a CONNECT has not.
    located: bool,
    malformed: bool,
}

/// A request that the peer sent.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) id: u32,
    pub(super) fields: Fields,
}

/// The state.
#[derive(Debug)]
pub(super) struct Core {
    role: Role,
    settings: Settings,
    pub(super) reader: Reader,
    /// Frames for TLS.
    pub(super) out: Vec<u8>,
    /// Who writes them, where it is not about to anyway.
    pub(super) driver: Option<Waker>,
    /// To be woken once the lock is gone.
    pub(super) woken: Vec<Waker>,
    streams: HashMap<u32, Stream, BuildHasherDefault<Ids>>,
    /// Streams for which something came in this turn that still lies in the socket's buffer.
    lent: Vec<u32>,
    asked: VecDeque<Asked>,
    acceptor: Option<Waker>,
    next: u32,
    last: u32,
    credit: i64,
    /// Received since the peer got credit for it.
    taken: u32,
    peer_window: u32,
    peer_frame: usize,
    peer_streams: u32,
    /// What the peer's decoder may remember; we use nothing of it.
    peer_table: u32,
    /// The peer reduced it: the next header block has to say so.
    shrunk: bool,
    /// Streams that we reset last, of which the peer may not know yet.
    forgotten: VecDeque<u32>,
    /// Streams that wait for the connection's credit or for room in `out`.
    waiting: VecDeque<u32>,
    /// Those of them that had their share in this turn: they come after all that had none.
    served: VecDeque<u32>,
    /// More than one stream had waited when this turn began.
    crowd: bool,
    /// How often frames were taken out; more than 1 from the start, so that a new stream's last turn is long ago.
    turn: u64,
    decoder: Decoder,
    flood: Flood,
    /// Bytes of answers in `out`.
    answers: usize,
    /// The last stream that the peer will serve.
    goaway: Option<u32>,
    /// How far our own goodbye went.
    leaving: Leaving,
    /// Nobody opens streams any more.
    pub(super) abandoned: bool,
    pings: u64,
    pongs: u64,
    pinger: Option<Waker>,
    pub(super) over: Option<Error>,
    now: Instant,
    begun: Instant,
    /// Milliseconds from then to now.
    clock: u32,
    /// When a stream carried bulk last, by that clock.
    bulk: Option<u32>,
    /// Who waits for that.
    watcher: Option<Waker>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaving {
    No,
    /// Told, without a last stream: those under way to us are still taken.
    Announced,
    /// Told, with the last stream.
    Said,
}

impl Core {
    pub(super) fn new(role: Role, settings: Settings, now: Instant) -> Self {
        let mut out = Vec::new();
        if role == Role::Client {
            out.extend_from_slice(frame::PREFACE);
        }
        let mut values = vec![
            (setting::INITIAL_WINDOW_SIZE, settings.window),
            (setting::MAX_FRAME_SIZE, settings.frame as u32),
            (setting::MAX_HEADER_LIST_SIZE, hpack::MAX_LIST as u32),
        ];
        match role {
            Role::Client => values.extend([(setting::ENABLE_PUSH, 0), (setting::MAX_CONCURRENT_STREAMS, 0)]),
            Role::Server => values.push((setting::MAX_CONCURRENT_STREAMS, settings.streams)),
        }
        frame::settings(&mut out, &values);
        frame::window(&mut out, 0, CONNECTION_WINDOW - DEFAULT_WINDOW);
        Self {
            role,
            settings,
            reader: Reader::new(role, settings.frame),
            out,
            driver: None,
            woken: Vec::new(),
            streams: HashMap::default(),
            lent: Vec::new(),
            asked: VecDeque::new(),
            acceptor: None,
            next: 1,
            last: 0,
            credit: DEFAULT_WINDOW.into(),
            taken: 0,
            peer_window: DEFAULT_WINDOW,
            peer_frame: DEFAULT_FRAME,
            peer_streams: settings.streams,
            peer_table: hpack::TABLE as u32,
            shrunk: false,
            forgotten: VecDeque::new(),
            waiting: VecDeque::new(),
            served: VecDeque::new(),
            crowd: false,
            turn: 2,
            decoder: Decoder::new(),
            flood: Flood::new(now),
            answers: 0,
            goaway: None,
            leaving: Leaving::No,
            abandoned: false,
            pings: 0,
            pongs: 0,
            pinger: None,
            over: None,
            now,
            begun: now,
            clock: 0,
            bulk: None,
            watcher: None,
        }
    }

    // What the driver does.

    /// Time, for the budgets; read once a turn.
    pub(super) fn set_now(&mut self, now: Instant) {
        self.now = now;
        self.clock = self.clock(now);
    }

    /// Ends what is lent of the buffer that the socket was read into: whoever could write had a turn for it.
    pub(super) fn keep(&mut self) {
        for id in self.lent.drain(..) {
            if let Some(stream) = self.streams.get_mut(&id) {
                stream.received.keep();
            }
        }
    }

    /// Whether something is to be written, and so many streams are open that more will soon be.
    pub(super) fn crowded(&self) -> bool {
        self.streams.len() >= CROWD && !self.out.is_empty() && !self.choked()
    }

    /// The frames to be written now.
    pub(super) fn take_out(&mut self, into: &mut Vec<u8>) {
        std::mem::swap(&mut self.out, into);
        self.answers = 0;
        self.turn += 1;
        self.crowd = self.queue() > 1;
        self.admit();
    }

    /// Whether a peer that does not read makes answers pile up: then nothing more is read from it.
    pub(super) fn choked(&self) -> bool {
        self.answers > MAX_ANSWERS
    }

    /// Whether everything that there was to do is done.
    pub(super) fn done(&self) -> bool {
        let leaving = self.leaving == Leaving::Said || self.goaway.is_some() || self.abandoned;
        leaving && self.unused()
    }

    /// Whether no stream is open.
    pub(super) fn unused(&self) -> bool {
        self.streams.is_empty() && self.asked.is_empty()
    }

    /// Says goodbye where everything is done (RFC 9113 section 6.8: also before a close that nobody minds).
    pub(super) fn part(&mut self) {
        if self.done() && self.leaving != Leaving::Said {
            self.leaving = Leaving::Said;
            frame::goaway(&mut self.out, self.last, Code::NO_ERROR);
        }
    }

    /// Ends all streams: the connection is no more.
    pub(super) fn fail(&mut self, error: Error) {
        if self.over.is_none() {
            self.over = Some(error);
        }
        // No turn comes after this one, and a reader that stalls may hold what is lent for long.
        self.keep();
        for stream in self.streams.values_mut() {
            if !(stream.ended && stream.finished) {
                stream.lost.get_or_insert(Lost::Connection);
            }
            self.woken.extend(stream.reader.take().into_iter().chain(stream.writer.take()));
        }
        self.woken.extend(self.acceptor.take().into_iter().chain(self.pinger.take()));
        self.woken.extend(self.driver.take());
    }

    /// An error of the whole connection: the peer is told.
    pub(super) fn broken(&mut self, code: Code, what: &'static str) -> Error {
        frame::goaway(&mut self.out, self.last, code);
        Error::Protocol { code, what }
    }

    fn wake_driver(&mut self) {
        self.woken.extend(self.driver.take());
    }

    /// How many streams wait.
    fn queue(&self) -> usize {
        self.waiting.len() + self.served.len()
    }

    /// Lets streams that wait for the connection write again.
    fn admit(&mut self) {
        if self.credit <= 0 {
            return;
        }
        // All of them: each takes its turn, and waits again at the end of the queue where nothing was left.
        while let Some(id) = self.waiting.pop_front().or_else(|| self.served.pop_front()) {
            if let Some(stream) = self.streams.get_mut(&id) {
                stream.waits = false;
                self.woken.extend(stream.writer.take());
            }
        }
    }

    fn stream(&self) -> Stream {
        Stream {
            received: Received::default(),
            window: Window::new(self.settings.window, self.now),
            credit: self.peer_window.into(),
            ended: false,
            finished: false,
            deaf: false,
            lost: None,
            answer: None,
            answered: false,
            reader: None,
            writer: None,
            sent: 0,
            held: false,
            waits: false,
            pace: Pace::default(),
        }
    }

    /// Milliseconds since the beginning; they wrap after 49 days, which [`pace`] knows.
    fn clock(&self, now: Instant) -> u32 {
        now.saturating_duration_since(self.begun).as_millis() as u32
    }

    /// A stream moves so much that the others notice.
    fn saw_bulk(&mut self) {
        self.bulk = Some(self.clock);
        self.woken.extend(self.watcher.take());
    }

    /// Whether one does, or did a moment ago.
    pub(super) fn carries_bulk(&self, now: Instant) -> bool {
        self.bulk.is_some_and(|at| pace::lasts(at, self.clock(now)))
    }
}

impl Fields {
    /// Takes a field in; RFC 9113 section 8.2 and 8.3 say what makes a message malformed.
    fn take(&mut self, name: &[u8], value: &[u8]) {
        let twice = match name {
            b":method" => match Method::from_bytes(value) {
                Ok(method) => self.method.replace(method).is_some(),
                Err(_) => true,
            },
            b":authority" => self.authority.replace(String::from_utf8_lossy(value).into_owned()).is_some(),
            b":status" => match StatusCode::from_bytes(value) {
                Ok(status) => self.status.replace(status).is_some(),
                Err(_) => true,
            },
            b":scheme" | b":path" => {
                self.located = true;
                false
            }
            _ => {
                // No capital letters, and no pseudo-header after this.
                let lower = !name.iter().any(u8::is_ascii_uppercase);
                let good = lower && !of_connection(name, value) && value.trim_ascii() == value;
                match (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
                    (Ok(name), Ok(value)) if good => {
                        self.headers.append(name, value);
                    }
                    _ => self.malformed = true,
                }
                return;
            }
        };
        self.malformed |= twice || !self.headers.is_empty();
    }

    /// Whether it can be no request: section 8.3.1, and section 8.5 for a CONNECT.
    fn no_request(&self) -> bool {
        let connect = self.method.as_ref() == Some(&Method::CONNECT);
        self.malformed || self.status.is_some() || self.method.is_none() || (connect && self.located)
    }

    /// Whether it can be no answer (section 8.3.2).
    fn no_answer(&self) -> bool {
        self.malformed || self.method.is_some() || self.authority.is_some() || self.located
    }
}

/// Whether a field speaks of a connection, which is HTTP/1's way (section 8.2.2).
fn of_connection(name: &[u8], value: &[u8]) -> bool {
    match name {
        b"connection" | b"proxy-connection" | b"keep-alive" | b"transfer-encoding" | b"upgrade" => true,
        b"te" => value != b"trailers",
        _ => false,
    }
}
