//! The exchange between Envoys: through one pd-control, through replicas of it, and with messages that are none.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use axum::http::{Response, StatusCode};
use bytes::Bytes;
use pd_control::access::token::Token;
use pd_control::envoys::relay::Replicas;
use pd_core::endpoints::elsewhere::Totals;
use pd_core::envoys::message::{ExchangeRequest, ExchangeResponse, Record};
use pd_core::envoys::report::Report;
use pd_core::prefix::block_log::{block_event, split_events};
use pd_core::prefix::hash::BlockHash;
use pd_core::wire::EndpointId;
use pd_core::workers::recent::Generation;

use crate::support::*;

/// Key of an endpoint of the list.
fn key() -> u64 {
    "127.0.0.1:1".parse::<EndpointId>().unwrap().key()
}

/// An Envoy.
struct Gateway {
    id: u64,
    turn: u64,
    client: HttpClient,
}

impl Gateway {
    fn new(id: u64, address: SocketAddr) -> Self {
        Self { id, turn: 0, client: HttpClient::new(address) }
    }

    fn with_token(mut self) -> Self {
        self.client.token = Some("secret");
        self
    }

    async fn post(&self, body: Vec<u8>, wait: Duration) -> Response<Bytes> {
        self.client.send("POST", &format!("/v1/exchange?wait_ms={}", wait.as_millis()), body).await.unwrap()
    }

    async fn ask(&self, request: &ExchangeRequest, wait: Duration) -> ExchangeResponse {
        let answer = self.post(request.to_bytes(), wait).await;
        assert_eq!(answer.status(), StatusCode::OK);
        ExchangeResponse::from_bytes(answer.body()).unwrap()
    }

    /// Sends a request with so many tokens at the first endpoint, and a block there.
    async fn send(&mut self, tokens: u64) -> ExchangeResponse {
        self.turn += 1;
        let generation = Generation { version: "0.1.0".into(), build: "b".into(), revision: "r".into(), workers: 4 };
        let record = Record {
            gateway: self.id,
            turn: self.turn,
            hash_scheme: 512,
            loads: vec![(key(), Totals { tokens, requests: 1, ..Totals::default() })],
            blocks: block_event(key(), &[BlockHash(self.id)]).into_vec(),
            report: Report { generations: vec![generation], ..Report::default() }.to_json(),
            ..Record::default()
        };
        self.ask(
            &ExchangeRequest { from: self.id, records: vec![record], ..ExchangeRequest::default() },
            Duration::ZERO,
        )
        .await
    }

    /// What others have in flight at the first endpoint, when that is something new.
    async fn receive(&self, known_state: (u64, u64), known: &[(u64, u64)], wait: Duration) -> ExchangeResponse {
        self.ask(
            &ExchangeRequest {
                from: self.id,
                known_state,
                wants: true,
                known: known.to_vec(),
                ..ExchangeRequest::default()
            },
            wait,
        )
        .await
    }
}

fn tokens(response: &ExchangeResponse) -> Option<u64> {
    Some(response.loads.as_ref()?.iter().find(|(endpoint, _)| *endpoint == key())?.1.tokens)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_envoy_sends_answers_the_request_of_another() {
    let rig = Rig::start(&four(1.0)).await;
    let (mut a, b) = (Gateway::new(1, rig.client.address), Gateway::new(2, rig.client.address));
    assert_eq!(a.send(10).await.have, [(1, 1)]);
    let first = b.receive((0, 0), &[], PATIENCE).await;
    assert_eq!((tokens(&first), first.exchanging, first.batches.len()), (Some(10), 1, 1));
    assert_eq!(split_events(&first.batches[0].blocks).count(), 1);
    let known = [(first.batches[0].gateway, 1)];
    let question = tokio::spawn(async move {
        let response = b.receive((first.hub, first.state), &known, PATIENCE).await;
        (response, Instant::now(), b)
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!question.is_finished(), "nothing is new");
    let sent = Instant::now();
    a.send(30).await;
    let (second, answered, mut b) = question.await.unwrap();
    println!("from request to response: {:?}", answered - sent);
    assert_eq!((tokens(&second), second.batches.len()), (Some(30), 0));
    // Its own load is not news to it, nor is it in the response.
    b.send(7).await;
    let third = b.receive((second.hub, second.state), &known, Duration::from_millis(50)).await;
    assert_eq!((third.loads, third.exchanging, third.gateways), (None, 2, 2));
    let status: serde_json::Value = serde_json::from_str(&rig.client.get("/v1/status").await.body).unwrap();
    let shown = status["gateways"].as_array().unwrap();
    let name = format!("{:016x}", known[0].0);
    assert!(shown.iter().any(|of| of["id"] == name.as_str()), "{shown:?}");
    assert_eq!(shown[1]["generations"][0]["workers"], 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_is_silent_is_forgotten_and_its_blocks_are_not() {
    let rig = Rig::start(&four(1.0)).await;
    let (mut a, b) = (Gateway::new(1, rig.client.address), Gateway::new(2, rig.client.address));
    a.send(10).await;
    let first = b.receive((0, 0), &[], PATIENCE).await;
    let known = [(first.batches[0].gateway, 1)];
    let second = b.receive((first.hub, first.state), &known, Duration::from_secs(5)).await;
    assert_eq!((second.loads, second.exchanging), (Some(vec![]), 0));
    let late = b.receive((0, 0), &[], Duration::ZERO).await;
    assert_eq!(late.batches.len(), 1, "for whoever comes later");
    until_true("its metric is down", || async { rig.client.metric("pd_control_gateways").await == 0.0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_relay_what_envoys_send() {
    let ports = [Port::reserve(), Port::reserve()];
    let [first, second] = ports.each_ref().map(Port::address);
    let start = |own: SocketAddr, other: SocketAddr| async move {
        Rig::start_with(&four(1.0), |config, directory| {
            with_token(config, directory);
            config.listen = own;
            config.replicas_token = Token::new("replica");
            config.replicas =
                Some(Replicas { name: other.to_string(), token: config.replicas_token.clone(), tls: None });
        })
        .await
    };
    let mut rigs = vec![start(first, second).await, start(second, first).await];
    let gateway = |id, address| Gateway::new(id, address).with_token();
    let (mut a, b) = (gateway(1, first), gateway(2, second));
    a.send(10).await;
    let sent = Instant::now();
    let mut response = b.receive((0, 0), &[], PATIENCE).await;
    while tokens(&response) != Some(10) {
        assert!(sent.elapsed() < PATIENCE);
        response = b.receive((response.hub, response.state), &[], PATIENCE).await;
    }
    println!("from replica to replica: {:?}", sent.elapsed());
    assert_eq!(response.batches.len(), 1);
    // The second one dies; one that knows nothing takes its place and receives all of it.
    rigs.pop().unwrap().control.stop().await;
    rigs.push(start(second, first).await);
    let restarted = Instant::now();
    loop {
        a.send(20).await;
        let response = b.receive((0, 0), &[], Duration::ZERO).await;
        if tokens(&response) == Some(20) && response.batches.len() == 1 {
            break;
        }
        assert!(restarted.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!("a replica that restarted knows all after {:?}", restarted.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_finds_itself_among_the_others_lets_itself_be() {
    let port = Port::reserve();
    let address = port.address();
    let rig = Rig::start_with(&four(1.0), |config, _| {
        config.listen = address;
        config.replicas = Some(Replicas { name: address.to_string(), token: None, tls: None });
    })
    .await;
    let mut a = Gateway::new(1, address);
    for tokens in 0..20 {
        a.send(tokens).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(rig.client.metric("pd_control_relays_total{result=\"ok\"}").await, 0.0);
    let answered = rig.client.metric("pd_control_exchange_requests_total{code=\"200\"}").await;
    assert!((20.0..=21.0).contains(&answered), "{answered}");
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_are_none_are_refused_and_change_nothing() {
    let rig = Rig::start_with(&four(1.0), with_token).await;
    let mut a = Gateway::new(1, rig.client.address).with_token();
    a.send(10).await;
    let stranger = Gateway::new(2, rig.client.address);
    assert_eq!(
        stranger.post(ExchangeRequest::default().to_bytes(), Duration::ZERO).await.status(),
        StatusCode::UNAUTHORIZED
    );
    let good = ExchangeRequest { from: 1, records: vec![Record::default()], ..ExchangeRequest::default() }.to_bytes();
    let newer = [&9_u64.to_le_bytes(), &good[8..]].concat();
    let endless = [&good[..48], &u64::MAX.to_le_bytes()].concat();
    for bad in [vec![], b"{}".to_vec(), good[..good.len() - 1].to_vec(), newer, endless] {
        assert_eq!(a.post(bad, Duration::ZERO).await.status(), StatusCode::BAD_REQUEST);
    }
    // It is refused by its head, so the client may see the connection's end before the answer.
    if let Ok(answer) = a.client.send("POST", "/v1/exchange", vec![0; 5 << 20]).await {
        assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
    }
    let b = Gateway::new(2, rig.client.address).with_token();
    assert_eq!(tokens(&b.receive((0, 0), &[], Duration::ZERO).await), Some(10));
}
