//! The output of `pd-control endpoints` and `explain`.

use std::fmt::Write;

use crate::api::status::{EndpointView, StatusView, ago, time_of_day};
use crate::list::{role, state};

/// A table of all endpoints.
#[must_use]
pub fn endpoints(status: &StatusView) -> String {
    let mut rows =
        vec![["ENDPOINT", "ROLE", "STATE", "POOL", "ENGINE", "GROUP", "REVISION", "MODELS", "POD"].map(str::to_owned)];
    rows.extend(status.endpoints.iter().map(|it| {
        [
            it.endpoint.id().to_string(),
            role(it.endpoint.role).to_owned(),
            state(it.endpoint.state).to_owned(),
            it.endpoint.pool.clone(),
            engine(it),
            it.endpoint.group.clone().unwrap_or_default(),
            it.endpoint.revision.clone().unwrap_or_default(),
            it.endpoint.models.join(","),
            it.pod.clone().unwrap_or_default(),
        ]
    }));
    head(status) + &table(&rows)
}

/// Explains why a pod or an endpoint is in the list as it is, or is not in it; `None` when no endpoint and no refused
/// pod has the name.
#[must_use]
pub fn explain(status: &StatusView, name: &str) -> Option<String> {
    let is_named = |pod: &str| pod == name || pod.split_once('/').is_some_and(|(_, short)| short == name);
    let mut text = String::new();
    // Writing to a string cannot fail.
    for it in &status.endpoints {
        let id = it.endpoint.id().to_string();
        let is_it = id == name || it.endpoint.address.to_string() == name || it.pod.as_deref().is_some_and(is_named);
        if !is_it {
            continue;
        }
        let _ = writeln!(text, "{id} is in the list: {}, {}", role(it.endpoint.role), state(it.endpoint.state));
        if let Some(pod) = &it.pod {
            let _ = writeln!(text, "  pod     {pod}");
        }
        let _ = writeln!(text, "  pool    {}", it.endpoint.pool);
        let _ = writeln!(text, "  engine  {}", engine(it));
        if let Some(group) = &it.endpoint.group {
            let _ = writeln!(text, "  group   {group}: pairs with this group only");
        }
        if let Some(revision) = &it.endpoint.revision {
            let _ = writeln!(text, "  rev     {revision}: pairs with this revision only");
        }
        match (it.endpoint.min_prompt_tokens, it.endpoint.max_prompt_tokens) {
            (None, None) => {}
            (min, None) => drop(writeln!(text, "  prompts of {} tokens or more", min.unwrap_or(0))),
            (min, Some(max)) => drop(writeln!(text, "  prompts of {} to {max} tokens", min.unwrap_or(0))),
        }
        let models = if it.endpoint.models.is_empty() { "any".to_owned() } else { it.endpoint.models.join(", ") };
        let _ = writeln!(text, "  models  {models}");
        if let Some(since) = it.since_ms {
            let _ = writeln!(text, "  fails since {}, {} ago", time_of_day(since), ago(since, status.now_ms));
        }
        match (it.answers, &it.problem) {
            (Some(true), None) => drop(writeln!(text, "  the engine answers")),
            (Some(true), Some(problem)) => drop(writeln!(text, "  the engine answers pd-control; {problem}")),
            (Some(false), Some(problem)) => drop(writeln!(text, "  the engine does not answer: {problem}")),
            (None, Some(problem)) => drop(writeln!(text, "  {problem}")),
            (_, None) => {}
        }
    }
    for refused in status.refused.iter().filter(|refused| is_named(&refused.pod)) {
        let _ = writeln!(text, "pd-control refused {}: {}", refused.pod, refused.reason);
    }
    (!text.is_empty()).then_some(text)
}

fn engine(it: &EndpointView) -> String {
    let name = it.endpoint.engine.and_then(|engine| serde_json::to_value(engine).ok());
    name.as_ref().and_then(serde_json::Value::as_str).unwrap_or("the pool's").to_owned()
}

pub(super) fn head(status: &StatusView) -> String {
    let StatusView { version, source, degraded, filters, .. } = status;
    let current = filters.iter().filter(|filter| filter.version == *version).count();
    let mut text = format!("list {version} from {source}, {current} of {} Envoys have it\n", filters.len());
    if let Some(reason) = degraded {
        text += &format!("degraded: {reason}\n");
    }
    text
}

pub(super) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let cells: Vec<_> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}
