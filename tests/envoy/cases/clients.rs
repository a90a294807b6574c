//! Real clients: what the packages of OpenAI, Anthropic and LiteLLM make of an answer is the same through the gateway as
//! from the engine itself. `tests/clients/install.sh` installs them.

use std::path::{Path, PathBuf};
use std::process::Command;

use pd_sim::Role;
use pd_tests::rig::{Rig, run};
use serde_json::{Map, Value};

use crate::support::sum;

/// Folder of the installed clients, where this one is there.
fn installed(client: &str) -> Option<PathBuf> {
    let folder = PathBuf::from(std::env::var_os("PD_CLIENTS")?);
    folder.join(client).join("complete").exists().then_some(folder)
}

/// Sends every request of the corpus to an engine and through the gateway, and compares.
fn compare(client: &str, fewest: usize, command: impl FnOnce(&Path, &Path) -> Command) {
    let Some(clients) = installed(client) else {
        eprintln!("NOT TESTED without PD_CLIENTS (tests/clients/install.sh): requests of the {client} clients");
        return;
    };
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../clients");
    let mut command = command(&clients, &corpus);
    run(async {
        let engine = pd_sim::start(pd_sim::Config::of(Role::Both)).await.unwrap();
        let rig = Rig::start().await;
        command.arg(format!("http://{}", engine.addr())).arg(format!("http://{}", rig.address()));
        command.env("CLIENTS", &clients).env("NO_PROXY", "127.0.0.1").env("no_proxy", "127.0.0.1");
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        let report: Map<String, Value> = serde_json::from_slice(&output.stdout).unwrap();
        assert!(report.len() >= fewest, "{} cases", report.len());
        for (case, answers) in &report {
            let is_error = answers["engine"].get("error").is_some_and(Value::is_string);
            assert!(!is_error, "{case}: {}", answers["engine"]);
            assert_eq!(answers["gateway"], answers["engine"], "{case}");
        }
        assert!(sum(&rig.prefill, |stats| stats.prefill_legs) > 1, "some of them are split");
        rig.until_idle().await;
    });
}

#[test]
fn python_clients_see_the_engines_answers() {
    compare("python", 97, |clients, corpus| {
        let mut command = Command::new(clients.join("python/bin/python"));
        command.arg("-I").arg(corpus.join("corpus.py"));
        command
    });
}

#[test]
fn node_clients_see_the_engines_answers() {
    compare("node", 55, |_, corpus| {
        let mut command = Command::new("node");
        command.arg(corpus.join("corpus.mjs"));
        command
    });
}
