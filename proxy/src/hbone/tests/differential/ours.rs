//! Our end.

use std::{
    collections::BTreeMap,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};

use super::wire::{End, Seen, Verdict, Wish, frames};
use crate::hbone::{Error, Role, Settings, core::Core, frame};

/// What the application has of a stream.
#[derive(Debug, Default)]
struct Use {
    answered: bool,
    ended: bool,
    keeps: bool,
    finish: bool,
    finished: bool,
    /// Bytes that wait to be sent.
    unsent: usize,
}

pub(super) struct Ours {
    core: Core,
    role: Role,
    now: Instant,
    cut: usize,
    /// The application ends its half only when it wants to.
    keeps: bool,
    streams: BTreeMap<u32, Use>,
}

impl Ours {
    /// An end that is greeted, with requests under way where it is a client; bytes come in pieces of `cut`.
    pub(super) fn new(
        role: Role,
        settings: Settings,
        (cut, keeps): (usize, bool),
        greeting: &[u8],
        requests: u32,
    ) -> Self {
        let now = Instant::now();
        let mut ours =
            Self { core: Core::new(role, settings, now), role, now, cut, keeps, streams: BTreeMap::new() };
        ours.core.receive(Bytes::copy_from_slice(greeting)).unwrap();
        for _ in 0..requests {
            let id = ours.core.open(([10, 0, 0, 1], 80).into(), &HeaderMap::new()).unwrap();
            ours.streams.insert(id, Use { keeps, ..Use::default() });
        }
        if role == Role::Client {
            ours.core.out.drain(..frame::PREFACE.len());
        }
        ours.work(Verdict::default());
        ours
    }

    fn work(&mut self, mut verdict: Verdict) -> Verdict {
        let mut cx = Context::from_waker(Waker::noop());
        loop {
            if verdict.over.is_none() {
                while let Poll::Ready(Some(asked)) = self.core.poll_asked(&mut cx) {
                    let headers = &asked.fields.headers;
                    let headers =
                        headers.iter().map(|(n, v)| (n.as_str().to_owned(), v.as_bytes().to_vec())).collect();
                    let method = asked.fields.method.unwrap_or_default().to_string();
                    let seen = Seen { method, authority: asked.fields.authority, headers };
                    verdict.asked.insert(asked.id, seen);
                    self.core.answer(asked.id, StatusCode::OK).unwrap();
                    self.streams
                        .insert(asked.id, Use { answered: true, keeps: self.keeps, ..Use::default() });
                }
                let Self { core, streams, .. } = self;
                streams.retain(|id, used| {
                    let goes_on = step(core, *id, used, &mut verdict, &mut cx);
                    if !goes_on {
                        core.drop_stream(*id, frame::Code::CANCEL);
                    }
                    goes_on
                });
            }
            let mut out = Vec::new();
            // As the driver does.
            if verdict.over.is_none() {
                self.core.part();
            }
            self.core.take_out(&mut out);
            if out.is_empty() {
                if verdict.over.is_none() && self.core.done() {
                    verdict.over = Some(0);
                }
                verdict.data.retain(|_, data| !data.is_empty());
                return verdict;
            }
            frames(&out).iter().for_each(|frame| verdict.wrote(frame));
        }
    }
}

/// Whether the stream goes on.
fn step(core: &mut Core, id: u32, used: &mut Use, verdict: &mut Verdict, cx: &mut Context<'_>) -> bool {
    if !used.answered {
        match core.poll_answer(id, cx) {
            Poll::Ready(Ok(status)) => {
                verdict.answers.insert(id, status.as_u16());
                used.answered = true;
            }
            Poll::Ready(Err(_)) => {
                verdict.lost.insert(id);
                return false;
            }
            Poll::Pending => {}
        }
    }
    while used.answered {
        let to = verdict.data.entry(id).or_default();
        let before = to.len();
        let take = |_: &mut Context<'_>, parts: &[std::io::IoSlice<'_>]| {
            parts.iter().for_each(|part| to.extend_from_slice(part));
            Poll::Ready(Ok(to.len() - before))
        };
        match core.deliver(id, cx, take) {
            Poll::Ready(Ok(0)) => {
                if !std::mem::replace(&mut used.ended, true) {
                    verdict.ended.insert(id);
                }
                break;
            }
            Poll::Ready(Ok(_)) => {}
            Poll::Ready(Err(_)) => {
                verdict.lost.insert(id);
                return false;
            }
            Poll::Pending => break,
        }
    }
    while used.unsent > 0 {
        match core.write(id, &vec![7; used.unsent], cx) {
            Poll::Ready(Ok(n)) => used.unsent -= n,
            Poll::Ready(Err(_)) => {
                verdict.lost.insert(id);
                return false;
            }
            Poll::Pending => break,
        }
    }
    if (used.ended && !used.keeps || used.finish) && used.unsent == 0 && !used.finished {
        core.finish(id).unwrap();
        used.finished = true;
    }
    !(used.ended && used.finished)
}

impl End for Ours {
    fn take(&mut self, bytes: &[u8]) -> Verdict {
        // Every frame has time of its own: neither are budgets used up, nor do windows grow for a quick reader.
        self.now += Duration::from_secs(1);
        self.core.set_now(self.now);
        let mut verdict = Verdict::default();
        for part in bytes.chunks(self.cut) {
            if let Err(error) = self.core.receive(Bytes::copy_from_slice(part)) {
                verdict.over = Some(match &error {
                    Error::Protocol { code, .. } | Error::Goaway(code) => code.0,
                    other => panic!("{:?}: {other}", self.role),
                });
                break;
            }
        }
        self.work(verdict)
    }

    fn wish(&mut self, wish: Wish) -> Verdict {
        let (Wish::Reset(id) | Wish::Send(id, _) | Wish::Finish(id)) = wish;
        if let Some(used) = self.streams.get_mut(&id) {
            match wish {
                Wish::Reset(_) => {
                    self.streams.remove(&id);
                    self.core.drop_stream(id, frame::Code::CANCEL);
                }
                Wish::Send(_, bytes) if !used.finish && !used.finished => used.unsent += bytes,
                Wish::Send(..) => {}
                Wish::Finish(_) => used.finish = true,
            }
        }
        self.work(Verdict::default())
    }
}
