//! `pd-explain`: why pd-core would send a request where it would, from the same code as in Envoy.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use pd_core::config::EXPLAIN_HEADER;
use pd_core::headers::Headers;
use pd_core::request::{EXPLAIN, Effect, PrefillAnswer, Request};
use pd_core::time::Monotonic;
use pd_core::workers::worker::Worker;

/// Explains to which endpoints pd-core would send requests.
///
/// Each request ends before the next one starts, so a request finds the cached prefixes of earlier ones.
#[derive(Clone, Debug, Parser)]
#[command(name = "pd-explain", version, max_term_width = 120)]
struct Args {
    /// Plugin configuration with endpoints, as JSON [default: four prefill and four decode endpoints]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Path of the requests
    #[arg(long, default_value = "/v1/chat/completions")]
    path: String,
    /// Request bodies
    #[arg(required = true)]
    bodies: Vec<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pd-explain: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn config(args: &Args) -> Result<Vec<u8>> {
    let mut config = match &args.config {
        Some(path) => {
            let text = std::fs::read(path).with_context(|| path.display().to_string())?;
            serde_json::from_slice(&text).with_context(|| path.display().to_string())?
        }
        None => {
            let endpoint = |i: u8| {
                let role = if i < 4 { "prefill" } else { "decode" };
                let address = SocketAddr::from((Ipv4Addr::new(10, 0, 0, 1 + i), 8_000)).to_string();
                serde_json::json!({"address": address, "role": role})
            };
            serde_json::json!({"endpoints": (0..8).map(endpoint).collect::<Vec<_>>()})
        }
    };
    config["trusted_headers"] = serde_json::json!([EXPLAIN_HEADER]);
    Ok(config.to_string().into_bytes())
}

fn run(args: &Args) -> Result<()> {
    let mut worker = Worker::default();
    worker.configure(&config(args)?).context("plugin configuration")?;
    let mut now = Monotonic::ZERO;
    for path in &args.bodies {
        let body = std::fs::read(path).with_context(|| path.display().to_string())?;
        now += Duration::from_secs(1);
        println!("{}: {}", path.display(), explain(&mut worker, &args.path, &body, now)?.replace("; ", "\n  "));
    }
    Ok(())
}

/// Lets a request through from begin to end; what is said of its way.
fn explain(worker: &mut Worker, path: &str, body: &[u8], now: Monotonic) -> Result<String> {
    let headers = [(":method", "POST"), (":path", path), (":authority", "gateway"), (EXPLAIN_HEADER, "1")];
    let mut request = Request::default();
    let mut effects = request.headers(worker, Headers::from_pairs(headers), false, now).effects;
    ensure!(request.wants_body(), "{path} is none of the paths whose requests are routed by their body");
    effects.extend(request.body(worker, body, now).effects);
    if request.is_prefilling() {
        let answer = PrefillAnswer::Answered { status: 200, content_type: None, body: b"{}" };
        effects.extend(request.prefill_answer(worker, answer, || None::<Vec<u8>>, now).effects);
    }
    request.done(worker, now);
    let explained = effects.iter().find_map(|effect| match effect {
        Effect::SetState(EXPLAIN, text) => Some(String::from_utf8_lossy(text).into_owned()),
        Effect::Reply(reply) => Some(format!("{} {}", reply.status, String::from_utf8_lossy(&reply.body))),
        _ => None,
    });
    explained.context("nothing was said")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_turn_is_explained_by_the_first() {
        let args = Args { config: None, path: String::new(), bodies: Vec::new() };
        let mut worker = Worker::default();
        worker.configure(&config(&args).unwrap()).unwrap();
        let body = |turns: usize| {
            let text = format!("{}{}", "word ".repeat(2_000), "more ".repeat(turns * 800));
            format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{text}"}}]}}"#)
        };
        let mut say = |turns, path| explain(&mut worker, path, body(turns).as_bytes(), Monotonic::from_millis(5_000));
        let chat = "/v1/chat/completions";
        let (first, second) = (say(0, chat).unwrap(), say(1, chat).unwrap());
        assert!(first.starts_with("split") && !first.contains("match=2"), "{first}");
        let chosen = second.split(';').nth(2).unwrap();
        assert!(second.starts_with("split") && chosen.contains("match=24"), "{second}");
        assert!(say(0, "/v1/models").is_err());
    }
}
