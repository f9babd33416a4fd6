//! Policies, settings and routes: what the operator says of them.

use serde_json::Value;

use super::{Finding, facts::Facts};

const SECTION: &str = "Policies and routes";
const CONTROLLER: &str = "weft.mesh/operator";

pub(super) fn all(facts: &Facts) -> Vec<Finding> {
    let objects = match &facts.objects {
        Err(why) => return vec![Finding::unseen(SECTION, "policies and routes", why)],
        Ok(objects) => objects,
    };
    let mut findings = Vec::new();
    let (mut fine, mut unseen) = (0_usize, Vec::new());
    for object in objects {
        let name = name(object);
        let Some(conditions) = conditions(object) else { continue };
        if conditions.is_empty() {
            unseen.push(name);
            continue;
        }
        let failed: Vec<_> = conditions.iter().filter(|c| c["status"] == "False").collect();
        if failed.is_empty() {
            fine += 1;
        }
        for condition in failed {
            let text = |field: &str| condition[field].as_str().unwrap_or_default();
            let message = format!("{name}: not {}: {}", text("type"), text("message"));
            let remedy = match text("type") {
                "Programmed" => "see `weft status` for the nodes that are named".to_owned(),
                _ => format!("correct it: kubectl {}", edit(object)),
            };
            findings.push(Finding::error(SECTION, message, remedy));
        }
    }
    if !unseen.is_empty() {
        let remedy = "the operator looks at new objects within a second: does it run?";
        let message = format!("{} have no status yet", unseen.len());
        findings.push(Finding::warning(SECTION, message, remedy).with(unseen));
    }
    if findings.is_empty() {
        findings.push(match fine {
            0 => Finding::info(SECTION, "there are none: every authenticated caller is allowed"),
            n => Finding::ok(SECTION, format!("{n} accepted and in force")),
        });
    }
    findings
}

/// The conditions that Weft set; `None` for a route that is not Weft's.
fn conditions(object: &Value) -> Option<Vec<Value>> {
    let list = |v: &Value| v.as_array().cloned().unwrap_or_default();
    if object["kind"] != "HTTPRoute" {
        return Some(list(&object["status"]["conditions"]));
    }
    let parents = list(&object["status"]["parents"]);
    let ours = parents.iter().filter(|p| p["controllerName"] == CONTROLLER);
    let found: Vec<_> = ours.flat_map(|p| list(&p["conditions"])).collect();
    (!found.is_empty()).then_some(found)
}

fn name(object: &Value) -> String {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let (kind, name) = (text(&object["kind"]), text(&object["metadata"]["name"]));
    match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{kind} {namespace}/{name}"),
        None => format!("{kind} {name}"),
    }
}

fn edit(object: &Value) -> String {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let (kind, name) = (text(&object["kind"]).to_lowercase(), text(&object["metadata"]["name"]));
    match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("-n {namespace} edit {kind} {name}"),
        None => format!("edit {kind} {name}"),
    }
}
