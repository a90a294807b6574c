//! What a request costs in the real module: WebAssembly instructions of each callback, exactly; and the time of the
//! callbacks that decide, among more and more endpoints, less the same among two. `cargo run -p pd-host --example cost`

use std::time::Duration;

use anyhow::{Context as _, Result};
use pd_host::{Module, ModuleOptions, Request, SharedStore, Stream, Worker, WorkerConfig};
use pd_support::places;

const ENDPOINTS: [usize; 5] = [2, 10, 100, 1_000, 10_000];
const PROMPT_BYTES: [usize; 3] = [4_000, 16_000, 220_000];
/// Rounds in which all are measured in turn.
const ROUNDS: usize = 15;
const REQUESTS: u32 = 64;
/// Callbacks that choose: the prefill endpoint, then the decode endpoint.
const CHOOSING: [&str; 2] = ["proxy_on_request_body", "proxy_on_http_call_response"];
const ANSWER: &[u8] = br#"{"id":"c","choices":[{"index":0,"message":{"role":"assistant","content":"a"},"finish_reason":"length"}],"kv_transfer_params":{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[1,2,3]],"remote_engine_id":"e","remote_request_id":"r","remote_host":"10.0.0.1","remote_port":5600}}"#;

fn main() -> Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| places::wasm_path().display().to_string());
    instructions(&path)?;
    let module = Module::load(&path).with_context(|| format!("{path}: run `make wasm`"))?;
    let workers = ENDPOINTS.map(|endpoints| worker(&module, endpoints));
    let workers = workers.into_iter().collect::<Result<Vec<_>>>()?;
    let mut times = vec![Vec::new(); workers.len()];
    // In the first round all prompts are new, and the code is cold.
    for round in 0..=ROUNDS {
        for (worker, times) in workers.iter().zip(&mut times) {
            let time = round_of(worker, 16_000)?;
            if round > 0 {
                times.push(time);
            }
        }
    }
    let medians: Vec<f64> = times.iter_mut().map(|times| median(times)).collect();
    println!("callbacks that choose both endpoints for a 16 kB prompt, in {path}, medians of {ROUNDS} rounds:");
    for (endpoints, us) in ENDPOINTS.iter().zip(&medians) {
        let more = us - medians.first().copied().unwrap_or_default();
        println!(
            "  {endpoints:>6} endpoints {us:>7.1} µs, {more:>+6.1} µs over those among two (target at 1,000: < 20)"
        );
    }
    let worker = workers.get(1).context("no worker")?;
    let mut sizes = Vec::new();
    for bytes in PROMPT_BYTES {
        round_of(worker, bytes)?;
        let mut times = (0..ROUNDS).map(|_| round_of(worker, bytes)).collect::<Result<Vec<_>>>()?;
        sizes.push((bytes as f64 * 1e-3, median(&mut times)));
    }
    if let [(small, small_us), .., (large, large_us)] = sizes[..] {
        println!(
            "scanning, hashing, lookup and both choices per kB of prompt: {:.2} µs (from {small:.0} to {large:.0} kB)",
            (large_us - small_us) / (large - small)
        );
    }
    Ok(())
}

/// A worker that knows so many endpoints, half of them prefill.
fn worker(module: &Module, endpoints: usize) -> Result<Worker> {
    let endpoint = |i: usize| {
        let role = if i.is_multiple_of(2) { "prefill" } else { "decode" };
        format!(r#"{{"address":"10.{}.{}.{}:8000","role":"{role}"}}"#, i >> 16, i >> 8 & 255, i & 255)
    };
    let list = (0..endpoints).map(endpoint).collect::<Vec<_>>().join(",");
    let plugin = format!(r#"{{"endpoints":[{list}],"pools":{{"default":{{"split":{{"mode":"always"}}}}}}}}"#);
    let config = WorkerConfig {
        vm_id: "pd".into(),
        root_id: "pd".into(),
        plugin_configuration: plugin.into(),
        clusters: vec!["engines".into()],
        route_headers: vec![("x-pd-destination".into(), "wasm.pd.destination".into())],
        ..WorkerConfig::default()
    };
    Worker::new(module, SharedStore::new(), config)
}

/// Mean microseconds per request of the callbacks that choose. The prompts are the same in every round.
fn round_of(worker: &Worker, bytes: usize) -> Result<f64> {
    worker.tick();
    worker.take_logs();
    worker.reset_counts();
    for id in 0..REQUESTS {
        let stream = send(worker, id, bytes);
        answer(worker, &stream)?;
        respond(&stream);
    }
    let times = worker.callback_times();
    let choosing = CHOOSING.iter().filter_map(|name| times.get(name));
    Ok(choosing.map(|time| time.total.as_secs_f64() * 1e6).sum::<f64>() / f64::from(REQUESTS))
}

/// Sends a request up to its prefill leg.
fn send(worker: &Worker, id: u32, bytes: usize) -> Stream {
    worker.clock().advance(Duration::from_millis(1));
    let words = format!("request {id} ");
    let prompt = words.repeat(bytes / words.len());
    let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{prompt}"}}],"max_tokens":64}}"#);
    Request::post("/v1/chat/completions", body).send(worker)
}

/// Answers the prefill leg; the decode leg begins.
fn answer(worker: &Worker, stream: &Stream) -> Result<()> {
    let leg = worker.callouts().into_iter().find(|call| call.cluster == "engines").context("no prefill leg")?;
    worker.answer(leg.token, [(":status", "200"), ("content-type", "application/json")], ANSWER)?;
    stream.forwarded().context("no decode leg").map(drop)
}

fn respond(stream: &Stream) {
    stream.response_headers([(":status", "200")], false);
    stream.response_body("{}", true);
}

/// Prints WebAssembly instructions of each part of a request.
fn instructions(path: &str) -> Result<()> {
    let bytes = std::fs::read(path).with_context(|| format!("{path}: run `make wasm`"))?;
    let module = Module::with_options(&bytes, ModuleOptions { fuel: true })?;
    println!("WebAssembly instructions of a split request, in {path}:");
    println!("  {:>8} {:>10} {:>10} {:>10} {:>10}", "prompt", "request", "hand-over", "answer", "sum");
    for bytes in [200, 4_000, 16_000, 220_000] {
        let worker = worker(&module, 4)?;
        let mut parts = [0; 3];
        for id in 0..2 * REQUESTS {
            if id == REQUESTS {
                parts = [0; 3];
            }
            let [requested, handed, answered] = &mut parts;
            worker.reset_counts();
            let stream = send(&worker, id, bytes);
            *requested += worker.fuel_used().unwrap_or_default();
            worker.reset_counts();
            answer(&worker, &stream)?;
            *handed += worker.fuel_used().unwrap_or_default();
            worker.reset_counts();
            respond(&stream);
            *answered += worker.fuel_used().unwrap_or_default();
            worker.take_logs();
        }
        let [requested, handed, answered] = parts.map(|part| part / u64::from(REQUESTS));
        let sum = requested + handed + answered;
        println!("  {bytes:>8} {requested:>10} {handed:>10} {answered:>10} {sum:>10}");
    }
    Ok(())
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or_default()
}
