//! Whether a Pod may start.

use crate::{
    ask::Silence,
    list::{List, ListError, Mode},
    wire::Answer,
};

/// Namespaces that the mesh stands on: their Pods start whatever happens to it, or it could never come back.
pub const ALWAYS_PASS: [&str; 2] = ["kube-system", "weft-system"];

/// How a person looks for the agent.
const LOOK: &str = "kubectl -n weft-system get pods -l app.kubernetes.io/name=weft-agent -o wide";
/// What to do where there is no Weft any more.
const REMOVED: &str = "if Weft was removed from this cluster, `weft uninstall` cleans its nodes";

/// Judges a Pod of `namespace` by the agent's answer, and by the list on the node where there is none. `list` is asked
/// for only then.
///
/// # Errors
/// Why the Pod must not start now, and what to do: the text that `kubectl describe pod` shows.
pub fn judge(
    namespace: &str,
    answer: Result<Answer, Silence>,
    list: impl FnOnce() -> Result<Option<List>, ListError>,
) -> Result<(), String> {
    if ALWAYS_PASS.contains(&namespace) {
        return Ok(());
    }
    let missing = match answer {
        Ok(Answer::Pass) => return Ok(()),
        Ok(Answer::Refuse { why }) => return Err(format!("weft: {why}")),
        Ok(Answer::Unsure { why }) => why,
        Err(silence) => silence.to_string(),
    };
    let what = match list() {
        // No agent was ever ready here: nothing of this node is in the mesh, and the agent itself may have to come.
        Ok(None) => return Ok(()),
        Ok(Some(list)) => match list.namespaces.get(namespace) {
            Some(known) if !known.holds() => return Ok(()),
            Some(known) => {
                let mode = if known.mode == Mode::Strict { "strict" } else { "permissive" };
                format!("the namespace {namespace} is {mode} in the mesh")
            }
            None => format!("whether the namespace {namespace} is in the mesh is not known on this node"),
        },
        Err(error) => format!("whether the namespace {namespace} is in the mesh is not known ({error})"),
    };
    Err(format!(
        "weft: the Pod is held: {what}, and {missing}. It starts by itself when the agent is back ({LOOK}); {REMOVED}"
    ))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::list;

    fn known() -> Result<Option<List>, ListError> {
        let text = r#"{"namespaces":{"shop":{"mode":"strict"},"db":{"mode":"permissive"},
            "soft":{"mode":"permissive","failMode":"open"},"out":{"mode":"disabled"}}}"#;
        Ok(Some(serde_json::from_str(text).unwrap()))
    }

    fn without(namespace: &str) -> Result<(), String> {
        judge(namespace, Err(Silence::Absent), known)
    }

    #[test]
    fn without_an_agent_the_list_decides() {
        for passes in ["out", "soft", "kube-system", "weft-system"] {
            assert_eq!(without(passes), Ok(()), "{passes}");
        }
        let held = without("shop").unwrap_err();
        for part in
            ["shop is strict", "agent does not run on this node", "starts by itself", "weft uninstall"]
        {
            assert!(held.contains(part), "{held}");
        }
        assert!(without("db").unwrap_err().contains("permissive"));
        assert!(without("new").unwrap_err().contains("not known on this node"));
    }

    #[test]
    fn a_node_that_never_had_an_agent_holds_nothing() {
        assert_eq!(judge("shop", Err(Silence::Absent), || Ok(None)), Ok(()));
    }

    #[test]
    fn a_damaged_list_holds_all_but_the_system() {
        let dir = tempfile::tempdir().unwrap();
        let damaged = || list::load(Path::new(dir.path()));
        assert!(judge("out", Err(Silence::Absent), damaged).is_err());
        assert_eq!(judge("kube-system", Err(Silence::Absent), damaged), Ok(()));
    }

    #[test]
    fn an_agent_that_can_tell_decides_alone() {
        let never = || -> Result<Option<List>, ListError> { panic!("the list was asked for") };
        assert_eq!(judge("shop", Ok(Answer::Pass), never), Ok(()));
        let refused = judge("out", Ok(Answer::Refuse { why: "no".into() }), never);
        assert_eq!(refused, Err("weft: no".into()));
        let unsure = |namespace: &str| {
            judge(namespace, Ok(Answer::Unsure { why: "it has no configuration yet".into() }), known)
        };
        assert_eq!(unsure("out"), Ok(()));
        assert!(unsure("shop").unwrap_err().contains("no configuration yet"));
        let mute = judge("shop", Err(Silence::Mute("nothing within 12 s".into())), known).unwrap_err();
        assert!(mute.contains("does not answer"), "{mute}");
    }
}
