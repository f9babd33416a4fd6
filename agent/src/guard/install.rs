//! The guard on the node's disk: its program beside the other CNI plugins', its file beside the CNI's.

use std::{
    fs, io,
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use serde_json::{Value, json};
use weft_runtime::durable;

use super::{
    Settings,
    conf::{self, File, NAMES, NoName, PLUGIN, Plan},
};

/// Largest configuration file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Most files of the folder that are read.
const MAX_FILES: usize = 64;
/// Largest program.
const MAX_PROGRAM: u64 = 64 << 20;
/// Our file is not written again while others have taken it away this often, this recently.
const CONTEST: (usize, Duration) = (3, Duration::from_secs(60));

/// Why Pods that start while no agent runs are not held on this node.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// A file or folder cannot be read or written.
    #[error(
        "{path} cannot be {done}; check the agent's volumes and --cni-conf-dir, --cni-bin-dir and --state-dir"
    )]
    File {
        /// Which.
        path: PathBuf,
        /// What failed.
        done: &'static str,
        /// Why.
        source: io::Error,
    },
    /// There is no configuration.
    #[error(
        "{0} holds no CNI configuration: if the container runtime reads another folder, name that one (the chart's value \
         agent.cni.confFolder, or the agent's volume cni-conf)"
    )]
    Empty(PathBuf),
    /// No name is left.
    #[error(transparent)]
    NoName(#[from] NoName),
    /// Somebody takes our file away.
    #[error(
        "something removes {0} again and again; Cilium does so unless it is installed with cni.exclusive=false. The agent \
         tries again after a while"
    )]
    Contested(PathBuf),
}

fn file(path: &Path, done: &'static str) -> impl FnOnce(io::Error) -> Problem {
    move |source| Problem::File { path: path.into(), done, source }
}

/// Installs the guard and keeps it installed.
#[derive(Debug)]
pub(super) struct Installer {
    settings: Settings,
    /// Where our file was after the last look.
    written: Option<PathBuf>,
    /// When others took it away.
    taken: Vec<Instant>,
    /// The program as it was found to be right.
    right: Option<Seal>,
}

/// By what a change of a file is noticed: length, time of change, permission bits.
type Seal = (u64, SystemTime, u32);

fn seal(path: &Path) -> Option<Seal> {
    let found = fs::metadata(path).ok()?;
    Some((found.len(), found.modified().ok()?, found.permissions().mode()))
}

impl Installer {
    pub(super) fn new(settings: Settings) -> Self {
        Self { settings, written: None, taken: Vec::new(), right: None }
    }

    /// Brings the node to what it should be; true where something was written. Program first: a file that names a
    /// program that is not there would fail every Pod.
    pub(super) fn install(&mut self, now: Instant) -> Result<bool, Problem> {
        let program = self.program()?;
        let folder = self.settings.conf_dir.clone();
        let files = files(&folder)?;
        let ours = match conf::plan(&files, &self.entry())? {
            Plan::Write(ours) => ours,
            Plan::Remove => {
                remove_configuration(&folder, None)?;
                self.written = None;
                return Err(Problem::Empty(folder));
            }
        };
        let path = folder.join(&ours.name);
        let there = files.iter().any(|file| file.name == ours.name);
        if !there && self.written.as_ref() == Some(&path) {
            self.taken.push(now);
        }
        self.taken.retain(|at| now.saturating_duration_since(*at) < CONTEST.1);
        if self.taken.len() >= CONTEST.0 {
            // Not taken once more by the next look.
            self.written = None;
            return Err(Problem::Contested(path));
        }
        let current = files.contains(&ours);
        if !current {
            let mut content = serde_json::to_vec_pretty(&ours.content).unwrap_or_default();
            content.push(b'\n');
            durable::replace(&path, &content, ours.mode).map_err(file(&path, "written"))?;
            // The umask may have taken bits away, which would make it another file for ever.
            let mode = fs::Permissions::from_mode(ours.mode);
            fs::set_permissions(&path, mode).map_err(file(&path, "written"))?;
        }
        remove_configuration(&folder, Some(&ours.name))?;
        self.written = Some(path);
        Ok(program || !current)
    }

    /// Copies the program, unless it is there.
    fn program(&mut self) -> Result<bool, Problem> {
        let path = self.settings.bin_dir.join(PLUGIN);
        if self.right.is_some() && seal(&path) == self.right {
            return Ok(false);
        }
        let wanted =
            content(&self.settings.program, MAX_PROGRAM).map_err(file(&self.settings.program, "read"))?;
        let executable = fs::metadata(&path).is_ok_and(|found| found.permissions().mode() & 0o111 == 0o111);
        if executable && content(&path, MAX_PROGRAM).is_ok_and(|there| there == wanted) {
            self.right = seal(&path);
            return Ok(false);
        }
        durable::replace(&path, &wanted, 0o755).map_err(file(&path, "written"))?;
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&path, mode).map_err(file(&path, "written"))?;
        self.right = seal(&path);
        Ok(true)
    }

    /// The guard's entry in the chain. Its paths are the node's.
    fn entry(&self) -> Value {
        json!({"type": PLUGIN, "socket": self.settings.socket, "namespaces": self.settings.list()})
    }
}

/// Removes our file, the program and the list, in this order: from the first step on no Pod is held.
///
/// # Errors
/// When something stays.
pub fn remove(
    conf_dir: Option<&Path>,
    bin_dir: Option<&Path>,
    state_dir: Option<&Path>,
) -> Result<(), Problem> {
    if let Some(folder) = conf_dir {
        remove_configuration(folder, None)?;
    }
    if let Some(folder) = bin_dir {
        let path = folder.join(PLUGIN);
        gone(fs::remove_file(&path)).map_err(file(&path, "removed"))?;
    }
    if let Some(folder) = state_dir {
        let path = folder.join(super::LIST);
        gone(fs::remove_file(&path)).map_err(file(&path, "removed"))?;
    }
    Ok(())
}

fn remove_configuration(folder: &Path, keep: Option<&str>) -> Result<(), Problem> {
    for name in NAMES.into_iter().filter(|name| Some(*name) != keep) {
        let path = folder.join(name);
        gone(fs::remove_file(&path)).map_err(file(&path, "removed"))?;
    }
    Ok(())
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The files of the folder that a runtime would read and that are JSON.
fn files(folder: &Path) -> Result<Vec<File>, Problem> {
    let list = fs::read_dir(folder).map_err(file(folder, "read"))?;
    let names = list.flatten().filter_map(|item| item.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| conf::read(name)).collect();
    names.sort();
    let one = |name: String| {
        let path = folder.join(&name);
        let mode = fs::metadata(&path).ok().filter(fs::Metadata::is_file)?.permissions().mode() & 0o777;
        let content = serde_json::from_slice(&content(&path, MAX_FILE).ok()?).ok()?;
        Some(File { name, mode, content })
    };
    Ok(names.into_iter().take(MAX_FILES).filter_map(one).collect())
}

fn content(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    fs::File::open(path)?.take(limit + 1).read_to_end(&mut content)?;
    if content.len() as u64 > limit {
        return Err(io::Error::other("the file is too large"));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = r#"{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"bridge"}]}"#;

    fn settings(root: &Path) -> Settings {
        for folder in ["net.d", "bin", "state"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::write(root.join("weft-cni"), "program 1").unwrap();
        Settings {
            conf_dir: root.join("net.d"),
            bin_dir: root.join("bin"),
            state_dir: root.join("state"),
            socket: root.join("cni.sock"),
            program: root.join("weft-cni"),
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn the_guard_is_installed_kept_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path());
        let (ours, own) =
            (settings.conf_dir.join("00-weft.conflist"), settings.conf_dir.join("10-pods.conflist"));
        let mut installer = Installer::new(settings.clone());
        let mut install = || installer.install(Instant::now());
        assert!(matches!(install(), Err(Problem::Empty(_))));
        assert!(!ours.exists());

        fs::write(&own, OWN).unwrap();
        fs::set_permissions(&own, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(install().unwrap());
        let text: Value = serde_json::from_slice(&fs::read(&ours).unwrap()).unwrap();
        assert_eq!(text["plugins"][1]["namespaces"], json!(dir.path().join("state/namespaces.json")));
        assert_eq!((mode(&ours), mode(&settings.bin_dir.join("weft-cni"))), (0o600, 0o755));
        assert_eq!(fs::read_to_string(&own).unwrap(), OWN, "the CNI's own file is never touched");
        assert!(!install().unwrap());

        // The CNI changes its own, somebody changes ours, the agent is another version.
        fs::write(&own, OWN.replace("bridge", "ptp")).unwrap();
        assert!(install().unwrap() && fs::read_to_string(&ours).unwrap().contains("ptp"));
        fs::write(&ours, "{}").unwrap();
        assert!(install().unwrap() && fs::read_to_string(&ours).unwrap().contains("weft-cni"));
        fs::write(settings.bin_dir.join("weft-cni"), "").unwrap();
        assert!(install().unwrap() && !install().unwrap());
        fs::write(&settings.program, "program 2").unwrap();
        let mut installer = Installer::new(settings.clone());
        let mut install = || installer.install(Instant::now());
        assert!(install().unwrap() && !install().unwrap());
        assert_eq!(fs::read(settings.bin_dir.join("weft-cni")).unwrap(), b"program 2");

        // Without the CNI's own a node must not seem to have a network.
        fs::rename(&own, dir.path().join("away")).unwrap();
        assert!(install().is_err() && !ours.exists());
        fs::rename(dir.path().join("away"), &own).unwrap();
        assert!(install().unwrap());

        fs::write(settings.list(), "{}").unwrap();
        for _ in 0..2 {
            remove(Some(&settings.conf_dir), Some(&settings.bin_dir), Some(&settings.state_dir)).unwrap();
        }
        assert!(own.exists() && !ours.exists() && !settings.list().exists());
        assert_eq!(fs::read_dir(&settings.bin_dir).unwrap().count(), 0);
    }

    #[test]
    fn a_fight_over_the_file_is_given_up_for_a_while_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path());
        let ours = settings.conf_dir.join("00-weft.conflist");
        fs::write(settings.conf_dir.join("05-cilium.conflist"), OWN).unwrap();
        let mut installer = Installer::new(settings);
        let now = Instant::now();
        assert!(installer.install(now).unwrap());
        for round in 1..=3 {
            fs::rename(&ours, ours.with_extension("cilium_bak")).unwrap();
            assert_eq!(installer.install(now).is_ok(), round < 3, "{round}");
        }
        assert!(matches!(installer.install(now), Err(Problem::Contested(_))));
        assert!(installer.install(now + CONTEST.1).unwrap());
    }
}
