//! A holder of the filters' token that means harm: it posts gigabytes, speaks for other Envoys, reads nothing.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use pd_control::access::token::Token;
use pd_core::endpoints::elsewhere::Totals;
use pd_core::envoys::message::{ExchangeRequest, ExchangeResponse, MAX_BLOCKS_BYTES, Record};
use pd_core::prefix::block_log::block_event;
use pd_core::prefix::hash::BlockHash;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::process::spawn_with;
use crate::support::*;

/// Memory limit of the container in the manifests.
const LIMIT_KIB: u64 = 256 << 10;
/// How long the attack lasts, and how many messages it has.
const ATTACK: Duration = Duration::from_secs(3);
const MESSAGES: u64 = 200;

/// A client on another host.
fn client_from(host: [u8; 4], address: SocketAddr, token: &'static str) -> HttpClient {
    let mut connector = HttpConnector::new();
    connector.set_local_address(Some(IpAddr::V4(host.into())));
    HttpClient { address, token: Some(token), client: Client::builder(TokioExecutor::new()).build(connector) }
}

fn one(gateway: u64, turn: u64, loads: Vec<(u64, Totals)>) -> ExchangeRequest {
    let record = Record { gateway, turn, loads, ..Record::default() };
    ExchangeRequest { from: gateway, records: vec![record], ..ExchangeRequest::default() }
}

async fn post(client: &HttpClient, message: &ExchangeRequest) -> (StatusCode, Option<ExchangeResponse>) {
    let sent = client.send("POST", "/v1/exchange", message.to_bytes());
    let answer = tokio::time::timeout(PATIENCE, sent).await.expect("an answer in time").unwrap();
    (answer.status(), ExchangeResponse::from_bytes(answer.body()))
}

/// A message as large as one may be, of an Envoy that is made up.
fn largest(gateway: u64) -> Vec<u8> {
    let totals = Totals { work: u64::MAX, tokens: u64::MAX, requests: u64::MAX, legs: u64::MAX };
    let event = block_event(gateway, &[]);
    let record = Record {
        gateway,
        turn: u64::MAX,
        replaces: gateway ^ 1,
        loads: (0..110_000).map(|endpoint| (endpoint ^ gateway << 20, totals)).collect(),
        blocks: event.repeat(MAX_BLOCKS_BYTES / event.len()),
        report: [br#"{"failing":["#.as_slice(), &br#""","#.repeat(20_000), br#"""]}"#].concat(),
        ..Record::default()
    };
    ExchangeRequest { from: gateway, wants: true, records: vec![record], ..ExchangeRequest::default() }.to_bytes()
}

async fn connect_from(host: [u8; 4], address: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from((Ipv4Addr::from(host), 0))).unwrap();
    socket.connect(address).await.unwrap()
}

/// Heads of a message that announces `length` bytes.
fn head(length: usize) -> String {
    format!(
        "POST /v1/exchange?wait_ms=5000 HTTP/1.1\r\nhost: pd\r\nauthorization: Bearer secret\r\ncontent-length: {length}\r\n\r\n"
    )
}

/// Highest resident memory so far, in KiB.
fn peak_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Posts the largest messages as fast as they are taken, each of another Envoy.
async fn post_gigabytes(address: SocketAddr, sent: Arc<AtomicU64>, is_over: Arc<AtomicBool>) {
    let mut body = largest(1_000);
    while !is_over.load(Relaxed) {
        let gateway = (sent.fetch_add(1, Relaxed) + 1_000).to_le_bytes();
        // The sender, and the Envoy of its record.
        for word in [1, 7] {
            body[word * 8..][..8].copy_from_slice(&gateway);
        }
        let mut stream = connect_from([127, 0, 0, 66], address).await;
        let post = async {
            stream.write_all(head(body.len()).as_bytes()).await?;
            stream.write_all(&body).await?;
            stream.read(&mut [0; 1_024]).await
        };
        // Whether it is refused or answered.
        let _ = tokio::time::timeout(Duration::from_secs(1), post).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gigabytes_of_messages_fit_into_the_memory_limit_and_keep_nobody_from_the_exchange() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("endpoints.yaml");
    std::fs::write(&file, four(1.0)).unwrap();
    let arguments = ["--endpoints", &file.display().to_string()];
    let (mut child, client) = spawn_with(&arguments, &[("PD_CONTROL_TOKEN", "secret")]);
    let address = client.address;
    let key = 0x7c0d_e5a1;
    let a = client_from([127, 0, 0, 2], address, "secret");
    let b = client_from([127, 0, 0, 3], address, "secret");

    let (sent, is_over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let attackers: Vec<_> =
        (0..48).map(|_| tokio::spawn(post_gigabytes(address, Arc::clone(&sent), Arc::clone(&is_over)))).collect();
    let (mut held, body) = (Vec::new(), largest(7));
    for number in 0..300_usize {
        let mut stream = connect_from([127, 0, 0, 66], address).await;
        // A head that never ends, a body that never comes, an answer that nobody reads.
        let part = match number % 3 {
            0 => format!("GET /v1/watch?epoch={}", "e".repeat(16_000)).into_bytes(),
            1 => [head(body.len()).as_bytes(), &body[..body.len() / 2]].concat(),
            _ => b"GET /v1/status HTTP/1.1\r\nhost: pd\r\nauthorization: Bearer secret\r\n\r\n".repeat(50),
        };
        let _ = tokio::time::timeout(Duration::from_millis(20), stream.write_all(&part)).await;
        held.push(stream);
    }

    let (began, mut turn, mut slowest) = (Instant::now(), 0, Duration::ZERO);
    while began.elapsed() < ATTACK || sent.load(Relaxed) < MESSAGES {
        assert!(began.elapsed() < 4 * PATIENCE, "{} messages", sent.load(Relaxed));
        turn += 1;
        let asked = Instant::now();
        let mut message = one(1, turn, vec![(key, Totals { tokens: turn, requests: 1, ..Totals::default() })]);
        message.records[0].blocks = block_event(key, &[BlockHash(turn)]).into_vec();
        message.records[0].first = turn - 1;
        let (status, answer) = post(&a, &message).await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(answer.unwrap().have, [(1, turn)]);
        let listener = ExchangeRequest { from: 2, wants: true, ..ExchangeRequest::default() };
        let (status, answer) = post(&b, &listener).await;
        assert_eq!(status, StatusCode::OK);
        // Its blocks are kept, however many others there are.
        let batches = answer.unwrap().batches;
        assert!(batches.iter().any(|batch| batch.blocks.starts_with(&key.to_le_bytes())), "turn {turn}");
        slowest = slowest.max(asked.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    is_over.store(true, Relaxed);
    futures::future::join_all(attackers).await;
    let (peak, posted) = (peak_kib(child.id()), sent.load(Relaxed));
    println!("{posted} messages of 4 MB posted; peak {} MiB; slowest pair of calls {slowest:?}", peak >> 10);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(peak < LIMIT_KIB, "{} MiB", peak >> 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_replicas_speak_for_other_envoys_and_a_public_name_gives_no_right() {
    let rig = Rig::start_with(&four(1.0), |config, directory| {
        with_token(config, directory);
        config.replicas_token = Token::new("replica");
    })
    .await;
    let as_ = |token| HttpClient { token: Some(token), ..rig.client.clone() };
    let (filter, replica) = (as_("secret"), as_("replica"));
    let key = "127.0.0.1:1".parse::<pd_core::wire::EndpointId>().unwrap().key();
    let load = |tokens| vec![(key, Totals { tokens, requests: 1, ..Totals::default() })];
    let mut honest = one(71, 1, load(500));
    honest.records[0].blocks = block_event(key, &[BlockHash(1)]).into_vec();
    assert_eq!(post(&filter, &honest).await.0, StatusCode::OK);
    let sum = async || {
        let listener = ExchangeRequest { from: 99, wants: true, ..ExchangeRequest::default() };
        let answer = post(&filter, &listener).await.1.unwrap();
        let tokens = answer.loads.unwrap().iter().map(|(_, totals)| totals.tokens).sum::<u64>();
        (tokens, answer.batches.first().map(|batch| batch.gateway))
    };
    let (tokens, name) = sum().await;
    assert_eq!(tokens, 500);
    let name = name.unwrap();
    assert_ne!(name, 71);
    // The exchange gives Envoys the name of another Envoy, but not the number by which that Envoy identifies itself.
    for replaces in [name, 0] {
        let mut liar = one(if replaces == 0 { name } else { 88 }, 1, Vec::new());
        liar.records[0].replaces = replaces;
        assert_eq!(post(&filter, &liar).await.0, StatusCode::OK);
        assert_eq!(sum().await.0, 500);
    }
    // For others speak replicas only, even for an Envoy whose number was guessed.
    let relayed = ExchangeRequest { from: 5, ..one(71, 2, load(7)) };
    assert_eq!(post(&filter, &relayed).await.0, StatusCode::FORBIDDEN);
    assert_eq!(sum().await.0, 500);
    assert_eq!(post(&replica, &relayed).await.0, StatusCode::OK);
    assert_eq!(sum().await.0, 7);
    assert_eq!(replica.get("/v1/status").await.status, StatusCode::UNAUTHORIZED);
    let status = filter.get("/v1/status").await.body;
    assert!(!status.contains(&format!("{:016x}", 71)), "{status}");
    // A message that came before, and loads of endpoints that nobody listed, count for nothing.
    assert_eq!(post(&filter, &honest).await.0, StatusCode::OK);
    assert_eq!(sum().await.0, 7);
    let nowhere = (0..10_000).map(|endpoint| (endpoint, Totals { work: 1, tokens: 1, requests: 1, legs: 1 })).collect();
    assert_eq!(post(&filter, &one(88, 9, nowhere)).await.0, StatusCode::OK);
    assert_eq!(sum().await.0, 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_from_the_future_does_not_break_the_page() {
    let rig = Rig::start(&four(1.0)).await;
    let mut message = one(1, 1, Vec::new());
    let time = u64::MAX;
    message.records[0].report = format!(
        r#"{{"ejected":[{{"address":"127.0.0.1:1","reason":"\u001b[2J","since_ms":{time}}}],"failing":["127.0.0.1:1"],
        "decisions":[{{"at_ms":{time},"model":"\u009b31m"}}]}}"#
    )
    .into_bytes();
    assert_eq!(post(&rig.client, &message).await.0, StatusCode::OK);
    let status = rig.client.get("/v1/status").await;
    assert_eq!(status.status, StatusCode::OK);
    let view: serde_json::Value = serde_json::from_str(&status.body).unwrap();
    let gateway = &view["gateways"][0];
    let at = gateway["decisions"][0]["at_ms"].as_u64().unwrap();
    assert!(at < 4_000_000_000_000, "{at}");
    assert_eq!(gateway["ejected"][0]["since_ms"].as_u64().unwrap(), at);
    assert_eq!((&gateway["ejected"][0]["reason"], &gateway["decisions"][0]["model"]), (&"[2J".into(), &"31m".into()));
}
