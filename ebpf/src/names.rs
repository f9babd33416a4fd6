//! `getpeername` and `getsockname`: what applications see of their connections.

use aya_ebpf::{bindings::bpf_sock_addr, programs::SockAddrContext};
use weft_ebpf_common::{
    Addr, addr,
    codes::{kind, stat},
};

use crate::{connect::write6, events, maps::PODS, sock};

const DONE: i32 = 1;

/// The peer: what was dialled, or the real client. `accept4` asks here too.
#[inline(always)]
pub(crate) fn peer(ctx: &SockAddrContext, v6: bool) -> i32 {
    let raw = ctx.sock_addr;
    // SAFETY: the socket of the context is never null in this hook.
    let meta = unsafe { sock::meta((*raw).__bindgen_anon_1.sk) };
    if !meta.is_null() {
        // SAFETY: not null, and the entry lives as long as the socket.
        let meta = unsafe { &*meta };
        match meta.kind {
            kind::APP => show(raw, v6, &meta.addr, meta.port),
            // An IPv4 socket has no way to show an IPv6 client.
            kind::ACCEPTED_IN if v6 || meta.family == 4 => show(raw, v6, &meta.addr, meta.port),
            kind::ACCEPTED_IN => show(raw, v6, &addr::NONE, 0),
            _ => {}
        }
        return DONE;
    }
    if addr::is_dial_source(&current(raw, v6)) {
        // Applications trust loopback; a client that is not known must not look like it.
        events::count(stat::CLIENT_MISS);
        show(raw, v6, &addr::NONE, 0);
    }
    DONE
}

/// The own address: the Pod's, where a redirected connection leaves from loopback.
#[inline(always)]
pub(crate) fn own(ctx: &SockAddrContext, v6: bool) -> i32 {
    let raw = ctx.sock_addr;
    // SAFETY: the socket of the context is never null in this hook.
    let meta = unsafe { sock::meta((*raw).__bindgen_anon_1.sk) };
    if meta.is_null() {
        return DONE;
    }
    // SAFETY: not null, and the entry lives as long as the socket.
    let meta = unsafe { &*meta };
    if meta.kind != kind::APP || !addr::is_loopback(&current(raw, v6)) {
        return DONE;
    }
    // SAFETY: rows are replaced whole by the agent.
    if let Some(pod) = unsafe { PODS.get(meta.netns) } {
        let address = if meta.family == 4 { &pod.ip4 } else { &pod.ip6 };
        if v6 {
            write6(raw, address);
        } else {
            // SAFETY: a plain field of the context.
            unsafe { (*raw).user_ip4 = addr::words(address)[3] };
        }
    }
    DONE
}

#[inline(always)]
fn current(raw: *mut bpf_sock_addr, v6: bool) -> Addr {
    if v6 {
        // SAFETY: four words of the context, read one by one as the verifier wants it.
        unsafe {
            let ip = (&raw const (*raw).user_ip6).cast::<u32>();
            addr::from_words([
                ip.read_volatile(),
                ip.add(1).read_volatile(),
                ip.add(2).read_volatile(),
                ip.add(3).read_volatile(),
            ])
        }
    } else {
        // SAFETY: a plain field of the context.
        addr::v4(unsafe { (*raw).user_ip4 }.to_ne_bytes())
    }
}

#[inline(always)]
fn show(raw: *mut bpf_sock_addr, v6: bool, address: &Addr, port: u16) {
    if v6 {
        write6(raw, address);
    } else {
        // SAFETY: a plain field of the context.
        unsafe { (*raw).user_ip4 = addr::words(address)[3] };
    }
    // SAFETY: a plain field of the context.
    unsafe { (*raw).user_port = u32::from(port.to_be()) };
}
