//! The answer to readiness probes of this Envoy.

use crate::config::{Config, STATIC_EPOCH};
use crate::endpoints::endpoint_state::EndpointState;
use crate::request::reply::{REASON_HEADER, Reply};
use crate::wire::{Role, State};
use crate::workers::worker::Worker;

/// Path of readiness probes.
pub const READY_PATH: &[u8] = b"/.pd-ready";

/// 200 once the filter has a list of endpoints, which may be empty. A filter without a list or without a configuration answers
/// 503, so a roll-out does not replace Envoys that serve by Envoys that cannot.
pub(super) fn readiness(worker: &Worker, config: &Config) -> Reply {
    let is_ready =
        config.control.is_none() || !worker.state.table.is_empty() || worker.state.table.version().0 != STATIC_EPOCH;
    let (status, reason) = if is_ready { (200, "ready") } else { (503, "no_list") };
    let headers = vec![("content-type", "application/json".to_owned()), (REASON_HEADER, reason.to_owned())];
    let table = &worker.state.table;
    let ready_of = |role| {
        let is_it = |state: &EndpointState| state.endpoint.role == role && state.endpoint.state == State::Ready;
        table.iter().filter(|(_, state)| is_it(state)).count()
    };
    let (epoch, version) = table.version();
    let body = serde_json::json!({
        "ready": is_ready,
        "endpoints": table.len(),
        "ready_endpoints": {
            "prefill": ready_of(Role::Prefill), "decode": ready_of(Role::Decode), "both": ready_of(Role::Both),
        },
        "ejected": table.iter().filter(|(_, state)| state.health.is_failing()).count(),
        "list": format!("{epoch}/{version}"),
    });
    let body = body.to_string().into_bytes();
    Reply { status, headers, body, reason }
}
