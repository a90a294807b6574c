//! Messages of KEDA's external scaler, as `externalscaler.proto` of KEDA 2.17 numbers their fields. Written by hand: the
//! build needs no protoc for seven messages.

use std::collections::HashMap;

use prost::Message;

/// Path of the gRPC service.
pub const SERVICE: &str = "/externalscaler.ExternalScaler";

/// The ScaledObject that asks, with the metadata of its trigger.
#[derive(Clone, PartialEq, Message)]
pub struct ScaledObjectRef {
    /// Name of the ScaledObject.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// `metadata` of the trigger, with KEDA's own keys in it.
    #[prost(map = "string, string", tag = "3")]
    pub scaler_metadata: HashMap<String, String>,
}

/// Answer of `IsActive`, and each item of `StreamIsActive`.
#[derive(Clone, PartialEq, Message)]
pub struct IsActiveResponse {
    /// Whether at least one replica is needed.
    #[prost(bool, tag = "1")]
    pub result: bool,
}

/// Answer of `GetMetricSpec`.
#[derive(Clone, PartialEq, Message)]
pub struct GetMetricSpecResponse {
    /// What the HorizontalPodAutoscaler will ask for.
    #[prost(message, repeated, tag = "1")]
    pub metric_specs: Vec<MetricSpec>,
}

/// One metric with its target per replica.
#[derive(Clone, PartialEq, Message)]
pub struct MetricSpec {
    /// Name.
    #[prost(string, tag = "1")]
    pub metric_name: String,
    /// Target for a KEDA that does not know the next field.
    #[prost(int64, tag = "2")]
    pub target_size: i64,
    /// Target.
    #[prost(double, tag = "3")]
    pub target_size_float: f64,
}

/// Question of `GetMetrics`.
#[derive(Clone, PartialEq, Message)]
pub struct GetMetricsRequest {
    /// The ScaledObject that asks.
    #[prost(message, optional, tag = "1")]
    pub scaled_object_ref: Option<ScaledObjectRef>,
    /// A name of `GetMetricSpec`.
    #[prost(string, tag = "2")]
    pub metric_name: String,
}

/// Answer of `GetMetrics`.
#[derive(Clone, PartialEq, Message)]
pub struct GetMetricsResponse {
    /// One value.
    #[prost(message, repeated, tag = "1")]
    pub metric_values: Vec<MetricValue>,
}

/// A metric's value.
#[derive(Clone, PartialEq, Message)]
pub struct MetricValue {
    /// Name.
    #[prost(string, tag = "1")]
    pub metric_name: String,
    /// Value for a KEDA that does not know the next field.
    #[prost(int64, tag = "2")]
    pub metric_value: i64,
    /// Value.
    #[prost(double, tag = "3")]
    pub metric_value_float: f64,
}
