//! What grows, one function for each: they measure points and return the curves.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use pd_bench::client::{self, Outcome, Until};
use pd_bench::envoy::Envoy;
use pd_bench::figures::{Sample, percentile};
use pd_bench::process;
use pd_bench::prompt::{Sharing, Template};
use pd_support::client::{Answer, get};
use pd_support::file::replace;
use pd_support::places;
use pd_support::port::Port;
use pd_support::process::{Process, ready};
use serde_json::json;

use crate::Args;
use crate::curve::Curves;
use crate::load::{self, Open, Streams};
use crate::rig::{self, Engines, Kind, Options};

/// How long pd-control may take to start, and a new configuration to arrive.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause in which what was just started gets quiet.
const SETTLE: Duration = Duration::from_secs(2);

/// What a bench of one axis has.
pub struct Bench<'a> {
    pub args: &'a Args,
    pub engines: Engines,
    /// Number of the next prompt.
    pub mark: Rc<Cell<u64>>,
}

impl Bench<'_> {
    /// CPU µs per request and the outcome of a closed loop.
    async fn closed(&self, envoy: &Envoy, bytes: usize, connections: usize, until: Until) -> Result<(f64, Outcome)> {
        let step = [Template::chat(bytes, Sharing::None, false, "")];
        let before = process::usage(envoy.pid())?;
        let outcome = client::run(envoy.gateway, &step, connections, until, &self.mark).await?;
        let cpu = process::usage(envoy.pid())?.since(before).cpu;
        Ok((cpu.as_secs_f64() * 1e6 / outcome.requests as f64, outcome))
    }

    /// Medians over the rounds of the CPU µs per request of each Envoy, measured in turn after a warm-up.
    async fn cpu(&self, envoys: &[Envoy], bytes: usize, connections: usize) -> Result<Vec<f64>> {
        let time = Duration::from_secs_f64(self.args.seconds);
        let mut samples = vec![Sample::default(); envoys.len()];
        for round in 0..=self.args.rounds {
            for (envoy, sample) in envoys.iter().zip(&mut samples) {
                let until = Until::Elapsed(if round == 0 { time / 2 } else { time });
                let (cpu, _) = self.closed(envoy, bytes, connections, until).await?;
                if round > 0 {
                    sample.push(cpu);
                }
            }
        }
        Ok(samples.iter().map(Sample::median).collect())
    }

    async fn start(&self, name: &str, kinds: &[Kind], edit: impl Fn(&mut Options)) -> Result<Vec<Envoy>> {
        let mut envoys = Vec::new();
        for &kind in kinds {
            let mut options = Options::of(kind);
            edit(&mut options);
            envoys.push(rig::start(self.args, &self.engines, name, &options).await?);
        }
        Ok(envoys)
    }

    fn marks(&self, count: u64) -> u64 {
        let mark = self.mark.get();
        self.mark.set(mark + count);
        mark
    }
}

const ALL: [Kind; 3] = [Kind::Plain, Kind::OneLeg, Kind::TwoLegs];
const TWO: [Kind; 2] = [Kind::Plain, Kind::TwoLegs];

fn resident_mb(envoy: &Envoy) -> Result<f64> {
    Ok(process::resident_kb(envoy.pid())? as f64 / 1_024.0)
}

/// Length of the prompt, to the 16 MB that a body may have by default.
pub async fn prompt(bench: &Bench<'_>) -> Result<Curves> {
    let mut curves = Curves::new("prompt", "bytes of the body");
    let envoys = bench.start("prompt", &ALL, |_| {}).await?;
    for bytes in [1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000, 4_000_000, 16_000_000] {
        let cpu = bench.cpu(&envoys, bytes, 2).await?;
        for (kind, (cpu, envoy)) in ALL.iter().zip(cpu.iter().zip(&envoys)) {
            curves.add(&format!("CPU µs/request, {}", kind.name()), bytes as f64, *cpu);
            curves.add(&format!("MiB, {}", kind.name()), bytes as f64, resident_mb(envoy)?);
        }
        curves.row(bytes as f64);
    }
    Ok(curves)
}

/// Endpoints of the list.
pub async fn endpoints(bench: &Bench<'_>) -> Result<Curves> {
    let mut curves = Curves::new("endpoints", "endpoints");
    for count in [4, 10, 100, 1_000, 10_000] {
        let envoys = bench.start("endpoints", &TWO, |options| options.endpoints = count).await?;
        let cpu = bench.cpu(&envoys, 16_000, 16).await?;
        for (kind, (cpu, envoy)) in TWO.iter().zip(cpu.iter().zip(&envoys)) {
            curves.add(&format!("CPU µs/request, {}", kind.name()), count as f64, *cpu);
            curves.add(&format!("MiB, {}", kind.name()), count as f64, resident_mb(envoy)?);
        }
        curves.row(count as f64);
    }
    Ok(curves)
}

/// Workers of one Envoy.
pub async fn workers(bench: &Bench<'_>) -> Result<Curves> {
    let mut curves = Curves::new("workers", "workers");
    for workers in [1, 2, 4, 8, 16] {
        let envoys = bench.start("workers", &TWO, |options| options.workers = workers).await?;
        tokio::time::sleep(SETTLE).await;
        for (kind, envoy) in TWO.iter().zip(&envoys) {
            curves.add(&format!("MiB at rest, {}", kind.name()), f64::from(workers), resident_mb(envoy)?);
        }
        let cpu = bench.cpu(&envoys, 4_000, 64).await?;
        for (kind, cpu) in TWO.iter().zip(cpu) {
            curves.add(&format!("CPU µs/request, {}", kind.name()), f64::from(workers), cpu);
        }
        curves.row(f64::from(workers));
    }
    Ok(curves)
}

/// Prompts that the prefix index has been told of, until its bound is passed several times.
pub async fn index(bench: &Bench<'_>) -> Result<Curves> {
    const BOUND_MB: u64 = 16;
    let mut curves = Curves::new("index", "prompts of 16 kB entered");
    let bound = |options: &mut Options| options.filter = json!({"prefix": {"index_bytes": BOUND_MB << 20}});
    let envoys = bench.start("index", &[Kind::TwoLegs], bound).await?;
    let envoy = envoys.first().context("an Envoy")?;
    let mut entered = 0;
    for more in [500, 500, 1_000, 2_000, 4_000, 8_000] {
        let (cpu, _) = bench.closed(envoy, 16_000, 16, Until::Requests(more)).await?;
        entered += more;
        curves.add("CPU µs/request", entered as f64, cpu);
        curves.add("MiB", entered as f64, resident_mb(envoy)?);
        curves.row(entered as f64);
    }
    Ok(curves)
}

/// Open streams that say nothing.
pub async fn streams(bench: &Bench<'_>) -> Result<Curves> {
    let mut curves = Curves::new("streams", "open streams");
    for kind in ALL {
        // Engines of its own: those of the kind before still hold its streams.
        let engines = Engines::start().await?;
        let envoy = rig::start(bench.args, &engines, "streams", &Options::of(kind)).await?;
        let mut open = Streams::new();
        for count in [1_000, 3_000, 10_000] {
            open.open(envoy.gateway, count, bench.marks(count as u64)).await?;
            let before = process::usage(envoy.pid())?.cpu;
            tokio::time::sleep(SETTLE).await;
            let cpu = process::usage(envoy.pid())?.cpu.saturating_sub(before);
            curves.add(&format!("MiB, {}", kind.name()), count as f64, resident_mb(&envoy)?);
            curves.add(&format!("% of a core, {}", kind.name()), count as f64, share(cpu, SETTLE));
            curves.row(count as f64);
        }
    }
    Ok(curves)
}

/// Requests that the queue holds, of 16 kB each: the prefill endpoints are busy with one that does not end.
pub async fn held(bench: &Bench<'_>) -> Result<Curves> {
    let mut curves = Curves::new("held", "held requests of 16 kB");
    // A listener that accepts nobody: the first legs stay there for ever.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let mut options = Options::of(Kind::TwoLegs);
    options.filter = json!({
        "pools": {"default": {"prefill_timeout_ms": 600_000, "queue": {
            "enabled": true, "lead_ms": 1, "max_wait_ms": 600_000, "max_requests": 10_000, "max_bytes": 1_000_000_000_u64,
        }}},
        "endpoints": [
            {"address": silent.local_addr()?, "role": "prefill"},
            {"address": bench.engines.endpoints(2).1[1], "role": "decode"},
        ],
    });
    let mut config = rig::config(bench.args, &bench.engines, &options)?;
    config.set_engines(&[silent.local_addr()?, bench.engines.endpoints(2).1[1]]);
    let envoy = Envoy::start(&bench.args.envoy, &config, &bench.args.out.join("held"), 1).await?;
    let mut open = Open::new();
    for count in [100, 1_000, 2_500, 5_000] {
        open.requests(envoy.gateway, count, 16_000, bench.marks(count as u64)).await?;
        tokio::time::sleep(SETTLE).await;
        let before = process::usage(envoy.pid())?.cpu;
        tokio::time::sleep(SETTLE).await;
        let cpu = process::usage(envoy.pid())?.cpu.saturating_sub(before);
        let stats = get(envoy.admin, "/stats?filter=pd_waiting_requests").await.and_then(Answer::ok)?.text();
        let waiting = stats.lines().find_map(|line| line.rsplit_once(": ")?.1.parse::<usize>().ok()).unwrap_or(0);
        ensure!(waiting * 10 >= count * 9, "{waiting} of {count} requests wait");
        curves.add("waiting", count as f64, waiting as f64);
        curves.add("MiB", count as f64, resident_mb(&envoy)?);
        curves.add("% of a core", count as f64, share(cpu, SETTLE));
        curves.row(count as f64);
    }
    Ok(curves)
}

/// A connection for each request, beside connections that stay.
pub async fn churn(bench: &Bench<'_>) -> Result<Curves> {
    let mut curves = Curves::new("churn", "requests per connection");
    let envoys = bench.start("churn", &ALL, |_| {}).await?;
    let kept = bench.cpu(&envoys, 4_000, 16).await?;
    let time = Duration::from_secs_f64(bench.args.seconds);
    for ((kind, envoy), kept) in ALL.iter().zip(&envoys).zip(kept) {
        let mut each = Sample::default();
        for _ in 0..bench.args.rounds {
            let before = process::usage(envoy.pid())?.cpu;
            let requests = load::new_connections(envoy.gateway, 16, time, bench.marks(1 << 30)).await?;
            let cpu = process::usage(envoy.pid())?.cpu.saturating_sub(before);
            each.push(cpu.as_secs_f64() * 1e6 / requests as f64);
        }
        let name = format!("CPU µs/request, {}", kind.name());
        curves.add(&name, 1.0, each.median());
        curves.add(&name, 1_000.0, kept);
    }
    curves.row(1.0);
    curves.row(1_000.0);
    Ok(curves)
}

/// Changes of a list of 1,000 endpoints each second, from a real pd-control.
pub async fn list(bench: &Bench<'_>) -> Result<Curves> {
    const ENDPOINTS: usize = 1_000;
    let mut curves = Curves::new("list", "changes of the list each second");
    let (file, control) = Control::start(bench, ENDPOINTS).await?;
    let edit = |options: &mut Options| (options.endpoints, options.control) = (ENDPOINTS, Some(control.address));
    let envoys = bench.start("list", &[Kind::TwoLegs], edit).await?;
    let envoy = envoys.first().context("an Envoy")?;
    for changes in [0, 1, 10] {
        let changing = async {
            if changes == 0 {
                return std::future::pending::<Result<()>>().await;
            }
            for change in 1.. {
                replace(&file, &list_file(bench, ENDPOINTS, change))?;
                tokio::time::sleep(Duration::from_secs(1) / changes).await;
            }
            Ok(())
        };
        let control_before = process::usage(control.process.pid())?.cpu;
        let time = Duration::from_secs_f64(bench.args.seconds * bench.args.rounds as f64);
        let (cpu, outcome) = tokio::select! {
            done = bench.closed(envoy, 16_000, 16, Until::Elapsed(time)) => done?,
            Err(error) = changing => return Err(error),
        };
        let control_cpu = process::usage(control.process.pid())?.cpu.saturating_sub(control_before);
        curves.add("CPU µs/request", f64::from(changes), cpu);
        curves.add("p99 ms", f64::from(changes), percentile(&outcome.latencies, 0.99) as f64 / 1e6);
        curves.add("pd-control, % of a core", f64::from(changes), share(control_cpu, time));
        curves.row(f64::from(changes));
    }
    Ok(curves)
}

/// Envoys at one pd-control, each with one worker.
pub async fn envoys(bench: &Bench<'_>) -> Result<Curves> {
    const ENDPOINTS: usize = 100;
    let mut curves = Curves::new("envoys", "Envoys");
    let (_, control) = Control::start(bench, ENDPOINTS).await?;
    let mut running: Vec<Envoy> = Vec::new();
    for count in [1, 4, 16, 64] {
        while running.len() < count {
            let mut options = Options::of(Kind::TwoLegs);
            (options.endpoints, options.control) = (ENDPOINTS, Some(control.address));
            let name = format!("envoys-{}", running.len());
            running.push(rig::start(bench.args, &bench.engines, &name, &options).await?);
        }
        tokio::time::sleep(SETTLE).await;
        let before = process::usage(control.process.pid())?.cpu;
        let (mut busy, mut idle) = (Sample::default(), Sample::default());
        let all_before: Vec<_> = running.iter().map(|envoy| process::usage(envoy.pid())).collect();
        let begun = Instant::now();
        let time = Duration::from_secs(4);
        // One of them has work: 100 requests each second.
        let loaded = running.first().context("an Envoy")?;
        let mut mark = bench.marks(1_000);
        let latencies = load::at_rate(loaded.gateway, 4_000, 100.0, time, &mut mark).await?;
        for (index, (envoy, before)) in running.iter().zip(all_before).enumerate() {
            let cpu = process::usage(envoy.pid())?.cpu.saturating_sub(before?.cpu);
            if index == 0 { &mut busy } else { &mut idle }.push(share(cpu, begun.elapsed()));
        }
        let control_cpu = process::usage(control.process.pid())?.cpu.saturating_sub(before);
        curves.add("pd-control, % of a core", count as f64, share(control_cpu, begun.elapsed()));
        curves.add("pd-control, MiB", count as f64, process::resident_kb(control.process.pid())? as f64 / 1_024.0);
        curves.add("Envoy with 100 requests/s, % of a core", count as f64, busy.median());
        curves.add("Envoy without requests, % of a core", count as f64, idle.median());
        curves.add("p50 ms", count as f64, percentile(&latencies, 0.5) as f64 / 1e6);
        curves.row(count as f64);
    }
    Ok(curves)
}

/// Prompts of 400 kB (100,000 tokens) at a growing rate, both legs, 100 endpoints, one worker.
pub async fn long(bench: &Bench<'_>) -> Result<Curves> {
    let mut curves = Curves::new("long", "requests of 400 kB each second");
    let envoys = bench.start("long", &TWO, |options| options.endpoints = 100).await?;
    for rate in [25.0, 50.0, 100.0] {
        for (kind, envoy) in TWO.iter().zip(&envoys) {
            let time = Duration::from_secs_f64(bench.args.seconds * bench.args.rounds as f64);
            let mut mark = bench.marks(100_000);
            load::at_rate(envoy.gateway, 400_000, rate, time / 4, &mut mark).await?;
            let before = process::usage(envoy.pid())?.cpu;
            let begun = Instant::now();
            let latencies = load::at_rate(envoy.gateway, 400_000, rate, time, &mut mark).await?;
            let cpu = process::usage(envoy.pid())?.cpu.saturating_sub(before);
            let name = kind.name();
            curves.add(&format!("% of a core, {name}"), rate, share(cpu, begun.elapsed()));
            curves.add(&format!("p50 ms, {name}"), rate, percentile(&latencies, 0.5) as f64 / 1e6);
            curves.add(&format!("p99 ms, {name}"), rate, percentile(&latencies, 0.99) as f64 / 1e6);
            curves.add(&format!("MiB, {name}"), rate, resident_mb(envoy)?);
        }
        curves.row(rate);
    }
    Ok(curves)
}

/// Time from Envoy's start to the first answer, memory at rest, and the first requests after a new configuration.
pub async fn start(bench: &Bench<'_>) -> Result<Curves> {
    let mut curves = Curves::new("start", "workers");
    for workers in [1, 4] {
        for kind in TWO {
            let (mut first, mut rest) = (Sample::default(), Sample::default());
            for _ in 0..bench.args.rounds {
                let begun = Instant::now();
                let envoys = bench.start("start", &[kind], |options| options.workers = workers).await?;
                let envoy = envoys.first().context("an Envoy")?;
                bench.closed(envoy, 200, 1, Until::Requests(1)).await?;
                first.push(begun.elapsed().as_secs_f64() * 1e3);
                tokio::time::sleep(SETTLE / 4).await;
                rest.push(resident_mb(envoy)?);
            }
            curves.add(&format!("ms to the first answer, {}", kind.name()), f64::from(workers), first.median());
            curves.add(&format!("MiB at rest, {}", kind.name()), f64::from(workers), rest.median());
        }
        curves.row(f64::from(workers));
    }
    Ok(curves)
}

/// The requests right after a new configuration of the filter, beside those before it.
pub async fn reconfigured(bench: &Bench<'_>) -> Result<Curves> {
    const REQUESTS: u64 = 20;
    let mut curves = Curves::new("reconfigured", "new configurations so far");
    let directory = bench.args.out.join("reconfigured");
    std::fs::create_dir_all(&directory)?;
    let file = directory.join("listeners.json");
    let ports = [Port::reserve(), Port::reserve()];
    let listeners = |block_bytes: u32| -> Result<(String, pd_support::config::Config)> {
        let mut options = Options::of(Kind::TwoLegs);
        options.filter = json!({"prefix": {"block_bytes": block_bytes}});
        let mut config = rig::config(bench.args, &bench.engines, &options)?;
        config.set_listener(ports[0].address());
        config.set_admin(ports[1].address());
        let text = config.listener_file();
        config.set_lds(&file);
        Ok((text, config))
    };
    let (text, config) = listeners(512)?;
    replace(&file, &text)?;
    let path = directory.join("envoy.json");
    std::fs::write(&path, config.root.to_string())?;
    let arguments =
        ["-c", &path.display().to_string(), "--concurrency", "1", "--log-level", "warning", "--disable-hot-restart"]
            .map(str::to_owned);
    let envoy = Process::start("envoy", &directory, &bench.args.envoy, &arguments);
    ready(&envoy, ports[1].address(), "/ready", PATIENCE).await?;
    let step = [Template::chat(4_000, Sharing::None, false, "")];
    let ask = async |count: u64| -> Result<f64> {
        let outcome = client::run(ports[0].address(), &step, 1, Until::Requests(count), &bench.mark).await?;
        Ok(percentile(&outcome.latencies, 0.5) as f64 / 1e3)
    };
    ask(500).await?;
    for change in 1..=bench.args.rounds as u32 {
        let warm = ask(REQUESTS).await?;
        replace(&file, &listeners(512 + 64 * change)?.0)?;
        until_updated(ports[1].address(), u64::from(change) + 1).await?;
        let new = ask(REQUESTS).await?;
        curves.add("p50 µs of 20 before", f64::from(change), warm);
        curves.add("p50 µs of 20 after", f64::from(change), new);
        curves.add("after ÷ before", f64::from(change), new / warm);
        curves.row(f64::from(change));
    }
    Ok(curves)
}

async fn until_updated(admin: std::net::SocketAddr, updates: u64) -> Result<()> {
    let begun = Instant::now();
    loop {
        let stats = get(admin, "/stats?filter=listener_manager.lds.update_success|total_listeners_warming").await;
        let text = stats.and_then(Answer::ok)?.text();
        let value = |name: &str| -> Option<u64> {
            text.lines().find(|line| line.contains(name))?.rsplit_once(": ")?.1.trim().parse().ok()
        };
        if value("update_success") >= Some(updates) && value("warming") == Some(0) {
            return Ok(());
        }
        ensure!(begun.elapsed() < PATIENCE, "Envoy took no new listener:\n{text}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A running pd-control that reads a file.
struct Control {
    process: Process,
    address: std::net::SocketAddr,
    _port: Port,
}

impl Control {
    async fn start(bench: &Bench<'_>, endpoints: usize) -> Result<(std::path::PathBuf, Self)> {
        let directory: &Path = &bench.args.out.join("control");
        std::fs::create_dir_all(directory)?;
        let file = directory.join("endpoints.json");
        replace(&file, &list_file(bench, endpoints, 0))?;
        let port = Port::reserve();
        let address = port.address();
        let arguments = [
            format!("--endpoints={}", file.display()),
            format!("--listen={address}"),
            "--scrape-interval=0".to_owned(),
            "--log-level=warn".to_owned(),
        ];
        let process = Process::start("pd-control", directory, &places::control(), &arguments);
        ready(&process, address, "/readyz", PATIENCE).await?;
        Ok((file, Self { process, address, _port: port }))
    }
}

/// The endpoints file; the first endpoint's weight counts the changes.
fn list_file(bench: &Bench<'_>, count: usize, change: u32) -> String {
    let (mut list, _) = bench.engines.endpoints(count);
    if let Some(first) = list.first_mut() {
        first["weight"] = json!(1.0 + f64::from(change) / 100.0);
    }
    json!({"endpoints": list}).to_string()
}

fn share(cpu: Duration, of: Duration) -> f64 {
    100.0 * cpu.as_secs_f64() / of.as_secs_f64()
}
