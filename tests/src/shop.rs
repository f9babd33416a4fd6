//! The shop of `deploy/examples/shop-cluster.yaml`: its manifest with the programs of Debian in place of the public
//! images, spread over two nodes so that every step of an order crosses the wire.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use weft_cluster::{image::Image, parts::debian};

use crate::{
    lab::objects,
    mesh::{LAB, Mesh, NGINX},
};

/// Its namespace.
pub const SHOP: &str = "shop";
const REDIS: &str = "registry.test/redis:1";
const PYTHON: &str = "registry.test/python:1";
/// PostgreSQL's image, `psql` included.
pub const POSTGRES: &str = "registry.test/postgres:1";

/// What each public image is replaced by.
const IMAGES: [(&str, &str); 5] = [
    ("nginxinc/nginx-unprivileged:1.29", NGINX),
    ("python:3.13-alpine", PYTHON),
    ("redis:7-alpine", REDIS),
    ("postgres:17-alpine", POSTGRES),
    ("registry.k8s.io/e2e-test-images/agnhost:2.53", LAB),
];

/// Where each part runs; the customer is on node 2.
const NODES: [(&str, &str); 6] = [
    ("frontend", "node1"),
    ("api", "node2"),
    ("redis", "node1"),
    ("postgres", "node1"),
    ("migrate", "node2"),
    ("quotes", "node2"),
];

/// What an image of PostgreSQL does before the server runs, as the public one does it.
const POSTGRES_START: &str = "#!/bin/sh
set -e
[ $# -eq 0 ] || exec \"$@\"
if [ ! -s \"$PGDATA/PG_VERSION\" ]; then
  initdb --pgdata \"$PGDATA\" --username postgres --auth trust --locale C --no-sync --no-instructions
  echo \"host all all all ${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256}\" >> \"$PGDATA/pg_hba.conf\"
fi
exec postgres -D \"$PGDATA\" -c 'listen_addresses=*' -c unix_socket_directories=/tmp
";

fn say(line: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Gives the nodes the images.
///
/// # Errors
/// When Debian cannot be reached, or a node refuses one.
pub fn load_images(mesh: &Mesh) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let tree = |name: &str, packages: &[&str]| debian::tree(name, "bookworm", packages, &say);
    let redis = Image::new(REDIS).tree(&tree("redis-server", &["redis-server"])?, "/")?;
    let python =
        Image::new(PYTHON).tree(&tree("python3", &["python3-minimal", "libpython3-stdlib"])?, "/")?;
    let root = tree("postgresql-15-shell", &["postgresql-15", "dash", "coreutils"])?;
    let users = fs::read_to_string(root.join("etc/passwd"))? + "postgres:x:70:70::/tmp:/bin/sh\n";
    let bin = "/usr/lib/postgresql/15/bin";
    let postgres = Image::new(POSTGRES)
        .tree(&root, "/")?
        .link("dash", "/usr/bin/sh")
        .text(&users, "/etc/passwd", 0o644)
        .text(POSTGRES_START, "/usr/local/bin/docker-entrypoint.sh", 0o755)
        .env("PATH", &format!("{bin}:/usr/local/bin:/usr/bin:/bin"))
        .user("70:70")
        .entrypoint(&["docker-entrypoint.sh"]);
    for (name, image) in [("redis", redis), ("python", python), ("postgres", postgres)] {
        let archive = folder.path().join(format!("{name}.tar"));
        image.write_archive(&archive)?;
        mesh.cluster.load(&archive)?;
        fs::remove_file(&archive)?;
    }
    Ok(())
}

/// The manifest as the test applies it, with two Pods more: the customer, who may call the frontend, and an analyst who
/// is allowed nothing.
///
/// # Errors
/// When the manifest is not as it is expected here.
pub fn manifest() -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples/shop-cluster.yaml");
    let mut text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    for (public, ours) in IMAGES {
        ensure!(text.contains(public), "the manifest has no image {public}");
        text = text.replace(public, ours);
    }
    let mut all = objects::documents(&text)?;
    for object in &mut all {
        let (kind, _, name) = objects::name_of(object);
        if !["Deployment", "StatefulSet", "Job"].contains(&kind.as_str()) {
            continue;
        }
        let node = NODES.iter().find(|(part, _)| *part == name);
        let (_, node) = node.with_context(|| format!("nobody says where {name} shall run"))?;
        let pod = &mut object["spec"]["template"]["spec"];
        pod["nodeName"] = json!(node);
        pod["terminationGracePeriodSeconds"] = json!(1);
        if name == "quotes" {
            pod["containers"][0]["args"] = json!(["serve", "--grpc", "9000"]);
        }
    }
    for (name, image) in [("customer", LAB), ("analyst", POSTGRES)] {
        all.push(json!({"apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": name, "namespace": SHOP}}));
        let container = match name {
            "customer" => json!({"name": "c", "image": image, "args": ["serve"]}),
            _ => json!({"name": "c", "image": image, "command": ["sleep", "infinity"]}),
        };
        all.push(json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": SHOP},
            "spec": {"nodeName": "node2", "serviceAccountName": name, "terminationGracePeriodSeconds": 0,
                "containers": [container]}}));
    }
    Ok(all.iter().map(|object| format!("---\n{object}\n")).collect())
}

/// Waits until every part is ready.
///
/// # Errors
/// When one is not in time.
pub fn opened(mesh: &Mesh) -> Result<()> {
    let wait = |words: &[&str]| mesh.cluster.kubectl(words).with_context(|| mesh.diagnose());
    for part in [
        "statefulset/postgres",
        "deployment/redis",
        "deployment/quotes",
        "deployment/api",
        "deployment/frontend",
    ] {
        wait(&["-n", SHOP, "rollout", "status", part, "--timeout=240s"])?;
    }
    wait(&["-n", SHOP, "wait", "--for=condition=Complete", "job/migrate", "--timeout=240s"])?;
    mesh.ready(SHOP, &["customer", "analyst"])?;
    mesh.named(SHOP, &["frontend", "api", "redis", "postgres", "quotes"])
}

/// `address:port` of a Service.
///
/// # Errors
/// When there is none.
pub fn at(mesh: &Mesh, service: &str, port: u16, v6: bool) -> Result<String> {
    let path = format!(".spec.clusterIPs[{}]", u8::from(v6));
    let address = mesh.field(SHOP, &format!("service/{service}"), &path)?;
    let address: std::net::IpAddr =
        address.trim().parse().with_context(|| format!("{service}: {address:?}"))?;
    Ok(std::net::SocketAddr::new(address, port).to_string())
}

/// Orders `item` so many times through frontend, api, redis and postgres, and checks every answer.
///
/// # Errors
/// When one is wrong or missing.
pub fn order(mesh: &Mesh, item: &str, count: usize, pace_ms: u64, v6: bool) -> Result<()> {
    let (to, count) = (at(mesh, "frontend", 80, v6)?, count.to_string());
    let (path, pace) = (format!("/api/order/{item}"), pace_ms.to_string());
    let words = ["http", "--to", &to, "--path", &path, "--count", &count, "--pace-ms", &pace];
    let answer = mesh.app(SHOP, "customer", &words)?;
    let told = format!("{item} is redis-{item} and sql-{item}");
    let right = answer["bodies"][&told].as_u64().unwrap_or(0).to_string();
    ensure!(right == count, "{right} of {count} orders were right: {}", brief(&answer));
    Ok(())
}

/// Asks for quotes so many times (gRPC through nginx), and checks every answer.
///
/// # Errors
/// When one is wrong or missing.
pub fn quote(mesh: &Mesh, name: &str, count: usize, pace_ms: u64, v6: bool) -> Result<()> {
    let (to, count, pace) = (at(mesh, "frontend", 81, v6)?, count.to_string(), pace_ms.to_string());
    let words = ["health", "--to", &to, "--count", &count, "--service", name, "--pace-ms", &pace];
    let answer = mesh.app(SHOP, "customer", &words)?;
    let serving = answer["serving"].to_string();
    ensure!(serving == count, "of {count} quotes: {answer}");
    Ok(())
}

fn brief(answer: &Value) -> String {
    format!("bodies {}, statuses {}, errors {}", answer["bodies"], answer["statuses"], answer["errors"])
}
