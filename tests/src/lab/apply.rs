//! Changes while the mesh runs, and when they are enforced.

use std::{
    fs, io,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{Lab, objects};
use crate::wait;

const LIMIT: Duration = Duration::from_secs(10);

impl Lab {
    /// Writes `<name>.yaml` and waits until both nodes say that they enforce what it changed. Gives the time from
    /// before the write.
    ///
    /// # Errors
    /// When a node does not in time, or the operator refuses an object.
    pub fn apply(&self, name: &str, text: &str) -> Result<Duration> {
        self.change(|lab| lab.source().write(name, text))
    }

    /// [`Lab::apply`] of a file of `deploy/examples`.
    ///
    /// # Errors
    /// As [`Lab::apply`].
    pub fn apply_example(&self, name: &str) -> Result<Duration> {
        let path = super::workspace().join("deploy/examples").join(format!("{name}.yaml"));
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        self.apply(name, &text)
    }

    /// Removes `<name>.yaml` and waits as [`Lab::apply`] does.
    ///
    /// # Errors
    /// As [`Lab::apply`].
    pub fn delete(&self, name: &str) -> Result<Duration> {
        self.change(|lab| lab.source().remove(name))
    }

    /// Sets the label `weft.mesh/mode` of a namespace and waits as [`Lab::apply`] does.
    ///
    /// # Errors
    /// As [`Lab::apply`].
    pub fn set_mode(&self, file: &str, namespace: &str, mode: &str) -> Result<Duration> {
        let path = self.source().path().join(format!("{file}.yaml"));
        let mut all = objects::documents(&fs::read_to_string(path)?)?;
        for object in &mut all {
            let (kind, _, name) = objects::name_of(object);
            if kind == "Namespace" && name == namespace {
                object["metadata"]["labels"]["weft.mesh/mode"] = json!(mode);
            }
        }
        self.change(|lab| lab.source().write_objects(file, &all))
    }

    /// Makes a change and waits until both nodes have acknowledged a version that is newer than the one before.
    ///
    /// # Errors
    /// As [`Lab::apply`].
    pub fn change(&self, make: impl FnOnce(&Self) -> Result<()>) -> Result<Duration> {
        let before = self.summary()?;
        let start = Instant::now();
        make(self)?;
        self.wait_enforced(&before)?;
        Ok(start.elapsed())
    }

    /// Takes the objects of a text in, as [`Lab::add_objects`] does, and waits as [`Lab::apply`] does.
    ///
    /// # Errors
    /// As [`Lab::apply`].
    pub fn take_in(&mut self, file: &str, text: &str) -> Result<()> {
        let before = self.summary()?;
        self.add_objects(file, &objects::documents(text)?)?;
        self.wait_enforced(&before)
    }

    /// Waits until both nodes enforce what the operator that runs has read.
    ///
    /// # Errors
    /// When one does not within `limit`, or rejects something.
    pub fn wait_settled(&self, limit: Duration) -> Result<()> {
        let look = || self.enforced_since(&self.summary()?, 0);
        wait::until(limit, "both nodes to enforce what the operator holds", look).map(drop)
    }

    fn wait_enforced(&self, before: &Value) -> Result<()> {
        let sequence = before["sequence"].as_u64().unwrap_or(0);
        wait::until_every(Duration::from_micros(500), LIMIT, "both nodes to enforce the change", || {
            let summary = self.summary()?;
            let unreadable = summary["unreadable"].as_object().filter(|files| !files.is_empty());
            // What could not be read before may be what this change mends.
            if let Some(files) = unreadable
                && summary["unreadable"] != before["unreadable"]
            {
                return Ok(Err(anyhow::anyhow!("the operator cannot read a file: {files:?}")));
            }
            self.enforced_since(&summary, sequence).map(Ok)
        })?
        .0
    }

    fn enforced_since(&self, summary: &Value, before: u64) -> Result<()> {
        let sequence = summary["sequence"].as_u64().unwrap_or(0);
        ensure!(sequence > before, "the operator is still at version {sequence}, as before the change");
        for node in self.nodes() {
            let line = summary["nodes"]
                .as_array()
                .into_iter()
                .flatten()
                .find(|line| line["node"] == node.name.as_str());
            let version = line.map(|line| &line["version"]).filter(|held| held["epoch"] == summary["epoch"]);
            let at = version.and_then(|held| held["sequence"].as_u64()).unwrap_or(0);
            ensure!(at >= sequence, "{} is at version {at} of {sequence}", node.name);
            let rejected =
                line.and_then(|line| line["rejected"].as_array()).is_some_and(|list| !list.is_empty());
            ensure!(!rejected, "{} rejected something: {line:?}", node.name);
        }
        Ok(())
    }

    /// The operator's summary: version, nodes, objects.
    ///
    /// # Errors
    /// When there is none yet.
    pub fn summary(&self) -> Result<Value> {
        let path = self.summary_path();
        let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&bytes).context("the operator's summary")
    }

    /// Removes the summary that an operator left which runs no more: what is read after it is the next one's, whose
    /// versions count from the beginning.
    pub(super) fn forget_summary(&self) -> Result<()> {
        let path = self.summary_path();
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    fn summary_path(&self) -> PathBuf {
        self.source().path().join("status/summary.json")
    }

    /// A condition of an object: its status and message.
    ///
    /// # Errors
    /// When the operator has not written it.
    pub fn condition(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
        condition: &str,
    ) -> Result<(bool, String)> {
        let object = self.source().status(kind, namespace, name)?;
        let list = object.pointer("/status/conditions").and_then(Value::as_array);
        let found = list.into_iter().flatten().find(|one| one["type"] == condition);
        let found =
            found.with_context(|| format!("{kind} {namespace}/{name} has no condition {condition}"))?;
        Ok((found["status"] == "True", found["message"].as_str().unwrap_or_default().to_owned()))
    }
}
