//! The exchange: whatever pd-control answers to an Envoy and whatever Envoys tell pd-control, both stay sane, what they
//! write can be read, and an Envoy that falls silent forgets the others' loads to the last.
#![no_main]

use core::time::Duration;

use hashbrown::HashMap;
use pd_core::time::Monotonic;
use pd_core::prefix::block_log::{block_event, read_event, split_events};
use pd_core::exchange::hub::Hub;
use pd_core::exchange::message::{Heard, MAX_MESSAGE_BYTES, Told};
use pd_core::exchange::report::Report;
use pd_core::exchange::{Exchange, Kind, TICK};
use pd_core::worker::Worker;

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
    let Some(mut heard) = Heard::from_bytes(message) else { return message.to_vec() };
    let key = |number: u64| usize::try_from(number).ok().and_then(|at| keys.get(at)).copied().unwrap_or(number);
    for (endpoint, _) in heard.loads.iter_mut().flatten() {
        *endpoint = key(*endpoint);
    }
    for batch in &mut heard.batches {
        let events = split_events(&batch.blocks).filter_map(read_event);
        batch.blocks = events.flat_map(|(endpoint, blocks)| block_event(key(endpoint), &blocks)).collect();
    }
    heard.to_bytes()
}

fn answer(hub: &mut Hub, told: &Told, now: Monotonic) -> Heard {
    assert_eq!(Told::from_bytes(&told.to_bytes()).as_ref(), Some(told));
    hub.take(told, now);
    let _ = hub.has_news(told);
    let heard = hub.answer(told, 3);
    assert_eq!(Heard::from_bytes(&heard.to_bytes()).as_ref(), Some(&heard));
    heard
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let (mut worker, mut exchange, mut hub) = (Worker::default(), Exchange::default(), Hub::new(9));
    let config = worker.configure(CONFIG).expect("a good configuration");
    let keys: Vec<u64> = worker.state.table.iter().map(|(_, slot)| slot.key).collect();
    let mut now = Monotonic::from_secs(1);
    exchange.configure(&mut worker, config.control.as_ref());
    exchange.speak(&mut worker, 1, 0, now);
    for (what, message) in steps(input) {
        now += TICK;
        match what % 4 {
            0 => exchange.answered(&mut worker, Kind::Hear, Some(200), &with_endpoints(message, &keys), now),
            1 => {
                if let Some(told) = Told::from_bytes(message) {
                    answer(&mut hub, &told, now);
                }
            }
            2 => {
                for call in exchange.tick(&mut worker, true, now, |_| Report::default().to_json()) {
                    let told = Told::from_bytes(&call.body).expect("what an Envoy tells can be read");
                    let heard = answer(&mut hub, &told, now).to_bytes();
                    exchange.answered(&mut worker, call.kind, Some(200), &heard, now);
                }
            }
            _ => {
                now += Duration::from_secs(4);
                hub.prune(now);
                exchange.failed(&mut worker, Kind::Tell, now);
            }
        }
    }
    for told in hub.relay(&HashMap::new(), now) {
        assert!(told.to_bytes().len() <= MAX_MESSAGE_BYTES);
    }
    exchange.fall_silent(&mut worker);
    for (_, slot) in worker.state.table.iter() {
        assert_eq!((slot.work(now), slot.decode_tokens()), (0.0, 0));
    }
});
