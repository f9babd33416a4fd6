//! What the CNI specification asks of a plugin: its parameters, its configuration and its errors.

use std::{env, io, path::PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

/// Versions of the specification that the plugin takes: it hands the result of the plugin before it on as it is.
pub const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Longest name of a Kubernetes object.
const MAX_NAME: usize = 253;

/// What the runtime wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// A sandbox gets its network.
    Add,
    /// It loses it.
    Del,
    /// Whether it is as it was made.
    Check,
    /// Whether the plugin can add.
    Status,
    /// What belongs to no sandbox any more may go.
    Gc,
    /// Which versions the plugin takes.
    Version,
}

/// The parameters, which the runtime puts into the environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameters {
    /// `CNI_COMMAND`.
    pub command: Command,
    /// `CNI_CONTAINERID`; empty where the command needs none.
    pub sandbox: String,
    /// `CNI_NETNS`.
    pub netns: String,
    /// The Pod, of `CNI_ARGS`; `None` for a container that is none's.
    pub pod: Option<Pod>,
}

/// A Pod, as container runtimes name it in `CNI_ARGS`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// `K8S_POD_NAMESPACE`.
    pub namespace: String,
    /// `K8S_POD_NAME`.
    pub name: String,
    /// `K8S_POD_UID`; empty where the runtime does not tell it.
    pub uid: String,
}

/// The plugin's part of the network configuration, from standard input.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// The version of the specification.
    #[serde(default = "oldest")]
    pub cni_version: String,
    /// Where the agent listens.
    pub socket: PathBuf,
    /// The list of namespaces.
    pub namespaces: PathBuf,
    /// What the plugins before it made.
    pub prev_result: Option<Value>,
}

fn oldest() -> String {
    VERSIONS[0].to_owned()
}

/// Why the plugin fails.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The configuration is of another version.
    #[error("CNI version {0} is not known to weft-cni; it takes {known}", known = VERSIONS.join(", "))]
    Version(String),
    /// A parameter is missing or wrong.
    #[error("{0} is missing or wrong: weft-cni is run by a container runtime, not by hand")]
    Parameter(&'static str),
    /// Standard input cannot be read.
    #[error("no configuration on standard input: {0}")]
    Input(#[from] io::Error),
    /// It is no configuration.
    #[error("the configuration on standard input cannot be used: {0}")]
    Content(#[from] serde_json::Error),
    /// No plugin ran before it.
    #[error(
        "weft-cni makes no network itself: in the CNI configuration it stands behind the plugin that does"
    )]
    Alone,
    /// The Pod must not start now.
    #[error("{0}")]
    Held(String),
}

impl Failure {
    /// The specification's code; 11 is "try again later".
    pub fn code(&self) -> u32 {
        match self {
            Self::Version(_) => 1,
            Self::Parameter(_) => 4,
            Self::Input(_) => 5,
            Self::Content(_) => 6,
            Self::Alone => 7,
            Self::Held(_) => 11,
        }
    }

    /// The error as the specification wants it on standard output.
    pub fn object(&self, version: &str) -> Value {
        json!({"cniVersion": version, "code": self.code(), "msg": self.to_string()})
    }
}

impl Parameters {
    /// Those of this process.
    ///
    /// # Errors
    /// Names the one that is missing or wrong.
    pub fn read() -> Result<Self, Failure> {
        Self::of(|name| env::var(name).ok())
    }

    fn of(get: impl Fn(&str) -> Option<String>) -> Result<Self, Failure> {
        let command = match get("CNI_COMMAND").as_deref() {
            Some("ADD") => Command::Add,
            Some("DEL") => Command::Del,
            Some("CHECK") => Command::Check,
            Some("STATUS") => Command::Status,
            Some("GC") => Command::Gc,
            Some("VERSION") => Command::Version,
            _ => return Err(Failure::Parameter("CNI_COMMAND")),
        };
        let sandbox = get("CNI_CONTAINERID").unwrap_or_default();
        let netns = get("CNI_NETNS").unwrap_or_default();
        if matches!(command, Command::Add | Command::Del) && !plain(&sandbox, MAX_NAME) {
            return Err(Failure::Parameter("CNI_CONTAINERID"));
        }
        if command == Command::Add && !netns.starts_with('/') {
            return Err(Failure::Parameter("CNI_NETNS"));
        }
        let pod = Pod::of(&get("CNI_ARGS").unwrap_or_default())?;
        Ok(Self { command, sandbox, netns, pod })
    }
}

impl Pod {
    fn of(arguments: &str) -> Result<Option<Self>, Failure> {
        let value = |key: &str| {
            let found = arguments.split(';').filter_map(|pair| pair.split_once('='));
            found.filter(|(name, _)| *name == key).map(|(_, value)| value.to_owned()).next()
        };
        let Some(namespace) = value("K8S_POD_NAMESPACE") else { return Ok(None) };
        let name = value("K8S_POD_NAME").unwrap_or_default();
        let uid = value("K8S_POD_UID").unwrap_or_default();
        if plain(&namespace, MAX_NAME) && plain(&name, MAX_NAME) && (uid.is_empty() || plain(&uid, 64)) {
            Ok(Some(Self { namespace, name, uid }))
        } else {
            Err(Failure::Parameter("CNI_ARGS"))
        }
    }
}

/// A name as Kubernetes and runtimes give them.
fn plain(text: &str, longest: usize) -> bool {
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    (1..=longest).contains(&text.len()) && text.bytes().all(fine)
}

impl Network {
    /// Reads it.
    ///
    /// # Errors
    /// When it is no configuration of a version that is known.
    pub fn parse(content: &[u8]) -> Result<Self, Failure> {
        let network: Self = serde_json::from_slice(content)?;
        if VERSIONS.contains(&network.cni_version.as_str()) {
            Ok(network)
        } else {
            Err(Failure::Version(network.cni_version))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(pairs: &[(&str, &str)]) -> Result<Parameters, Failure> {
        let get =
            |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Parameters::of(get)
    }

    const ADD: [(&str, &str); 3] =
        [("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "0a1b"), ("CNI_NETNS", "/var/run/netns/cni-1")];

    #[test]
    fn the_pod_is_in_the_arguments() {
        let arguments = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=12-34";
        let read = parameters(&[&ADD[..], &[("CNI_ARGS", arguments)]].concat()).unwrap();
        let pod = Pod { namespace: "shop".into(), name: "web-0".into(), uid: "12-34".into() };
        assert_eq!(read.pod, Some(pod));
        assert_eq!(parameters(&ADD).unwrap().pod, None);
        for bad in [
            "K8S_POD_NAMESPACE=a/b;K8S_POD_NAME=x",
            "K8S_POD_NAMESPACE=shop",
            "K8S_POD_NAMESPACE=;K8S_POD_NAME=x",
        ] {
            let read = parameters(&[&ADD[..], &[("CNI_ARGS", bad)]].concat());
            assert!(matches!(read, Err(Failure::Parameter("CNI_ARGS"))), "{bad}");
        }
    }

    #[test]
    fn what_the_command_needs_must_be_there() {
        assert!(matches!(parameters(&[]), Err(Failure::Parameter("CNI_COMMAND"))));
        assert!(matches!(parameters(&ADD[..1]), Err(Failure::Parameter("CNI_CONTAINERID"))));
        assert!(matches!(parameters(&ADD[..2]), Err(Failure::Parameter("CNI_NETNS"))));
        assert!(parameters(&[("CNI_COMMAND", "DEL"), ADD[1]]).is_ok());
        for free in ["STATUS", "GC", "VERSION"] {
            assert!(parameters(&[("CNI_COMMAND", free)]).is_ok(), "{free}");
        }
    }

    #[test]
    fn a_network_of_an_unknown_version_is_refused_by_the_specifications_code() {
        let text = |version: &str| {
            format!(
                r#"{{"cniVersion":"{version}","name":"n","type":"weft-cni","socket":"/s","namespaces":"/l"}}"#
            )
        };
        assert!(Network::parse(text("1.1.0").as_bytes()).unwrap().prev_result.is_none());
        assert_eq!(Network::parse(text("9.0.0").as_bytes()).unwrap_err().code(), 1);
        assert_eq!(Network::parse(b"{").unwrap_err().code(), 6);
        let object = Failure::Held("later".into()).object("1.0.0");
        assert_eq!(object, json!({"cniVersion": "1.0.0", "code": 11, "msg": "later"}));
    }
}
