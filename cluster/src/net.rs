//! The addresses of a cluster, and its wires.

use std::{fs::File, path::PathBuf, process::Command, thread};

use anyhow::{Context as _, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use crate::sh;

/// The API server's address.
pub(crate) const CONTROL: &str = "10.200.0.1";
/// Its IPv6 address.
pub(crate) const CONTROL6: &str = "fd00:10:200::1";
/// The first Service address: the API server's own Service.
pub(crate) const API_SERVICE: &str = "10.96.0.1";
/// The address of the cluster's DNS.
pub(crate) const DNS: &str = "10.96.0.10";

/// A list for both families, or the IPv4 part alone.
fn both(dual: bool, four: &str, six: &str) -> String {
    if dual { format!("{four},{six}") } else { four.to_owned() }
}

/// The ranges of all Pods, comma separated.
pub(crate) fn pod_ranges(dual: bool) -> String {
    both(dual, "10.244.0.0/16", "fd00:10:244::/56")
}

/// The ranges of Services, comma separated.
pub(crate) fn service_ranges(dual: bool) -> String {
    both(dual, "10.96.0.0/16", "fd00:10:96::/112")
}

/// A node's addresses, comma separated.
pub(crate) fn node_addresses(dual: bool, node: u8) -> String {
    both(dual, &format!("10.200.0.1{node}"), &format!("fd00:10:200::1{node}"))
}

/// The ranges of a node's Pods.
pub(crate) fn node_pod_ranges(dual: bool, node: u8) -> Vec<String> {
    let mut ranges = vec![format!("10.244.{node}.0/24")];
    if dual {
        ranges.push(format!("fd00:10:244:{node}::/64"));
    }
    ranges
}

/// Where a named network namespace is.
pub(crate) fn path(netns: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(netns)
}

/// Makes the namespace of the control plane with its bridge, to which the nodes' wires are plugged.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn raise_control(netns: &str) -> Result<()> {
    add(netns)?;
    batch(
        netns,
        &format!(
            "link set lo up\nlink add br0 type bridge\naddr add {CONTROL}/24 dev br0\n\
             addr add {CONTROL6}/64 dev br0 nodad\nlink set br0 up\n"
        ),
    )?;
    sysctls(netns, &[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")])
}

/// Makes a node's namespace and its wire to the control plane; adds the routes to it and to the other nodes.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn raise_node(control: &str, netns: &str, node: u8, nodes: u8) -> Result<()> {
    add(netns)?;
    batch(
        control,
        &format!("link add v{node} type veth peer name eth0 netns {netns}\nlink set v{node} master br0 up\n"),
    )?;
    let mut inside = format!(
        "link set lo up\naddr add 10.200.0.1{node}/24 dev eth0\naddr add fd00:10:200::1{node}/64 dev eth0 nodad\n\
         link set eth0 up\nroute add default via {CONTROL}\n-6 route add default via {CONTROL6}\n"
    );
    for other in (1..=nodes).filter(|other| *other != node) {
        inside += &format!(
            "route add 10.244.{other}.0/24 via 10.200.0.1{other}\n\
             -6 route add fd00:10:244:{other}::/64 via fd00:10:200::1{other}\n"
        );
    }
    sysctls(
        netns,
        &[
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv6/conf/default/accept_dad", "0"),
        ],
    )?;
    batch_lines(netns, &inside)?;
    batch_lines(
        control,
        &format!(
            "route replace 10.244.{node}.0/24 via 10.200.0.1{node}\n\
             -6 route replace fd00:10:244:{node}::/64 via fd00:10:200::1{node}\n"
        ),
    )
}

/// Pulls a node's wire out. Its namespace is emptied some time after it was removed; the wire's name in the control
/// plane's namespace has to be free before that.
///
/// # Errors
/// When `ip` cannot be run.
pub(crate) fn unplug(control: &str, node: u8) -> Result<()> {
    // It fails where no wire is plugged in.
    sh::finish(ip()?.args(["-n", control, "link", "del", &format!("v{node}")]), None).map(drop)
}

/// Removes a namespace with everything in it; one that is not there is fine.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn remove(netns: &str) -> Result<()> {
    if path(netns).exists() {
        sh::output(ip()?.args(["netns", "del", netns]), None)?;
    }
    Ok(())
}

fn ip() -> Result<Command> {
    Ok(Command::new(sh::need("ip", "iproute2")?))
}

fn add(netns: &str) -> Result<()> {
    sh::output(ip()?.args(["netns", "add", netns]), None).map(drop)
}

fn batch(netns: &str, commands: &str) -> Result<()> {
    sh::output(ip()?.args(["-n", netns, "-batch", "-"]), Some(commands.as_bytes())).map(drop)
}

/// Batch mode has one address family for all lines, so those that begin with `-6` go apart.
fn batch_lines(netns: &str, commands: &str) -> Result<()> {
    let (six, four): (Vec<&str>, Vec<&str>) = commands.lines().partition(|line| line.starts_with("-6 "));
    batch(netns, &(four.join("\n") + "\n"))?;
    let six: String = six.iter().map(|line| format!("{}\n", line.trim_start_matches("-6 "))).collect();
    sh::output(ip()?.args(["-6", "-n", netns, "-batch", "-"]), Some(six.as_bytes())).map(drop)
}

/// Runs `work` on a thread of its own inside a network namespace.
///
/// # Errors
/// When the namespace cannot be entered, and what `work` gives.
pub(crate) fn within<T: Send>(netns: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let path = path(netns);
    let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    thread::scope(|scope| {
        let thread = scope.spawn(move || {
            setns(file, CloneFlags::CLONE_NEWNET).context("enter a network namespace")?;
            work()
        });
        thread.join().map_err(|_| anyhow!("the thread inside {} panicked", path.display()))?
    })
}

fn sysctls(netns: &str, settings: &[(&str, &str)]) -> Result<()> {
    within(netns, || {
        for (key, value) in settings {
            std::fs::write(format!("/proc/sys/{key}"), value).with_context(|| format!("set {key}"))?;
        }
        Ok(())
    })
}
