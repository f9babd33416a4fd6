//! The reference of the kinds as Markdown, made from their schemas: what the API server knows is what is written down.

use std::fmt::Write as _;

use serde_json::Value;

use crate::{AuthorizationPolicy, MeshConfig, TrafficPolicy};
use kube::CustomResourceExt as _;

const HEADER: &str = "<!-- Generated from api/src by `cargo xtask docs`; do not edit. -->\n";

/// Every page: the file's name in `docs/reference` and its text.
///
/// # Errors
/// When a schema does not serialise.
pub fn all() -> Result<Vec<(String, String)>, serde_json::Error> {
    let mut pages = Vec::new();
    let mut index = format!(
        "# The kinds of weft.mesh\n\n{HEADER}\n| kind | what it says | scope | short |\n|---|---|---|---|\n"
    );
    for crd in [AuthorizationPolicy::crd(), MeshConfig::crd(), TrafficPolicy::crd()] {
        let crd = serde_json::to_value(crd)?;
        let kind = text(&crd["spec"]["names"]["kind"]);
        let file = format!("{}.md", kind.to_lowercase());
        let about = text(&crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["description"]);
        let short = shorts(&crd);
        let _ = writeln!(index, "| [{kind}]({file}) | {} | {} | {short} |", cell(about), scope(&crd));
        pages.push((file, page(&crd)));
    }
    index.push_str(
        "\n`kubectl get weft -A` lists all of them, `kubectl explain KIND.spec` tells the same as these pages. Routes are the\nGateway API's own HTTPRoute. Labels on Namespaces and Pods: [concepts](../concepts.md).\n",
    );
    pages.push(("README.md".into(), index));
    Ok(pages)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn scope(crd: &Value) -> &'static str {
    if crd["spec"]["scope"] == "Namespaced" { "a namespace" } else { "the cluster" }
}

fn shorts(crd: &Value) -> String {
    let all = crd["spec"]["names"]["shortNames"].as_array().into_iter().flatten();
    all.map(|s| format!("`{}`", text(s))).collect::<Vec<_>>().join(", ")
}

fn page(crd: &Value) -> String {
    let names = &crd["spec"]["names"];
    let version = &crd["spec"]["versions"][0];
    let schema = &version["schema"]["openAPIV3Schema"];
    let mut out =
        format!("# {}\n\n{HEADER}\n{}\n\n", text(&names["kind"]), prose(text(&schema["description"])));
    let _ = writeln!(
        out,
        "`apiVersion: {}/{}`, of {}; `kubectl get {}`{}.",
        text(&crd["spec"]["group"]),
        text(&version["name"]),
        scope(crd),
        text(&names["plural"]),
        match shorts(crd) {
            short if short.is_empty() => short,
            short => format!(" ({short})"),
        },
    );
    let columns: Vec<_> = version["additionalPrinterColumns"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|c| text(&c["name"]))
        .collect();
    if !columns.is_empty() {
        let _ = writeln!(out, "It shows {}.", columns.join(", "));
    }
    out.push_str("\n## Fields of `spec`\n| field | type | default | what it says |\n|---|---|---|---|\n");
    let mut rules = Vec::new();
    fields(&schema["properties"]["spec"], "", &mut out, &mut rules);
    rules_of(schema, "the object", &mut rules);
    if !rules.is_empty() {
        out.push_str("\n## What is refused when it is applied\nBesides values of a wrong type or out of bounds, and fields that are not in the table:\n\n");
        for (place, message) in rules {
            let _ = writeln!(out, "- `{place}`: {}", prose(&message));
        }
    }
    let _ = write!(out, "\n## Status\n{}\n", prose(text(&schema["properties"]["status"]["description"])));
    out
}

/// The rows below a schema, depth first.
fn fields(schema: &Value, path: &str, out: &mut String, rules: &mut Vec<(String, String)>) {
    rules_of(schema, if path.is_empty() { "spec" } else { path }, rules);
    let required: Vec<_> = schema["required"].as_array().into_iter().flatten().map(text).collect();
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let default = match &field["default"] {
            Value::Null if required.contains(&name.as_str()) => "required".to_owned(),
            Value::Null => String::new(),
            Value::Object(_) => String::new(),
            Value::String(text) if text.is_empty() => "`\"\"`".to_owned(),
            value => format!("`{}`", plain(value)),
        };
        let about = cell(text(&field["description"]));
        let _ = writeln!(out, "| `{path}` | {} | {default} | {about} |", kind(field));
        let mut inner = (field, path);
        while inner.0["items"].is_object() {
            inner = (&inner.0["items"], format!("{}[]", inner.1));
        }
        if inner.0["additionalProperties"].is_object() {
            inner = (&inner.0["additionalProperties"], format!("{}.*", inner.1));
        }
        fields(inner.0, &inner.1, out, rules);
    }
}

fn rules_of(schema: &Value, place: &str, rules: &mut Vec<(String, String)>) {
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        let message = text(&rule["message"]);
        rules.push((
            place.to_owned(),
            if message.is_empty() { text(&rule["rule"]) } else { message }.to_owned(),
        ));
    }
}

/// A type with its bounds, for people.
fn kind(field: &Value) -> String {
    if let Some(values) = field["enum"].as_array() {
        let values = values.iter().filter(|v| !v.is_null()).map(|v| format!("`{}`", plain(v)));
        return values.collect::<Vec<_>>().join(" or ");
    }
    let mut name = match text(&field["type"]) {
        "array" => {
            let of = kind(&field["items"]);
            if of == "object" { "list".to_owned() } else { format!("list of {of}") }
        }
        "object" if field["additionalProperties"].is_object() => {
            format!("map of {}", kind(&field["additionalProperties"]))
        }
        "" if field["x-kubernetes-int-or-string"] == true => "integer or string".to_owned(),
        "" => "any".to_owned(),
        other => other.to_owned(),
    };
    let bound = |low: &str, high: &str| match (&field[low], &field[high]) {
        (Value::Null, Value::Null) => None,
        (low, Value::Null) => Some(format!("from {}", plain(low))),
        (Value::Null, high) => Some(format!("to {}", plain(high))),
        (low, high) if low == high => Some(plain(low)),
        (low, high) => Some(format!("{} to {}", plain(low), plain(high))),
    };
    let sizes = [
        bound("minimum", "maximum"),
        bound("minLength", "maxLength").map(|b| format!("{b} characters")),
        bound("minItems", "maxItems").map(|b| format!("{b} entries")),
        bound("minProperties", "maxProperties").map(|b| format!("{b} entries")),
        field["pattern"].as_str().map(|p| format!("matches `{}`", p.replace('|', "\\|"))),
        field["format"]
            .as_str()
            .filter(|f| !f.starts_with("uint") && !f.starts_with("int"))
            .map(str::to_owned),
    ];
    let sizes: Vec<_> = sizes.into_iter().flatten().collect();
    if !sizes.is_empty() {
        let _ = write!(name, ", {}", sizes.join(", "));
    }
    name
}

/// A value as one writes it in YAML.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => match number.as_f64() {
            Some(float) if float.fract() == 0.0 => format!("{float:.0}"),
            _ => number.to_string(),
        },
        other => other.to_string(),
    }
}

/// Text in a cell of a table.
fn cell(text: &str) -> String {
    prose(text).replace('\n', " ").replace('|', "\\|")
}

/// Text without the breaks of source lines.
fn prose(text: &str) -> String {
    text.split("\n\n").map(|part| part.replace('\n', " ")).collect::<Vec<_>>().join("\n\n").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pages_are_current() {
        for (name, text) in all().unwrap() {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/").to_owned() + &name;
            let found = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(found == text, "docs/reference/{name} is stale; run `cargo xtask docs`");
        }
    }

    #[test]
    fn every_field_of_a_kind_has_its_row_and_its_meaning() {
        let pages = all().unwrap();
        assert_eq!(pages.len(), 4);
        for (name, text) in pages.iter().filter(|(name, _)| name != "README.md") {
            for row in text.lines().filter(|l| l.starts_with("| `")) {
                let cells: Vec<_> = row.trim_matches('|').split(" | ").collect();
                assert_eq!(cells.len(), 4, "{name}: {row}");
                assert!(!cells[3].trim().is_empty(), "{name}: a field without a meaning: {row}");
            }
        }
        let config = &pages.iter().find(|(name, _)| name == "meshconfig.md").unwrap().1;
        assert!(
            config.contains("| `unknownPods` | `RefuseMesh` or `RefuseAll` | `RefuseMesh` |"),
            "{config}"
        );
    }
}
