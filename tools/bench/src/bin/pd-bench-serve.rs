//! Load on a gateway that exists, as the field's serving benchmarks make it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clap::{Parser, ValueEnum};
use http_body_util::{BodyExt as _, Full};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{HeaderMap, Request, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use pd_bench::figures::table;
use pd_bench::plot::{Bar, Graph, Panel, Series, graphs};
use pd_bench::serve::{Answer, COLUMNS, Events, Level, Timing};
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// Longest shown part of an error, in bytes.
const MAX_ERROR_BYTES: usize = 400;

/// Measures output tokens a second, TTFT, TPOT and ITL of a running gateway or server.
///
/// At each concurrency, that many streams run at a time; the next one begins when one has ended. Prompts consist of words
/// that no cache holds. Answers have the requested number of tokens if the server supports `ignore_eos` (vLLM, SGLang).
#[derive(Parser)]
#[command(name = "pd-bench-serve", version, max_term_width = 120)]
struct Args {
    /// URL in front of /v1, such as http://127.0.0.1:8080
    #[arg(long)]
    url: String,
    /// Model [default: the first of /v1/models]
    #[arg(long)]
    model: Option<String>,
    /// API to ask
    #[arg(long, value_enum, default_value = "chat")]
    api: Api,
    /// Streams that run at a time; one run for each value
    #[arg(long, value_delimiter = ',', default_values_t = [32, 64, 128])]
    concurrency: Vec<usize>,
    /// Requests of each run, in multiples of its concurrency
    #[arg(long, default_value_t = 4)]
    rounds: usize,
    /// Tokens of a prompt, at --bytes-per-token; the table shows the server's count
    #[arg(long, default_value_t = 1_000)]
    input_tokens: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 1_000)]
    output_tokens: usize,
    /// Bytes of English words to a token
    #[arg(long, default_value_t = 4.0)]
    bytes_per_token: f64,
    /// Time limit of a request, in seconds
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Further header, as NAME: VALUE; may be repeated
    #[arg(long, value_name = "NAME: VALUE")]
    header: Vec<String>,
    /// Environment variable with the API key, if it is set
    #[arg(long, value_name = "NAME", default_value = "OPENAI_API_KEY")]
    key_env: String,
    /// Seed of the prompts
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder for serve.csv and serve.svg
    #[arg(long, value_name = "DIRECTORY", default_value = "target/bench-serve")]
    out: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Api {
    Chat,
    Completions,
}

type Http = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// The requests of a run, and their server.
struct Target {
    http: Http,
    base: String,
    headers: HeaderMap,
    api: Api,
    model: String,
    prompt_bytes: usize,
    output_tokens: usize,
    timeout: Duration,
    seed: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pd-bench-serve: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<()> {
    ensure!(
        args.bytes_per_token >= 0.5 && args.bytes_per_token <= 64.0,
        "--bytes-per-token must be between 0.5 and 64"
    );
    ensure!(args.concurrency.iter().all(|level| (1..=100_000).contains(level)), "--concurrency must be 1 or more");
    ensure!(args.rounds > 0 && args.output_tokens > 0, "--rounds and --output-tokens must be 1 or more");
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let target = Arc::new(Target::new(&args).await?);
    println!(
        "{} at {}: prompts of about {} tokens, answers of {}",
        target.model, target.base, args.input_tokens, args.output_tokens
    );
    // One request that does not count: connections, compilations, caches of the first one.
    target.ask(u64::MAX).await.map_err(|error| anyhow::anyhow!("the first request: {error}"))?;
    let (numbers, mut levels) = (Arc::new(AtomicU64::new(0)), Vec::new());
    for concurrency in &args.concurrency {
        let (level, error) = measure(&target, *concurrency, args.rounds, &numbers).await?;
        if let Some(error) = error {
            eprintln!(
                "pd-bench-serve: {} of {} requests failed: {error}",
                level.failures,
                level.failures + level.requests
            );
        }
        levels.push(level);
    }
    print!("{}", shown(&levels));
    let (csv, svg) = (args.out.join("serve.csv"), args.out.join("serve.svg"));
    let rows = levels.iter().map(|level| level.row().join(",") + "\n");
    std::fs::write(&csv, std::iter::once(COLUMNS.join(",") + "\n").chain(rows).collect::<String>())?;
    draw(&svg, &target.model, &levels)?;
    println!("{} and {}", csv.display(), svg.display());
    let failures: u64 = levels.iter().map(|level| level.failures).sum();
    ensure!(failures == 0, "{failures} requests failed: the figures are those of the others");
    Ok(())
}

/// The columns that fit on a screen.
fn shown(levels: &[Level]) -> String {
    let head = ["streams", "requests", "output tok/s", "TTFT p50", "p99 ms", "TPOT p50", "p99 ms", "ITL p50", "p99 ms"];
    let row = |level: &Level| {
        let mut row = vec![
            level.concurrency.to_string(),
            level.requests.to_string(),
            format!("{:.0}", level.output_tokens_per_s()),
        ];
        row.extend(
            [level.ttft, level.tpot, level.itl].iter().flat_map(|it| [it.p50, it.p99]).map(|ms| format!("{ms:.1}")),
        );
        row
    };
    let rows: Vec<_> = std::iter::once(head.map(str::to_owned).to_vec()).chain(levels.iter().map(row)).collect();
    table(&rows)
}

async fn measure(
    target: &Arc<Target>,
    concurrency: usize,
    rounds: usize,
    numbers: &Arc<AtomicU64>,
) -> Result<(Level, Option<String>)> {
    let left = Arc::new(AtomicU64::new((concurrency * rounds) as u64));
    let (start, mut streams) = (Instant::now(), JoinSet::new());
    for _ in 0..concurrency {
        let (target, left, numbers) = (Arc::clone(target), Arc::clone(&left), Arc::clone(numbers));
        streams.spawn(async move {
            let mut outcomes = Vec::new();
            while left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
                outcomes.push(target.ask(numbers.fetch_add(1, Relaxed)).await);
            }
            outcomes
        });
    }
    let (mut timings, mut failures, mut first_error) = (Vec::new(), 0, None);
    while let Some(outcomes) = streams.join_next().await {
        for outcome in outcomes.context("a stream's task failed")? {
            match outcome {
                Ok(timing) => timings.push(timing),
                Err(error) => {
                    failures += 1;
                    first_error.get_or_insert(error);
                }
            }
        }
    }
    if timings.is_empty() {
        bail!("no request succeeded at {concurrency} streams: {}", first_error.unwrap_or_default());
    }
    Ok((Level::new(concurrency, start.elapsed(), &timings, failures), first_error))
}

impl Target {
    async fn new(args: &Args) -> Result<Self> {
        let base = args.url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let uri: Uri = base.parse().with_context(|| format!("--url {base}"))?;
        ensure!(uri.host().is_some() && uri.scheme_str().is_some(), "--url {base}: begin with http:// or https://");
        let mut headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
        if let Ok(key) = std::env::var(&args.key_env) {
            headers.insert(AUTHORIZATION, format!("Bearer {key}").parse().with_context(|| args.key_env.clone())?);
        }
        for header in &args.header {
            let (name, value) = header.split_once(':').with_context(|| format!("--header {header}: no colon"))?;
            headers.insert(name.trim().parse::<HeaderName>()?, value.trim().parse()?);
        }
        let connector = HttpsConnectorBuilder::new().with_native_roots()?.https_or_http().enable_http1().build();
        let mut target = Self {
            http: Client::builder(TokioExecutor::new()).build(connector),
            base,
            headers,
            api: args.api,
            model: String::new(),
            prompt_bytes: (args.input_tokens as f64 * args.bytes_per_token) as usize,
            output_tokens: args.output_tokens,
            timeout: Duration::from_secs(args.timeout),
            seed: args.seed,
        };
        target.model = match &args.model {
            Some(model) => model.clone(),
            None => {
                target.first_model().await.with_context(|| format!("{}/v1/models (or name --model)", target.base))?
            }
        };
        Ok(target)
    }

    fn request(&self, method: &str, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>, String> {
        let request = Request::builder().method(method).uri(format!("{}{path}", self.base)).body(Full::new(body));
        let mut request = request.map_err(|error| error.to_string())?;
        request.headers_mut().extend(self.headers.clone());
        Ok(request)
    }

    async fn first_model(&self) -> Result<String> {
        let request = self.request("GET", "/v1/models", Bytes::new()).map_err(anyhow::Error::msg)?;
        let answer = self.http.request(request).await?;
        ensure!(answer.status() == 200, "status {}", answer.status());
        let list: Value = serde_json::from_slice(&answer.into_body().collect().await?.to_bytes())?;
        Ok(list["data"][0]["id"].as_str().context("it names no model")?.to_owned())
    }

    fn body(&self, number: u64) -> (&'static str, Bytes) {
        let text = prompt(self.seed, number, self.prompt_bytes);
        let mut body = json!({
            "model": self.model, "max_tokens": self.output_tokens, "temperature": 0, "ignore_eos": true,
            "stream": true, "stream_options": {"include_usage": true},
        });
        let path = match self.api {
            Api::Chat => {
                body["messages"] = json!([{"role": "user", "content": text}]);
                "/v1/chat/completions"
            }
            Api::Completions => {
                body["prompt"] = text.into();
                "/v1/completions"
            }
        };
        (path, body.to_string().into())
    }

    /// One stream from its first byte to its end.
    async fn ask(&self, number: u64) -> Result<Timing, String> {
        let stream = tokio::time::timeout(self.timeout, self.stream(number));
        stream.await.unwrap_or_else(|_| Err(format!("no end within {} s", self.timeout.as_secs())))
    }

    async fn stream(&self, number: u64) -> Result<Timing, String> {
        let (path, body) = self.body(number);
        let request = self.request("POST", path, body)?;
        let start = Instant::now();
        let response = self
            .http
            .request(request)
            .await
            .map_err(|error| format!("{error}: {:?}", std::error::Error::source(&error)))?;
        let status = response.status();
        let mut body = response.into_body();
        if status != 200 {
            let text = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            let text = text.get(..text.len().min(MAX_ERROR_BYTES)).unwrap_or_default();
            return Err(format!("status {status}: {}", String::from_utf8_lossy(text)));
        }
        let (mut events, mut answer) = (Events::default(), Answer::default());
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| error.to_string())?;
            let at = start.elapsed();
            if let Some(bytes) = frame.data_ref() {
                events.push(bytes)?;
                while let Some(data) = events.next_data() {
                    answer.take(&data, at)?;
                }
            }
        }
        answer.timing()
    }
}

/// English-like words, unlike those of any other number from the first one on.
fn prompt(seed: u64, number: u64, bytes: usize) -> String {
    const WORDS: [&str; 32] = [
        "time", "river", "north", "paper", "glass", "music", "stone", "light", "table", "green", "water", "house",
        "market", "letter", "winter", "garden", "bridge", "street", "forest", "silver", "window", "friend", "story",
        "morning", "question", "number", "engine", "island", "copper", "yellow", "signal", "travel",
    ];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number.wrapping_add(1);
    let mut text = String::with_capacity(bytes + 16);
    while text.len() < bytes {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        text.push_str(WORDS[(mixed >> 59) as usize]);
        text.push(' ');
    }
    text.truncate(bytes);
    text
}

fn draw(path: &Path, model: &str, levels: &[Level]) -> Result<()> {
    let graph = |title: &str, pick: fn(&Level) -> (f64, f64)| {
        let line = |colour, value: fn((f64, f64)) -> f64| Series {
            points: levels.iter().map(|level| (level.concurrency as f64, value(pick(level)))).collect(),
            colour,
            joined: true,
        };
        let (title, x) = (title.to_owned(), "streams at a time".to_owned());
        Graph { title, x, log_x: false, log_y: false, series: vec![line(3, |it| it.0), line(5, |it| it.1)] }
    };
    let all = [
        graph("TTFT, ms", |level| (level.ttft.p50, level.ttft.p99)),
        graph("TPOT, ms", |level| (level.tpot.p50, level.tpot.p99)),
        graph("ITL, ms", |level| (level.itl.p50, level.itl.p99)),
    ];
    let bar = |level: &Level| {
        let value = level.output_tokens_per_s();
        Bar { label: format!("{}: {value:.0}", level.concurrency), value, range: (value, value), series: 6 }
    };
    let panel = Panel { title: "output tokens/s by streams".to_owned(), bars: levels.iter().map(bar).collect() };
    graphs(path, &format!("Serving {model}"), &[("p50", 3), ("p99", 5)], &all, Some(&panel))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn prompts_have_their_size_and_no_beginning_in_common() {
        let (a, b, c) = (prompt(1, 0, 4_000), prompt(1, 1, 4_000), prompt(2, 0, 4_000));
        assert_eq!((a.len(), a.clone()), (4_000, prompt(1, 0, 4_000)));
        let common = |a: &str, b: &str| a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
        assert!(common(&a, &b) < 64 && common(&a, &c) < 64);
    }
}
