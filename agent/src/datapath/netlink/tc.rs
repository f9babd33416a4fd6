//! Traffic control as far as it is needed: the `clsact` qdisc of an interface and the BPF filters on it
//! (include/uapi/linux/pkt_sched.h, pkt_cls.h).

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::{NLM_F_ACK, Netlink, ROUTE, attribute};

const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_CHAIN: u16 = 11;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
/// `TCA_BPF_FLAG_ACT_DIRECT`: the program's return value is the verdict.
const DIRECT: u32 = 1;
/// `TC_H_CLSACT` and the handle of the qdisc there.
const CLSACT: (u32, u32) = (0xffff_fff1, 0xffff_0000);
/// The first of all priorities, for every protocol (`ETH_P_ALL` in network order).
const PRIORITY: u32 = 1;
const ALL: u32 = 0x0300;

/// The direction of packets, as the interface sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Way {
    /// Received by the interface: from the Pod behind a host-side veth.
    In,
    /// Sent through it: to the Pod.
    Out,
}

impl Way {
    fn parent(self) -> u32 {
        match self {
            Self::In => 0xffff_fff2,
            Self::Out => 0xffff_fff3,
        }
    }
}

/// A filter of any kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Filter {
    /// Its handle within the priority.
    pub(in super::super) handle: u32,
    /// The priority; lower ones run first.
    pub(in super::super) priority: u32,
    /// The chain; all packets begin at 0.
    pub(in super::super) chain: u32,
    /// The program's id; 0 where it is no BPF filter.
    pub(in super::super) program: u32,
    /// The name that was given with the program.
    pub(in super::super) name: String,
}

/// struct tcmsg: family, pad, interface, handle, parent, info.
fn message(index: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    for word in [index, handle, parent, info] {
        body.extend_from_slice(&word.to_ne_bytes());
    }
    body
}

/// Appends an attribute. Values are short constants and names.
fn put(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    body.extend_from_slice(&length.to_ne_bytes());
    body.extend_from_slice(&kind.to_ne_bytes());
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

fn request(kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
    let socket = Netlink::open(ROUTE)?;
    socket.send(kind, NLM_F_ACK | flags, body)?;
    socket.receive(|_| ())
}

/// Gives the interface a `clsact` qdisc; false where something of the kind is there already.
pub(in super::super) fn add_clsact(index: u32) -> io::Result<bool> {
    let mut body = message(index, CLSACT.1, CLSACT.0, 0);
    put(&mut body, TCA_KIND, b"clsact\0");
    match request(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &body) {
        Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        done => done.map(|()| true),
    }
}

/// Takes the `clsact` qdisc away, with every filter on it; fine where there is none.
pub(in super::super) fn delete_clsact(index: u32) -> io::Result<()> {
    let mut body = message(index, CLSACT.1, CLSACT.0, 0);
    put(&mut body, TCA_KIND, b"clsact\0");
    gone(request(RTM_DELQDISC, 0, &body))
}

/// Sets our filter of a handle, ahead of every other of priority 1 where it is new; atomically in its place where it
/// is there.
pub(in super::super) fn set_filter(
    index: u32,
    way: Way,
    handle: u32,
    program: BorrowedFd<'_>,
    name: &str,
) -> io::Result<()> {
    let mut options = Vec::new();
    put(&mut options, TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes());
    put(&mut options, TCA_BPF_NAME, &[name.as_bytes(), &[0]].concat());
    put(&mut options, TCA_BPF_FLAGS, &DIRECT.to_ne_bytes());
    let mut body = message(index, handle, way.parent(), PRIORITY << 16 | ALL);
    put(&mut body, TCA_KIND, b"bpf\0");
    put(&mut body, TCA_OPTIONS, &options);
    request(RTM_NEWTFILTER, NLM_F_CREATE, &body)
}

/// Deletes the filter of a handle; fine where it, or the interface, is gone.
pub(in super::super) fn delete_filter(index: u32, way: Way, handle: u32) -> io::Result<()> {
    let mut body = message(index, handle, way.parent(), PRIORITY << 16 | ALL);
    put(&mut body, TCA_KIND, b"bpf\0");
    gone(request(RTM_DELTFILTER, 0, &body))
}

/// ENOENT: no such filter or qdisc; EINVAL: no qdisc to look at; ENODEV: no interface.
fn gone(result: io::Result<()>) -> io::Result<()> {
    match result.as_ref().err().and_then(io::Error::raw_os_error) {
        Some(libc::ENOENT | libc::EINVAL | libc::ENODEV) => Ok(()),
        _ => result,
    }
}

/// Every filter of a direction, in the order in which they run; none where the interface is gone.
pub(in super::super) fn filters(index: u32, way: Way) -> io::Result<Vec<Filter>> {
    let mut found = Vec::new();
    let body = message(index, 0, way.parent(), 0);
    Netlink::open(ROUTE)?.dump(RTM_GETTFILTER, &body, |body| found.extend(filter(body)))?;
    Ok(found)
}

/// Reads one filter; `None` for the entry that only announces a priority.
fn filter(body: &[u8]) -> Option<Filter> {
    let number = |bytes: &[u8]| Some(u32::from_ne_bytes(*bytes.first_chunk()?));
    let handle = number(body.get(8..)?)?;
    let priority = number(body.get(16..)?)? >> 16;
    let attributes = body.get(20..)?;
    let options = attribute(attributes, TCA_OPTIONS).unwrap_or_default();
    let bpf = attribute(attributes, TCA_KIND).is_some_and(|kind| kind.starts_with(b"bpf\0"));
    let own = |kind| if bpf { attribute(options, kind) } else { None };
    let name = own(TCA_BPF_NAME).unwrap_or_default();
    let name = name.split(|b| *b == 0).next().unwrap_or_default();
    (handle != 0).then(|| Filter {
        handle,
        priority,
        chain: attribute(attributes, TCA_CHAIN).and_then(number).unwrap_or(0),
        program: own(TCA_BPF_ID).and_then(number).unwrap_or(0),
        name: String::from_utf8_lossy(name).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_bytes_are_no_filter() {
        assert_eq!(filter(&[]), None);
        assert_eq!(filter(&[255; 19]), None);
        assert_eq!(filter(&[0; 64]), None);
        let foreign = filter(&[255; 64]).expect("a filter of no known kind");
        assert_eq!((foreign.program, foreign.name.as_str()), (0, ""));
    }

    #[test]
    fn attributes_are_padded_and_read_back() {
        let mut body = message(7, 9, Way::In.parent(), PRIORITY << 16 | ALL);
        let mut options = Vec::new();
        put(&mut options, TCA_BPF_NAME, b"abc\0");
        put(&mut options, TCA_BPF_ID, &42_u32.to_ne_bytes());
        put(&mut body, TCA_KIND, b"bpf\0");
        put(&mut body, TCA_OPTIONS, &options);
        let expected = Filter { handle: 9, priority: 1, chain: 0, program: 42, name: "abc".into() };
        assert_eq!(filter(&body), Some(expected));
    }

    #[test]
    fn what_is_not_there_is_deleted_without_a_word() {
        assert_eq!(filters(0x7fff_0000, Way::In).expect("none"), []);
        delete_filter(0x7fff_0000, Way::Out, 1).expect("gone");
        delete_clsact(0x7fff_0000).expect("gone");
        assert!(add_clsact(0x7fff_0000).is_err());
    }
}
