//! Whose connections enter a strict Pod beside the proxy: those of the cgroup that the datapath was told. Needs root.

#![allow(clippy::expect_used, reason = "a test that cannot set itself up has to end")]

#[allow(dead_code, reason = "each file of tests uses a part")]
#[path = "datapath/world.rs"]
mod world;

use std::{
    collections::BTreeSet,
    fs,
    io::ErrorKind,
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::MetadataExt as _,
};

use weft_agent::datapath::{AddressInfo, Datapath, Hook, KernelVerdict, Tables};
use weft_core::SubjectId;
use world::World;

const SUBJECT: SubjectId = SubjectId(300);

#[test]
fn the_node_enters_a_strict_pod_from_the_kubelets_cgroup_only() {
    World::run(|world| {
        let pod = world.pod();
        let (datapath, _) = Datapath::load(world.config()).expect("load");
        let _enrolled = datapath.enroll(&pod.spec(SUBJECT)).expect("enrol");
        let own = AddressInfo {
            subject: SUBJECT,
            enrolled: true,
            local: true,
            strict: true,
            ..AddressInfo::default()
        };
        let addresses = pod.addresses.iter().map(|a| (*a, own)).collect();
        datapath.reconcile(&Tables { addresses, ..Tables::default() }).expect("tables");
        let own = fs::metadata(world.cgroup().join("agent")).expect("this process's cgroup").ino();
        let above = fs::metadata(world.cgroup()).expect("the one above").ino();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let mut events = runtime.block_on(async { datapath.events() }).expect("ring");
        for address in &pod.addresses {
            let address = SocketAddr::new(*address, 0);
            let listener = pod.inside(move || TcpListener::bind(address)).expect("bind");
            let target = listener.local_addr().expect("address");
            for (told, enters) in [
                (vec![], false),
                (vec![above], false),
                (vec![above, own], true),
                (vec![own], true),
                (vec![], false),
            ] {
                datapath.exempt(&BTreeSet::from_iter(told.clone())).expect("told");
                match TcpStream::connect(target) {
                    Ok(stream) => {
                        assert!(enters, "{told:?}");
                        let (_, peer) = listener.accept().expect("accept");
                        let client = stream.local_addr().expect("address");
                        assert_eq!((peer.ip(), peer.port()), (client.ip(), client.port()));
                    }
                    Err(error) => {
                        assert!(!enters, "{told:?}: {error}");
                        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                    }
                }
                let event = runtime.block_on(async {
                    loop {
                        let event = events.next().await.expect("event");
                        if event.destination == target && event.hook == Hook::Inbound {
                            return event;
                        }
                    }
                });
                let expected = match enters {
                    true => (KernelVerdict::Forwarded, SubjectId::HOST, own),
                    false => (KernelVerdict::Denied, SubjectId::WORLD, 0),
                };
                assert_eq!((event.verdict, event.source_subject, event.cgroup), expected, "{told:?}");
            }
        }
    });
}
