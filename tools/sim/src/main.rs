//! Command line of the engine simulator.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use pd_sim::{Config, Engine, Fault, Role};

/// An engine server without an engine: vLLM's API, prefix cache, KV hand-over and timing, and faults on demand.
///
/// GET /stats returns its counters, GET /requests the requests that it got. POST /fault sets faults (a list as text).
#[derive(Parser)]
#[command(name = "pd-sim", version, max_term_width = 120)]
struct Args {
    /// Address of the API
    #[arg(long, default_value = "127.0.0.1:8100", value_parser = address)]
    listen: SocketAddr,
    /// Revision of engine and model. Servers of different revisions refuse each other's KV caches, as vLLM does by its
    /// compatibility hash [default: none, compared with no revision]
    #[arg(long)]
    revision: Option<String>,
    /// API key that requests below /v1 and /inference must carry as a bearer token
    #[arg(long)]
    api_key: Option<String>,
    /// Address from which other simulators fetch KV [default: a free port at the IP of --listen]
    #[arg(long)]
    side_channel: Option<SocketAddr>,
    /// Role of the server (it accepts every kind of request, as vLLM does)
    #[arg(long, value_enum, default_value = "both")]
    role: Role,
    /// Engine and connector
    #[arg(long, value_enum, default_value = "vllm-nixl")]
    engine: Engine,
    /// Model it serves (repeatable)
    #[arg(long = "model", default_value = "sim")]
    models: Vec<String>,
    /// LoRA adapter of the first model (repeatable)
    #[arg(long = "lora")]
    loras: Vec<String>,
    /// Factor on every simulated time: 1 real, 0.1 ten times faster, 0 at once
    #[arg(long, default_value_t = 1.0)]
    speed: f64,
    /// Prefill: milliseconds per request
    #[arg(long, default_value_t = 15.0)]
    a_ms: f64,
    /// Prefill: microseconds per uncached token
    #[arg(long, default_value_t = 25.0)]
    b_us: f64,
    /// Prefill: nanoseconds per token², on n² − p² for n prompt tokens with p cached
    #[arg(long, default_value_t = 0.524)]
    c_ns: f64,
    /// Decode: milliseconds per token
    #[arg(long, default_value_t = 8.0)]
    tpot_ms: f64,
    /// Decode: microseconds that each other decoding request adds to a token
    #[arg(long, default_value_t = 100.0)]
    tpot_batch_us: f64,
    /// KV transfer: milliseconds per request
    #[arg(long, default_value_t = 2.0)]
    transfer_ms: f64,
    /// KV transfer: microseconds per token
    #[arg(long, default_value_t = 2.5)]
    transfer_us: f64,
    /// Tokens that the KV cache holds
    #[arg(long, default_value_t = 2_000_000)]
    cache_tokens: u64,
    /// Tokens of a KV block
    #[arg(long, default_value_t = 16)]
    block_tokens: u32,
    /// Seconds that the KV of a prefill leg waits for its decode leg
    #[arg(long, default_value_t = 30.0)]
    lease_s: f64,
    /// Longest prompt plus output, in tokens
    #[arg(long, default_value_t = 131_072)]
    max_model_len: u64,
    /// Requests that run at once; more wait
    #[arg(long, default_value_t = 256)]
    max_num_seqs: usize,
    /// Directory that vllm-shared servers share
    #[arg(long)]
    shared_dir: Option<PathBuf>,
    /// Fault, as [role:]kind[=arg][:probability][*count][@path] (repeatable); kinds: delay=MS, refuse=MS, reset, 400 to
    /// 599, hang, die=TOKENS, error_event=TOKENS, exit,
    /// malformed_params=missing|null|string|no_request_id|null_blocks|truncated, recompute, stall=ms
    #[arg(long = "fault", value_parser = |spec: &str| spec.parse::<Fault>())]
    faults: Vec<Fault>,
    /// Seed of the faults' probabilities
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Seconds after which the server closes a connection without a request, as uvicorn does after 5 [default: never]
    #[arg(long)]
    keep_alive_s: Option<f64>,
    /// Accept KV parameters that a gateway parsed and wrote again, as vLLM does; by default they must be byte for byte
    #[arg(long)]
    rebuilt_params: bool,
    /// Requests kept for GET /requests
    #[arg(long, value_name = "N", default_value_t = 0)]
    record: usize,
}

/// An address; the last colon of an IPv6 address without brackets stands before the port, as in Kubernetes'
/// `$(POD_IP):8000`.
fn address(text: &str) -> Result<SocketAddr, String> {
    let parsed = text.parse::<SocketAddr>().ok().or_else(|| {
        let (ip, port) = text.rsplit_once(':')?;
        Some(SocketAddr::new(ip.parse().ok()?, port.parse().ok()?))
    });
    parsed.ok_or_else(|| "must be IP:PORT".to_owned())
}

impl Args {
    fn into_config(self) -> Result<Config, String> {
        let lease = Duration::try_from_secs_f64(self.lease_s)
            .ok()
            .filter(|lease| lease.as_secs() <= 86_400)
            .ok_or("--lease-s must be between 0 and 86400")?;
        let keep_alive = self.keep_alive_s.map(Duration::try_from_secs_f64).transpose();
        let keep_alive = keep_alive.map_err(|error| format!("--keep-alive-s: {error}"))?;
        Ok(Config {
            listen: self.listen,
            revision: self.revision,
            api_key: self.api_key,
            side_channel: self.side_channel,
            role: self.role,
            engine: self.engine,
            models: self.models,
            loras: self.loras,
            speed: self.speed,
            a_ms: self.a_ms,
            b_us: self.b_us,
            c_ns: self.c_ns,
            tpot_ms: self.tpot_ms,
            tpot_batch_us: self.tpot_batch_us,
            transfer_ms: self.transfer_ms,
            transfer_us: self.transfer_us,
            cache_tokens: self.cache_tokens,
            block_tokens: self.block_tokens,
            lease,
            max_model_len: self.max_model_len,
            max_num_seqs: self.max_num_seqs,
            shared_dir: self.shared_dir,
            faults: self.faults,
            seed: self.seed,
            record: self.record,
            keep_alive,
            rebuilt_params: self.rebuilt_params,
            computed: None,
            ..Config::default()
        })
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("pd-sim: {why}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<(), String> {
    let config = args.into_config()?;
    let (role, engine) = (config.role.name(), config.engine.name());
    let handle = pd_sim::start(config).await.map_err(|error| error.to_string())?;
    // Nobody reads our output: no reason to stop serving.
    let _ = writeln!(std::io::stdout(), "pd-sim {role} listening on {} ({engine})", handle.addr());
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .map_err(|error| format!("cannot handle SIGTERM: {error}"))?;
    tokio::select! {
        () = handle.crashed() => Err(format!("{role} at {}: the engine died, as a real one would", handle.addr())),
        _ = terminate.recv() => Ok(()),
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}
