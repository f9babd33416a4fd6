//! A Pod: a network namespace, a child cgroup of its node, and a veth whose other end is the node's.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use anyhow::{Context as _, Result};

use crate::lab::{net, node::Node, process::Place};

/// The gateway of every Pod: the node's end of its veth.
const GATEWAY4: &str = "169.254.1.1";
const GATEWAY6: &str = "fe80::1";

/// A Pod of the lab.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its namespace (Kubernetes).
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its node's name.
    pub node: String,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
    /// Its UID.
    pub uid: String,
    /// The name of its network namespace.
    pub netns_name: String,
    /// The node's end of its veth.
    pub veth: String,
    /// Where its processes live.
    pub place: Place,
}

impl Pod {
    /// Its address of the wanted family.
    pub fn address(&self, v6: bool) -> IpAddr {
        if v6 { self.v6.into() } else { self.v4.into() }
    }

    /// `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Makes namespace, cgroup, link and routes. The namespace's name must be in the lab's record already.
    pub(super) fn raise(&self, node: &Node) -> Result<()> {
        fs::create_dir_all(&self.place.cgroup)
            .with_context(|| format!("make {}", self.place.cgroup.display()))?;
        net::ip_batch(None, &format!("netns add {}\n", self.netns_name))?;
        net::sysctls(&self.place.netns, &["net/ipv6/conf/default/accept_dad=0"])?;
        let (ns, veth, v4, v6) = (&self.netns_name, &self.veth, self.v4, self.v6);
        net::ip_batch(
            Some(&node.netns_name),
            &format!(
                "link add {veth} type veth peer name eth0 netns {ns}\n\
                 addr add {GATEWAY4}/32 dev {veth}\n\
                 addr add {GATEWAY6}/64 dev {veth} nodad\n\
                 link set {veth} up\n"
            ),
        )?;
        net::ip_batch(
            Some(ns),
            &format!(
                "link set lo up\n\
                 addr add {v4}/32 dev eth0\n\
                 addr add {v6}/128 dev eth0 nodad\n\
                 link set eth0 up\n\
                 route add {GATEWAY4}/32 dev eth0 scope link\n\
                 route add default via {GATEWAY4} dev eth0 src {v4}\n\
                 route add ::/0 via {GATEWAY6} dev eth0 src {v6}\n"
            ),
        )?;
        // The interface of a Pod that had the address before may outlive it until the agent lets go of its namespace.
        net::ip_batch(
            Some(&node.netns_name),
            &format!("route replace {v4}/32 dev {veth}\nroute replace {v6}/128 dev {veth}\n"),
        )?;
        net::sysctls(
            &self.place.netns,
            &[
                "net/ipv4/ip_local_port_range=10000 65000",
                "net/core/somaxconn=8192",
                "net/ipv4/tcp_tw_reuse=1",
            ],
        )
    }

    /// Its folder for configuration and logs.
    pub fn folder(&self, lab: &std::path::Path) -> PathBuf {
        lab.join("pods").join(&self.name)
    }
}
