//! `sock_ops`: carries what the connecting socket knows to the accepted one, through a map keyed by the connection.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock_ops},
    helpers::generated::bpf_get_netns_cookie,
    programs::SockOpsContext,
};
use weft_ebpf_common::{
    Addr, OrigDst, SkMeta, Tuple, addr,
    codes::{kind, stat},
};

use crate::{
    events,
    maps::{CLIENT_OF, Handover, ORIG_DST},
    sock,
};

const AF_INET: u32 = 2;

/// The hook. It runs for every TCP event of every socket: all but two leave at once.
#[inline(always)]
pub(crate) fn sock_ops(ctx: &SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ctx),
        _ => {}
    }
    1
}

/// The source port is chosen, the SYN has not left: the entry is there before the other end can ask for it.
#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    // SAFETY: a plain field of the context.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return;
    }
    // SAFETY: not null.
    let meta = unsafe { sock::meta(sk) };
    if meta.is_null() {
        return;
    }
    // SAFETY: not null, and the entry lives as long as the socket.
    let meta = unsafe { &*meta };
    let to: &Handover = match meta.kind {
        kind::APP => &ORIG_DST,
        kind::PROXY if !addr::is_unspecified(&meta.addr) => &CLIENT_OF,
        _ => return,
    };
    let (local, remote) = addresses(ctx.ops);
    let (sport, dport) = ports(ctx);
    let key = Tuple { netns: netns(ctx), src: local, dst: remote, sport, dport, proto: 0 };
    let value = OrigDst {
        addr: meta.addr,
        cookie: meta.cookie,
        subject: meta.subject,
        port: meta.port,
        family: meta.family,
        pad: 0,
    };
    if to.insert(key, value, 0).is_err() {
        events::count(stat::MAP_FULL);
    }
}

/// A connection came in: takes over what its other end left, so that a full map can hurt only connections that are
/// just being made.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let (local, remote) = addresses(ctx.ops);
    let redirected = addr::is_redirect_range(&local) || addr::same(&local, &remote);
    let dialled = addr::is_dial_source(&remote);
    if !redirected && !dialled && !addr::same(&remote, &addr::LOOPBACK6) {
        return;
    }
    let (own_port, peer_port) = ports(ctx);
    let key =
        Tuple { netns: netns(ctx), src: remote, dst: local, sport: peer_port, dport: own_port, proto: 0 };
    let (from, kind): (&Handover, u8) =
        if redirected { (&ORIG_DST, kind::ACCEPTED_OUT) } else { (&CLIENT_OF, kind::ACCEPTED_IN) };
    // SAFETY: the entry is of this connection alone and is read before it is deleted.
    let Some(found) = (unsafe { from.get(&key) }) else {
        if addr::is_redirect_range(&local) {
            events::count(stat::ORIG_MISS);
        } else if dialled {
            events::count(stat::CLIENT_MISS);
        }
        return;
    };
    let mut meta = SkMeta {
        kind,
        family: found.family,
        port: found.port,
        subject: found.subject,
        addr: found.addr,
        cookie: found.cookie,
        netns: key.netns,
    };
    // SAFETY: a plain field of the context.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return;
    }
    // SAFETY: not null.
    if !unsafe { sock::set_meta(sk, &mut meta) } {
        events::count(stat::MAP_FULL);
    }
    // Nothing can be done, nor needs to, where it is gone already.
    let _ = from.remove(&key);
}

#[inline(always)]
fn netns(ctx: &SockOpsContext) -> u64 {
    // SAFETY: takes the context, gives a number.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// Own and peer port, host order.
#[inline(always)]
fn ports(ctx: &SockOpsContext) -> (u16, u16) {
    // The context has the own port in host order, the peer's in network order.
    (ctx.local_port() as u16, u32::from_be(ctx.remote_port()) as u16)
}

/// Own and peer address.
#[inline(always)]
fn addresses(ops: *mut bpf_sock_ops) -> (Addr, Addr) {
    // SAFETY: plain fields of the context, read word by word as the verifier wants it.
    unsafe {
        if (*ops).family == AF_INET {
            return (addr::v4((*ops).local_ip4.to_ne_bytes()), addr::v4((*ops).remote_ip4.to_ne_bytes()));
        }
        let read = |field: *const u32| {
            addr::from_words([
                field.read_volatile(),
                field.add(1).read_volatile(),
                field.add(2).read_volatile(),
                field.add(3).read_volatile(),
            ])
        };
        let remote = read((&raw const (*ops).remote_ip6).cast());
        // While a v4-mapped connect is under way, the socket's own IPv6 address is not set yet.
        let local = if addr::is_v4(&remote) {
            addr::v4((*ops).local_ip4.to_ne_bytes())
        } else {
            read((&raw const (*ops).local_ip6).cast())
        };
        (local, remote)
    }
}
