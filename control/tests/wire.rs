//! The wire format of each version, as its goldens have it. `../goldens/wire/README.md` says what to do when these fail.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use pd_control::list::EndpointList;
use pd_control::publish::registry::Registry;
use pd_core::endpoints::elsewhere::Totals;
use pd_core::endpoints::table::Applied;
use pd_core::envoys::message::{Batch, ExchangeRequest, ExchangeResponse, Record};
use pd_core::prefix::block_log::block_event;
use pd_core::prefix::hash::BlockHash;
use pd_core::wire::{Endpoint, Engine, ModelCard, Role, Snapshot, State, Stated, Target};
use pd_core::workers::worker::Worker;
use serde_json::{Value, json};

use crate::support::*;

const VERSION: &str = env!("CARGO_PKG_VERSION");
const WHAT_TO_DO: &str = "the wire format has changed: raise the version in Cargo.toml and add a folder of goldens for \
     it; never edit the folder of a released version (control/tests/goldens/wire/README.md)";

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/wire")
}

fn versions() -> Vec<PathBuf> {
    let entries = fs::read_dir(goldens()).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<_> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}; {WHAT_TO_DO}", path.display()))
}

/// One endpoint with every key, one with none that may be left out.
fn endpoints() -> [Endpoint; 4] {
    let full = Endpoint {
        rank: Some(3),
        pool: "big".into(),
        models: vec!["llama".into(), "adapter \"ä\"".into()],
        models_closed: true,
        engine: Some(Engine::Sglang),
        group: Some("rack-1".into()),
        weight: 2.5,
        cache_tokens: Some(500_000),
        bootstrap_port: Some(8_998),
        min_prompt_tokens: Some(100),
        max_prompt_tokens: Some(2_000),
        state: State::Draining,
        ..Endpoint::new("10.0.0.1:8000".parse().unwrap(), Role::Prefill)
    };
    let bare = Endpoint::new("10.0.0.2:8000".parse().unwrap(), Role::Decode);
    let bare = Endpoint { models_pending: true, ..bare };
    let six = Endpoint::new("[fd01::1]:80".parse().unwrap(), Role::Both);
    [full, bare, six, Endpoint::new("10.0.0.3:8000".parse().unwrap(), Role::Both)]
}

/// What a pd-control of this version answers: the file's name and the text.
fn written() -> Vec<(&'static str, String)> {
    let registry = Registry::new("golden", SystemTime::UNIX_EPOCH);
    let cards = [
        ModelCard {
            max_model_len: Some(131_072),
            root: Some("/models/llama".into()),
            owned_by: Some("vllm".into()),
            ..ModelCard::new("llama")
        },
        ModelCard { parent: Some("llama".into()), ..ModelCard::new("adapter \"ä\"") },
    ];
    let target = |model: &str, weight| Target { model: model.to_owned(), weight };
    let stated = Stated {
        objectives: [("batch".to_owned(), -5)].into(),
        aliases: [("chat".to_owned(), vec![target("llama", 9), target("adapter \"ä\"", 1)])].into(),
        others: vec![target("llama", 1)],
    };
    let publish = |list: &[Endpoint]| {
        let list = EndpointList::new(list.to_vec()).unwrap().with_stated(stated.clone()).unwrap();
        let list = list.with_cards(cards.iter());
        registry.publish(list, SystemTime::UNIX_EPOCH).unwrap();
        registry.current()
    };
    let text = |bytes: bytes::Bytes| String::from_utf8(bytes.to_vec()).unwrap() + "\n";
    let [full, bare, six, other] = endpoints();
    let whole = publish(&[full.clone(), bare.clone(), six, other.clone()]).answer("", 0).unwrap();
    let delta = publish(&[full, Endpoint { state: State::Down, ..bare }, other]).answer("golden", 1).unwrap();
    let empty = publish(&[]).answer("", 0).unwrap();
    vec![("whole.json", text(whole)), ("delta.json", text(delta)), ("empty.json", text(empty))]
}

#[test]
fn this_version_writes_its_goldens() {
    let folder = goldens().join(VERSION);
    for (name, text) in written() {
        if std::env::var_os("PD_WRITE_GOLDENS").is_some() {
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(name), &text).unwrap();
        }
        assert_eq!(read(&folder.join(name)), text, "{VERSION}/{name}: {WHAT_TO_DO}");
    }
}

/// A message of each kind with something in every place.
fn messages() -> (ExchangeRequest, ExchangeResponse) {
    let loads = vec![(5, Totals { work: 1_500_000, tokens: 2_000, requests: 3, legs: 4 })];
    let blocks = block_event(5, &[BlockHash(0xfeed), BlockHash(u64::MAX)]).into_vec();
    let record = Record {
        gateway: 0x1234_5678_9abc_def0,
        replaces: 7,
        turn: 9,
        hash_scheme: 512,
        loads: loads.clone(),
        oldest: 2,
        first: 3,
        blocks: blocks.clone(),
        report: br#"{"version":1}"#.to_vec(),
    };
    let request = ExchangeRequest {
        from: 1,
        known_state: (2, 3),
        wants: true,
        known: vec![(4, 5)],
        records: vec![record],
        origins: vec![],
    };
    let batch = Batch { gateway: 4, hash_scheme: 512, first: 3, blocks };
    let response = ExchangeResponse {
        hub: 2,
        state: 4,
        have: vec![(1, 4)],
        gateways: 3,
        exchanging: 2,
        loads: Some(loads),
        batches: vec![batch],
    };
    (request, response)
}

fn to_hex(bytes: &[u8]) -> String {
    let line = |line: &[u8]| line.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n";
    bytes.chunks(32).map(line).collect()
}

fn from_hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.bytes().filter_map(|digit| (digit as char).to_digit(16)).map(|digit| digit as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

#[test]
fn messages_of_the_exchange_of_every_version_are_read() {
    let (request, response) = messages();
    let folder = goldens().join(VERSION);
    for (name, text) in [("request.hex", to_hex(&request.to_bytes())), ("response.hex", to_hex(&response.to_bytes()))] {
        if std::env::var_os("PD_WRITE_GOLDENS").is_some() {
            fs::write(folder.join(name), &text).unwrap();
        }
        assert_eq!(read(&folder.join(name)), text, "{VERSION}/{name}: {WHAT_TO_DO}");
    }
    for folder in versions().iter().filter(|folder| folder.join("request.hex").exists()) {
        let [request_bytes, response_bytes] =
            ["request.hex", "response.hex"].map(|name| from_hex(&read(&folder.join(name))));
        assert_eq!(ExchangeRequest::from_bytes(&request_bytes), Some(request.clone()), "{}", folder.display());
        assert_eq!(ExchangeResponse::from_bytes(&response_bytes), Some(response.clone()), "{}", folder.display());
        // A newer one may add words behind.
        assert_eq!(ExchangeRequest::from_bytes(&[request_bytes, vec![1; 8]].concat()), Some(request.clone()));
        assert_eq!(ExchangeResponse::from_bytes(&[response_bytes, vec![1; 8]].concat()), Some(response.clone()));
    }
}

/// Whether an object has at least what another one has: a reader ignores the rest.
fn contains(value: &Value, part: &Value) -> bool {
    match (value, part) {
        (Value::Object(value), Value::Object(part)) => {
            part.iter().all(|(key, part)| value.get(key).is_some_and(|value| contains(value, part)))
        }
        (Value::Array(value), Value::Array(part)) => {
            value.len() == part.len() && value.iter().zip(part).all(|(value, part)| contains(value, part))
        }
        _ => value == part,
    }
}

#[test]
fn lists_of_every_version_are_read_and_written_so_that_it_reads_them() {
    for folder in versions() {
        for name in ["whole.json", "delta.json", "empty.json"] {
            let (path, text) = (folder.join(name), read(&folder.join(name)));
            let snapshot = Snapshot::parse(text.as_bytes())
                .unwrap_or_else(|error| panic!("{}: {error}; a released version still writes this", path.display()));
            let again: Value = serde_json::from_slice(&snapshot.to_json()).unwrap();
            let golden: Value = serde_json::from_str(&text).unwrap();
            assert!(
                contains(&again, &golden),
                "{}: a filter of that version would miss something in {again}",
                path.display()
            );
        }
    }
}

#[test]
fn a_filter_follows_the_lists_of_every_version_and_keeps_its_own_where_one_is_refused() {
    for folder in versions() {
        let mut worker = Worker::default();
        worker.configure(b"{}").unwrap();
        assert_eq!(worker.apply(read(&folder.join("whole.json")).as_bytes()), Ok(Applied::Changed));
        assert_eq!(worker.state.table.len(), 4);
        assert_eq!(worker.apply(read(&folder.join("delta.json")).as_bytes()), Ok(Applied::Changed));
        assert_eq!((worker.state.table.len(), worker.state.table.version()), (3, ("golden", 2)));
        for refused in fs::read_dir(folder.join("refused")).unwrap().map(|entry| entry.unwrap().path()) {
            assert!(worker.apply(read(&refused).as_bytes()).is_err(), "{}", refused.display());
        }
        assert_eq!(worker.apply(read(&folder.join("empty.json")).as_bytes()), Ok(Applied::Empty));
        assert_eq!((worker.state.table.len(), worker.state.table.version()), (3, ("golden", 2)));
    }
}

#[test]
fn what_a_newer_version_adds_is_ignored() {
    /// Members of these objects are names, not fields.
    const NAMES: [&str; 2] = ["objectives", "aliases"];
    fn extended(value: &Value, has_fields: bool) -> Value {
        match value {
            Value::Object(members) => {
                let member =
                    |(key, value): (&String, &Value)| (key.clone(), extended(value, !NAMES.contains(&key.as_str())));
                let mut members: serde_json::Map<_, _> = members.iter().map(member).collect();
                if has_fields {
                    members.insert("of_a_newer_version".into(), json!({"a": [1, null]}));
                }
                members.into()
            }
            Value::Array(items) => items.iter().map(|item| extended(item, true)).collect(),
            _ => value.clone(),
        }
    }
    for (name, text) in written() {
        let newer = extended(&serde_json::from_str(&text).unwrap(), true).to_string();
        assert_eq!(Snapshot::parse(newer.as_bytes()), Snapshot::parse(text.as_bytes()), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_of_every_version_are_answered() {
    let rig = Rig::start(&four(1.0)).await;
    let epoch = rig.filter().await.epoch;
    replace(&rig.file(), &four(2.0)).unwrap();
    until_true("the second version is there", || async {
        rig.client.metric("pd_control_snapshot_version").await == 2.0
    })
    .await;
    for folder in versions() {
        for line in read(&folder.join("polls.txt")).lines() {
            let mut words = line.split(' ');
            let (path, status, like) = (words.next().unwrap(), words.next().unwrap(), words.next());
            let answer = rig.client.get(&path.replace("EPOCH", &epoch)).await;
            assert_eq!(answer.status.as_str(), status, "{}: {line}", folder.display());
            let keys = |text: &str| {
                let value: Value = serde_json::from_str(text).unwrap();
                (value["wire"].clone(), value.get("base").is_some(), value["version"].is_u64())
            };
            match like {
                Some(name) => assert_eq!(keys(&answer.body), keys(&read(&folder.join(name))), "{line}"),
                None => assert_eq!(answer.body, "", "{line}"),
            }
        }
    }
}
