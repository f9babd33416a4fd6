//! Checks a [`TrafficPolicy`]. Nothing of it is enforced by this version: its status says so.

use k8s_openapi::jiff::Timestamp;

use crate::{
    error::{ObjectError, Problems, object_name},
    traffic::{Algorithm, TrafficPolicy},
    values::Duration,
};

/// What its condition `Programmed` says.
pub const NOT_SUPPORTED: &str = "the object is valid, but this version of Weft does not enforce TrafficPolicy yet: calls are balanced by least request";

/// Checks what the CRD's CEL rules check, and what they cannot.
///
/// # Errors
/// With every field that is wrong, and what to write instead.
pub fn check(object: &TrafficPolicy) -> Result<(), ObjectError> {
    let mut problems = Problems::default();
    let spec = &object.spec;
    if spec.target_refs.is_empty() {
        problems
            .push("spec.targetRefs", "it names no Service; write [{group: \"\", kind: Service, name: web}]");
    }
    for (i, target) in spec.target_refs.iter().enumerate() {
        if !target.group.is_empty() {
            problems.push(format!("spec.targetRefs[{i}].group"), "Service is of the core group; write \"\"");
        }
    }
    if let Some(balancing) = &spec.load_balancing {
        let hashes = matches!(balancing.algorithm, Algorithm::RingHash | Algorithm::Maglev);
        if hashes != balancing.hash_on.is_some() {
            problems.push(
                "spec.loadBalancing.hashOn",
                "goes with RingHash and Maglev, and they need it; say header, cookie or sourceIP",
            );
        }
        if let Some(on) = &balancing.hash_on
            && usize::from(on.header.is_some())
                + usize::from(on.cookie.is_some())
                + usize::from(on.source_ip.is_some())
                != 1
        {
            problems.push("spec.loadBalancing.hashOn", "say exactly one of header, cookie and sourceIP");
        }
    }
    if let Some(budget) = &spec.retry_budget {
        percent(budget.percent, "spec.retryBudget.percent", &mut problems);
        positive(budget.interval, "spec.retryBudget.interval", &mut problems);
    }
    if let Some(outlier) = &spec.outlier_detection {
        percent(outlier.max_ejected_percent, "spec.outlierDetection.maxEjectedPercent", &mut problems);
        positive(outlier.base_ejection, "spec.outlierDetection.baseEjection", &mut problems);
    }
    for (i, limit) in spec.rate_limits.iter().enumerate() {
        if limit.requests == 0 {
            problems
                .push(format!("spec.rateLimits[{i}].requests"), "0 would refuse everything; write 1 or more");
        }
        positive(limit.per, &format!("spec.rateLimits[{i}].per"), &mut problems);
    }
    for (i, fault) in spec.faults.iter().enumerate() {
        let field = format!("spec.faults[{i}]");
        percent(fault.percent, &format!("{field}.percent"), &mut problems);
        if fault.abort.is_none() && fault.delay.is_none() {
            problems.push(field.as_str(), "it does nothing; say abort, delay or both");
        }
        if fault.abort.as_ref().is_some_and(|a| !(200..600).contains(&a.http_status)) {
            problems.push(format!("{field}.abort.httpStatus"), "write a status code from 200 to 599");
        }
        if fault.expires_at.parse::<Timestamp>().is_err() {
            problems.push(
                format!("{field}.expiresAt"),
                format_args!("{:?} is no time; write one like 2030-01-01T00:00:00Z", fault.expires_at),
            );
        }
    }
    problems.finish("TrafficPolicy", object_name(&object.metadata), ())
}

fn percent(value: u32, field: &str, problems: &mut Problems) {
    if value > 100 {
        problems.push(field, format_args!("{value} is out of range; write 0 to 100"));
    }
}

fn positive(value: Duration, field: &str, problems: &mut Problems) {
    if value.0.is_zero() {
        problems.push(field, "must be longer than 0s");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_example_is_valid() {
        let text = r#"
apiVersion: weft.mesh/v1alpha1
kind: TrafficPolicy
metadata: {name: web, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: web}]
  loadBalancing: {algorithm: Maglev, hashOn: {sourceIP: {}}, locality: {prefer: Zone}}
  circuitBreaker: {maxConnections: 1024, maxPendingRequests: 256, maxRequests: 1024}
  outlierDetection: {consecutiveFailures: 5, baseEjection: 30s, maxEjectedPercent: 50}
  retryBudget: {percent: 20, interval: 10s, minRetriesPerSecond: 10}
  rateLimits: [{requests: 100, per: 1s, by: SourceIdentity}]
  faults: [{percent: 5, abort: {httpStatus: 503}, expiresAt: "2030-01-01T00:00:00Z"}]"#;
        let object: TrafficPolicy = serde_yaml_ng::from_str(text).unwrap();
        check(&object).unwrap();
    }

    #[test]
    fn names_the_field_and_the_fix() {
        let text = r#"
apiVersion: weft.mesh/v1alpha1
kind: TrafficPolicy
metadata: {name: web, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: web}]
  loadBalancing: {algorithm: Maglev}
  faults: [{percent: 5, expiresAt: tomorrow}]"#;
        let object: TrafficPolicy = serde_yaml_ng::from_str(text).unwrap();
        let error = check(&object).unwrap_err().to_string();
        assert!(error.starts_with("TrafficPolicy shop/web: spec.loadBalancing.hashOn: "), "{error}");
        assert!(error.contains("spec.faults[0].expiresAt: \"tomorrow\" is no time"), "{error}");
    }
}
