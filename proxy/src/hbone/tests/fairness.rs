//! Many streams that want to send at once: each gets its share, and who seldom sends does not wait behind them.

use std::{
    collections::{HashMap, VecDeque},
    task::{Context, Wake, Waker},
    time::Instant,
};

use parking_lot::Mutex;

use super::{
    super::frame::{self, kind, setting, settings},
    *,
};
use crate::hbone::{core::Core, hpack};

/// A server's state with so many streams, whose peer grants more than anybody sends.
fn core(streams: u32) -> Core {
    let mut bytes = frame::PREFACE.to_vec();
    settings(&mut bytes, &[(setting::INITIAL_WINDOW_SIZE, 1 << 30)]);
    frame::window(&mut bytes, 0, 1 << 30);
    let mut block = Vec::new();
    hpack::named(&mut block, hpack::index::METHOD, b"CONNECT");
    hpack::named(&mut block, hpack::index::AUTHORITY, b"10.0.0.1:80");
    for n in 0..streams {
        frame::head(&mut bytes, block.len(), kind::HEADERS, frame::flag::END_HEADERS, 1 + 2 * n);
        bytes.extend_from_slice(&block);
    }
    let mut core = Core::new(Role::Server, Settings { streams: 1_000, ..SETTINGS }, Instant::now());
    core.receive(bytes.into()).unwrap();
    core
}

/// The tasks that were woken, in order.
type Woken = Arc<Mutex<VecDeque<u32>>>;

struct Task(Woken, u32);

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        self.0.lock().push_back(self.1);
    }
}

/// Writes as much as goes, as the task of a bulk stream does.
fn pour(core: &mut Core, id: u32, woken: &Woken) -> usize {
    let (data, mut sent) = (vec![0; 1 << 20], 0);
    let waker = Waker::from(Arc::new(Task(woken.clone(), id)));
    let mut cx = Context::from_waker(&waker);
    while let Poll::Ready(n) = core.write(id, &data, &mut cx) {
        sent += n.unwrap();
    }
    sent
}

/// One turn: who was woken writes, then the driver takes what there is.
fn turn(core: &mut Core, woken: &Woken, mut sent: impl FnMut(u32, usize)) -> usize {
    let ready = std::mem::take(&mut *woken.lock());
    for id in ready {
        sent(id, pour(core, id, woken));
    }
    let mut frames = Vec::new();
    core.take_out(&mut frames);
    std::mem::take(&mut core.woken).into_iter().for_each(Waker::wake);
    frames.len()
}

fn bulk(streams: u32) -> (Core, Woken) {
    (core(streams + 1), Arc::new(Mutex::new((0..streams).map(|n| 1 + 2 * n).collect())))
}

#[test]
fn all_that_wait_get_the_same() {
    let (mut core, woken) = bulk(200);
    let mut sent = HashMap::<u32, usize>::new();
    // In the first nobody waits yet.
    turn(&mut core, &woken, |_, _| ());
    for _ in 0..200 {
        let bytes = turn(&mut core, &woken, |id, n| *sent.entry(id).or_default() += n);
        assert!(bytes < 1 << 20, "a turn has {bytes} bytes");
    }
    let (least, most) = (*sent.values().min().unwrap(), *sent.values().max().unwrap());
    assert!(sent.len() == 200 && least * 2 > most, "between {least} and {most} bytes");
}

#[test]
fn a_request_passes_the_bulk() {
    let (mut core, woken) = bulk(200);
    let mut cx = Context::from_waker(Waker::noop());
    for n in 0..20 {
        turn(&mut core, &woken, |_, _| ());
        if n % 4 == 3 {
            // After all that were woken before it.
            let ready: Vec<u32> = woken.lock().drain(..).collect();
            for id in ready {
                pour(&mut core, id, &woken);
            }
            assert!(core.write(401, b"a request", &mut cx).is_ready(), "it waits in turn {n}");
        }
    }
}
