//! What several tests look at.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::Bytes;
use http::Request;
use pd_sim::{Handle, Recorded, Stats, expected_text};
use pd_support::body::{CHAT, chat, words};
use pd_support::client::{Answer, Body, Client};
use pd_support::places;
use pd_support::process::{self, Process};
use pd_support::wait::PATIENCE;
use pd_tests::answer::text;

/// A prompt that no request had before, of 4 kB: long enough to be split.
pub fn new_prompt() -> String {
    words(&new_id("prompt"), 4_000)
}

/// A name that nothing had before.
pub fn new_id(kind: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    format!("{kind}-{}", COUNT.fetch_add(1, Relaxed))
}

/// A new chat that will be split.
pub fn long_chat() -> String {
    chat(&[&new_prompt()], r#","max_tokens":8"#)
}

/// A chat that the decode engine serves whole.
pub fn short_chat() -> String {
    chat(&[&new_id("hello")], r#","max_tokens":8"#)
}

/// Checks that an answer is right.
#[track_caller]
pub fn assert_right(answer: &Answer, body: &str) {
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(text(&answer.body), expected_text("sim", body));
}

/// Sends a chat and checks the answer.
pub async fn ask(client: &mut Client, body: &str) {
    let answer = client.post(CHAT, body.to_owned()).await;
    assert_right(&answer, body);
}

/// A chat on a path that no other request has, by which the access log names it.
pub fn logged_chat(client: &Client, body: &str, headers: &[(&str, &[u8])]) -> (Request<Body>, String) {
    logged(client, CHAT, body.to_owned(), headers)
}

/// As [`logged_chat`], of any API.
pub fn logged(client: &Client, api: &str, body: String, headers: &[(&str, &[u8])]) -> (Request<Body>, String) {
    let path = format!("{api}?{}", new_id("request"));
    (client.json(&path, body, headers), path)
}

/// A decode engine in a process of its own, which can be stopped, killed and started again.
pub async fn decode_process(directory: &Path, address: SocketAddr) -> Process {
    engine_process("decode", directory, address).await
}

/// As [`decode_process`], of a role.
pub async fn engine_process(role: &str, directory: &Path, address: SocketAddr) -> Process {
    let program = places::control().with_file_name("pd-sim");
    let arguments = ["--role", role, "--listen", &address.to_string(), "--speed", "0.1"];
    let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    let process = Process::start("pd-sim", directory, &program, &arguments);
    process::ready(&process, address, "/health", PATIENCE).await.expect("a simulator");
    process
}

/// A count, over several engines.
pub fn sum<'a>(engines: impl IntoIterator<Item = &'a Handle>, count: impl Fn(&Stats) -> u64) -> u64 {
    engines.into_iter().map(|engine| count(&engine.stats())).sum()
}

/// Requests that several engines got.
pub fn recorded<'a>(engines: impl IntoIterator<Item = &'a Handle>) -> Vec<Recorded> {
    engines.into_iter().flat_map(Handle::requests).collect()
}

/// The only request that several engines got.
#[track_caller]
pub fn only<'a>(engines: impl IntoIterator<Item = &'a Handle>) -> Recorded {
    let [request] = <[Recorded; 1]>::try_from(recorded(engines)).unwrap_or_else(|all| panic!("not one: {all:#?}"));
    request
}

/// Checks that a decode leg's body is the client's, but for parameters in front, and returns those.
#[track_caller]
pub fn spliced(sent: &str, got: &Bytes) -> String {
    let got = std::str::from_utf8(got).expect("UTF-8");
    let members = sent.strip_prefix('{').expect("an object");
    let front = got.strip_suffix(members).unwrap_or_else(|| panic!("other bytes:\n{sent}\n{got}"));
    let params = front.strip_prefix(r#"{"kv_transfer_params":"#).and_then(|rest| rest.strip_suffix(','));
    params.unwrap_or_else(|| panic!("not spliced: {front}")).to_owned()
}

/// Checks that an answer is an error of the filter's own, for OpenAI clients.
#[track_caller]
pub fn assert_rejected(answer: &Answer, status: u16, reason: &str) {
    assert_eq!((answer.status, answer.reason()), (status, Some(reason)), "{}", answer.text());
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let error = &answer.json()["error"];
    assert_eq!(error["code"], reason, "{}", answer.text());
    assert!(error["message"].is_string() && error["type"].is_string(), "{}", answer.text());
    assert_eq!(answer.header("retry-after").is_some(), status == 503);
}
