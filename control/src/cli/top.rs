//! The output of `pd-control top`: what the status page shows, for a terminal.

use std::time::Duration;

use clap::Args;
use pd_core::envoys::report::ReportedDecision;
use pd_core::wire::State;

use crate::api::status::{EndpointView, PoolView, StatusView, ago, time_of_day};
use crate::api::traffic::Figures;
use crate::cli::client::Server;
use crate::cli::output::print;
use crate::cli::terminal::{head, table};
use crate::list::{role, state};

/// Most decisions that `top` shows.
const MAX_DECISIONS: usize = 8;
/// Time between two refreshes.
const REFRESH: Duration = Duration::from_secs(2);
/// Heights of the spark line, from none to the most of the last minute.
const SPARKS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const RED: &str = "\x1b[31m";
const PLAIN: &str = "\x1b[0m";

/// Which endpoints `top` shows.
#[derive(Debug, Default, Args)]
pub struct Shown {
    /// Show endpoints of this pool only
    #[arg(long, value_name = "NAME")]
    pool: Option<String>,
    /// Show endpoints that serve this model only
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Show endpoints in this state only: ready, draining, down or failing
    #[arg(long, value_name = "STATE")]
    state: Option<String>,
    /// Show at most so many endpoints, the busiest first
    #[arg(long, value_name = "NUMBER", default_value_t = 40)]
    most: usize,
}

/// Shows pools, endpoints, Envoys and decisions, and refreshes them every two seconds unless `once`.
///
/// # Errors
/// One line that says why there is no status, or [`Closed`](crate::cli::output::Closed).
pub async fn follow_top(server: &Server, once: bool, shown: &Shown) -> anyhow::Result<()> {
    loop {
        let text = top(&server.status().await?, shown);
        if once {
            return print(&text);
        }
        // Clears the screen.
        print(&format!("\x1b[H\x1b[2J{}", with_red(&text)))?;
        tokio::select! {
            () = tokio::time::sleep(REFRESH) => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}

/// Pools, endpoints with their loads, failing ones first and then the busiest; then the Envoys, decisions and advice.
#[must_use]
pub fn top(status: &StatusView, shown: &Shown) -> String {
    let mut text = head(status);
    text += &pools(status.pools.iter().filter(|pool| shown.pool.as_ref().is_none_or(|name| *name == pool.name)));
    text += &endpoints(status, shown);
    text += &envoys(status);
    text += &ejected(status);
    text += &decisions(status, shown);
    for line in &status.advice {
        text += &format!("\n! {line}\n");
    }
    text
}

impl Shown {
    fn shows(&self, it: &EndpointView) -> bool {
        let is_failing = it.problem.is_some();
        self.pool.as_ref().is_none_or(|pool| *pool == it.endpoint.pool)
            && self.model.as_ref().is_none_or(|model| it.endpoint.models.contains(model))
            && self.state.as_deref().is_none_or(|wanted| match wanted {
                "failing" => is_failing,
                wanted => wanted == state(it.endpoint.state),
            })
    }
}

fn pools<'a>(pools: impl Iterator<Item = &'a PoolView>) -> String {
    let heads =
        ["POOL", "READY", "REQ/S", "P+D", "WAITING", "ENGINES", "SPLIT", "HITS", "ERR/S", "FIRST", "LAST MINUTE"];
    let mut rows = vec![heads.map(str::to_owned)];
    rows.extend(pools.map(|pool| {
        let ready = pool.roles.iter().map(|(role, count)| format!("{}/{} {role}", count.ready, count.all));
        let Figures { rate, errors, split_share, hit_share, first_ms, spark } = &pool.figures;
        [
            pool.name.clone(),
            ready.collect::<Vec<_>>().join(", "),
            rate_text(*rate),
            in_flight(pool.prefill_in_flight, pool.decode_in_flight),
            pool.waiting.to_string(),
            number(pool.waiting_in_engines),
            percent(*split_share),
            percent(*hit_share),
            rate_text(*errors),
            milliseconds(*first_ms),
            spark_line(spark),
        ]
    }));
    if rows.len() > 1 { table(&rows) } else { String::new() }
}

fn endpoints(status: &StatusView, shown: &Shown) -> String {
    let mut found: Vec<_> = status.endpoints.iter().filter(|it| shown.shows(it)).collect();
    let load = |it: &EndpointView| it.waiting.unwrap_or(0.0) * 1e6 + it.running.unwrap_or(0.0) + it.figures.rate;
    found.sort_by(|a, b| b.problem.is_some().cmp(&a.problem.is_some()).then_with(|| load(b).total_cmp(&load(a))));
    let heads = [
        "ENDPOINT",
        "ROLE",
        "STATE",
        "REQ/S",
        "P+D",
        "WAITING",
        "RUNNING",
        "KV",
        "HITS",
        "ERR/S",
        "FIRST",
        "LAST MINUTE",
        "POD",
    ];
    let mut rows = vec![heads.map(str::to_owned)];
    rows.extend(found.iter().take(shown.most).map(|it| {
        let is_failing = it.problem.is_some() && it.endpoint.state == State::Ready;
        [
            it.endpoint.id().to_string(),
            role(it.endpoint.role).to_owned(),
            if is_failing { "failing".to_owned() } else { state(it.endpoint.state).to_owned() },
            rate_text(it.figures.rate),
            in_flight(it.prefill_in_flight, it.decode_in_flight),
            number(it.waiting),
            number(it.running),
            percent(it.kv_usage),
            percent(it.figures.hit_share.or(it.hit_ratio)),
            rate_text(it.figures.errors),
            milliseconds(it.figures.first_ms),
            spark_line(&it.figures.spark),
            it.pod.clone().unwrap_or_default(),
        ]
    }));
    let mut text = format!("\n{}", table(&rows));
    if found.len() > shown.most {
        text += &format!("… and {} more endpoints: --most shows more\n", found.len() - shown.most);
    }
    let mut rows = vec![["FAILING", "SINCE", "FOR", "WHY"].map(str::to_owned)];
    rows.extend(found.iter().filter_map(|it| {
        let since = it.since_ms;
        Some([
            it.endpoint.id().to_string(),
            since.map_or("-".to_owned(), time_of_day),
            since.map_or("-".to_owned(), |since| ago(since, status.now_ms)),
            it.problem.clone()?,
        ])
    }));
    if rows.len() > 1 {
        text += &format!("\n{}", table(&rows));
    }
    text
}

fn envoys(status: &StatusView) -> String {
    if status.gateways.is_empty() {
        return String::new();
    }
    let heads = ["ENVOY", "ID", "VERSION", "BUILD", "REVISION", "WORKERS", "LIST", "REFUSED/S", "SEEN"];
    let mut rows = vec![heads.map(str::to_owned)];
    for it in &status.gateways {
        let is_of_this_run = it.report.epoch == status.epoch;
        rows.extend(it.report.generations.iter().map(|generation| {
            [
                or_none(&it.report.name),
                it.id.clone(),
                generation.version.clone(),
                generation.build.clone(),
                or_none(&generation.revision),
                generation.workers.to_string(),
                if is_of_this_run { it.report.version.to_string() } else { "other".to_owned() },
                rate_text(it.refused),
                format!("{:.1}s", it.seen_ms as f64 / 1e3),
            ]
        }));
    }
    format!("\n{}", table(&rows))
}

/// A table of the endpoints that an Envoy avoids; empty where there are none.
fn ejected(status: &StatusView) -> String {
    let mut rows = vec![["EJECTED", "ENVOY", "SINCE", "REASON"].map(str::to_owned)];
    for it in &status.gateways {
        let envoy = if it.report.name.is_empty() { &it.id } else { &it.report.name };
        rows.extend(it.report.ejected.iter().map(|ejected| {
            [ejected.address.clone(), envoy.clone(), time_of_day(ejected.since_ms), ejected.reason.clone()]
        }));
    }
    if rows.len() > 1 { format!("\n{}", table(&rows)) } else { String::new() }
}

fn decisions(status: &StatusView, shown: &Shown) -> String {
    let mut decisions: Vec<_> = status.gateways.iter().flat_map(|it| &it.report.decisions).collect();
    decisions.retain(|it| shown.model.as_ref().is_none_or(|model| *model == it.decision.model));
    decisions.sort_by_key(|decision| std::cmp::Reverse(decision.at_ms));
    if decisions.is_empty() {
        return String::new();
    }
    let heads = [
        "TIME",
        "STATUS",
        "DECISION",
        "REASON",
        "PREFILL",
        "DECODE",
        "PROMPT",
        "MATCHED",
        "PREFILLED",
        "FIRST",
        "TOTAL",
    ];
    let mut rows = vec![heads.map(str::to_owned)];
    rows.extend(decisions.into_iter().take(MAX_DECISIONS).map(|ReportedDecision { at_ms, decision: it }| {
        let time = |ms: u64| milliseconds((ms > 0).then_some(ms as f64));
        [
            time_of_day(*at_ms),
            if it.status > 0 { it.status.to_string() } else { "-".to_owned() },
            or_none(&it.decision),
            or_none(&it.reason),
            or_none(&it.prefill),
            or_none(&it.decode),
            it.prompt_tokens.to_string(),
            it.matched_tokens.to_string(),
            time(it.prefill_ms),
            time(it.first_ms),
            time(it.total_ms),
        ]
    }));
    format!("\n{}", table(&rows))
}

/// The text with failing endpoints in red.
fn with_red(text: &str) -> String {
    let is_red = |line: &str| line.split_whitespace().nth(2).is_some_and(|word| matches!(word, "failing" | "down"));
    let lines =
        text.lines().map(|line| if is_red(line) { format!("{RED}{line}{PLAIN}\n") } else { format!("{line}\n") });
    lines.collect()
}

fn or_none(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

fn number(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.0}"))
}

fn percent(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{:.0}%", value * 100.0))
}

/// A rate with three digits at most.
fn rate_text(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        value if value < 10.0 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

fn milliseconds(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(ms) if ms < 1_000.0 => format!("{ms:.0}ms"),
        Some(ms) => format!("{:.1}s", ms / 1e3),
    }
}

/// Prefill legs and decode requests in flight.
fn in_flight(prefill: Option<u64>, decode: Option<u64>) -> String {
    match (prefill, decode) {
        (None, None) => "-".to_owned(),
        (prefill, decode) => format!("{}+{}", prefill.unwrap_or(0), decode.unwrap_or(0)),
    }
}

/// One character for two steps of the last minute.
fn spark_line(spark: &[u64]) -> String {
    let pairs: Vec<u64> = spark.rchunks(2).rev().map(|pair| pair.iter().sum()).collect();
    let most = pairs.iter().copied().max().unwrap_or(0).max(1);
    let place = |legs: u64| if legs == 0 { 0 } else { 1 + legs * (SPARKS.len() as u64 - 2) / most };
    pairs.into_iter().filter_map(|legs| SPARKS.get(usize::try_from(place(legs)).ok()?)).collect()
}

#[cfg(test)]
mod tests {
    use pd_core::envoys::report::{Ejected, Report};
    use pd_core::time::UnixTime;
    use pd_core::wire::{Endpoint, Role};
    use pd_core::workers::recent::{DecisionRecord, Generation};

    use super::*;
    use crate::api::status::{GatewayView, RoleCount};

    const AT: UnixTime = UnixTime::from_millis(1_700_000_000_000);

    fn gateway() -> GatewayView {
        let generation = Generation { version: "0.1.0".into(), build: "b".into(), revision: "r".into(), workers: 3 };
        let decision = DecisionRecord {
            decision: "split".into(),
            reason: "prefilled".into(),
            status: 200,
            first_ms: 120,
            total_ms: 2_500,
            ..DecisionRecord::default()
        };
        let report = Report {
            name: "envoy-7d9f".into(),
            generations: vec![generation],
            decisions: vec![ReportedDecision { at_ms: AT, decision }],
            epoch: "e".into(),
            version: 7,
            ejected: vec![Ejected { address: "10.0.0.1:1".into(), reason: "answers 5xx".into(), since_ms: AT }],
            ..Report::default()
        };
        GatewayView { id: "1f".into(), seen_ms: 300, refused: 0.25, report }
    }

    fn endpoint(n: u8, problem: Option<&str>) -> EndpointView {
        let mut endpoint = Endpoint::new(([10, 0, 0, n], 1).into(), Role::Decode);
        endpoint.models = vec![format!("m{n}")];
        let figures =
            Figures { rate: f64::from(n), first_ms: Some(50.0), spark: vec![0, 0, 1, 2], ..Figures::default() };
        EndpointView {
            endpoint,
            pod: None,
            answers: None,
            problem: problem.map(str::to_owned),
            since_ms: problem.map(|_| AT),
            prefill_in_flight: Some(0),
            decode_in_flight: Some(4),
            figures,
            waiting: None,
            running: None,
            kv_usage: Some(0.5),
            hit_ratio: None,
        }
    }

    fn status() -> StatusView {
        let figures = Figures { rate: 12.0, split_share: Some(0.5), ..Figures::default() };
        let roles = [("decode".to_owned(), RoleCount { all: 2, ready: 1 })].into();
        StatusView {
            build: String::new(),
            epoch: "e".into(),
            version: 7,
            age_ms: 0,
            source: "s".into(),
            degraded: None,
            filters: Vec::new(),
            gateways: vec![gateway()],
            advice: vec!["do it".into()],
            watches: Vec::new(),
            refused: Vec::new(),
            pending: 0,
            now_ms: UnixTime::from_millis(AT.as_millis() + 150_000),
            pools: vec![PoolView { name: "default".into(), roles, waiting: 3, figures, ..PoolView::default() }],
            endpoints: vec![endpoint(9, None), endpoint(1, Some("it answers 5xx"))],
        }
    }

    #[test]
    fn top_shows_pools_failing_endpoints_envoys_and_decisions() {
        let text = top(&status(), &Shown { most: 9, ..Shown::default() });
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        let expected = [
            "default 1/2 decode 12 - 3 - 50% - 0 -",
            "10.0.0.1:1 decode failing 1.0 0+4 - - 50% - 0 50ms █",
            "10.0.0.9:1 decode ready 9.0 0+4 - - 50% - 0 50ms █",
            "10.0.0.1:1 22:13:20 UTC 2 min it answers 5xx",
            "envoy-7d9f 1f 0.1.0 b r 3 7 0.2 0.3s",
            "10.0.0.1:1 envoy-7d9f 22:13:20 UTC answers 5xx",
            "22:13:20 UTC 200 split prefilled - - 0 0 - 120ms 2.5s",
            "! do it",
        ];
        let mut rest = lines.iter().map(|words| words.join(" "));
        for line in expected {
            assert!(rest.any(|found| found == line), "{line:?} is not in its place in\n{text}");
        }
    }

    #[test]
    fn top_shows_the_endpoints_that_were_asked_for() {
        let of = |shown: Shown| {
            let text = endpoints(&status(), &shown);
            ["10.0.0.1:1 ", "10.0.0.9:1 "].map(|address| text.contains(address))
        };
        let all = || Shown { most: 9, ..Shown::default() };
        assert_eq!(of(all()), [true, true]);
        assert_eq!(of(Shown { model: Some("m9".into()), ..all() }), [false, true]);
        assert_eq!(of(Shown { state: Some("failing".into()), ..all() }), [true, false]);
        assert_eq!(of(Shown { state: Some("ready".into()), ..all() }), [true, true]);
        assert_eq!(of(Shown { pool: Some("other".into()), ..all() }), [false, false]);
        assert!(endpoints(&status(), &Shown { most: 1, ..all() }).contains("… and 1 more endpoints"));
    }

    #[test]
    fn failing_endpoints_are_red() {
        let red = with_red("a decode failing x\nb decode ready x\nc decode down x\n");
        assert_eq!(red, "\x1b[31ma decode failing x\x1b[0m\nb decode ready x\n\x1b[31mc decode down x\x1b[0m\n");
    }

    #[test]
    fn a_spark_line_has_a_character_for_four_seconds() {
        assert_eq!(spark_line(&[]), "");
        assert_eq!(spark_line(&[0, 0, 1, 0, 4, 4, 8, 0]), " ▁██");
    }
}
