//! The exchange under any answer of pd-control and any request of an Envoy. Both sides keep their invariants, each can
//! read the other's bytes, and an Envoy without answers retracts all loads of the other Envoys.
#![no_main]

use core::time::Duration;

use hashbrown::HashMap;
use pd_core::prefix::block_log::{block_event, read_event, split_events};
use pd_core::envoys::hub::Hub;
use pd_core::envoys::message::{ExchangeResponse, MAX_MESSAGE_BYTES, ExchangeRequest};
use pd_core::envoys::report::Report;
use pd_core::envoys::client::{ExchangeClient, CallKind, TICK};
use pd_core::time::Monotonic;
use pd_core::workers::worker::Worker;

const CONFIG: &[u8] = br#"{"control":{"cluster":"pd-control"},"endpoints":[{"address":"10.0.0.1:1","role":"prefill"},{"address":"10.0.0.2:1","role":"decode"}]}"#;

/// Steps, each a byte for what happens, two for a length, and so many bytes of a message.
fn steps(input: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut rest = input;
    core::iter::from_fn(move || {
        let [what, low, high, behind @ ..] = rest else { return None };
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(behind.len());
        let (message, behind) = behind.split_at(length);
        rest = behind;
        Some((*what, message))
    })
}

/// The message with endpoints that the worker knows in place of the numbers 0 and 1: nobody guesses 64 bits.
fn with_endpoints(message: &[u8], keys: &[u64]) -> Vec<u8> {
    let Some(mut response) = ExchangeResponse::from_bytes(message) else { return message.to_vec() };
    let key = |number: u64| usize::try_from(number).ok().and_then(|index| keys.get(index)).copied().unwrap_or(number);
    for (endpoint, _) in response.loads.iter_mut().flatten() {
        *endpoint = key(*endpoint);
    }
    for batch in &mut response.batches {
        let events = split_events(&batch.blocks).filter_map(read_event);
        batch.blocks = events.flat_map(|(endpoint, blocks)| block_event(key(endpoint), &blocks)).collect();
    }
    response.to_bytes()
}

fn answer(hub: &mut Hub, request: &ExchangeRequest, now: Monotonic) -> ExchangeResponse {
    assert_eq!(ExchangeRequest::from_bytes(&request.to_bytes()).as_ref(), Some(request));
    hub.take(request, 0, now);
    let _ = hub.has_news(request);
    let response = hub.answer(request, 3);
    assert_eq!(ExchangeResponse::from_bytes(&response.to_bytes()).as_ref(), Some(&response));
    response
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let (mut worker, mut exchange, mut hub) = (Worker::default(), ExchangeClient::default(), Hub::new(9));
    let config = worker.configure(CONFIG).expect("a good configuration");
    let keys: Vec<u64> = worker.state.table.iter().map(|(_, state)| state.key).collect();
    let mut now = Monotonic::from_secs(1);
    exchange.configure(&mut worker, config.control.as_ref());
    exchange.lead(&mut worker, 1, 0, now);
    for (what, message) in steps(input) {
        now += TICK;
        match what % 4 {
            0 => exchange.answered(&mut worker, CallKind::Receive, Some(200), &with_endpoints(message, &keys), now),
            1 => {
                if let Some(request) = ExchangeRequest::from_bytes(message) {
                    answer(&mut hub, &request, now);
                }
            }
            2 => {
                for call in exchange.tick(&mut worker, true, now, |_| Report::default().to_json()) {
                    let request = ExchangeRequest::from_bytes(&call.body).expect("pd-control can read an Envoy's request");
                    let response = answer(&mut hub, &request, now).to_bytes();
                    exchange.answered(&mut worker, call.kind, Some(200), &response, now);
                }
            }
            _ => {
                now += Duration::from_secs(4);
                hub.prune(now);
                exchange.failed(&mut worker, CallKind::Send, now);
            }
        }
    }
    for request in hub.relay(&HashMap::new(), now) {
        assert!(request.to_bytes().len() <= MAX_MESSAGE_BYTES);
    }
    exchange.resign(&mut worker);
    for (_, state) in worker.state.table.iter() {
        assert_eq!((state.work(now), state.decode_tokens()), (0.0, 0));
    }
});
