//! KEDA's external scaler: KEDA asks pd-control by gRPC, and no Prometheus is needed.
//!
//! | key of the trigger's metadata | default | meaning |
//! |---|---|---|
//! | `pool` | `default` | Pool |
//! | `role` | required | `prefill`, `decode` or `both` |
//! | `windowSeconds` | `60` | Mean over so many seconds, 1 to 600 |
//! | `prefillWorkSeconds` | `5` for `prefill` and `both` | Target: seconds of prefill work per endpoint |
//! | `prefillBusy` | `0.85` for `prefill` and `both` | Target: share of the time for which an endpoint has prefill work |
//! | `kvLoad` | `0.85` for `decode` and `both` | Target: share of an endpoint's KV capacity that is assigned or in use |
//! | `requestsWaiting` | none | Target: requests that wait in an engine |
//! | `requestsInFlight` | none | Target: requests that decode at an endpoint |
//!
//! The defaults hold if no target is named. Values are sums over the role, for KEDA's `metricType: AverageValue`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use futures::Stream;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::Status;
use tonic_prost::ProstCodec;

use crate::scaling::demand::{Demand, PoolRole, role_named};
use crate::scaling::history::{History, MAX_WINDOW, Unknown};
use crate::scaling::messages::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, MetricSpec, MetricValue, SERVICE,
    ScaledObjectRef,
};

/// Window of a trigger that does not say.
const DEFAULT_WINDOW: Duration = Duration::from_secs(60);
/// Seconds of prefill work per endpoint: an overload that servers work off within seconds once they have started.
const DEFAULT_PREFILL_WORK_SECONDS: f64 = 5.0;
/// Share of the time for which an endpoint has prefill work. Without this target, work in flight alone would decide, which is
/// small as long as there are enough endpoints, so that the autoscaler would remove one of those that are needed.
const DEFAULT_PREFILL_BUSY: f64 = 0.85;
/// Share of the KV capacity: the rest is for answers that grow longer than expected while a new server starts.
const DEFAULT_KV_LOAD: f64 = 0.85;
/// Part of the target that one server would have to be below it before the second one is removed. With more servers, their
/// load spreads less, by the square root of their number.
const MARGIN: f64 = 0.15;
/// Keys that KEDA keeps for itself in the same map.
const KEDA_KEYS: &[&str] = &["scalerAddress", "enableTLS", "unsafeSsl"];

/// A value that scales a role.
#[derive(Debug)]
struct Signal {
    /// Name of the metric.
    name: &'static str,
    /// Key of the target in the trigger's metadata.
    key: &'static str,
    /// Sum over the role.
    read: fn(&Demand) -> Option<f64>,
    /// Target if none is named, for the roles that have one.
    default: Option<(f64, &'static [&'static str])>,
}

const SIGNALS: &[Signal] = &[
    Signal {
        name: "prefill_work_seconds",
        key: "prefillWorkSeconds",
        read: |demand| demand.prefill_work_seconds,
        default: Some((DEFAULT_PREFILL_WORK_SECONDS, &["prefill", "both"])),
    },
    Signal {
        name: "prefill_busy",
        key: "prefillBusy",
        read: |demand| demand.prefill_busy,
        default: Some((DEFAULT_PREFILL_BUSY, &["prefill", "both"])),
    },
    Signal {
        name: "kv_load",
        key: "kvLoad",
        read: Demand::kv_load,
        default: Some((DEFAULT_KV_LOAD, &["decode", "both"])),
    },
    Signal { name: "requests_waiting", key: "requestsWaiting", read: |demand| demand.requests_waiting, default: None },
    Signal {
        name: "requests_in_flight",
        key: "requestsInFlight",
        read: |demand| demand.requests_in_flight,
        default: None,
    },
];

/// A trigger that was read.
#[derive(Debug)]
struct Trigger {
    of: PoolRole,
    window: Duration,
    targets: Vec<(&'static Signal, f64)>,
}

impl Trigger {
    /// Reads a trigger's metadata; an unknown key or a bad value refuses all of it.
    fn read(metadata: &HashMap<String, String>) -> Result<Self, Status> {
        let known = |key: &str| {
            ["pool", "role", "windowSeconds"].contains(&key)
                || KEDA_KEYS.contains(&key)
                || SIGNALS.iter().any(|signal| signal.key == key)
        };
        if let Some(key) = metadata.keys().filter(|key| !known(key)).min() {
            return Err(Status::invalid_argument(format!("{key}: unknown key")));
        }
        let name = metadata.get("role").map_or("", String::as_str);
        let Some(role) = role_named(name) else {
            return Err(Status::invalid_argument("role: must be prefill, decode or both"));
        };
        let window = match number(metadata, "windowSeconds")? {
            None => DEFAULT_WINDOW,
            Some(seconds) if (1.0..=MAX_WINDOW.as_secs_f64()).contains(&seconds) => Duration::from_secs_f64(seconds),
            Some(_) => return Err(Status::invalid_argument("windowSeconds: must be between 1 and 600")),
        };
        let mut targets = Vec::new();
        for signal in SIGNALS {
            if let Some(target) = number(metadata, signal.key)? {
                targets.push((signal, target));
            }
        }
        if targets.is_empty() {
            let of_role = |signal: &'static Signal| {
                let (target, roles) = signal.default?;
                roles.contains(&role).then_some((signal, target))
            };
            targets.extend(SIGNALS.iter().filter_map(of_role));
        }
        let pool = metadata.get("pool").map_or("default", String::as_str).to_owned();
        Ok(Self { of: PoolRole { pool, role }, window, targets })
    }

    /// Value of a signal for the whole role: its mean over the window, made [`steady`].
    fn value(&self, history: &History, signal: &Signal, target: f64, now: Instant) -> Result<f64, Status> {
        let mean = |read| history.mean(&self.of, self.window, now, read).map_err(|why| self.status(why));
        let value = mean(signal.read)?;
        let ready = history.newest(&self.of).map_or(0, |demand| demand.ready);
        Ok(steady(value, target, ready))
    }

    fn status(&self, why: Unknown) -> Status {
        let PoolRole { pool, role } = &self.of;
        match why {
            // KEDA and the HorizontalPodAutoscaler change nothing while a metric fails.
            Unknown::Window => Status::unavailable(format!(
                "Envoys have not exchanged with this pd-control for {} s",
                self.window.as_secs()
            )),
            Unknown::PoolRole => {
                Status::not_found(format!("the list never had an endpoint of pool {pool} and role {role}"))
            }
            Unknown::Value => Status::unavailable(format!("nobody reports this of pool {pool} and role {role}")),
        }
    }
}

/// The value, or the value at which nothing changes: an autoscaler would remove a server by the value, but without that server
/// the others would be so close to the target that it would soon add one again.
fn steady(value: f64, target: f64, ready: u64) -> f64 {
    let (all, fewer) = (ready as f64, ready.saturating_sub(1) as f64);
    let is_close = fewer > 0.0 && value > fewer * target * (1.0 - MARGIN / fewer.sqrt());
    if is_close { value.max(all * target) } else { value }
}

/// A positive number of the metadata.
fn number(metadata: &HashMap<String, String>, key: &str) -> Result<Option<f64>, Status> {
    let Some(text) = metadata.get(key) else { return Ok(None) };
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok(Some(number)),
        _ => Err(Status::invalid_argument(format!("{key}: must be a number above 0"))),
    }
}

/// Answers KEDA.
#[derive(Clone, Debug)]
pub struct Scaler {
    history: Arc<History>,
    stopping: watch::Receiver<bool>,
}

impl Scaler {
    /// Answers from the samples of `history`. Streams end when `stopping` becomes true.
    #[must_use]
    pub fn new(history: Arc<History>, stopping: watch::Receiver<bool>) -> Self {
        Self { history, stopping }
    }

    /// The four methods of KEDA's service; any other path is answered with UNIMPLEMENTED.
    pub fn router(self) -> Router {
        Router::new()
            .route(&format!("{SERVICE}/IsActive"), post(is_active))
            .route(&format!("{SERVICE}/StreamIsActive"), post(stream_is_active))
            .route(&format!("{SERVICE}/GetMetricSpec"), post(metric_spec))
            .route(&format!("{SERVICE}/GetMetrics"), post(metrics))
            .fallback(|| async { Status::unimplemented("no such method").into_http::<axum::body::Body>() })
            .with_state(self)
    }

    fn is_active(&self, trigger: &Trigger) -> Result<IsActiveResponse, Status> {
        let active = self.history.was_active(&trigger.of.pool, trigger.window, Instant::now());
        active.map(|result| IsActiveResponse { result }).map_err(|why| trigger.status(why))
    }

    /// Says at once whether the pool is active and then whenever that changes; seconds without an answer are left out.
    fn stream(self, trigger: Trigger) -> impl Stream<Item = Result<IsActiveResponse, Status>> {
        let taken = self.history.subscribe();
        let stopping = self.stopping.clone();
        let state = (self, trigger, taken, stopping, None::<bool>);
        futures::stream::unfold(state, |(scaler, trigger, mut taken, mut stopping, said)| async move {
            loop {
                let now = scaler.is_active(&trigger).ok().map(|answer| answer.result);
                if let Some(result) = now.filter(|_| now != said) {
                    return Some((Ok(IsActiveResponse { result }), (scaler, trigger, taken, stopping, now)));
                }
                tokio::select! {
                    changed = taken.changed() => changed.ok()?,
                    _ = stopping.wait_for(|is_stopping| *is_stopping) => return None,
                }
            }
        })
    }

    fn metrics(&self, request: &GetMetricsRequest) -> Result<GetMetricsResponse, Status> {
        let metadata = request.scaled_object_ref.as_ref().map(|object| &object.scaler_metadata);
        let trigger = Trigger::read(metadata.unwrap_or(&HashMap::new()))?;
        let target = trigger.targets.iter().find(|(signal, _)| signal.name == request.metric_name);
        let (signal, target) = target.ok_or_else(|| Status::not_found(format!("metric {}", request.metric_name)))?;
        let value = trigger.value(&self.history, signal, *target, Instant::now())?;
        let value = MetricValue {
            metric_name: signal.name.to_owned(),
            metric_value: value.ceil() as i64,
            metric_value_float: value,
        };
        Ok(GetMetricsResponse { metric_values: vec![value] })
    }
}

/// What an autoscaler learns of a trigger, without a network: for each metric the target of one server, and the mean over the
/// window for the whole role.
///
/// # Errors
/// The status that KEDA gets.
pub fn answers(history: &History, metadata: &HashMap<String, String>, now: Instant) -> Result<Vec<(f64, f64)>, Status> {
    let trigger = Trigger::read(metadata)?;
    let answer =
        |(signal, target): &(&'static Signal, f64)| Ok((*target, trigger.value(history, signal, *target, now)?));
    trigger.targets.iter().map(answer).collect()
}

fn metric_specs(trigger: &Trigger) -> GetMetricSpecResponse {
    let spec = |(signal, target): &(&Signal, f64)| MetricSpec {
        metric_name: signal.name.to_owned(),
        target_size: target.ceil() as i64,
        target_size_float: *target,
    };
    GetMetricSpecResponse { metric_specs: trigger.targets.iter().map(spec).collect() }
}

async fn is_active(State(scaler): State<Scaler>, request: Request) -> Response {
    unary(request, move |object: ScaledObjectRef| scaler.is_active(&Trigger::read(&object.scaler_metadata)?)).await
}

async fn metric_spec(request: Request) -> Response {
    unary(request, |object: ScaledObjectRef| Ok(metric_specs(&Trigger::read(&object.scaler_metadata)?))).await
}

async fn metrics(State(scaler): State<Scaler>, request: Request) -> Response {
    unary(request, move |request: GetMetricsRequest| scaler.metrics(&request)).await
}

async fn stream_is_active(State(scaler): State<Scaler>, request: Request) -> Response {
    let service = tower::service_fn(move |request: tonic::Request<ScaledObjectRef>| {
        let trigger = Trigger::read(&request.into_inner().scaler_metadata);
        let scaler = scaler.clone();
        async move { Ok::<_, Status>(tonic::Response::new(Box::pin(scaler.stream(trigger?)))) }
    });
    let mut grpc = tonic::server::Grpc::new(ProstCodec::<IsActiveResponse, ScaledObjectRef>::default());
    grpc.server_streaming(service, request).await.into_response()
}

/// One question, one answer.
async fn unary<Q, A>(request: Request, answer: impl Fn(Q) -> Result<A, Status> + Clone) -> Response
where
    Q: prost::Message + Default + 'static,
    A: prost::Message + 'static,
{
    let service = tower::service_fn(move |request: tonic::Request<Q>| {
        let answer = answer(request.into_inner()).map(tonic::Response::new);
        std::future::ready(answer)
    });
    let mut grpc = tonic::server::Grpc::new(ProstCodec::<A, Q>::default());
    grpc.unary(service, request).await.into_response()
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn read(metadata: &[(&str, &str)]) -> Result<Trigger, Status> {
        Trigger::read(&metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    fn targets(metadata: &[(&str, &str)]) -> Vec<(&'static str, f64)> {
        read(metadata).unwrap().targets.iter().map(|(signal, target)| (signal.name, *target)).collect()
    }

    #[test]
    fn a_role_is_scaled_by_what_it_computes() {
        let prefill = [("prefill_work_seconds", 5.0), ("prefill_busy", 0.85)];
        assert_eq!(targets(&[("role", "prefill")]), prefill);
        assert_eq!(targets(&[("role", "decode")]), [("kv_load", 0.85)]);
        assert_eq!(targets(&[("role", "both")]), [prefill[0], prefill[1], ("kv_load", 0.85)]);
    }

    #[test]
    fn targets_that_are_named_replace_the_defaults() {
        let metadata = [("role", "decode"), ("requestsWaiting", "4"), ("scalerAddress", "a:1")];
        assert_eq!(targets(&metadata), [("requests_waiting", 4.0)]);
        let both = [("role", "decode"), ("requestsInFlight", "32"), ("kvLoad", "0.5")];
        assert_eq!(targets(&both), [("kv_load", 0.5), ("requests_in_flight", 32.0)]);
    }

    #[test]
    fn bad_metadata_is_refused_with_its_key() {
        for (metadata, says) in [
            (vec![], "role: must be prefill, decode or both"),
            (vec![("role", "prefil")], "role: must be prefill, decode or both"),
            (vec![("role", "decode"), ("kvload", "1")], "kvload: unknown key"),
            (vec![("role", "decode"), ("kvLoad", "0")], "kvLoad: must be a number above 0"),
            (vec![("role", "decode"), ("kvLoad", "NaN")], "kvLoad: must be a number above 0"),
            (vec![("role", "decode"), ("windowSeconds", "0.5")], "windowSeconds: must be between 1 and 600"),
            (vec![("role", "decode"), ("windowSeconds", "601")], "windowSeconds: must be between 1 and 600"),
        ] {
            let status = read(&metadata).unwrap_err();
            assert_eq!((status.code(), status.message()), (Code::InvalidArgument, says));
        }
    }

    #[test]
    fn a_server_goes_only_if_the_others_are_well_below_the_target() {
        // Two servers: one alone would have to be at 85 %.
        assert_eq!([1.9, 1.0, 0.86].map(|value| steady(value, 1.0, 2)), [2.0; 3]);
        assert_eq!(steady(0.84, 1.0, 2), 0.84);
        // Ten servers: nine alone at 95 %.
        assert_eq!((steady(8.6, 1.0, 10), steady(8.5, 1.0, 10)), (10.0, 8.5));
        // More load than they should have is said as it is, and that of the only server.
        assert_eq!((steady(3.5, 1.0, 2), steady(0.3, 1.0, 1), steady(0.5, 0.8, 0)), (3.5, 0.3, 0.5));
    }

    #[test]
    fn the_service_answers_nothing_before_a_whole_window() {
        let scaler = Scaler::new(Arc::default(), watch::channel(false).1);
        let trigger = read(&[("role", "decode")]).unwrap();
        assert_eq!(scaler.is_active(&trigger).unwrap_err().code(), Code::Unavailable);
    }
}
