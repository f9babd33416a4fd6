//! Moves the body of a stream to another: the slower side's flow control window sets the pace.

use std::{
    future::poll_fn,
    task::{Context, Poll},
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::HeaderMap;

use super::super::message::{Known, classify};

/// Which end failed, and with what reset.
#[derive(Debug)]
pub(crate) enum PumpError {
    Source(Option<Reason>),
    Sink,
}

enum Event {
    Data(Option<Result<Bytes, h2::Error>>),
    Reset,
}

/// Moves data and trailers to the end.
pub(crate) async fn pump(
    from: &mut RecvStream,
    to: &mut SendStream<Bytes>,
    count: impl Fn(usize),
) -> Result<(), PumpError> {
    loop {
        let data = match poll_fn(|cx| next(from, to, cx)).await {
            Event::Data(Some(Ok(data))) => data,
            Event::Data(Some(Err(error))) => return Err(PumpError::Source(error.reason())),
            Event::Data(None) => break,
            Event::Reset => return Err(PumpError::Sink),
        };
        count(data.len());
        if forward(data, from, to).await? {
            return Ok(());
        }
    }
    let trailers = poll_fn(|cx| from.poll_trailers(cx)).await;
    let sent = match trailers.map_err(|error| PumpError::Source(error.reason()))? {
        Some(mut trailers) => {
            strip(&mut trailers);
            to.send_trailers(trailers)
        }
        None => to.send_data(Bytes::new(), true),
    };
    sent.map_err(|_| PumpError::Sink)
}

fn next(from: &mut RecvStream, to: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> Poll<Event> {
    if to.poll_reset(cx).is_ready() {
        return Poll::Ready(Event::Reset);
    }
    from.poll_data(cx).map(Event::Data)
}

/// Sends one piece; the source may send on only as its bytes went out. Says whether that was the end.
async fn forward(
    mut data: Bytes,
    from: &mut RecvStream,
    to: &mut SendStream<Bytes>,
) -> Result<bool, PumpError> {
    loop {
        let wanted = data.len();
        let end = from.is_end_stream();
        if wanted == 0 && !end {
            return Ok(false);
        }
        to.reserve_capacity(wanted);
        while wanted > 0 && to.capacity() == 0 {
            match poll_fn(|cx| to.poll_capacity(cx)).await {
                Some(Ok(_)) => {}
                Some(Err(_)) => return Err(PumpError::Sink),
                None => return Err(PumpError::Sink),
            }
        }
        let part = data.split_to(wanted.min(to.capacity()));
        let count = part.len();
        let last = end && data.is_empty();
        to.send_data(part, last).map_err(|_| PumpError::Sink)?;
        from.flow_control().release_capacity(count).map_err(|error| PumpError::Source(error.reason()))?;
        if data.is_empty() {
            return Ok(last);
        }
    }
}

/// Takes away what a trailer may not say (RFC 9110 section 6.5.1).
fn strip(trailers: &mut HeaderMap) {
    let taken: Vec<_> =
        trailers.keys().filter(|name| classify(name.as_str().as_bytes()) != Known::Other).cloned().collect();
    for name in taken {
        trailers.remove(name);
    }
}
