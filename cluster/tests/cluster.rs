//! Real clusters. Needs root and the parts (`cargo xtask cluster parts`); without the latter the first run makes them.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers fail and speak as their test does")]

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use weft_cluster::{
    Cluster, Cni, Options, Program, ProxyMode, Service, image::Image, parts::debian, record::Record,
};

const PODS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  nodeName: node1
  containers:
  - name: web
    image: busybox:1
    command: [sh, -c, 'mkdir /www; echo hello from $(hostname) > /www/index.html; exec httpd -f -v -p 80 -h /www']
    readinessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1}
    volumeMounts: [{name: token, mountPath: /token}]
  volumes:
  - name: token
    projected: {sources: [{serviceAccountToken: {path: token, audience: weft-operator}}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}], ipFamilyPolicy: PreferDualStack}
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  nodeName: node2
  terminationGracePeriodSeconds: 0
  containers: [{name: c, image: busybox:1, command: [sleep, infinity]}]
";

fn say(line: &str) {
    println!("{line}");
}

fn eventually<T>(what: &str, mut step: impl FnMut() -> anyhow::Result<T>) -> T {
    let start = Instant::now();
    loop {
        match step() {
            Ok(value) => return value,
            Err(error) if start.elapsed() > Duration::from_secs(120) => panic!("{what}: {error:#}"),
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn raise_pods(cluster: &Cluster) {
    cluster.apply(PODS).unwrap();
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod/web", "pod/client", "--timeout=120s"]).unwrap();
}

fn fetch(cluster: &Cluster, host: &str) -> anyhow::Result<String> {
    cluster.kubectl(&["exec", "client", "--", "wget", "-T", "5", "-qO-", &format!("http://{host}/")])
}

/// By name, and by each address of the Service, from the other node.
fn services_work(cluster: &Cluster, addresses: usize) {
    let name = "web.default.svc.cluster.local";
    assert_eq!(eventually("the Service by name", || fetch(cluster, name)), "hello from web\n");
    let list = cluster.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIPs[*]}"]).unwrap();
    assert_eq!(list.split_whitespace().count(), addresses, "{list}");
    for address in list.split_whitespace() {
        let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
        assert_eq!(eventually(address, || fetch(cluster, &host)), "hello from web\n");
    }
}

fn removed_without_trace(record: &Record) {
    assert_eq!(record.left().unwrap(), Vec::<String>::new());
    assert!(Record::all().iter().all(|other| other.name != record.name));
}

fn record(cluster: &Cluster) -> Record {
    Record::all().into_iter().find(|record| record.name == cluster.name()).unwrap()
}

#[test]
fn dual_stack_routed_iptables() {
    let options = Options {
        cni: Cni::Ptp,
        proxy_mode: ProxyMode::Iptables,
        dual_stack: true,
        handlers: vec!["sandboxed".into()],
        ..Options::default()
    };
    let cluster = Cluster::up(&options, &say).unwrap();
    raise_pods(&cluster);
    services_work(&cluster, 2);
    assert!(cluster.node(1).exec(&["iptables-save"]).unwrap().contains("KUBE-SERVICES"));
    assert!(cluster.kubectl(&["logs", "web"]).unwrap().contains("response:200"));

    // A Pod's projected token, judged by the API server.
    let token = cluster.kubectl(&["exec", "web", "--", "cat", "/token/token"]).unwrap();
    let review = serde_json::json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
        "spec": {"token": token, "audiences": ["weft-operator"]},
    });
    let path = "jsonpath={.status.authenticated} {.status.user.username} {.status.audiences}";
    let judged = cluster.kubectl_with(&["create", "-f", "-", "-o", path], &review.to_string()).unwrap();
    assert_eq!(judged, r#"true system:serviceaccount:default:default ["weft-operator"]"#);

    // A further handler of the runtime is one that a RuntimeClass may name.
    cluster
        .apply(
            "{apiVersion: node.k8s.io/v1, kind: RuntimeClass, metadata: {name: sandboxed}, handler: sandboxed}\n---\n\
             {apiVersion: v1, kind: Pod, metadata: {name: other}, spec: {runtimeClassName: sandboxed, \
             containers: [{name: c, image: 'busybox:1', command: [sleep, infinity]}]}}",
        )
        .unwrap();
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod/other", "--timeout=120s"]).unwrap();

    let record = record(&cluster);
    assert!(!record.left().unwrap().is_empty());
    cluster.down().unwrap();
    removed_without_trace(&record);
}

#[test]
fn bridged_nftables_with_faults() {
    let cluster = Cluster::up(&Options::default(), &say).unwrap();
    raise_pods(&cluster);
    services_work(&cluster, 1);
    let node = cluster.node(1);
    assert!(node.cri_socket().exists() && node.nri_socket().exists());
    assert!(node.exec(&["nft", "list", "table", "ip", "kube-proxy"]).unwrap().contains("10.96.0.1"));

    // A kubelet that is gone and comes back.
    node.stop_service(Service::Kubelet).unwrap();
    assert!(node.stop_service(Service::Kubelet).is_err());
    node.start_service(Service::Kubelet).unwrap();
    eventually("logs through the new kubelet", || cluster.kubectl(&["logs", "web"]));

    // An API server that is gone: Pods go on.
    cluster.stop(Program::ApiServer).unwrap();
    assert!(cluster.kubectl(&["get", "nodes", "--request-timeout=2s"]).is_err());
    cluster.start(Program::ApiServer).unwrap();
    cluster.wait_api().unwrap();
    services_work(&cluster, 1);

    // A node that loses power: memory and network are new, Pods come back.
    let before = node.pid1();
    let boot = "jsonpath={.status.containerStatuses[0].restartCount}";
    node.stop().unwrap();
    assert!(node.pid1().is_none() && node.exec(&["true"]).is_err());
    node.start().unwrap();
    assert_ne!(node.pid1(), before);
    eventually("web's restart", || {
        let count = cluster.kubectl(&["get", "pod", "web", "-o", boot])?;
        anyhow::ensure!(count.parse::<u32>().unwrap_or(0) > 0, "{count}");
        Ok(())
    });
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod/web", "--timeout=120s"]).unwrap();
    services_work(&cluster, 1);

    let record = record(&cluster);
    drop(cluster);
    removed_without_trace(&record);
}

/// A program of Debian with all that it depends on, as an image made here; reached through a forwarded port. Beside it a
/// Pod that sees the node's own sockets, as a node agent does.
#[test]
fn debian_programs_and_node_sockets() {
    let folder = std::env::temp_dir().join(format!("weft-image-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let archive = folder.join("nginx.tar");
    nginx(&archive);
    let options = Options { nodes: 1, dns: false, images: vec![archive], ..Options::default() };
    let cluster = Cluster::up(&options, &say).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    cluster
        .apply(
            "{apiVersion: v1, kind: Pod, metadata: {name: nginx}, spec: {containers: [{name: c, \
             image: 'test.local/nginx:1', readinessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1}}]}}\n---\n\
             {apiVersion: v1, kind: Pod, metadata: {name: agent}, spec: {hostPID: true, containers: [{name: c, \
             image: 'busybox:1', command: [sh, -c, 'test -S /nri/nri.sock && test -S /cri/containerd.sock && \
             grep -q kubelet /proc/[0-9]*/comm && mount | grep -q bpf && echo seen && sleep 1000'], volumeMounts: [\
             {name: nri, mountPath: /nri}, {name: cri, mountPath: /cri}, {name: bpf, mountPath: /sys/fs/bpf}]}], \
             volumes: [{name: nri, hostPath: {path: /run/nri}}, {name: cri, hostPath: {path: /run/containerd}}, \
             {name: bpf, hostPath: {path: /sys/fs/bpf}}]}}",
        )
        .unwrap();
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod/nginx", "--timeout=120s"]).unwrap();
    eventually("the agent's sight", || {
        anyhow::ensure!(cluster.kubectl(&["logs", "agent"])?.contains("seen"));
        Ok(())
    });
    let script = "kubectl port-forward pod/nginx 18080:80 > /dev/null & \
                  until busybox wget -qO- http://127.0.0.1:18080/; do sleep 0.1; done; kill $!";
    let page = cluster.command("sh").unwrap().args(["-c", script]).output().unwrap();
    assert!(String::from_utf8_lossy(&page.stdout).contains("Welcome to nginx"), "{page:?}");
}

fn nginx(archive: &Path) {
    let root = debian::tree("nginx-light", "bookworm", &["nginx-light"], &say).unwrap();
    Image::new("test.local/nginx:1")
        .tree(&root, "/")
        .unwrap()
        .link("../sites-available/default", "/etc/nginx/sites-enabled/default")
        .folder("/var/www/html", 0o755)
        .text("<h1>Welcome to nginx</h1>", "/var/www/html/index.html", 0o644)
        .entrypoint(&["/usr/sbin/nginx", "-g", "daemon off;"])
        .write_archive(archive)
        .unwrap();
}
