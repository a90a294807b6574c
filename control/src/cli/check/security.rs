//! Checks the `SecurityPolicy`s that are in force for the filter's route.

use pd_core::config::Config;
use serde_json::Value;

use super::attached::policies;
use super::filters::Filter;
use super::report::Report;
use crate::cli::manifests::{Manifests, Object};

/// Checks that an external authorization that reads bodies accepts bodies of the size that the filter accepts.
pub(super) fn check(filter: &Filter<'_>, config: &Config, route: &Object, all: &Manifests, report: &mut Report) {
    for policy in policies("SecurityPolicy", route, all) {
        let limit = policy.value.pointer("/spec/extAuth/bodyToExtAuth/maxRequestBytes").and_then(Value::as_u64);
        if let Some(bytes) = limit.filter(|bytes| *bytes < config.max_body_bytes as u64) {
            let what = format!(
                "{bytes} is below config.max_body_bytes of {}, {}: Envoy answers 413 to bodies of a size between them",
                filter.policy.title(),
                config.max_body_bytes
            );
            report.warn(policy.says("spec.extAuth.bodyToExtAuth.maxRequestBytes", what));
        }
    }
}
