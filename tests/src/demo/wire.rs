//! Nothing readable on the wire, by a check that can fail.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{
    Teller,
    calls::{Seen, http, latencies, ms, number, pod, vip},
};
use crate::{
    Lab,
    capture::{Capture, Trace},
    wait,
};

/// Runs `work` while a capture on the wire runs.
pub fn captured(lab: &Lab, name: &str, work: impl FnOnce() -> Result<()>) -> Result<Trace> {
    // Outside the lab's folder: the reader may look at it when all else is gone.
    let path = std::env::temp_dir().join(format!("weft-demo-{name}.pcap"));
    let capture = Capture::start(&lab.node("node-a")?.place.netns, "wire0", &path)?;
    work()?;
    capture.finish()
}

/// Step 3.
///
/// # Errors
/// When something could not be done; what is not as told goes to the teller.
pub fn secret(tell: &mut Teller, lab: &Lab, seen: &mut Seen) -> Result<()> {
    tell.step(3, "Nothing readable on the wire, by a check that can fail");
    let word = format!("canary-{:08x}-in-the-clear", std::process::id());
    let header = format!("x-canary: {word}");
    let path = format!("/{word}");
    let web = vip(lab, "shop/web", 80)?;
    let mut payload = 0;
    let trace = captured(lab, "mtls", || {
        let answer = http(lab, "client", &web, &["--count", "200", "--header", &header, "--path", &path])?;
        ensure!(number(&answer, "/statuses/200") == 200, "{answer}");
        payload = number(&answer, "/payload_bytes");
        Ok(())
    })?;
    let (bytes, streams) = trace.tls_bytes(15008);
    let found = trace.find(word.as_bytes());
    tell.did(&format!("200 calls that each carry {word:?}, and a capture between the nodes"));
    tell.saw(
        found == 0 && bytes >= payload,
        &format!(
            "{} packets, {bytes} bytes in TLS records of {streams} streams for {payload} bytes of payload; {found} hold the word",
            trace.len()
        ),
    );
    let took = lab.set_mode("shop", "shop", "disabled")?;
    let direct = pod(lab, "web-v1", 8080)?;
    let trace = captured(lab, "plain", || {
        let answer = http(lab, "client", &direct, &["--count", "200", "--header", &header])?;
        seen.direct = latencies(&answer);
        ensure!(number(&answer, "/statuses/200") == 200, "{answer}");
        Ok(())
    })?;
    let found = trace.find(word.as_bytes());
    tell.saw(
        found > 0,
        &format!(
            "namespace `disabled` (after {}), web's Pod dialled: {found} packets hold the word",
            ms(took)
        ),
    );
    let took = lab.set_mode("shop", "shop", "strict")?;
    wait::until(Duration::from_secs(10), "a call through the mesh again", || {
        let answer = http(lab, "client", &web, &["--timeout-ms", "2000"])?;
        (number(&answer, "/statuses/200") == 1).then_some(()).with_context(|| answer.to_string())
    })?;
    tell.did(&format!(
        "strict again (after {}); {} and weft-demo-mtls.pcap beside it",
        ms(took),
        trace.path.display()
    ));
    Ok(())
}
