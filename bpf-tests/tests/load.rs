//! Many connections at once: each keeps what is its own, whatever happens in the maps around it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests are tests"
)]

use std::{
    collections::HashSet,
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf,
    maps::{HashMap, Map, MapData},
};
use socket2::{Domain, SockRef, Socket, Type};
use weft_bpf_tests::{
    enrolled::{Enrolled, dial_source, listen},
    tables::{FAMILIES, Maps, OWN, PEER, addr},
};
use weft_ebpf_common::{
    OrigDst, SkMeta, Tuple,
    codes::{info, kind, map, pod, stat},
};

/// Nothing here waits longer than this: a lost connection is a failure, not a hang.
const PATIENCE: Duration = Duration::from_secs(30);
/// How many entries CLIENT_OF and ORIG_DST hold (asserted below against the kernel's own number).
const CAPACITY: u64 = 131_072;

/// Raises the soft limit of open files: the default of many machines is 1,024.
fn room_for(files: u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure lives through the call.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }, 0);
    assert!(limit.rlim_max >= files, "{files} open files are needed; `ulimit -Hn` says {}", limit.rlim_max);
    limit.rlim_cur = limit.rlim_cur.max(files);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
}

/// A neighbour that fills both handover maps over and over, with connections of a namespace of its own.
struct Flood {
    maps: Vec<HashMap<MapData, Tuple, OrigDst>>,
}

impl Flood {
    fn new(bpf: &mut Ebpf) -> Self {
        let take = |name: &str| {
            let map = bpf.take_map(name).unwrap();
            let Map::LruHashMap(data) = &map else { panic!("{name} evicts nothing") };
            assert_eq!(u64::from(data.info().unwrap().max_entries()), CAPACITY, "{name}");
            HashMap::try_from(map).unwrap()
        };
        Self { maps: [map::CLIENT_OF, map::ORIG_DST].map(take).into() }
    }

    /// Inserts until told to stop; a token for each [`STEP`] entries that have gone into each map.
    fn run(mut self, stop: &AtomicBool, inserted: &AtomicU64, token: &SyncSender<()>) -> Result<()> {
        let junk = OrigDst { addr: addr([203, 0, 113, 9].into()), port: 9, family: 4, ..OrigDst::default() };
        let mut count = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            count += 1;
            let key = Tuple {
                netns: 1,
                src: u128::from(count).to_be_bytes(),
                dst: addr(FAMILIES[0].own),
                sport: 1,
                dport: 1,
                proto: 0,
            };
            for map in &mut self.maps {
                map.insert(key, junk, 0).context("the flood cannot insert")?;
            }
            if count.is_multiple_of(STEP) {
                inserted.store(count, Ordering::Relaxed);
                // Full: a token is waiting already.
                let _ = token.try_send(());
            }
        }
        Ok(())
    }
}

const CLIENTS: u32 = 4_000;
/// Connections between two looks at the flood.
const CHUNK: u32 = 250;
/// So many entries at least go into each map while a chunk is dialled: twice the capacity in all.
const STEP: u64 = 2 * CAPACITY * (CHUNK as u64) / (CLIENTS as u64);
/// Every so manieth connection has nobody behind it that the kernel knows.
const STRANGER: u32 = 100;

/// The client of a connection, or nobody.
fn client(number: u32) -> Option<SocketAddr> {
    let [_, _, high, low] = number.to_be_bytes();
    (!number.is_multiple_of(STRANGER))
        .then(|| SocketAddr::from(([10, 20, high, low], 20_000 + number as u16)))
}

/// Dials the application as the proxy does, and says which connection this is.
fn dial_as_proxy(maps: &mut Maps<'_>, netns: u64, to: SocketAddr, number: u32) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    if let Some(client) = client(number) {
        let meta = SkMeta {
            kind: kind::PROXY,
            family: 4,
            port: client.port(),
            subject: PEER,
            addr: addr(client.ip()),
            cookie: u64::from(number),
            netns,
        };
        maps.set_meta(&socket, meta)?;
    }
    let one: libc::c_int = 1;
    // SAFETY: the value is as long as told.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const one).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    ensure!(result == 0, "IP_BIND_ADDRESS_NO_PORT: {}", std::io::Error::last_os_error());
    socket.bind(&SocketAddr::from((dial_source(number / 2), 0)).into())?;
    socket.connect_timeout(&to.into(), PATIENCE).with_context(|| format!("connection {number}"))?;
    (&socket).write_all(&number.to_be_bytes())?;
    Ok(socket)
}

/// Accepts so many connections: their numbers, and the peers that `accept4` shows.
fn accept_all(listener: &TcpListener, count: u32) -> Result<Vec<(u32, SocketAddr, TcpStream)>> {
    SockRef::from(listener).set_read_timeout(Some(PATIENCE))?;
    (0..count)
        .map(|_| {
            let (mut stream, peer) = listener.accept().context("a connection did not arrive")?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut number = [0; 4];
            stream.read_exact(&mut number)?;
            Ok((u32::from_be_bytes(number), peer, stream))
        })
        .collect()
}

#[test]
fn every_connection_shows_its_own_client_through_a_flood() {
    room_for(12_000);
    let mut world = Enrolled::new(pod::STRICT).unwrap();
    let flood = Flood::new(&mut world.attached.bpf);
    let apps = world
        .netns
        .run(|| {
            // Few source ports: every one is in use towards both application ports, from every dialling address.
            fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40399")?;
            // A dual-stack application sees IPv4 clients in their mapped form.
            Ok([listen(FAMILIES[0].own)?, listen(Ipv6Addr::UNSPECIFIED.into())?])
        })
        .unwrap();
    let ports = apps.each_ref().map(|app| app.local_addr().unwrap().port());

    let (stop, inserted) = (AtomicBool::new(false), AtomicU64::new(0));
    let (token, tokens) = sync_channel(1);
    let netns = world.netns.cookie();
    let Enrolled { attached, netns: namespace, .. } = &mut world;
    let mut maps = Maps(&mut attached.bpf);
    let (dialled, flooded, accepted) = thread::scope(|scope| {
        let (stop, inserted) = (&stop, &inserted);
        let flood = scope.spawn(move || flood.run(stop, inserted, &token));
        let accepting = apps.each_ref().map(|app| scope.spawn(|| accept_all(app, CLIENTS / 2)));
        let dialled = namespace.run(move || {
            (0..CLIENTS)
                .map(|number| {
                    if number.is_multiple_of(CHUNK) {
                        tokens.recv_timeout(PATIENCE).context("the flood has ended")?;
                    }
                    let to = SocketAddr::new(FAMILIES[0].own, ports[(number % 2) as usize]);
                    dial_as_proxy(&mut maps, netns, to, number)
                })
                .collect::<Result<Vec<_>>>()
        });
        let accepted = accepting.map(|thread| thread.join().unwrap());
        stop.store(true, Ordering::Relaxed);
        flood.join().unwrap().unwrap();
        (dialled, inserted.load(Ordering::Relaxed), accepted)
    });
    let dialled = dialled.unwrap();
    assert!(flooded > CAPACITY, "only {flooded} entries of junk");

    let mut seen = HashSet::new();
    for (app, accepted) in accepted.into_iter().enumerate() {
        for (number, peer, stream) in accepted.unwrap() {
            assert!(seen.insert(number) && number as usize % 2 == app, "connection {number} came twice");
            let shown = SocketAddr::new(peer.ip().to_canonical(), peer.port());
            match client(number) {
                Some(client) => assert_eq!(shown, client, "connection {number}"),
                None => {
                    assert!(peer.ip().is_unspecified() && peer.port() == 0, "connection {number}: {peer}");
                }
            }
            assert_eq!(stream.peer_addr().unwrap(), peer, "getpeername says what accept4 said");
        }
    }
    assert_eq!(seen.len(), dialled.len());
    assert_eq!(world.maps().stat(stat::MAP_FULL).unwrap(), 0);
    println!("{} connections through {flooded} entries of junk in each map", seen.len());
}

const CONNECTS: u32 = 40_000;
/// Two sockets each are open at once.
const BATCH: u32 = 2_000;

/// What a connection dials: an address and a port that no other one does; each fourth in IPv6.
fn dialled(number: u32) -> SocketAddr {
    let [_, _, high, low] = number.to_be_bytes();
    let ip = if number.is_multiple_of(4) {
        IpAddr::from(Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 1, number as u16))
    } else {
        Ipv4Addr::new(10, 96, high, low).into()
    };
    SocketAddr::new(ip, 20_000 + number as u16 % 40_000)
}

/// Closes with a reset, so that no port waits.
fn reset(socket: impl std::os::fd::AsFd) {
    SockRef::from(&socket).set_linger(Some(Duration::ZERO)).unwrap();
}

#[test]
fn forty_thousand_connects_of_one_pod_find_their_destinations() {
    room_for(u64::from(BATCH) * 2 + 1_000);
    let mut world = Enrolled::new(pod::STRICT).unwrap();
    for family in &FAMILIES {
        world.maps().describe_range(family.service, 16, 0, info::MESH_RANGE).unwrap();
    }
    for listener in &world.out {
        SockRef::from(listener).set_read_timeout(Some(PATIENCE)).unwrap();
    }
    let netns = world.netns.cookie();
    for first in (0..CONNECTS).step_by(BATCH as usize) {
        let batch = first..first + BATCH;
        let clients: Vec<TcpStream> = world
            .netns
            .run(|| {
                batch
                    .clone()
                    .map(|number| {
                        let mut stream = TcpStream::connect(dialled(number))
                            .with_context(|| format!("connection {number}"))?;
                        stream.write_all(&number.to_be_bytes())?;
                        Ok(stream)
                    })
                    .collect()
            })
            .unwrap();
        let mut missing: HashSet<u32> = batch.clone().collect();
        for _ in batch {
            let family = &FAMILIES[usize::from(missing.len() <= BATCH as usize / 4)];
            let (mut accepted, _) = world.listener(family).accept().expect("a connection did not arrive");
            let mut bytes = [0; 4];
            accepted.read_exact(&mut bytes).unwrap();
            let number = u32::from_be_bytes(bytes);
            assert!(missing.remove(&number), "connection {number} came twice");
            let want = dialled(number);
            let meta = world.maps().meta(&accepted).unwrap();
            assert_eq!(
                (meta.kind, meta.addr, meta.port, meta.subject, meta.netns),
                (kind::ACCEPTED_OUT, addr(want.ip()), want.port(), OWN, netns),
                "connection {number} dialled {want}"
            );
            reset(&accepted);
        }
        clients.iter().for_each(reset);
    }
    let mut maps = world.maps();
    assert_eq!(maps.stat(stat::REDIRECTED).unwrap(), u64::from(CONNECTS));
    assert_eq!(maps.stat(stat::ORIG_MISS).unwrap(), 0);
    assert_eq!(maps.stat(stat::MAP_FULL).unwrap(), 0);
    assert_eq!(maps.rows::<Tuple, OrigDst>(map::ORIG_DST).unwrap(), 0, "nothing is left behind");
}
