//! [`MeshConfig`](crate::MeshConfig) to [`weft_core::MeshConfig`].

use std::time::Duration;

use weft_core::{TrustDomain, config, policy::Cidr};

use crate::{
    error::{ObjectError, Problems},
    mesh_config::{
        AccessLog, ConnectionsBeforeEnrolment, IssuerType, MeshConfig, MeshConfigSpec, SameNode, UnknownPods,
    },
};

/// The settings where nobody wrote any.
pub fn defaults(trust_domain: TrustDomain) -> config::MeshConfig {
    from_spec(&MeshConfigSpec::default(), trust_domain)
}

/// Checks and converts. The address ranges of Pods and Services come from other objects; they are left empty.
///
/// # Errors
/// With every field that is wrong, and what to write instead.
pub fn convert(object: &MeshConfig) -> Result<config::MeshConfig, ObjectError> {
    let mut problems = Problems::default();
    let spec = &object.spec;
    let name = object.metadata.name.clone().unwrap_or_default();
    if name != "default" {
        problems.push(
            "metadata.name",
            format_args!("{name:?} is not read; there is one MeshConfig, call it default"),
        );
    }
    let domain = TrustDomain::new(&spec.trust_domain).unwrap_or_else(|error| {
        problems.push("spec.trustDomain", error.reason);
        fallback_domain()
    });
    let life = spec.issuer.embedded.svid_lifetime.0;
    if !(Duration::from_secs(300)..=Duration::from_secs(86_400)).contains(&life) {
        problems.push(
            "spec.issuer.embedded.svidLifetime",
            format_args!("{} is out of range; write 5m to 24h", spec.issuer.embedded.svid_lifetime),
        );
    }
    match (spec.issuer.r#type, &spec.issuer.spire) {
        (IssuerType::Spire, None) => problems.push(
            "spec.issuer.spire",
            "type Spire needs the path of the SPIRE agent's admin socket; write spire: {socketPath: /run/spire/admin.sock}",
        ),
        (IssuerType::Spire, Some(spire)) if !spire.socket_path.starts_with('/') => problems.push(
            "spec.issuer.spire.socketPath",
            format_args!("{:?} is no absolute path; write one such as /run/spire/admin.sock", spire.socket_path),
        ),
        _ => {}
    }
    let capacity = spec.telemetry.flows.capacity;
    if !capacity.is_power_of_two() || !(256..=1_048_576).contains(&capacity) {
        let near = capacity.clamp(256, 1_048_576).next_power_of_two();
        problems.push(
            "spec.telemetry.flows.capacity",
            format_args!("{capacity} is no power of two from 256 to 1048576; write {near}"),
        );
    }
    for (i, header) in spec.telemetry.flows.headers.iter().enumerate() {
        let field = format!("spec.telemetry.flows.headers[{i}]");
        super::authorization::check_header_name(header, &field, &mut problems);
    }
    problems.finish("MeshConfig", name, from_spec(spec, domain))
}

fn from_spec(spec: &MeshConfigSpec, trust_domain: TrustDomain) -> config::MeshConfig {
    let flows = &spec.telemetry.flows;
    config::MeshConfig {
        trust_domain,
        svid_lifetime: spec.issuer.embedded.svid_lifetime.0,
        issuer: match (spec.issuer.r#type, &spec.issuer.spire) {
            (IssuerType::Spire, Some(spire)) => {
                config::Issuer::Spire { socket: spire.socket_path.as_str().into() }
            }
            _ => config::Issuer::Embedded,
        },
        before_enrolment: match spec.connections_before_enrolment {
            ConnectionsBeforeEnrolment::Reset => config::BeforeEnrolment::Reset,
            ConnectionsBeforeEnrolment::Keep => config::BeforeEnrolment::Keep,
        },
        namespaces: std::collections::BTreeMap::new(),
        same_node: match spec.same_node {
            SameNode::Shortcut => config::SameNode::Shortcut,
            SameNode::Mtls => config::SameNode::Mtls,
        },
        unknown_pods: match spec.unknown_pods {
            UnknownPods::RefuseMesh => config::UnknownPods::RefuseMesh,
            UnknownPods::RefuseAll => config::UnknownPods::RefuseAll,
        },
        ranges: Vec::<Cidr>::new(),
        reveal_policy: spec.denials.reveal_policy,
        telemetry: config::Telemetry {
            flow_capacity: flows.capacity,
            query_strings: flows.query_strings,
            headers: flows.headers.iter().map(|h| h.to_ascii_lowercase()).collect(),
            access_log: match spec.telemetry.access_log {
                AccessLog::Off => config::AccessLog::Off,
                AccessLog::Errors => config::AccessLog::Errors,
                AccessLog::All => config::AccessLog::All,
            },
        },
    }
}

/// Only stands in while the object is refused anyway.
#[expect(clippy::expect_used, reason = "a constant that a test covers")]
fn fallback_domain() -> TrustDomain {
    TrustDomain::new("cluster.local").expect("cluster.local is a trust domain")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_field_and_the_fix() {
        let text = "
apiVersion: weft.mesh/v1alpha1
kind: MeshConfig
metadata: {name: default}
spec: {trustDomain: Shop, issuer: {embedded: {svidLifetime: 1s}}, telemetry: {flows: {capacity: 1000}}}";
        let object: MeshConfig = serde_yaml_ng::from_str(text).unwrap();
        let error = convert(&object).unwrap_err().to_string();
        assert!(error.starts_with("MeshConfig default: spec.trustDomain: "), "{error}");
        assert!(
            error.contains("spec.issuer.embedded.svidLifetime: 1s is out of range; write 5m to 24h"),
            "{error}"
        );
        assert!(error.contains("write 1024"), "{error}");
    }

    #[test]
    fn the_access_log_is_carried_over() {
        for (written, meant) in [("Errors", config::AccessLog::Errors), ("All", config::AccessLog::All)] {
            let text = format!(
                "{{apiVersion: weft.mesh/v1alpha1, kind: MeshConfig, metadata: {{name: default}},
                  spec: {{telemetry: {{accessLog: {written}}}}}}}"
            );
            let object: MeshConfig = serde_yaml_ng::from_str(&text).unwrap();
            assert_eq!(convert(&object).unwrap().telemetry.access_log, meant);
        }
        assert_eq!(defaults(fallback_domain()).telemetry.access_log, config::AccessLog::Off);
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let text = "{apiVersion: weft.mesh/v1alpha1, kind: MeshConfig, metadata: {name: default}, spec: {}}";
        let object: MeshConfig = serde_yaml_ng::from_str(text).unwrap();
        let config = convert(&object).unwrap();
        assert_eq!(config, defaults(fallback_domain()));
        assert_eq!(config.svid_lifetime, Duration::from_secs(3600));
        assert_eq!(config.telemetry.flow_capacity, 8192);
    }
}
