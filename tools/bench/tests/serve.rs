//! `pd-bench-serve` against simulators whose times are known.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output};

use pd_bench::serve::COLUMNS;
use pd_sim::{Config, Role};

fn bench(server: SocketAddr, out: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pd-bench-serve"));
    command.args(["--url", &format!("http://{server}/v1")]).arg("--out").arg(out).args(arguments);
    command.output().unwrap()
}

fn rows(out: &Path) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(out.join("serve.csv")).unwrap();
    text.lines().map(|line| line.split(',').map(str::to_owned).collect()).collect()
}

fn number(row: &[String], column: &str) -> f64 {
    let index = COLUMNS.iter().position(|name| *name == column).unwrap();
    row[index].parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_figures_are_those_of_the_server() {
    let speed = 0.2;
    let engine = pd_sim::start(Config { speed, ..Config::of(Role::Both) }).await.unwrap();
    let out = tempfile::tempdir().unwrap();
    let (server, folder) = (engine.addr(), out.path().to_owned());
    let arguments = ["--concurrency", "2,8", "--rounds", "2", "--input-tokens", "500", "--output-tokens", "40"];
    let done = tokio::task::spawn_blocking(move || bench(server, &folder, &arguments)).await.unwrap();
    let said = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
    assert!(said.contains("output tok/s"), "{said}");
    let rows = rows(out.path());
    assert_eq!(rows[0], COLUMNS);
    assert_eq!(rows.len(), 3);
    for (row, streams) in rows[1..].iter().zip([2.0, 8.0]) {
        assert_eq!((number(row, "concurrency"), number(row, "requests")), (streams, 2.0 * streams));
        assert_eq!((number(row, "output_tokens"), number(row, "failures")), (2.0 * streams * 40.0, 0.0));
        assert!((400.0..=700.0).contains(&number(row, "input_tokens")), "{row:?}");
        // The simulator's own times, and what a busy machine adds.
        assert!(number(row, "ttft_ms_p50") >= 1.0 && number(row, "tpot_ms_p50") >= 0.5, "{row:?}");
        let per_token = number(row, "tpot_ms_mean") * 39.0 + number(row, "ttft_ms_mean");
        let whole = number(row, "seconds") * 1_000.0 / 2.0;
        assert!(per_token <= whole * 1.05, "an answer takes {per_token} ms, a round {whole} ms");
    }
    let plot = std::fs::read_to_string(out.path().join("serve.svg")).unwrap();
    assert!(plot.contains("TTFT") && plot.contains("ITL"));
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_fail_are_counted_and_the_exit_code_says_so() {
    let engine = pd_sim::start(Config::of(Role::Both)).await.unwrap();
    let out = tempfile::tempdir().unwrap();
    let (server, folder) = (engine.addr(), out.path().to_owned());
    let arguments = ["--model", "no-such-model", "--concurrency", "1", "--output-tokens", "4"];
    let done = tokio::task::spawn_blocking(move || bench(server, &folder, &arguments)).await.unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(!done.status.success() && said.contains("status 404"), "{said}");
}
