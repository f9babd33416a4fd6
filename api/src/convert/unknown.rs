//! Finds fields that a lenient type dropped.

use serde_json::Value;

/// The paths of the fields that are in `given` but not in `kept`, which is `given` after a round trip through a type
/// that ignores what it does not know.
pub fn unknown_fields(path: &str, given: &Value, kept: Option<&Value>) -> Vec<String> {
    match (given, kept) {
        (Value::Null, _) => Vec::new(),
        (_, None) => vec![path.to_owned()],
        (Value::Object(given), Some(Value::Object(kept))) => given
            .iter()
            // An empty list or map may be left out by the type without a loss.
            .filter(|(key, value)| kept.contains_key(*key) || !is_empty(value))
            .flat_map(|(key, value)| unknown_fields(&format!("{path}.{key}"), value, kept.get(key)))
            .collect(),
        (Value::Array(given), Some(Value::Array(kept))) => given
            .iter()
            .enumerate()
            .flat_map(|(i, value)| unknown_fields(&format!("{path}[{i}]"), value, kept.get(i)))
            .collect(),
        _ => Vec::new(),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Object(o) => o.is_empty(),
        Value::Array(a) => a.is_empty(),
        _ => false,
    }
}
