//! What a CNI with eBPF load balancing does at the root cgroup: `connect4` and `connect6` programs that turn a
//! Service's address into an endpoint's before the first packet. For tests beside Weft.

use std::{
    fs::File,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd as _,
};

use anyhow::{Context as _, Result, bail, ensure};

const PROG_LOAD: u32 = 5;
const PROG_ATTACH: u32 = 8;
/// `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`.
const SOCK_ADDR: u32 = 18;
/// `BPF_CGROUP_INET4_CONNECT` and `BPF_CGROUP_INET6_CONNECT`.
const HOOKS: [u32; 2] = [10, 11];
/// `BPF_F_ALLOW_MULTI`: beside other programs.
const MULTI: u32 = 2;
/// Offsets in struct bpf_sock_addr.
const IP4: i16 = 4;
const IP6: i16 = 8;
const PORT: i16 = 24;

/// struct bpf_insn.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Insn {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// `r2 = *(u32 *)(r1 + offset)`.
fn load(offset: i16) -> Insn {
    Insn { code: 0x61, registers: 0x12, offset, immediate: 0 }
}

/// `*(u32 *)(r1 + offset) = r2`.
fn store(offset: i16) -> Insn {
    Insn { code: 0x63, registers: 0x21, offset, immediate: 0 }
}

/// `w2 = value`.
fn set(value: u32) -> Insn {
    Insn { code: 0xb4, registers: 2, offset: 0, immediate: value.cast_signed() }
}

/// `if w2 != value skip`.
fn unless(value: u32, skip: usize) -> Result<Insn> {
    Ok(Insn { code: 0x56, registers: 2, offset: i16::try_from(skip)?, immediate: value.cast_signed() })
}

/// `return 1`: the connect goes on.
fn pass() -> [Insn; 2] {
    [
        Insn { code: 0xb7, registers: 0, offset: 0, immediate: 1 },
        Insn { code: 0x95, registers: 0, offset: 0, immediate: 0 },
    ]
}

/// The context's words that hold an address and port: offset and value in network order.
fn words(address: SocketAddr) -> Vec<(i16, u32)> {
    let mut words = match address.ip() {
        IpAddr::V4(ip) => vec![(IP4, u32::from_ne_bytes(ip.octets()))],
        IpAddr::V6(ip) => {
            let octets = ip.octets();
            let words = octets.as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word));
            (IP6..).step_by(4).zip(words).collect()
        }
    };
    words.push((PORT, u32::from(address.port().to_be())));
    words
}

/// The program for one hook: the first pair whose front is dialled decides.
fn program(pairs: &[(SocketAddr, SocketAddr)]) -> Result<Vec<Insn>> {
    let mut all = Vec::new();
    for (front, back) in pairs {
        let mut rewrite: Vec<Insn> =
            words(*back).into_iter().flat_map(|(offset, value)| [set(value), store(offset)]).collect();
        rewrite.extend(pass());
        let tests = words(*front);
        let mut left = tests.len() * 2 + rewrite.len();
        for (offset, value) in tests {
            left -= 2;
            all.extend([load(offset), unless(value, left)?]);
        }
        all.extend(rewrite);
    }
    all.extend(pass());
    Ok(all)
}

/// One call of bpf(2).
fn bpf(command: u32, attributes: &mut [u32; 18]) -> io::Result<i32> {
    // SAFETY: the array is live and of the size that is passed; pointers in it outlive the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val(attributes)) };
    i32::try_from(result).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)
}

fn attach(cgroup: &File, hook: u32, program: &[Insn]) -> Result<()> {
    let halves = |address: u64| [address as u32, (address >> 32) as u32];
    let mut attributes = [0; 18];
    attributes[0] = SOCK_ADDR;
    attributes[1] = u32::try_from(program.len())?;
    attributes[2..4].copy_from_slice(&halves(program.as_ptr() as u64));
    attributes[4..6].copy_from_slice(&halves(c"GPL".as_ptr() as u64));
    attributes[17] = hook;
    let loaded = bpf(PROG_LOAD, &mut attributes).context("load; this needs root")?;
    let mut attributes = [0; 18];
    attributes[..4].copy_from_slice(&[
        cgroup.as_raw_fd().cast_unsigned(),
        loaded.cast_unsigned(),
        hook,
        MULTI,
    ]);
    bpf(PROG_ATTACH, &mut attributes).context("attach")?;
    Ok(())
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [cgroup, pairs @ ..] = words.as_slice() else {
        bail!(
            "usage: weft-foreign-lb CGROUP FRONT=BACK..., with addresses and ports such as 10.96.0.9:80=10.1.1.1:80"
        );
    };
    let pair = |text: &String| {
        let (front, back) = text.split_once('=').context("a pair has the form FRONT=BACK")?;
        let (front, back): (SocketAddr, SocketAddr) = (front.parse()?, back.parse()?);
        ensure!(front.is_ipv4() == back.is_ipv4(), "{text} mixes address families");
        Ok((front, back))
    };
    let pairs: Vec<(SocketAddr, SocketAddr)> = pairs.iter().map(pair).collect::<Result<_>>()?;
    let cgroup = File::open(cgroup).with_context(|| format!("open {cgroup}"))?;
    for (hook, v4) in HOOKS.into_iter().zip([true, false]) {
        let own: Vec<_> = pairs.iter().filter(|(front, _)| front.is_ipv4() == v4).copied().collect();
        attach(&cgroup, hook, &program(&own)?)?;
    }
    Ok(())
}
