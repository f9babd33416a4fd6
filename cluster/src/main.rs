//! `cargo xtask cluster`: raises, shows and removes clusters.

#![forbid(unsafe_code)]

use std::{
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use weft_cluster::{
    Cluster, Cni, Options, ProxyMode,
    parts::{Parts, go},
    product,
    record::Record,
    vm,
};

#[derive(Parser)]
#[command(name = "cargo xtask cluster", about = "A real Kubernetes of several nodes on this machine")]
struct Args {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Build and fetch the parts that are missing, and say where they are
    Parts {
        /// SPIRE's server and agent, and Helm, too
        #[arg(long)]
        all: bool,
    },
    /// Raise a cluster and leave it standing
    Up {
        /// Its name; a unique one where none is given
        #[arg(long)]
        name: Option<String>,
        /// How many nodes
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=9))]
        nodes: u8,
        /// kube-proxy's mode
        #[arg(long, value_enum, default_value_t = ProxyMode::Nftables)]
        proxy_mode: ProxyMode,
        /// The Pod network
        #[arg(long, value_enum, default_value_t = Cni::Bridge)]
        cni: Cni,
        /// IPv4 and IPv6
        #[arg(long)]
        dual_stack: bool,
        /// Leave DNS out
        #[arg(long)]
        no_dns: bool,
        /// An image archive for every node
        #[arg(long = "image", value_name = "TAR")]
        images: Vec<PathBuf>,
        /// A further handler of the container runtime
        #[arg(long = "handler", value_name = "NAME")]
        handlers: Vec<String>,
    },
    /// Remove a cluster with everything that it made
    Down {
        #[command(flatten)]
        which: Which,
        /// Every cluster on this machine
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
    /// Show the clusters, their nodes, versions and paths
    Status,
    /// Give an image archive to every node
    Load {
        #[command(flatten)]
        which: Which,
        /// A docker-archive or OCI archive
        #[arg(required = true, value_name = "TAR")]
        images: Vec<PathBuf>,
    },
    /// Write the images of Weft itself, of static binaries (`cargo xtask images` builds them and calls this)
    Images {
        /// Where the binaries are
        #[arg(long, value_name = "DIR")]
        programs: PathBuf,
        /// What stands before the images' names
        #[arg(long)]
        registry: String,
        /// Their tag
        #[arg(long)]
        tag: String,
        /// Where the archives go
        #[arg(long, value_name = "DIR")]
        save: PathBuf,
        /// Push them to their registry, too
        #[arg(long)]
        push: bool,
    },
    /// Run programs on Debian's kernels in virtual machines (`cargo xtask test --tier 8` calls this)
    Kernels {
        /// Fetch what is missing, and run nothing
        #[arg(long)]
        fetch: bool,
        /// A program and its arguments, in one word
        #[arg(long = "run", value_name = "PROGRAM ARGUMENT...")]
        runs: Vec<String>,
    },
    /// Run kubectl as administrator
    Kubectl {
        #[command(flatten)]
        which: Which,
        /// Its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// Run a command where the cluster can be reached, with KUBECONFIG set
    Run {
        #[command(flatten)]
        which: Which,
        /// The command
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// Run a command inside a node
    Node {
        #[command(flatten)]
        which: Which,
        /// Its number, from 1
        index: u8,
        /// The command; a shell where none is given
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
}

#[derive(clap::Args)]
struct Which {
    /// The cluster; needed where several stand
    #[arg(long, env = "WEFT_CLUSTER")]
    name: Option<String>,
}

impl Which {
    fn name(&self) -> Result<String> {
        let all: Vec<String> = Record::all().into_iter().map(|record| record.name).collect();
        match (&self.name, all.as_slice()) {
            (Some(name), _) => Ok(name.clone()),
            (None, [one]) => Ok(one.clone()),
            (None, []) => bail!("no cluster stands; `cargo xtask cluster up` raises one"),
            (None, several) => {
                bail!("several clusters stand ({}); say which with --name", several.join(", "))
            }
        }
    }

    fn open(&self) -> Result<Cluster> {
        Cluster::open(&self.name()?)
    }
}

fn main() -> ExitCode {
    match run(Args::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn run(action: Action) -> Result<()> {
    match action {
        Action::Parts { all } => {
            let parts = Parts::ensure(&say)?;
            say(&format!("Kubernetes {} in {}", go::KUBERNETES.version, parts.kubernetes.display()));
            say(&format!("Debian's parts in {}", parts.debian.display()));
            if all {
                for tool in [go::SPIRE, go::HELM] {
                    say(&format!("{} {} in {}", tool.name, tool.version, tool.ensure(&say)?.display()));
                }
            }
            Ok(())
        }
        Action::Up { name, nodes, proxy_mode, cni, dual_stack, no_dns, images, handlers } => {
            let options = Options {
                name,
                nodes,
                proxy_mode,
                cni,
                dual_stack,
                dns: !no_dns,
                images,
                handlers,
                ..Options::default()
            };
            let mut cluster = Cluster::up(&options, &say)?;
            cluster.keep()?;
            say("");
            describe(&cluster);
            say(
                "\n`cargo xtask cluster kubectl get pods -A` talks to it, `cargo xtask cluster down` removes it.",
            );
            Ok(())
        }
        Action::Down { all: true, .. } => Record::all().iter().try_for_each(remove),
        Action::Down { which, all: false } => {
            let name = which.name()?;
            match Record::all().iter().find(|record| record.name == name) {
                Some(record) => remove(record),
                None => bail!("there is no cluster {name}"),
            }
        }
        Action::Status => status(),
        Action::Load { which, images } => {
            let cluster = which.open()?;
            images.iter().try_for_each(|image| cluster.load(image))
        }
        Action::Images { programs, registry, tag, save, push } => {
            let saved = product::save(&programs, &registry, &tag, &save)?;
            for (name, path) in &saved {
                say(&format!("{name}  {}", path.display()));
            }
            if push { product::push(&saved, &say) } else { Ok(()) }
        }
        Action::Kernels { fetch: true, .. } => vm::fetch(&say),
        Action::Kernels { fetch: false, runs } => {
            let run = |text: &String| {
                let mut words = text.split(' ').map(str::to_owned);
                let program = words.next().unwrap_or_default().into();
                vm::Run { program, arguments: words.collect() }
            };
            vm::on_every_kernel(&runs.iter().map(run).collect::<Vec<_>>(), &say)
        }
        Action::Kubectl { which, words } => become_it(which.open()?.command("kubectl")?.args(words)),
        Action::Run { which, words } => become_it(which.open()?.command(&words[0])?.args(&words[1..])),
        Action::Node { which, index, words } => {
            let cluster = which.open()?;
            if !(1..=cluster.options().nodes).contains(&index) {
                bail!("{} has nodes 1 to {}", cluster.name(), cluster.options().nodes);
            }
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let words = if words.is_empty() { &["bash"] } else { words.as_slice() };
            become_it(&mut cluster.node(index).command(words)?)
        }
    }
}

fn become_it(command: &mut Command) -> Result<()> {
    let error = command.exec();
    bail!("{command:?} cannot be run: {error}")
}

fn remove(record: &Record) -> Result<()> {
    record.remove()?;
    say(&format!("the cluster {} is gone", record.name));
    Ok(())
}

fn status() -> Result<()> {
    let all = Record::all();
    if all.is_empty() {
        say("no cluster stands");
    }
    for record in all {
        let cluster = Cluster::open(&record.name)?;
        describe(&cluster);
        match record.owner {
            Some(_) if record.abandoned() => {
                say("  its process is gone: the next `cargo xtask cluster up` or `down` removes it");
            }
            Some((pid, _)) => say(&format!("  belongs to process {pid} and ends with it")),
            None => {}
        }
        match cluster.kubectl(&["get", "nodes", "-o", "wide", "--request-timeout=5s"]) {
            Ok(nodes) => say(&format!("\n{}", nodes.trim_end())),
            Err(error) => say(&format!("  the API server does not answer: {error:#}")),
        }
    }
    Ok(())
}

fn describe(cluster: &Cluster) {
    let options = cluster.options();
    say(&format!(
        "cluster {}: Kubernetes {}, {} nodes, kube-proxy {}, CNI {}, {}",
        cluster.name(),
        go::KUBERNETES.version,
        options.nodes,
        options.proxy_mode.name(),
        options.cni.name(),
        if options.dual_stack { "IPv4 and IPv6" } else { "IPv4" },
    ));
    say(&format!(
        "  kubeconfig  {} (reachable in {})",
        cluster.kubeconfig().display(),
        cluster.netns().display()
    ));
    say(&format!("  logs        {}/control/*.log", cluster.folder().display()));
    for node in cluster.nodes() {
        let pid = node.pid1().map_or_else(|| "off".into(), |pid| format!("pid {pid}"));
        say(&format!("  {}       {pid}, {}", node.name(), node.folder().display()));
        say(&format!("    CRI {}  NRI {}", node.cri_socket().display(), node.nri_socket().display()));
    }
}
