//! The files of a node.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::{cgroup::Hierarchies, net, parts::Parts, pki::Pki, record::Record};

/// Writes the configuration of containerd, CNI, kubelet and kube-proxy, and a script for each service, below
/// `folder/etc`.
///
/// # Errors
/// When the folder cannot be written.
pub(super) fn write(record: &Record, parts: &Parts, node: u8, folder: &Path) -> Result<()> {
    let etc = folder.join("etc");
    fs::create_dir_all(&etc).with_context(|| format!("make {}", etc.display()))?;
    let pki = Pki::at(record.folder().join("pki"));
    let name = format!("node{node}");
    let json_file = |name: &str, value: &Value| -> Result<()> {
        // JSON is YAML.
        Ok(fs::write(etc.join(name), serde_json::to_vec_pretty(value)?)?)
    };
    fs::write(etc.join("containerd.toml"), containerd(parts, &record.options.handlers))?;
    json_file("cni.conflist", &cni(record, node))?;
    json_file("kubelet.yaml", &kubelet(&pki, &name))?;
    json_file("kube-proxy.yaml", &kube_proxy(record, &pki))?;
    script(
        &etc,
        "containerd",
        "containerd",
        &[format!("--config={}", etc.join("containerd.toml").display())],
    )?;
    script(
        &etc,
        "kubelet",
        "kubelet",
        &[
            format!("--config={}", etc.join("kubelet.yaml").display()),
            format!("--kubeconfig={}", pki.file(&format!("{name}.kubeconfig")).display()),
            format!("--hostname-override={name}"),
            format!("--node-ip={}", net::node_addresses(record.options.dual_stack, node)),
            "--root-dir=/var/lib/kubelet".into(),
        ],
    )?;
    script(
        &etc,
        "kube-proxy",
        "kube-proxy",
        &[
            format!("--config={}", etc.join("kube-proxy.yaml").display()),
            format!("--hostname-override={name}"),
        ],
    )
}

fn script(etc: &Path, name: &str, program: &str, arguments: &[String]) -> Result<()> {
    let path: PathBuf = etc.join(format!("start-{name}"));
    // As systemd does, the kubelet is alone in a cgroup of its own: by that its probes are known. Each start makes
    // another one.
    let group = match program {
        "kubelet" => format!(
            "group={}/system.slice/kubelet.service\nrmdir \"$group\" 2> /dev/null\nmkdir -p \"$group\"\n\
             echo $$ > \"$group/cgroup.procs\" || exit 70\n",
            Hierarchies::find()?.unified().display()
        ),
        _ => String::new(),
    };
    let text = format!(
        "#!/bin/sh\n{group}echo $$ > /run/node/{name}.pid\nexec {program} {} >> /var/log/{name}.log 2>&1\n",
        arguments.join(" ")
    );
    fs::write(&path, text)?;
    Ok(fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?)
}

/// NRI is on by default; its socket is /run/nri/nri.sock.
fn containerd(parts: &Parts, handlers: &[String]) -> String {
    let runc = parts.debian.join("wrapped/runc");
    let mut text = format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{pause}"
[plugins."io.containerd.cri.v1.runtime"]
  # Without CAP_SYS_RESOURCE no process can be made dearer to the kernel.
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["/opt/cni/bin", "{cni}"]
  conf_dir = "/etc/cni/net.d"
[plugins."io.containerd.cri.v1.runtime".containerd]
  default_runtime_name = "runc"
"#,
        pause = crate::parts::PAUSE_IMAGE,
        cni = parts.debian.join("usr/lib/cni").display(),
    );
    for handler in ["runc"].into_iter().chain(handlers.iter().map(String::as_str)) {
        text += &format!(
            r#"[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{handler}]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{handler}.options]
  BinaryName = "{}"
  SystemdCgroup = false
"#,
            runc.display()
        );
    }
    text
}

fn cni(record: &Record, node: u8) -> Value {
    let dual = record.options.dual_stack;
    let ranges: Vec<Value> =
        net::node_pod_ranges(dual, node).iter().map(|subnet| json!([{"subnet": subnet}])).collect();
    let mut routes = vec![json!({"dst": "0.0.0.0/0"})];
    if dual {
        routes.push(json!({"dst": "::/0"}));
    }
    let kind = record.options.cni;
    let mut plugin = json!({
        "type": kind.name(),
        "ipam": {"type": "host-local", "ranges": ranges, "routes": routes},
    });
    if kind == crate::options::Cni::Bridge {
        plugin["bridge"] = json!("cni0");
        plugin["isGateway"] = json!(true);
        plugin["hairpinMode"] = json!(true);
    }
    json!({
        "cniVersion": "1.0.0",
        "name": "weft",
        "plugins": [plugin, {"type": "portmap", "capabilities": {"portMappings": true}}],
    })
}

fn kubelet(pki: &Pki, name: &str) -> Value {
    let file = |name: String| pki.file(&name).display().to_string();
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": false,
        "cgroupDriver": "cgroupfs",
        "failSwapOn": false,
        "resolvConf": "/dev/null",
        "clusterDNS": [net::DNS],
        "clusterDomain": "cluster.local",
        "enforceNodeAllocatable": ["pods"],
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        // Not a share: the disk is the machine's, and one percent of a large one is more than many have left.
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "200Mi", "imagefs.available": "200Mi"},
        "imageGCHighThresholdPercent": 99,
        "volumePluginDir": "/opt/volume-plugins",
        "nodeStatusUpdateFrequency": "5s",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": file("ca.crt".into())},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": file(format!("{name}.crt")),
        "tlsPrivateKeyFile": file(format!("{name}.key")),
    })
}

fn kube_proxy(record: &Record, pki: &Pki) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": record.options.proxy_mode.name(),
        "clusterCIDR": net::pod_ranges(record.options.dual_stack),
        "clientConnection": {"kubeconfig": pki.file("kube-proxy.kubeconfig").display().to_string()},
        // The machine's settings: a network namespace may read them only.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpCloseWaitTimeout": "0s", "tcpEstablishedTimeout": "0s"},
    })
}
