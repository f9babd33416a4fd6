//! Label selectors in Kubernetes' syntax, over labels in Hubble's `source:key=value` form.

/// A selector: every requirement must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Selector(Vec<Requirement>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    Exists,
    Absent,
    In(Vec<String>),
    NotIn(Vec<String>),
}

impl Selector {
    /// Reads `a=b,c!=d,e in (f,g),h notin (i),j,!k`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let parts = split(text)?;
        let requirements: Result<Vec<_>, String> = parts.iter().map(|p| requirement(p)).collect();
        Ok(Self(requirements?))
    }

    /// Whether `labels` (`k8s:app=web`, or without the source) fulfil it. A key without source finds any source.
    pub(super) fn matches(&self, labels: &[String]) -> bool {
        self.0.iter().all(|r| {
            let value = labels.iter().find_map(|label| {
                let (key, value) = label.split_once('=').unwrap_or((label, ""));
                let bare = key.split_once(':').map_or(key, |(_, bare)| bare);
                (key == r.key || bare == r.key).then_some(value)
            });
            match (&r.test, value) {
                (Test::Exists, v) => v.is_some(),
                (Test::Absent, v) => v.is_none(),
                (Test::In(values), Some(v)) => values.iter().any(|x| x == v),
                (Test::In(_), None) => false,
                (Test::NotIn(values), Some(v)) => values.iter().all(|x| x != v),
                (Test::NotIn(_), None) => true,
            }
        })
    }
}

/// Splits at commas outside parentheses.
fn split(text: &str) -> Result<Vec<&str>, String> {
    let (mut parts, mut start, mut inside) = (Vec::new(), 0, false);
    for (at, c) in text.char_indices() {
        match c {
            '(' if !inside => inside = true,
            ')' if inside => inside = false,
            '(' | ')' => return Err(format!("{text:?}: parentheses do not match")),
            ',' if !inside => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if inside {
        return Err(format!("{text:?}: parentheses do not match"));
    }
    parts.push(&text[start..]);
    Ok(parts)
}

fn requirement(text: &str) -> Result<Requirement, String> {
    let text = text.trim();
    let made = |key: &str, test: Test| {
        let key = key.trim();
        if key.is_empty() || key.contains(char::is_whitespace) {
            Err(format!("{text:?} is no label selector; write one like app=web or app in (web,api)"))
        } else {
            Ok(Requirement { key: key.into(), test })
        }
    };
    if let Some(open) = text.find('(') {
        let values = text[open + 1..].trim_end_matches(')').split(',').map(|v| v.trim().to_owned()).collect();
        let head = text[..open].trim_end();
        return if let Some(key) = head.strip_suffix(" notin") {
            made(key, Test::NotIn(values))
        } else if let Some(key) = head.strip_suffix(" in") {
            made(key, Test::In(values))
        } else {
            made("", Test::Exists)
        };
    }
    if let Some((key, value)) = text.split_once("!=") {
        made(key, Test::NotIn(vec![value.trim().into()]))
    } else if let Some((key, value)) = text.split_once('=') {
        made(key, Test::In(vec![value.trim_start_matches('=').trim().into()]))
    } else if let Some(key) = text.strip_prefix('!') {
        made(key, Test::Absent)
    } else {
        made(text, Test::Exists)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_in_every_form() {
        let labels = ["k8s:app=web".to_owned(), "k8s:tier=front".to_owned(), "reserved:host".to_owned()];
        let table = [
            ("app=web", true),
            ("app==web", true),
            ("k8s:app=web", true),
            ("app=api", false),
            ("app!=api", true),
            ("app!=web", false),
            ("app in (api, web)", true),
            ("app notin (api,web)", false),
            ("color notin (red)", true),
            ("app,tier=front", true),
            ("!color", true),
            ("!app", false),
            ("reserved:host", true),
            ("any:app=web", false),
        ];
        for (text, expected) in table {
            assert_eq!(Selector::parse(text).unwrap().matches(&labels), expected, "{text}");
        }
        for bad in ["", "a in (b", "a (b)", "=x", "a b", "x)"] {
            assert!(Selector::parse(bad).is_err(), "{bad:?}");
        }
    }
}
