//! How fast a change of the list reaches every Envoy, and what pd-control costs.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use pd_bench::engine::head_length;
use pd_bench::figures::percentile;
use pd_bench::process;
use pd_support::client::{Answer, get};
use pd_support::file::replace;
use pd_support::places;
use pd_support::port::Port;
use pd_support::process::{Process, ready};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

/// Measures how fast a change of the list reaches every Envoy, and the cost of pd-control, with a real pd-control.
///
/// Each poller is one Envoy's long poll. A change is one endpoint's weight in the endpoints file. The time runs from before
/// the file's replacement until the poller has read the whole answer.
#[derive(Parser)]
#[command(name = "pd-bench-push", version, max_term_width = 120)]
struct Args {
    /// Envoys
    #[arg(long, default_value_t = 64)]
    pollers: usize,
    /// Endpoints of the list
    #[arg(long, default_value_t = 1_000)]
    endpoints: usize,
    /// Changes
    #[arg(long, default_value_t = 200)]
    changes: usize,
    /// Engines that pd-control asks for their metrics in the idle part; 0 leaves the part out
    #[arg(long, default_value_t = 100)]
    engines: usize,
    /// Seconds between two requests to an engine
    #[arg(long, default_value_t = 5.0)]
    scrape_interval: f64,
    /// Seconds of the idle part
    #[arg(long, default_value_t = 30)]
    idle_seconds: u64,
    /// pd-control
    #[arg(long, default_value_os_t = places::control_path())]
    control: PathBuf,
}

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    println!("{}", process::machine());
    let directory = places::root().join("target/bench-push");
    fs::create_dir_all(&directory)?;
    push(&args, &directory).await?;
    if args.engines > 0 {
        idle(&args, &directory).await?;
    }
    Ok(())
}

/// Changes the list under many polls.
async fn push(args: &Args, directory: &Path) -> Result<()> {
    let addresses: Vec<SocketAddr> =
        (0..args.endpoints).map(|n| ([10, 0, (n >> 8) as u8, n as u8], 8_000).into()).collect();
    let file = directory.join("endpoints.json");
    replace(&file, &list(&addresses, 0))?;
    let control = Control::start(args, &file, directory, 0.0).await?;
    let (seen, mut answers) = mpsc::channel(args.pollers);
    for _ in 0..args.pollers {
        tokio::spawn(poll(control.address, seen.clone()));
    }
    // The first answers are the whole list.
    next(&mut answers, args.pollers, 0).await?;
    let (mut each, mut all) = (Vec::new(), Vec::new());
    let (before, start) = (process::usage(control.process.pid())?, Instant::now());
    for change in 1..=args.changes {
        // Everybody waits again.
        sleep(Duration::from_millis(20)).await;
        let text = list(&addresses, change);
        let start = Instant::now();
        replace(&file, &text)?;
        let times = next(&mut answers, args.pollers, change).await?;
        let millis = |at: &Instant| u64::try_from((*at - start).as_micros()).unwrap_or(u64::MAX);
        each.extend(times.iter().map(millis));
        all.extend(times.iter().map(millis).max());
    }
    let cost = process::usage(control.process.pid())?.since(before).cpu;
    println!("\n{} changes of a list of {} endpoints, {} long polls", args.changes, args.endpoints, args.pollers);
    show("until one Envoy has it", &mut each);
    show("until all have it", &mut all);
    let per_change = cost.as_secs_f64() * 1e3 / args.changes as f64;
    println!(
        "pd-control: {per_change:.2} ms of CPU a change, {:.0} % of a core meanwhile",
        share(cost, start.elapsed())
    );
    Ok(())
}

/// Lets it scrape engines that do nothing.
async fn idle(args: &Args, directory: &Path) -> Result<()> {
    let page = page();
    let mut addresses = Vec::new();
    for _ in 0..args.engines {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        addresses.push(listener.local_addr()?);
        tokio::spawn(serve(listener, page.clone()));
    }
    let file = directory.join("engines.json");
    replace(&file, &list(&addresses, 0))?;
    let control = Control::start(args, &file, directory, args.scrape_interval).await?;
    // The first round opens connections.
    sleep(Duration::from_secs_f64(args.scrape_interval + 1.0)).await;
    let (before, start) = (process::usage(control.process.pid())?, Instant::now());
    sleep(Duration::from_secs(args.idle_seconds)).await;
    let cost = process::usage(control.process.pid())?.since(before).cpu;
    let (kilobytes, rss) = (page.len() / 1_000, process::resident_kb(control.process.pid())? / 1_000);
    println!("\n{} engines with {kilobytes} kB of metrics, asked every {} s", args.engines, args.scrape_interval);
    println!("pd-control: {:.2} % of a core, {rss} MB", share(cost, start.elapsed()));
    let text = get(control.address, "/metrics").await.and_then(Answer::ok)?.text();
    let up = text.lines().filter(|line| line.starts_with("pd_control_engine_up{") && line.ends_with(" 1.0")).count();
    if up != args.engines {
        bail!("{up} of {} engines answered", args.engines);
    }
    Ok(())
}

/// A running pd-control, which ends with this.
struct Control {
    process: Process,
    address: SocketAddr,
    _port: Port,
}

impl Control {
    async fn start(args: &Args, file: &Path, directory: &Path, scrape_interval: f64) -> Result<Self> {
        ensure!(args.control.exists(), "{} is missing: run `make build`", args.control.display());
        let port = Port::reserve();
        let address = port.address();
        let arguments = [
            format!("--endpoints={}", file.display()),
            format!("--listen={address}"),
            format!("--scrape-interval={scrape_interval}"),
            "--log-level=warn".to_owned(),
        ];
        let process = Process::start("pd-control", directory, &args.control, &arguments);
        ready(&process, address, "/readyz", PATIENCE).await?;
        Ok(Self { process, address, _port: port })
    }
}

fn share(cpu: Duration, of: Duration) -> f64 {
    cpu.as_secs_f64() / of.as_secs_f64() * 100.0
}

fn show(what: &str, micros: &mut [u64]) {
    micros.sort_unstable();
    let quantile = |share| percentile(micros, share) as f64 / 1e3;
    println!("{what}: median {:.1} ms, p99 {:.1} ms, longest {:.1} ms", quantile(0.5), quantile(0.99), quantile(1.0));
}

/// The endpoints file; the first one's weight counts the changes.
fn list(addresses: &[SocketAddr], change: usize) -> String {
    let mut text = r#"{"endpoints":["#.to_owned();
    for (n, address) in addresses.iter().enumerate() {
        let weight = if n == 0 { 1.0 + change as f64 / 100.0 } else { 1.0 };
        let comma = if n == 0 { "" } else { "," };
        let _ = write!(text, r#"{comma}{{"address":"{address}","role":"decode","weight":{weight}}}"#);
    }
    text + "]}"
}

/// When each poller had the change, in no order.
async fn next(answers: &mut mpsc::Receiver<(u64, Instant)>, pollers: usize, change: usize) -> Result<Vec<Instant>> {
    let mut times = Vec::new();
    while times.len() < pollers {
        let (version, at) =
            timeout(PATIENCE, answers.recv()).await.context("a change did not come")?.context("ended")?;
        if version == change as u64 + 1 {
            times.push(at);
        }
    }
    Ok(times)
}

/// Polls as a filter does; says when it had which version.
async fn poll(address: SocketAddr, seen: mpsc::Sender<(u64, Instant)>) -> Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (mut epoch, mut version, mut buffer) = (String::new(), 0_u64, Vec::new());
    loop {
        let request =
            format!("GET /v1/watch?epoch={epoch}&since={version}&wait_ms=30000 HTTP/1.1\r\nhost: pd-control\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let body = answer(&mut stream, &mut buffer).await?;
        let at = Instant::now();
        if body.is_empty() {
            continue;
        }
        let snapshot: serde_json::Value = serde_json::from_slice(&body)?;
        epoch = snapshot["epoch"].as_str().context("no epoch")?.to_owned();
        version = snapshot["version"].as_u64().context("no version")?;
        seen.send((version, at)).await?;
    }
}

/// The body of the next answer.
async fn answer(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Result<Vec<u8>> {
    buffer.clear();
    loop {
        if let Some(head) = head_length(buffer) {
            let text = String::from_utf8_lossy(&buffer[..head]).to_ascii_lowercase();
            let length = text.split("content-length:").nth(1).and_then(|rest| rest.split("\r\n").next());
            let length: usize = length.map_or(Ok(0), |length| length.trim().parse())?;
            if buffer.len() >= head + length {
                return Ok(buffer[head..head + length].to_vec());
            }
        }
        if stream.read_buf(buffer).await? == 0 {
            bail!("pd-control has closed the connection");
        }
    }
}

/// As long a page as a vLLM with two models has: mostly histograms.
fn page() -> String {
    let mut text = String::new();
    for (name, value) in [
        ("num_requests_waiting", 0),
        ("num_requests_running", 0),
        ("kv_cache_usage_perc", 0),
        ("prefix_cache_queries_total", 100),
        ("prefix_cache_hits_total", 60),
    ] {
        let _ =
            writeln!(text, "# HELP vllm:{name} A figure.\nvllm:{name}{{engine=\"0\",model_name=\"model\"}} {value}");
    }
    let _ = writeln!(text, "vllm:cache_config_info{{block_size=\"16\",num_gpu_blocks=\"20000\"}} 1");
    for family in 0..24 {
        for bucket in 0..40 {
            let _ = writeln!(
                text,
                "vllm:request_family_{family}_seconds_bucket{{engine=\"0\",le=\"{bucket}.0\",model_name=\"model\"}} 0.0"
            );
        }
    }
    text
}

async fn serve(listener: TcpListener, page: String) -> Result<()> {
    loop {
        let (mut stream, _) = listener.accept().await?;
        let page = page.clone();
        tokio::spawn(async move {
            let mut buffer = Vec::new();
            while stream.read_buf(&mut buffer).await? > 0 {
                let Some(head) = head_length(&buffer) else { continue };
                let is_metrics = buffer.starts_with(b"GET /metrics");
                let body = if is_metrics { page.as_str() } else { r#"{"object":"list","data":[{"id":"model"}]}"# };
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).await?;
                buffer.drain(..head);
            }
            anyhow::Ok(())
        });
    }
}
