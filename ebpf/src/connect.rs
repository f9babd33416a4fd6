//! `connect4` and `connect6`: the verdict before the first packet, and the way into the proxy.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        bpf_sock, bpf_sock_addr, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
    },
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_current_pid_tgid,
        bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_set_retval, bpf_setsockopt,
        bpf_sk_release, bpf_skc_lookup_tcp,
    },
    programs::SockAddrContext,
};
use weft_ebpf_common::{
    Addr, AddrInfo, CountKey, Event, Pod, SkMeta, VipKey, addr,
    codes::{
        TUNNEL_PORT, VIP_NO_ENDPOINT, cgroup, config, direction, event, info, kind, outcome, pod, proto,
        reason, stat, subject, verdict,
    },
    judge::{Judgement, Query},
};

use crate::{
    events,
    log::trace_line,
    maps::{CGROUPS, PODS, VIP_DENIED},
    sock, tables,
};

const SOCK_STREAM: u32 = 1;
const IPPROTO_MPTCP: u32 = 262;
const ECONNREFUSED: i32 = 111;
const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
const BPF_F_CURRENT_NETNS: u64 = u64::MAX;

const PASS: i32 = 1;

/// What a connect asks for.
struct Call<'a, const V6: bool> {
    ctx: &'a SockAddrContext,
    dst: Addr,
    port: u16,
    netns: u64,
    cookie: u64,
}

/// The hook.
#[inline(always)]
pub(crate) fn connect<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    let raw = ctx.sock_addr;
    // SAFETY: the kernel hands a valid context with a socket.
    let sk = unsafe { (*raw).__bindgen_anon_1.sk };
    // SAFETY: not null in this hook.
    let known = unsafe { sock::meta(sk) };
    if !known.is_null() {
        // SAFETY: not null.
        if unsafe { (*known).kind } == kind::PROXY {
            return PASS;
        }
        // A reconnect: what the socket dialled, or who dialled it, is not true any more.
        // SAFETY: as above.
        unsafe { sock::forget(sk) };
    }
    // SAFETY: plain fields of the context.
    let (type_, protocol) = unsafe { ((*raw).type_, (*raw).protocol) };
    if type_ != SOCK_STREAM || (protocol != u32::from(proto::TCP) && protocol != IPPROTO_MPTCP) {
        return PASS;
    }
    // SAFETY: the helpers take the context and give a number.
    let (netns, cookie) =
        unsafe { (bpf_get_netns_cookie(ctx.as_ptr()), bpf_get_socket_cookie(ctx.as_ptr())) };
    let call = Call::<'_, V6> { ctx, dst: destination::<V6>(raw), port: port(raw), netns, cookie };
    // SAFETY: rows are replaced whole by the agent, and a reader of a replaced one sees one that was true just now.
    let Some(own) = (unsafe { PODS.get(netns) }) else {
        return unknown(&call);
    };
    judge(&call, own, sk)
}

#[inline(always)]
fn destination<const V6: bool>(raw: *mut bpf_sock_addr) -> Addr {
    if V6 {
        // Field by field: the verifier takes only whole, aligned reads of the context.
        // SAFETY: plain fields of the context.
        let ip = unsafe { &raw const (*raw).user_ip6 }.cast::<u32>();
        // SAFETY: four words.
        unsafe {
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
fn port(raw: *mut bpf_sock_addr) -> u16 {
    // SAFETY: a plain field of the context; the port is in its low half, in network order.
    u16::from_be(unsafe { (*raw).user_port } as u16)
}

/// A connect from a network namespace that nobody described.
#[inline(always)]
fn unknown<const V6: bool>(call: &Call<'_, V6>) -> i32 {
    if addr::is_loopback(&call.dst) || addr::is_unspecified(&call.dst) {
        return PASS;
    }
    events::count(stat::UNKNOWN_NETNS);
    let refused = tables::config() & config::UNKNOWN_REFUSE_ALL != 0
        || tables::dialled(&call.dst, call.port, proto::TCP)
            .is_some_and(|(found, _)| tables::is_enrolled(found.flags));
    let result = if refused { outcome::DENIED } else { outcome::FORWARDED };
    let why = if refused { reason::UNKNOWN_PEER } else { reason::NONE };
    emit(call, event::UNKNOWN_NETNS, result, why, (subject::UNKNOWN, subject::UNKNOWN), 0, &addr::NONE);
    if refused { refuse() } else { PASS }
}

#[inline(always)]
fn judge<const V6: bool>(call: &Call<'_, V6>, own: &Pod, sk: *mut aya_ebpf::bindings::bpf_sock) -> i32 {
    let dst = &call.dst;
    if own.flags & pod::PASS != 0 {
        return PASS;
    }
    if addr::is_redirect_range(dst) {
        events::count(stat::DENIED_CONNECT);
        report(call, own, outcome::DENIED, reason::PROXY_BYPASSED, 0, 0);
        return refuse();
    }
    let host = own.flags & pod::HOST != 0;
    // A node's own address has ports of Services.
    let itself = !host && (addr::same(dst, &own.ip4) || addr::same(dst, &own.ip6));
    if addr::is_loopback(dst) || addr::is_unspecified(dst) || itself {
        return PASS;
    }
    let Some(found) = tables::dialled_or_range(dst, call.port, proto::TCP) else {
        return PASS;
    };
    if !tables::is_mesh(found.flags) || (host && !(tables::is_enrolled(found.flags) && of_a_pod())) {
        return PASS;
    }
    let reported = tables::reported(&found);
    if own.flags & pod::HELD != 0 {
        return held(call, own, sk, &found);
    }
    if call.port == TUNNEL_PORT {
        events::count(stat::TUNNEL_DIALLED);
        report(call, own, outcome::DENIED, reason::TUNNEL_PORT_DIALLED, reported, 0);
        return refuse();
    }
    if found.flags & info::ENROLLED != 0 {
        let judged = tables::verdict(&Query {
            src: own.subject,
            dst: found.subject,
            port: call.port,
            proto: proto::TCP,
            authenticated: true,
            dst_flags: found.flags,
        });
        if judged.denied() {
            return deny(call, own, found.subject, &judged);
        }
        // The Pod would take a connection of the node's own network for one from outside the mesh.
        let shortcut = info::LOCAL | info::SHORTCUT_OK;
        if !host && judged.verdict != verdict::PROXY && found.flags & shortcut == shortcut {
            return direct(call, own, sk, found.subject, judged.policy);
        }
    } else if found.flags & info::SERVICE != 0 {
        let key = VipKey { subject: own.subject, port: call.port, pad: 0, addr: *dst };
        // SAFETY: four bytes, copied at once.
        if let Some(&policy) = unsafe { VIP_DENIED.get(key) } {
            let (why, policy) = match policy {
                VIP_NO_ENDPOINT => (reason::NO_ENDPOINT, 0),
                0 => (reason::POLICY_DENIED, 0),
                policy => (reason::POLICY_DENY_RULE, policy),
            };
            let judged = Judgement { verdict: verdict::DENY, reason: why, policy };
            return deny(call, own, reported, &judged);
        }
    }
    redirect(call, own, sk, reported)
}

/// Whether the process is one of a Pod, and none of an agent: the node's own network has others, which are left alone.
#[inline(always)]
fn of_a_pod() -> bool {
    // SAFETY: takes nothing, gives a number.
    let own = unsafe { bpf_get_current_cgroup_id() };
    // SAFETY: four bytes, copied at once; here and below.
    if unsafe { CGROUPS.get(own) }.copied() == Some(cgroup::AGENT) {
        return false;
    }
    for level in 1..=cgroup::LEVELS {
        // SAFETY: takes a number, gives a number: 0 below the process's own cgroup.
        let id = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if id == 0 {
            return false;
        }
        // SAFETY: as above.
        if unsafe { CGROUPS.get(id) }.copied() == Some(cgroup::PODS) {
            return true;
        }
    }
    false
}

/// A Pod that nobody has described yet: a Service outside the mesh is open to it, what may be of the mesh is not.
#[inline(always)]
fn held<const V6: bool>(call: &Call<'_, V6>, own: &Pod, sk: *mut bpf_sock, found: &AddrInfo) -> i32 {
    if found.flags & info::SERVICE != 0 && !tables::is_enrolled(found.flags) {
        return direct(call, own, sk, subject::UNKNOWN, 0);
    }
    let refused = Judgement { verdict: verdict::DENY, reason: reason::UNKNOWN_PEER, policy: 0 };
    deny(call, own, tables::reported(found), &refused)
}

#[inline(always)]
fn deny<const V6: bool>(call: &Call<'_, V6>, own: &Pod, dst_subject: u32, judged: &Judgement) -> i32 {
    events::count(stat::DENIED_CONNECT);
    report(call, own, outcome::DENIED, judged.reason, dst_subject, judged.policy);
    refuse()
}

/// Passes beside the proxy: the packet hooks know the socket by its mark.
#[inline(always)]
fn direct<const V6: bool>(
    call: &Call<'_, V6>,
    own: &Pod,
    sk: *mut bpf_sock,
    dst_subject: u32,
    policy: u32,
) -> i32 {
    if !mark(call, own, sk, kind::DIRECT) {
        return refuse();
    }
    events::count(stat::PASSED_KERNEL);
    report(call, own, outcome::FORWARDED, reason::NONE, dst_subject, policy);
    PASS
}

#[inline(always)]
fn redirect<const V6: bool>(call: &Call<'_, V6>, own: &Pod, sk: *mut bpf_sock, dst_subject: u32) -> i32 {
    // SAFETY: takes nothing, gives a number.
    let spread = unsafe { bpf_get_prandom_u32() };
    let v4 = addr::is_v4(&call.dst);
    let host = own.flags & pod::HOST != 0;
    let target = match (v4, host) {
        (true, true) => addr::v4(addr::redirect4(own.slot, spread & (addr::HOST_SPREAD - 1))),
        (true, false) => addr::v4(addr::redirect4(own.slot, spread)),
        // Whoever is outside could dial the node's address.
        (false, true) => addr::LOOPBACK6,
        (false, false) => own.ip6,
    };
    let port = match (v4, spread & 1) {
        (true, _) => own.out_port,
        (false, 0) => own.out_port6[0],
        (false, _) => own.out_port6[1],
    };
    let absent = port == 0 || addr::is_unspecified(&target);
    if own.flags & pod::FAIL_OPEN != 0 && (absent || !listening(call.ctx, &target, port, v4)) {
        events::count(stat::FAILED_OPEN);
        return direct(call, own, sk, dst_subject, 0);
    }
    if absent {
        events::count(stat::NO_LISTENER);
        report(call, own, outcome::DENIED, reason::CONNECT_FAILURE, dst_subject, 0);
        return refuse();
    }
    if !mark(call, own, sk, kind::APP) {
        return refuse();
    }
    unbind_device(call.ctx, sk);
    rewrite::<V6>(call.ctx.sock_addr, &target, port);
    trace_line!(call.ctx, "connect: netns {} slot {} port {} to the proxy", call.netns, own.slot, call.port);
    events::count(stat::REDIRECTED);
    report(call, own, outcome::REDIRECTED, reason::NONE, dst_subject, 0);
    PASS
}

#[inline(always)]
fn mark<const V6: bool>(call: &Call<'_, V6>, own: &Pod, sk: *mut bpf_sock, kind: u8) -> bool {
    let mut meta = SkMeta {
        kind,
        family: if addr::is_v4(&call.dst) { 4 } else { 6 },
        port: call.port,
        subject: own.subject,
        addr: call.dst,
        cookie: call.cookie,
        netns: call.netns,
    };
    // SAFETY: the socket of the context is never null in this hook.
    let marked = unsafe { sock::set_meta(sk, &mut meta) };
    if !marked {
        events::count(stat::MAP_FULL);
    }
    marked
}

/// A socket bound to a device would look for loopback there, and time out.
#[inline(always)]
fn unbind_device(ctx: &SockAddrContext, sk: *mut aya_ebpf::bindings::bpf_sock) {
    // SAFETY: a plain field of a socket that is not null.
    if unsafe { (*sk).bound_dev_if } != 0 {
        let mut none = [0_u8; 4];
        // SAFETY: an empty name of four bytes; the kernel copies it.
        unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, SO_BINDTODEVICE, none.as_mut_ptr().cast(), 4) };
    }
}

#[inline(always)]
fn rewrite<const V6: bool>(raw: *mut bpf_sock_addr, target: &Addr, port: u16) {
    // SAFETY: plain fields of the context, written whole.
    unsafe {
        if V6 {
            write6(raw, target);
        } else {
            (*raw).user_ip4 = addr::words(target)[3];
        }
        (*raw).user_port = u32::from(port.to_be());
    }
}

/// Writes the context's IPv6 address, word by word as the verifier wants it.
#[inline(always)]
pub(crate) fn write6(raw: *mut bpf_sock_addr, target: &Addr) {
    let words = addr::words(target);
    // SAFETY: four words of the context.
    unsafe {
        let ip = (&raw mut (*raw).user_ip6).cast::<u32>();
        ip.write_volatile(words[0]);
        ip.add(1).write_volatile(words[1]);
        ip.add(2).write_volatile(words[2]);
        ip.add(3).write_volatile(words[3]);
    }
}

/// True where the proxy's listener would take the connection.
#[inline(always)]
fn listening(ctx: &SockAddrContext, target: &Addr, port: u16, v4: bool) -> bool {
    // SAFETY: a tuple is plain numbers.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let words = addr::words(target);
    let size = if v4 {
        tuple.__bindgen_anon_1.ipv4 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 {
            saddr: u32::from_ne_bytes([127, 0, 0, 1]),
            daddr: words[3],
            sport: 0,
            dport: port.to_be(),
        };
        size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1>()
    } else {
        tuple.__bindgen_anon_1.ipv6 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 {
            saddr: words,
            daddr: words,
            sport: 0,
            dport: port.to_be(),
        };
        size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2>()
    };
    // SAFETY: tuple and size agree; a socket that is found is released.
    unsafe {
        let found = bpf_skc_lookup_tcp(ctx.as_ptr(), &raw mut tuple, size as u32, BPF_F_CURRENT_NETNS, 0);
        if found.is_null() {
            return false;
        }
        bpf_sk_release(found.cast());
    }
    true
}

#[inline(always)]
fn refuse() -> i32 {
    // SAFETY: takes a number. Without it the application would see EPERM, which few retry.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    0
}

#[inline(always)]
fn report<const V6: bool>(
    call: &Call<'_, V6>,
    own: &Pod,
    outcome: u8,
    reason: u8,
    dst_subject: u32,
    policy: u32,
) {
    events::decision(&CountKey {
        src: own.subject,
        dst: dst_subject,
        reason,
        dir: direction::OUT,
        verdict: outcome,
        proto: proto::TCP,
    });
    let src = if addr::is_v4(&call.dst) { &own.ip4 } else { &own.ip6 };
    emit(call, event::CONNECT, outcome, reason, (own.subject, dst_subject), policy, src);
}

#[inline(always)]
fn emit<const V6: bool>(
    call: &Call<'_, V6>,
    kind: u8,
    outcome: u8,
    reason: u8,
    subjects: (u32, u32),
    policy: u32,
    src: &Addr,
) {
    // SAFETY: the helpers take nothing and give numbers.
    let (cgroup, pid) = unsafe { (bpf_get_current_cgroup_id(), (bpf_get_current_pid_tgid() >> 32) as u32) };
    events::emit(|| Event {
        ktime: events::now(),
        cookie: call.cookie,
        netns: call.netns,
        cgroup,
        src: *src,
        dst: call.dst,
        sport: 0,
        dport: call.port,
        proto: proto::TCP,
        kind,
        verdict: outcome,
        reason,
        src_subject: subjects.0,
        dst_subject: subjects.1,
        policy,
        pid,
    });
}
