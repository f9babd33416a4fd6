//! An enrolled Pod: a namespace whose sockets meet every hook, and the proxy's listeners for what it dials.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::Result;
use socket2::{Domain, Socket, Type};
use weft_ebpf_common::{
    Pod, addr as ranges,
    codes::{info, listener, map},
};

use crate::{
    attach::{Attached, attach_cgroup, attach_sk_lookup},
    netns::Netns,
    tables::{FAMILIES, Family, Maps, OWN, addr, own_pod},
};

/// Room in a listener's queue for every connection of a test's largest batch.
const BACKLOG: i32 = 4_096;

/// The Pod of [`FAMILIES`], described in every map.
pub struct Enrolled {
    /// The object and its attachments.
    pub attached: Attached,
    /// The Pod's namespace.
    pub netns: Netns,
    /// The proxy's listeners for outgoing connections, IPv4 and IPv6.
    pub out: [TcpListener; 2],
    /// The row that describes it.
    pub row: Pod,
}

impl Enrolled {
    /// Makes one with these [`weft_ebpf_common::codes::pod`] flags.
    ///
    /// # Errors
    /// The namespace, an attachment or a map row fails (run as root).
    pub fn new(flags: u32) -> Result<Self> {
        let netns = Netns::new(&[FAMILIES[0].own, FAMILIES[1].own])?;
        let mut attached = attach_cgroup()?;
        attach_sk_lookup(&mut attached.bpf, &netns)?;
        let out =
            netns.run(|| Ok([listen(Ipv4Addr::LOCALHOST.into())?, listen(Ipv6Addr::LOCALHOST.into())?]))?;
        let row = Pod {
            cookie: netns.cookie(),
            out_port: out[0].local_addr()?.port(),
            out_port6: [out[1].local_addr()?.port(); 2],
            ..own_pod(flags)
        };
        let mut maps = Maps(&mut attached.bpf);
        maps.set(map::PODS, row.cookie, row)?;
        for family in &FAMILIES {
            maps.set(map::POD_ADDRS, addr(family.own), row)?;
            maps.describe(family.own, OWN, info::ENROLLED | info::LOCAL)?;
            maps.describe(family.service, 0, info::SERVICE)?;
        }
        maps.listener(listener::OUT4, row.out_port, &out[0])?;
        maps.listener(listener::OUT6, row.out_port6[0], &out[1])?;
        Ok(Self { attached, netns, out, row })
    }

    /// Hands on the maps.
    pub fn maps(&mut self) -> Maps<'_> {
        Maps(&mut self.attached.bpf)
    }

    /// The proxy's listener for what the Pod dials in this family.
    pub fn listener(&self, family: &Family) -> &TcpListener {
        &self.out[usize::from(family.own.is_ipv6())]
    }

    /// Connects from inside the Pod.
    ///
    /// # Errors
    /// What connect says.
    pub fn dial(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.netns
            .run(|| Ok(TcpStream::connect_timeout(&to, Duration::from_secs(5))))
            .map_err(io::Error::other)?
    }
}

/// A listener at any port whose queue holds a whole batch.
///
/// # Errors
/// The address is not of this namespace.
pub fn listen(ip: IpAddr) -> Result<TcpListener> {
    let address = SocketAddr::new(ip, 0);
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// One of the proxy's dialling addresses, chosen by a number.
pub fn dial_source(number: u32) -> Ipv4Addr {
    let count = u32::from(ranges::DIAL_LAST - ranges::DIAL_FIRST) + 1;
    Ipv4Addr::new(127, 0, 0, ranges::DIAL_FIRST + (number % count) as u8)
}
