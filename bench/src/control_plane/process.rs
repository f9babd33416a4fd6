//! The operator as a process, and what the kernel says of it.

use std::{
    fs::{self, File},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::server::port;

/// How long it has to read everything.
const START: Duration = Duration::from_secs(120);
/// Ticks of `/proc/PID/stat` in a second: USER_HZ, the same on all of Linux's architectures that Weft runs on.
const TICKS: f64 = 100.0;

/// A running operator; killed with the value.
pub(crate) struct Operator {
    child: Child,
    /// Where agents connect.
    pub(crate) listen: SocketAddr,
    admin: SocketAddr,
}

impl Operator {
    /// Starts it; at `listen` where that is given.
    pub(crate) fn start(
        program: &Path,
        kubeconfig: &Path,
        log: &Path,
        listen: Option<SocketAddr>,
    ) -> Result<Self> {
        let at = || SocketAddr::from(([127, 0, 0, 1], port()));
        let (listen, admin) = (listen.unwrap_or_else(at), at());
        let log = File::options().create(true).append(true).open(log)?;
        let child = Command::new(program)
            .args(["--source=kubernetes", "--namespace=weft-system", "--pod-name=operator-0"])
            .args([format!("--listen={listen}"), format!("--admin={admin}")])
            .env("KUBECONFIG", kubeconfig)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{} cannot be run", program.display()))?;
        Ok(Self { child, listen, admin })
    }

    /// Waits until it has read everything; how long that took.
    pub(crate) async fn ready(&mut self) -> Result<Duration> {
        let begin = Instant::now();
        loop {
            if let Some(end) = self.child.try_wait()? {
                bail!("the operator ended: {end}");
            }
            if self.get("/readyz").await.is_some_and(|answer| answer.starts_with("HTTP/1.1 200")) {
                return Ok(begin.elapsed());
            }
            if begin.elapsed() > START {
                bail!("the operator is not ready after {START:?}");
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    async fn get(&self, path: &str) -> Option<String> {
        let ask = async {
            let mut stream = TcpStream::connect(self.admin).await.ok()?;
            let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.ok()?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.ok()?;
            Some(answer)
        };
        timeout(Duration::from_secs(5), ask).await.ok()?
    }

    /// The sum over all labels of one of its metrics.
    pub(crate) async fn metric(&self, name: &str) -> Result<f64> {
        let text = self.get("/metrics").await.context("the operator's metrics")?;
        let values = text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name).filter(|r| r.starts_with([' ', '{']))?;
            rest.rsplit_once(' ')?.1.parse::<f64>().ok()
        });
        Ok(values.sum())
    }

    fn proc(&self, file: &str) -> Result<String> {
        Ok(fs::read_to_string(format!("/proc/{}/{file}", self.child.id()))?)
    }

    /// Processor time so far, in seconds.
    pub(crate) fn cpu(&self) -> Result<f64> {
        let stat = self.proc("stat")?;
        let fields = stat.rsplit_once(") ").context("/proc/PID/stat")?.1;
        let ticks = fields.split(' ').skip(11).take(2).map(|t| t.parse::<f64>().unwrap_or_default());
        Ok(ticks.sum::<f64>() / TICKS)
    }

    /// Resident memory now, and at its peak since [`Self::forget_peak`], in MiB.
    pub(crate) fn memory(&self) -> Result<(f64, f64)> {
        let status = self.proc("status")?;
        let field = |name: &str| {
            let line = status.lines().find(|l| l.starts_with(name)).unwrap_or_default();
            let kib = line.split_whitespace().nth(1).and_then(|v| v.parse::<f64>().ok());
            kib.map(|kib| kib / 1024.0).with_context(|| format!("/proc/PID/status has no {name}"))
        };
        Ok((field("VmRSS:")?, field("VmHWM:")?))
    }

    /// Begins a new peak.
    pub(crate) fn forget_peak(&self) -> Result<()> {
        Ok(fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5")?)
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
