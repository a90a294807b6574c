//! `make run ENGINE=vllm`.

use std::net::SocketAddr;
use std::time::Duration;

use pd_support::admin::Admin;
use pd_support::places::{envoy, root};
use pd_support::port::is_free;
use pd_support::process::{Process, tree};

use crate::servers::{Connector, START_LIMIT, gone, prompt_tokens, within};

/// Ports of a run, before its offset.
const PORTS: [u16; 7] = [5600, 5700, 8080, 8100, 8200, 9000, 9901];
/// How long the end may take: five seconds for each process, then it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// The printed command is split between two vLLM servers, and the launcher's end is theirs, also when it is killed.
pub async fn runs_a_pair(signal: &str) {
    let offset = (1..400).map(|i| i * 100 + 7).find(|offset| are_free(*offset)).expect("free ports");
    let directory = crate::directory("run");
    let mut arguments = vec!["--vllm".to_owned(), format!("--port-offset={offset}")];
    arguments.push(format!("--directory={}", directory.display()));
    arguments.push(format!("--envoy={}", envoy().display()));
    println!("vllm: starting the launcher");
    let launcher = Process::start("pd-run", &directory, &root().join("target/debug/pd-run"), &arguments);
    within(START_LIMIT, "the launcher is ready", async || {
        assert!(launcher.is_running(), "the launcher has ended: {}", launcher.log());
        launcher.out().contains("Ctrl-C").then_some(())
    })
    .await;
    let out = launcher.out();
    let (_, command) = out.split_once("\n  curl ").expect("a command");
    let (command, _) = command.split_once("\n\n").expect("its end");
    let answer = std::process::Command::new("bash").args(["-c", &format!("curl {command}")]).output().expect("bash");
    assert!(String::from_utf8_lossy(&answer.stdout).contains("\"finish_reason\":"), "{answer:?}");
    let line = within(STOP_LIMIT, "the access log", async || {
        launcher.out().lines().find(|line| line.contains("\"decision\":\"split\",\"decode\"")).map(str::to_owned)
    });
    let line = line.await;
    assert!(line.contains("\"reason\":\"prefilled\"") && line.contains("\"status\":200"), "{line}");
    let decode = SocketAddr::from(([127, 0, 0, 1], 8200 + offset));
    let moved = prompt_tokens(&Admin { address: decode }, "external_kv_transfer").await;
    assert!(moved > 2_000, "{moved} tokens moved");

    let processes = tree(launcher.pid());
    assert!(processes.len() > 5, "{processes:?}");
    launcher.signal(signal);
    within(STOP_LIMIT, "the launcher ends", async || (!launcher.is_running()).then_some(())).await;
    gone(&processes).await;
    assert!(are_free(offset), "a port is still taken");
    println!(
        "vllm: {:?} by the launcher: split, {moved} tokens moved, nothing left after SIG{signal}",
        Connector::Pull
    );
}

fn are_free(offset: u16) -> bool {
    PORTS.iter().all(|port| is_free(port + offset))
}
