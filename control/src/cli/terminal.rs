//! The output of `pd-control endpoints`, `explain` and `top`.

use std::fmt::Write;
use std::time::Duration;

use pd_core::envoys::report::ReportedDecision;

use crate::api::status::{EndpointView, StatusView, time_of_day};
use crate::cli::client::Server;
use crate::cli::output::print;
use crate::list::{role, state};

/// Most decisions that `top` shows.
const MAX_DECISIONS: usize = 8;
/// Time between two refreshes of `top`.
const REFRESH: Duration = Duration::from_secs(2);

/// Shows the busiest endpoints, and refreshes them every two seconds unless `once`.
///
/// # Errors
/// One line that says why there is no status, or [`Closed`](crate::cli::output::Closed).
pub async fn follow_top(server: &Server, once: bool) -> anyhow::Result<()> {
    loop {
        let text = top(&server.status().await?);
        if once {
            return print(&text);
        }
        // Clears the screen.
        print(&format!("\x1b[H\x1b[2J{text}"))?;
        tokio::select! {
            () = tokio::time::sleep(REFRESH) => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}

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

/// A table of all endpoints with their loads, the busiest first; then the Envoys, decisions and advice.
#[must_use]
pub fn top(status: &StatusView) -> String {
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.0}"));
    let percent = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{:.0}%", value * 100.0));
    let mut busiest: Vec<_> = status.endpoints.iter().collect();
    let load = |it: &EndpointView| it.waiting.unwrap_or(0.0) * 1e6 + it.running.unwrap_or(0.0);
    busiest.sort_by(|a, b| load(b).total_cmp(&load(a)));
    let mut rows = vec![["ENDPOINT", "ROLE", "STATE", "WAITING", "RUNNING", "KV", "HITS", "POD"].map(str::to_owned)];
    rows.extend(busiest.into_iter().map(|it| {
        [
            it.endpoint.id().to_string(),
            role(it.endpoint.role).to_owned(),
            state(it.endpoint.state).to_owned(),
            number(it.waiting),
            number(it.running),
            percent(it.kv_usage),
            percent(it.hit_ratio),
            it.pod.clone().unwrap_or_default(),
        ]
    }));
    head(status) + &table(&rows) + &envoys(status)
}

/// Tables of Envoys and their latest decisions, and the advice.
fn envoys(status: &StatusView) -> String {
    let mut text = String::new();
    if !status.gateways.is_empty() {
        let mut rows = vec![["ENVOY", "VERSION", "BUILD", "REVISION", "WORKERS", "LIST", "SEEN"].map(str::to_owned)];
        for it in &status.gateways {
            let is_of_this_run = it.report.epoch == status.epoch;
            rows.extend(it.report.generations.iter().map(|generation| {
                [
                    it.id.clone(),
                    generation.version.clone(),
                    generation.build.clone(),
                    if generation.revision.is_empty() { "-".to_owned() } else { generation.revision.clone() },
                    generation.workers.to_string(),
                    if is_of_this_run { it.report.version.to_string() } else { "other".to_owned() },
                    format!("{:.1}s", it.seen_ms as f64 / 1e3),
                ]
            }));
        }
        text += "\n";
        text += &table(&rows);
    }
    text += &ejected(status);
    let mut decisions: Vec<_> = status.gateways.iter().flat_map(|it| &it.report.decisions).collect();
    decisions.sort_by_key(|decision| std::cmp::Reverse(decision.at_ms));
    if !decisions.is_empty() {
        let mut rows = vec![["DECISION", "REASON", "PREFILL", "DECODE", "PROMPT", "MATCHED"].map(str::to_owned)];
        rows.extend(decisions.into_iter().take(MAX_DECISIONS).map(|ReportedDecision { decision: it, .. }| {
            let or_none = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
            [
                or_none(&it.decision),
                or_none(&it.reason),
                or_none(&it.prefill),
                or_none(&it.decode),
                it.prompt_tokens.to_string(),
                it.matched_tokens.to_string(),
            ]
        }));
        text += "\n";
        text += &table(&rows);
    }
    for line in &status.advice {
        text += "\n! ";
        text += line;
        text += "\n";
    }
    text
}

/// A table of the endpoints that an Envoy avoids; empty where there are none.
fn ejected(status: &StatusView) -> String {
    let mut rows = vec![["EJECTED", "ENVOY", "SINCE", "REASON"].map(str::to_owned)];
    for it in &status.gateways {
        rows.extend(it.report.ejected.iter().map(|ejected| {
            [ejected.address.clone(), it.id.clone(), time_of_day(ejected.since_ms), ejected.reason.clone()]
        }));
    }
    if rows.len() > 1 { format!("\n{}", table(&rows)) } else { String::new() }
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

fn head(status: &StatusView) -> String {
    let StatusView { version, source, degraded, filters, .. } = status;
    let current = filters.iter().filter(|filter| filter.version == *version).count();
    let mut text = format!("list {version} from {source}, {current} of {} Envoys have it\n", filters.len());
    if let Some(reason) = degraded {
        text += &format!("degraded: {reason}\n");
    }
    text
}

fn table<const N: usize>(rows: &[[String; N]]) -> String {
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

#[cfg(test)]
mod tests {
    use pd_core::envoys::report::{Ejected, Report};
    use pd_core::time::UnixTime;
    use pd_core::workers::recent::{DecisionRecord, Generation};

    use super::*;
    use crate::api::status::GatewayView;

    #[test]
    fn top_shows_envoys_their_decisions_and_what_to_do() {
        let generation = Generation { version: "0.1.0".into(), build: "b".into(), revision: "r".into(), workers: 3 };
        let decision =
            DecisionRecord { decision: "split".into(), reason: "prefilled".into(), ..DecisionRecord::default() };
        let decision = ReportedDecision { decision, ..ReportedDecision::default() };
        let report = Report {
            generations: vec![generation],
            decisions: vec![decision],
            epoch: "e".into(),
            version: 7,
            ejected: vec![Ejected {
                address: "10.0.0.1:1".into(),
                reason: "answers 5xx".into(),
                since_ms: UnixTime::from_millis(1_700_000_000_000),
            }],
            ..Report::default()
        };
        let status = StatusView {
            build: String::new(),
            epoch: "e".into(),
            version: 7,
            age_ms: 0,
            source: "s".into(),
            degraded: None,
            filters: Vec::new(),
            gateways: vec![GatewayView { id: "1f".into(), seen_ms: 300, report }],
            advice: vec!["do it".into()],
            watches: Vec::new(),
            refused: Vec::new(),
            pending: 0,
            endpoints: Vec::new(),
        };
        let text = top(&status);
        let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
        assert_eq!(
            lines[2..],
            [
                "ENVOY  VERSION  BUILD  REVISION  WORKERS  LIST  SEEN",
                "1f     0.1.0    b      r         3        7     0.3s",
                "EJECTED     ENVOY  SINCE         REASON",
                "10.0.0.1:1  1f     22:13:20 UTC  answers 5xx",
                "DECISION  REASON     PREFILL  DECODE  PROMPT  MATCHED",
                "split     prefilled  -        -       0       0",
                "! do it",
            ],
            "{text}"
        );
    }
}
