//! The objects of the Gateway API Inference Extension and the routes to its pools.

use serde_json::{Map, Value};

use super::report::Report;
use super::values::Values;
use crate::cli::manifests::{Manifests, Object, items, text};
use crate::sources::kubernetes::config::ObjectGroup;
use crate::sources::kubernetes::stated::{StatedKind, StatedObject};

pub(super) fn read(manifests: &Manifests, values: &mut Values, report: &mut Report) {
    for pool in manifests.of_kind("InferencePool") {
        inference_pool(pool, values, report);
    }
    for (kind, stated) in
        [("InferenceObjective", StatedKind::Objective), ("InferenceModelRewrite", StatedKind::Rewrite)]
    {
        for object in manifests.of_kind(kind) {
            followed(object, stated, values, report);
        }
    }
    for model in manifests.of_kind("InferenceModel") {
        inference_model(model, values, report);
    }
    for route in manifests.of_kind("HTTPRoute") {
        http_route(route, values, report);
    }
}

fn inference_pool(pool: &Object, values: &mut Values, report: &mut Report) {
    let group = text(&pool.value, "/apiVersion").split('/').next().unwrap_or_default();
    values.inference_pools.push((pool.namespace.clone(), pool.name.clone(), group.to_owned()));
    let followed = "pd-control follows the pool: its endpoints have the pool's name in the list";
    report.carried(pool, "metadata.name", followed);
    if !pool.namespace.is_empty() {
        let where_to = format!("install the release in this namespace: helm install … --namespace {}", pool.namespace);
        report.carried(pool, "metadata.namespace", where_to);
    }
    // v1 has matchLabels; v1alpha2 has the labels themselves.
    let selector = pool.value.pointer("/spec/selector/matchLabels").or_else(|| pool.value.pointer("/spec/selector"));
    match selector.and_then(Value::as_object).map(strings) {
        Some(labels) if values.selector.is_empty() || values.selector == labels => {
            values.selector = labels;
            report.carried(pool, "spec.selector", "engines.selector: the Service of all engines has these labels");
        }
        Some(_) => report.dropped(
            pool,
            "spec.selector",
            "another pool has other labels, and one Service covers all engines: set engines.selector to labels that the \
             pods of both pools have",
        ),
        None => report.dropped(pool, "spec.selector", "is missing"),
    }
    let numbers = items(&pool.value, "/spec/targetPorts").iter().map(|port| port.get("number"));
    let numbers = numbers.chain([pool.value.pointer("/spec/targetPortNumber")]).flatten().filter_map(Value::as_u64);
    let ports: Vec<_> = numbers.filter_map(|port| u16::try_from(port).ok()).collect();
    match ports.split_first() {
        Some((port, more)) if values.port.is_none_or(|known| known == *port) => {
            values.port = Some(*port);
            let new = more.iter().filter(|port| !values.more_ports.contains(port)).copied().collect::<Vec<_>>();
            values.more_ports.extend(new);
            report.carried(
                pool,
                "spec.targetPorts",
                "engines.port, engines.morePorts: pd-control takes every port of the pool",
            );
        }
        Some((port, _)) => report.dropped(
            pool,
            "spec.targetPorts",
            format!("another pool has another port than {port}, and one Service covers all engines"),
        ),
        None => report.dropped(pool, "spec.targetPorts", "has no port number"),
    }
    if pool.value.pointer("/spec/endpointPickerRef").or_else(|| pool.value.pointer("/spec/extensionRef")).is_some() {
        report.dropped(
            pool,
            "spec.endpointPickerRef",
            "the filter chooses endpoints: delete the picker after the switch",
        );
    }
}

/// An object that pd-control follows: it stays where it is.
fn followed(object: &Object, kind: StatedKind, values: &mut Values, report: &mut Report) {
    let group = text(&object.value, "/apiVersion").split('/').next().unwrap_or_default();
    if !ObjectGroup::ALL.iter().any(|known| known.group_version().0 == group) {
        return report.dropped(object, "apiVersion", format!("{group:?} is no API group of such objects"));
    }
    let read = serde_json::from_value(object.value.clone()).map_err(|error| error.to_string());
    match read.and_then(|object| StatedObject::read(kind, object)) {
        Ok(_) => {
            values.inference_objects.insert(group.to_owned());
            let how = "kubernetesConfig.inference_objects: pd-control follows such objects, so keep this one";
            report.carried(object, "spec", how);
        }
        Err(why) => report.dropped(object, "spec", why),
    }
}

/// An InferenceModel of the API before v1: an alias and a criticality.
fn inference_model(model: &Object, values: &mut Values, report: &mut Report) {
    let asked = text(&model.value, "/spec/modelName");
    let targets: Vec<_> = items(&model.value, "/spec/targetModels").iter().map(|it| weighted(it, "name")).collect();
    if !asked.is_empty() && !targets.is_empty() {
        values.models.insert(asked.to_owned(), targets);
        report.carried(model, "spec.targetModels", format!("filter.config.models has the alias {asked:?}"));
    }
    let priority = match text(&model.value, "/spec/criticality") {
        "" => return,
        "Critical" => 1,
        "Standard" => 0,
        "Sheddable" => -1,
        other => return report.dropped(model, "spec.criticality", format!("{other:?} is no criticality")),
    };
    values.objectives.insert(model.name.clone(), priority);
    report.carried(
        model,
        "spec.criticality",
        format!(
            "filter.config.objectives: priority {priority} for requests with x-llm-d-inference-objective: {}; a model name \
             alone gives no priority",
            model.name
        ),
    );
}

fn http_route(route: &Object, values: &mut Values, report: &mut Report) {
    let rules = items(&route.value, "/spec/rules");
    let is_pool = |backend: &Value| text(backend, "/kind") == "InferencePool";
    let of_pools = |rule: &&Value| items(rule, "/backendRefs").iter().any(is_pool);
    if !rules.iter().any(|rule| of_pools(&rule)) {
        return;
    }
    report.carried(
        route,
        "spec.rules",
        "the chart's route has our Service as its backend: delete this route when clients use the Gateway pd",
    );
    for host in items(&route.value, "/spec/hostnames").iter().filter_map(Value::as_str) {
        if !values.hostnames.iter().any(|known| known == host) {
            values.hostnames.push(host.to_owned());
        }
        report.carried(route, "spec.hostnames", "gateway.hostnames");
    }
    for (i, rule) in rules.iter().enumerate().filter(|(_, rule)| of_pools(rule)) {
        let key = format!("spec.rules[{i}]");
        if items(rule, "/backendRefs").len() > 1 {
            let why = "weights between backends: the pools' models say which pool serves a request";
            report.dropped(route, &format!("{key}.backendRefs"), why);
        }
        for a_match in items(rule, "/matches") {
            let path = text(a_match, "/path/value");
            if !matches!(path, "" | "/") {
                prefix(route, &key, path, rule, values, report);
            }
            if ["headers", "queryParams", "method"].iter().any(|part| a_match.get(part).is_some()) {
                let why = "the chart's route takes every request of its paths; the model in the body decides";
                report.dropped(route, &format!("{key}.matches"), why);
            }
        }
        for filter in items(rule, "/filters").iter().filter(|filter| text(filter, "/type") != "URLRewrite") {
            let kind = text(filter, "/type");
            report.dropped(route, &format!("{key}.filters"), format!("{kind}: add it to the route pd"));
        }
        if rule.get("timeouts").is_some() {
            let why = "the chart's route has no time limit for a request: streams take as long as they take";
            report.dropped(route, &format!("{key}.timeouts"), why);
        }
    }
}

/// A path prefix of a rule: one that the route takes away is the filter's, too.
fn prefix(route: &Object, key: &str, path: &str, rule: &Value, values: &mut Values, report: &mut Report) {
    let rewrites = |filter: &Value| text(filter, "/urlRewrite/path/replacePrefixMatch") == "/";
    let trimmed = path.trim_end_matches('/');
    if items(rule, "/filters").iter().any(rewrites) && !trimmed.is_empty() {
        values.path_prefixes.push(trimmed.to_owned());
        let what = "filter.config.path_prefixes; add a rule with this prefix and its URLRewrite to the route pd";
        report.carried(route, &format!("{key}.matches"), what);
    } else {
        let why = format!("{path}: the chart's route takes the paths of inference APIs");
        report.dropped(route, &format!("{key}.matches"), why);
    }
}

/// A target and its weight, 1 unless given.
fn weighted(target: &Value, name: &str) -> (String, u64) {
    let weight = target.get("weight").and_then(Value::as_u64).unwrap_or(1);
    (target.get(name).and_then(Value::as_str).unwrap_or_default().to_owned(), weight)
}

fn strings(object: &Map<String, Value>) -> std::collections::BTreeMap<String, String> {
    object.iter().filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}
