//! What a cluster shall be.

use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How kube-proxy programs the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ProxyMode {
    /// nftables rules.
    Nftables,
    /// iptables rules (through the kernel's nftables).
    Iptables,
}

impl ProxyMode {
    /// As kube-proxy's configuration names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

/// How Pods are wired to their node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Cni {
    /// A bridge; Pods of a node are neighbours.
    Bridge,
    /// A routed point-to-point link for each Pod.
    Ptp,
}

impl Cni {
    /// The plugin's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Ptp => "ptp",
        }
    }
}

/// What a cluster shall be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Options {
    /// Its name; a unique one where there is none. At most 12 characters of `a-z`, `0-9` and `-`.
    pub name: Option<String>,
    /// How many nodes, 1 to 9. They are called `node1`, `node2` and so on.
    pub nodes: u8,
    /// kube-proxy's mode.
    pub proxy_mode: ProxyMode,
    /// The Pod network.
    pub cni: Cni,
    /// IPv4 and IPv6 for nodes, Pods and Services; else IPv4 alone.
    pub dual_stack: bool,
    /// Whether CoreDNS runs.
    pub dns: bool,
    /// Image archives that each node holds from its start.
    pub images: Vec<PathBuf>,
    /// Further arguments of kube-apiserver.
    pub apiserver_args: Vec<String>,
    /// Further handler names of the container runtime, for RuntimeClass objects (they all run runc).
    pub handlers: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: None,
            nodes: 2,
            proxy_mode: ProxyMode::Nftables,
            cni: Cni::Bridge,
            dual_stack: false,
            dns: true,
            images: Vec::new(),
            apiserver_args: Vec::new(),
            handlers: Vec::new(),
        }
    }
}
