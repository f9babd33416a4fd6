//! Reading a `/metrics` page.

use std::collections::BTreeMap;

/// One sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The series' name with its suffix (`_total`, `_bucket`).
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Value.
    pub value: f64,
}

/// The samples of a page in OpenMetrics' text form; lines that are none are left out.
pub fn parse(page: &str) -> Vec<Sample> {
    page.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect()
}

fn sample(line: &str) -> Option<Sample> {
    let (series, value) = match line.split_once('}') {
        Some((series, value)) => (series, value),
        None => line.split_once(' ')?,
    };
    let value = value.split_whitespace().next()?.parse().ok()?;
    let (name, labels) = series.split_once('{').unwrap_or((series, ""));
    let labels = labels
        .split("\",")
        .filter_map(|pair| pair.split_once("=\""))
        .map(|(key, value)| (key.trim().to_owned(), value.trim_end_matches('"').to_owned()))
        .collect();
    Some(Sample { name: name.into(), labels, value })
}

/// The sum of the samples of that name whose labels hold all of `wanted`.
pub fn sum(samples: &[Sample], name: &str, wanted: &[(&str, &str)]) -> f64 {
    let fits = |sample: &&Sample| {
        sample.name == name
            && wanted.iter().all(|(key, value)| sample.labels.get(*key).map(String::as_str) == Some(value))
    };
    samples.iter().filter(fits).map(|sample| sample.value).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_labels_and_values() {
        let page =
            "# TYPE a counter\na_total{x=\"1\",y=\"b c\"} 3\na_total{x=\"2\",y=\"d\"} 4.5 1.0\nup 1\n# EOF\n";
        let samples = parse(page);
        assert_eq!(samples.len(), 3);
        assert_eq!(sum(&samples, "a_total", &[]), 7.5);
        assert_eq!(sum(&samples, "a_total", &[("y", "b c")]), 3.0);
        assert_eq!(sum(&samples, "up", &[]), 1.0);
    }
}
