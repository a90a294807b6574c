//! `cargo bench -p pd-core --bench schedule`: what hashing, the index, a choice and a whole request cost.

use std::net::{Ipv4Addr, SocketAddr};

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use pd_core::choose::prompt::Prompt;
use pd_core::choose::scheduler::Scheduler;
use pd_core::prefix::hash::{BlockHash, PromptHash, prompt_hash};
use pd_core::prefix::index::PrefixIndex;
use pd_core::time::Monotonic;
use pd_core::wire::{Endpoint, Role, Snapshot};
use pd_core::workers::worker::Worker;

mod one_request;

use one_request::{headers, serve};

fn main() {
    divan::main();
}

const SIZES: &[usize] = &[200, 4_000, 16_000, 220_000];
const BLOCK_BYTES: usize = 512;

/// Text of a prompt that has no block in common with one of another number.
fn text(number: u64, bytes: usize) -> Vec<u8> {
    let mut text = format!("{number:016x}").into_bytes();
    text.extend(b"The quick brown fox jumps over the lazy dog. ".iter().cycle().take(bytes.saturating_sub(16)));
    text
}

fn hashed(number: u64, bytes: usize) -> PromptHash {
    prompt_hash(b"m", b"", &[&text(number, bytes)], BLOCK_BYTES)
}

#[divan::bench(args = SIZES)]
fn hash_prompt(bencher: Bencher<'_, '_>, bytes: usize) {
    let text = text(1, bytes);
    let hash = || prompt_hash(b"m", b"", &[black_box(&text)], BLOCK_BYTES);
    bencher.counter(BytesCount::of_slice(&text)).bench(hash);
}

/// An index of one endpoint, full, so that what comes in drives something out.
fn full_index() -> PrefixIndex {
    let mut index = PrefixIndex::new(8 << 20);
    index.set_capacity(0, usize::MAX);
    for number in 0..2_000 {
        index.insert(0, &hashed(number, 100_000).blocks);
    }
    index
}

/// A prompt that nobody has sent before: looked up and entered.
#[divan::bench(args = SIZES)]
fn index_unknown_prompt(bencher: Bencher<'_, '_>, bytes: usize) {
    let mut index = full_index();
    let mut prompts = 1 << 32..;
    bencher
        .counter(BytesCount::new(bytes))
        .with_inputs(|| hashed(prompts.next().unwrap_or_default(), bytes).blocks)
        .bench_local_refs(|blocks| visit(&mut index, blocks));
}

/// A prompt that the endpoint holds: looked up and made the newest.
#[divan::bench(args = SIZES)]
fn index_known_prompt(bencher: Bencher<'_, '_>, bytes: usize) {
    let mut index = full_index();
    let blocks = hashed(1 << 33, bytes).blocks;
    bencher.counter(BytesCount::new(bytes)).bench_local(|| visit(&mut index, black_box(&blocks)));
}

fn visit(index: &mut PrefixIndex, blocks: &[BlockHash]) -> usize {
    let distinctive = index.distinctive(blocks, 0.02);
    let holders = index.holders(blocks, 8).len();
    let matched = index.matched(0, blocks);
    index.insert(0, blocks);
    usize::from(distinctive.is_some()) + holders + matched
}

/// A worker that knows so many endpoints, half of them prefill, and some prompts.
fn worker(endpoints: u32, split: &str) -> Worker {
    let mut worker = Worker::default();
    let config = format!(r#"{{"pools":{{"default":{{"split":{{"mode":"{split}"}}}}}}}}"#);
    worker.configure(config.as_bytes()).expect("the configuration is valid");
    let endpoint = |i: u32| {
        let address = SocketAddr::from((Ipv4Addr::from_bits(0x0a00_0001 + i), 8000));
        Endpoint::new(address, if i.is_multiple_of(2) { Role::Prefill } else { Role::Decode })
    };
    let endpoints = (0..endpoints).map(endpoint).collect();
    let snapshot = Snapshot::whole("b", 1, endpoints);
    worker.apply(&snapshot.to_json()).expect("the snapshot is valid");
    worker
}

/// Decider, prefill and decode choice for a 16 kB prompt that four endpoints hold in part.
#[divan::bench(args = [10, 100, 1_000, 10_000])]
fn choose_both_endpoints(bencher: Bencher<'_, '_>, endpoints: u32) {
    let mut worker = worker(endpoints, "threshold");
    let hash = hashed(7, 16_000);
    for i in 0..4 {
        let held = hash.blocks.len() / (i as usize + 1);
        worker.state.index.insert(i * (endpoints / 5), hash.blocks.get(..held).unwrap_or_default());
    }
    let config = worker.config.clone().expect("there is a configuration");
    let candidates = worker.state.table.candidates("m").expect("there are endpoints");
    let prompt = Prompt { tokens: 4_000.0, block_tokens: 128.0, key: hash.head, hash, ..Prompt::default() };
    let now = Monotonic::from_secs(1_000);
    bencher.bench_local(|| {
        let scheduler =
            Scheduler { table: &worker.state.table, index: &worker.state.index, pool: config.pool("default"), now };
        let schedule = scheduler.schedule(black_box(&candidates), black_box(&prompt));
        (schedule, scheduler.pick_decode(&candidates.decode, &prompt, &[]))
    });
}

fn body(number: u64, bytes: usize) -> Vec<u8> {
    let (head, tail) = (
        r#"{"model":"m","messages":[{"role":"user","content":""#,
        r#""}],"max_tokens":128,"temperature":0.7,"stream":true}"#,
    );
    let content = String::from_utf8(text(number, bytes - head.len() - tail.len())).unwrap_or_default();
    [head, &content, tail].concat().into_bytes()
}

fn serve_all(bencher: Bencher<'_, '_>, bytes: usize, split: &str) {
    let mut worker = worker(4, split);
    let mut numbers = 0..;
    bencher
        .counter(BytesCount::new(bytes))
        .with_inputs(|| (headers(), body(numbers.next().unwrap_or_default(), bytes)))
        .bench_local_values(|(headers, body)| serve(&mut worker, headers, &body));
}

#[divan::bench(args = SIZES)]
fn serve_by_one_leg(bencher: Bencher<'_, '_>, bytes: usize) {
    serve_all(bencher, bytes, "never");
}

#[divan::bench(args = SIZES)]
fn serve_by_two_legs(bencher: Bencher<'_, '_>, bytes: usize) {
    serve_all(bencher, bytes, "always");
}
