//! What is said of the MeshConfig.

use weft_api::mesh_config::{MeshConfigSpec, Telemetry};

const COMPAT: &str = "spec.telemetry.metricsCompat";
const TRACING: &str = "spec.telemetry.tracing";

/// The fields, set to something else than their default, that are accepted and that nothing follows yet.
pub(super) fn without_effect(spec: &MeshConfigSpec) -> Vec<&'static str> {
    let (telemetry, default) = (&spec.telemetry, Telemetry::default());
    let set = [
        (COMPAT, telemetry.metrics_compat != default.metrics_compat),
        (TRACING, telemetry.tracing != default.tracing),
    ];
    set.into_iter().filter(|(_, set)| *set).map(|(field, _)| field).collect()
}

/// The message of condition `Accepted`.
pub(super) fn message(set: &[&'static str]) -> String {
    let all = format!("these fields are accepted but have no effect in this version: {COMPAT}, {TRACING}");
    if set.is_empty() { all } else { format!("{all}; this object sets {}", set.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_without_effect_are_named() {
        let mut spec = MeshConfigSpec::default();
        assert!(message(&without_effect(&spec)).ends_with("spec.telemetry.tracing"));
        spec.telemetry.metrics_compat = vec![weft_api::mesh_config::MetricsCompat::Istio];
        spec.telemetry.tracing.otlp.endpoint = "http://otel:4317".into();
        let message = message(&without_effect(&spec));
        assert!(message.contains("accepted but have no effect"), "{message}");
        let set = "this object sets spec.telemetry.metricsCompat, spec.telemetry.tracing";
        assert!(message.ends_with(set), "{message}");
    }
}
