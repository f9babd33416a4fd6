//! The node's CNI configuration with the guard at the end of its chain. Container runtimes use the file whose name
//! sorts first, so the chain is written anew under such a name and the CNI's own file stays as it is. No file is
//! touched in here.

use serde_json::{Map, Value, json};

/// The plugin's type, which is its program's name.
pub(super) const PLUGIN: &str = "weft-cni";
/// Names of our own file. The first that sorts before the CNI's is taken.
pub(super) const NAMES: [&str; 3] = ["00-weft.conflist", "00-00-weft.conflist", "!00-weft.conflist"];
/// What runtimes read.
const EXTENSIONS: [&str; 3] = [".conf", ".conflist", ".json"];
/// How deep a configuration is searched.
const DEPTH: usize = 16;

/// A configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct File {
    /// Its name.
    pub(super) name: String,
    /// Its permission bits.
    pub(super) mode: u32,
    /// What it holds.
    pub(super) content: Value,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// There is no network of Pods that could be guarded: ours goes, or the node would seem to have one.
    Remove,
    /// This file is ours.
    Write(File),
}

/// Why nothing can be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the file {first} sorts before every name that Weft's could have; give it a name that begins with 10-"
)]
pub struct NoName {
    /// The file that is used.
    first: String,
}

/// Whether a runtime would read it, by its name.
pub(super) fn read(name: &str) -> bool {
    EXTENSIONS.iter().any(|extension| name.ends_with(extension))
}

/// What is to be done, given every file that runtimes read, and the guard's entry in a chain.
pub(super) fn plan(files: &[File], entry: &Value) -> Result<Plan, NoName> {
    let mut others: Vec<&File> =
        files.iter().filter(|file| !NAMES.contains(&&*file.name) && usable(file)).collect();
    others.sort_by(|a, b| a.name.cmp(&b.name));
    // A meta plugin copies the first file, ours, into its own: it is guarded already, and taking it again would never
    // come to an end.
    let Some(base) = others.iter().find(|file| !guarded(&file.content, DEPTH)) else {
        return Ok(Plan::Remove);
    };
    let copied = others.first().is_some_and(|first| first.name != base.name);
    let before = |name: &&&str| copied || ***name < *base.name;
    let name = NAMES.iter().find(before).ok_or_else(|| NoName { first: base.name.clone() })?;
    let content = chain(&base.content, entry);
    Ok(Plan::Write(File { name: (*name).into(), mode: base.mode, content }))
}

/// Whether a runtime takes it: it passes over files that it does not understand.
fn usable(file: &File) -> bool {
    let content = &file.content;
    if file.name.ends_with(".conflist") {
        let plugins = content["plugins"].as_array().is_some_and(|plugins| !plugins.is_empty());
        // Plugins may lie in a folder beside it (CNI 1.1).
        content["name"].is_string() && (plugins || content["loadOnlyInlinedPlugins"] == false)
    } else {
        content["type"].as_str().is_some_and(|kind| !kind.is_empty())
    }
}

/// Whether the guard is somewhere in it.
fn guarded(value: &Value, depth: usize) -> bool {
    let Some(depth) = depth.checked_sub(1) else { return false };
    match value {
        Value::Object(fields) => {
            fields.get("type").is_some_and(|kind| kind == PLUGIN)
                || fields.values().any(|value| guarded(value, depth))
        }
        Value::Array(list) => list.iter().any(|value| guarded(value, depth)),
        // Some embed a whole configuration as text.
        Value::String(text) => text.contains(&format!("\"{PLUGIN}\"")),
        _ => false,
    }
}

/// The configuration with the guard behind its plugins. A single plugin becomes a list of itself and the guard; name and
/// version stay, since address managers keep their books under the name.
fn chain(base: &Value, entry: &Value) -> Value {
    let mut list = match base {
        Value::Object(fields) if fields.contains_key("plugins") => fields.clone(),
        single => {
            let mut list = Map::new();
            for key in ["cniVersion", "name", "disableCheck"] {
                if let Some(value) = single.get(key) {
                    list.insert(key.into(), value.clone());
                }
            }
            list.insert("plugins".into(), json!([single]));
            list
        }
    };
    if let Some(plugins) = list.entry("plugins").or_insert_with(|| json!([])).as_array_mut() {
        plugins.push(entry.clone());
    }
    Value::Object(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, content: Value) -> File {
        File { name: name.into(), mode: 0o644, content }
    }

    fn bridge() -> Value {
        json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}, {"type": "portmap"}]})
    }

    fn entry() -> Value {
        json!({"type": PLUGIN, "socket": "/s", "namespaces": "/l"})
    }

    fn written(files: &[File]) -> File {
        match plan(files, &entry()) {
            Ok(Plan::Write(file)) => file,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_first_chain_gets_the_guard_at_its_end() {
        let files = [
            file("20-other.conflist", json!({"name": "o", "plugins": [{"type": "x"}]})),
            File { mode: 0o600, ..file("10-pods.conflist", bridge()) },
        ];
        let ours = written(&files);
        assert_eq!((ours.name.as_str(), ours.mode), ("00-weft.conflist", 0o600));
        assert_eq!(ours.content["name"], "pods");
        assert_eq!(ours.content["plugins"][2], entry());
        // Once it is there nothing changes.
        assert_eq!(written(&[&files[..], std::slice::from_ref(&ours)].concat()), ours);
    }

    #[test]
    fn a_single_plugin_becomes_a_chain() {
        let single =
            json!({"cniVersion": "0.3.1", "name": "n", "type": "calico", "ipam": {"type": "host-local"}});
        let ours = written(&[file("10-calico.conf", single.clone())]);
        let expected = json!({"cniVersion": "0.3.1", "name": "n", "plugins": [single, entry()]});
        assert_eq!(ours.content, expected);
    }

    #[test]
    fn its_name_sorts_first() {
        assert_eq!(written(&[file("00-zone.conflist", bridge())]).name, "00-weft.conflist");
        assert_eq!(written(&[file("00-a.conflist", bridge())]).name, "00-00-weft.conflist");
        assert_eq!(written(&[file("0-a.conflist", bridge())]).name, "!00-weft.conflist");
        assert!(plan(&[file("!!.conflist", bridge())], &entry()).is_err());
        // The earlier one of ours does not count as somebody else's.
        let earlier = file("00-weft.conflist", chain(&bridge(), &entry()));
        assert_eq!(written(&[earlier, file("00-a.conflist", bridge())]).name, "00-00-weft.conflist");
    }

    #[test]
    fn what_runtimes_pass_over_is_passed_over() {
        let broken = file("05-empty.conflist", json!({"name": "n", "plugins": []}));
        let untyped = file("06-x.conf", json!({"name": "n"}));
        assert_eq!(plan(&[broken.clone(), untyped.clone()], &entry()), Ok(Plan::Remove));
        assert_eq!(written(&[broken, untyped, file("10-pods.conflist", bridge())]).content["name"], "pods");
        // The CNI went: so does ours.
        assert_eq!(plan(&[file("00-weft.conflist", chain(&bridge(), &entry()))], &entry()), Ok(Plan::Remove));
        assert!(
            read("a.conf") && read("a.json") && !read(".00-weft.conflist.1f.new") && !read("a.cilium_bak")
        );
    }

    #[test]
    fn a_copy_of_ours_is_not_wrapped_again() {
        let ours = chain(&bridge(), &entry());
        let object = json!({"name": "multus", "type": "multus", "delegates": [ours]});
        let text = json!({"name": "multus", "type": "multus", "clusterNetwork": ours.to_string()});
        for meta in [object, text] {
            let ours = written(&[file("00-multus.conf", meta.clone()), file("10-pods.conflist", bridge())]);
            assert_eq!(ours.content["name"], "pods", "{meta}");
            assert_eq!(ours.content["plugins"].as_array().map(Vec::len), Some(3));
        }
    }
}
