//! What must be so with every connector.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use pd_support::body::{CHAT, COMPLETIONS, words};
use pd_support::client::Answer;
use pd_tests::answer::{is_done, text};
use serde_json::{Value, json};

use crate::Pair;
use crate::servers::{Connector, client, until_ready};

/// Tokens of a block, which is what the shared directory moves.
const BLOCK: u64 = 32;
/// Requests at once.
const CONCURRENT: usize = 24;

/// Requests until NIXL's two sides have met.
const MEETINGS: usize = 5;

/// A request and the answer of one server.
pub struct Question {
    pub path: &'static str,
    pub body: Value,
    pub expected: String,
    pub prompt_tokens: u64,
}

impl Question {
    /// Asks the aggregated server.
    async fn new(pair: &Pair, path: &'static str, mut body: Value) -> Self {
        // Random weights come to the end of the text early.
        for (key, value) in [("model", json!("tiny")), ("temperature", json!(0)), ("ignore_eos", json!(true))] {
            body[key] = value;
        }
        let mut whole = body.clone();
        whole["stream"] = json!(false);
        let answer = pair.aggregated.client().await.post(path, whole.to_string()).await;
        assert_eq!(answer.status, 200, "aggregated: {}", answer.text());
        let (expected, usage) = (text(&answer.body), &answer.json()["usage"]);
        assert!(!expected.is_empty() && usage["completion_tokens"] == body["max_tokens"], "{}", answer.text());
        Self { path, body, expected, prompt_tokens: usage["prompt_tokens"].as_u64().expect("a count") }
    }

    /// Asks through Envoy.
    pub async fn ask(&self, pair: &Pair) -> Answer {
        client(pair.rig.address()).await.post(self.path, self.body.to_string()).await
    }

    #[track_caller]
    pub fn assert_right(&self, pair: &Pair, answer: &Answer) {
        let of = || format!("{:?}, {} tokens of {}", pair.connector, self.prompt_tokens, self.path);
        assert_eq!(answer.status, 200, "{}: {}", of(), answer.text());
        assert_eq!(text(&answer.body), self.expected, "{}", of());
        assert_eq!(is_done(&answer.body), self.body["stream"] == true, "{}", of());
        assert_eq!(answer.header("x-pd-kv"), None, "{}", of());
    }
}

/// A prompt that no request had before. A token is a byte or two.
pub fn new_prompt(bytes: usize) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    words(&format!("vllm-{}", COUNT.fetch_add(1, Relaxed)), bytes)
}

/// A question that no request had before.
pub async fn question(pair: &Pair, path: &'static str, bytes: usize, stream: bool) -> Question {
    let mut body = json!({"max_tokens": 24, "stream": stream});
    if path == CHAT {
        body["messages"] = json!([{"role": "user", "content": new_prompt(bytes)}]);
    } else {
        body["prompt"] = new_prompt(bytes).into();
    }
    Question::new(pair, path, body).await
}

/// Asks, checks the answers, and that every request was split and its KV cache moved.
async fn ask_all(pair: &Pair, what: &str, questions: &[Question], at_once: bool) {
    let start = Instant::now();
    let split = "pd_requests_total{decision=\"split\"}";
    let sources = ["external_kv_transfer", "local_compute"];
    let counts = async || {
        let [moved, computed] = sources.map(|source| pair.decode.prompt_tokens(source));
        (moved.await, computed.await)
    };
    let (split_before, before) = (pair.rig.metric(split).await, counts().await);
    if at_once {
        let answers = futures::future::join_all(questions.iter().map(|question| question.ask(pair))).await;
        questions.iter().zip(&answers).for_each(|(question, answer)| question.assert_right(pair, answer));
    } else {
        for question in questions {
            question.assert_right(pair, &question.ask(pair).await);
        }
    }
    pair.rig.until_metric(split, |value| value == split_before + questions.len() as f64).await;
    let after = counts().await;
    let (moved, computed) = (after.0 - before.0, after.1 - before.1);
    // Text that does not depend on the prompt would prove nothing.
    let texts: BTreeSet<_> = questions.iter().map(|question| &question.expected).collect();
    assert!(texts.len() * 10 > questions.len() * 9, "{} texts of {} prompts", texts.len(), questions.len());
    let tokens = questions.iter().map(|question| question.prompt_tokens);
    let (all, least): (u64, u64) = match pair.connector {
        Connector::Pull | Connector::Push => (tokens.clone().sum(), tokens.map(|tokens| tokens - 1).sum()),
        // A prompt of one token more than whole blocks is looked for under another name than it was stored under.
        Connector::Shared => {
            let found = |tokens: u64| if tokens % BLOCK == 1 { 0 } else { (tokens - 1) / BLOCK * BLOCK };
            (tokens.clone().sum(), tokens.map(found).sum())
        }
    };
    println!(
        "vllm: {:?}: {what}: {} answers right, {moved} of {all} prompt tokens moved, {computed} computed by decode, {:.1} s",
        pair.connector,
        questions.len(),
        start.elapsed().as_secs_f64()
    );
    assert!(moved >= least && moved + computed >= all, "{moved} of {all} moved, {computed} computed by decode");
}

/// Asks until NIXL's two sides have met: vLLM gives that five seconds, once, which a busy machine may not have.
pub async fn until_met(pair: &Pair) {
    for attempt in 1..=MEETINGS {
        let question = question(pair, CHAT, 700, false).await;
        let answer = question.ask(pair).await;
        if answer.status == 200 {
            question.assert_right(pair, &answer);
            println!("vllm: {:?}: met at request {attempt}", pair.connector);
            return;
        }
        println!("vllm: {:?}: not met at request {attempt}: {}", pair.connector, answer.text());
    }
    panic!("{:?}: not met", pair.connector);
}

/// Chat and completions, whole and streamed, of several lengths.
pub async fn answers_are_those_of_one_server(pair: &Pair) {
    for (path, what) in [(CHAT, "chat"), (COMPLETIONS, "completions")] {
        for (stream, how) in [(false, "whole"), (true, "streamed")] {
            let mut questions = Vec::new();
            for bytes in [350, 700, 1_400] {
                questions.push(question(pair, path, bytes, stream).await);
            }
            ask_all(pair, &format!("{what}, {how}"), &questions, false).await;
        }
    }
}

/// The second turn goes on from the first one's answer.
pub async fn a_second_turn_is_right(pair: &Pair) {
    let first = question(pair, CHAT, 600, false).await;
    let answer = first.ask(pair).await;
    first.assert_right(pair, &answer);
    for more in [20, 500] {
        let said = [first.body["messages"][0]["content"].clone(), first.expected.as_str().into()];
        let [question, answer] = said;
        let body = json!({"max_tokens": 24, "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": new_prompt(more)},
        ]});
        let second = Question::new(pair, CHAT, body).await;
        let cached = pair.decode.prompt_tokens("local_cache_hit").await;
        let answer = second.ask(pair).await;
        second.assert_right(pair, &answer);
        let cached = pair.decode.prompt_tokens("local_cache_hit").await - cached;
        println!("vllm: {:?}: second turn, {more} bytes more: right, {cached} tokens cached by decode", pair.connector);
        assert!(cached >= first.prompt_tokens / BLOCK * BLOCK, "{cached}");
    }
}

/// Many new prompts at once.
pub async fn many_at_once_are_right(pair: &Pair) {
    let lengths = (0..CONCURRENT).map(|i| 250 + i * 50);
    let questions =
        lengths.map(|bytes| question(pair, if bytes % 100 == 0 { CHAT } else { COMPLETIONS }, bytes, bytes % 3 == 0));
    let questions = futures::future::join_all(questions).await;
    ask_all(pair, &format!("{CONCURRENT} at once"), &questions, true).await;
}

/// Values that end a real engine, or say where it connects, in every place that vLLM copies parameters from.
pub async fn a_clients_parameters_end_no_server(pair: &Pair) {
    let places = [
        json!({"vllm_xargs": {"kv_transfer_params": 0}}),
        json!({"vllm_xargs": {"kv_transfer_params": ""}}),
        json!({"vllm_xargs": {"kv_transfer_params": [], "other": 1}}),
        json!({"kv_transfer_params": {"do_remote_prefill": true}}),
        json!({"ec_transfer_params": {"x": {"peer_host": "127.0.0.1", "peer_port": 1}}}),
    ];
    let message = json!([{"role": "user", "content": "hi"}]);
    let of_generate =
        [json!(0), json!(""), json!({"do_remote_prefill": true, "remote_block_ids": null})].map(|value| {
            let extra = json!({"kv_transfer_params": value});
            json!({"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 4, "extra_args": extra}})
        });
    let apis = [
        (CHAT, json!({"messages": message, "max_tokens": 4})),
        (COMPLETIONS, json!({"prompt": "hi", "max_tokens": 4})),
        ("/v1/responses", json!({"input": "hi", "max_output_tokens": 4, "store": false})),
        ("/v1/messages", json!({"messages": message, "max_tokens": 4})),
        ("/v1/chat/completions/batch", json!({"messages": [message, message], "max_tokens": 4})),
        ("/invocations", json!({"messages": message, "max_tokens": 4})),
    ];
    let mut sent = 0;
    let mut client = client(pair.rig.address()).await;
    let with_places = apis.iter().flat_map(|(path, body)| places.iter().map(move |place| (*path, body, place)));
    let generate = of_generate.iter().map(|body| ("/inference/v1/generate", body, &Value::Null));
    for (path, body, place) in with_places.chain(generate) {
        for phase in [None, Some("prefill"), Some("decode")] {
            let mut body = body.clone();
            body["model"] = json!("tiny");
            for (key, value) in place.as_object().into_iter().flatten() {
                body[key] = value.clone();
            }
            let phase = phase.map(|phase| ("x-pd-phase", phase.as_bytes()));
            let answer = client.send(client.json(path, body.to_string(), phase.as_slice())).await;
            // What an API does not know it may refuse; nothing may hang or end.
            assert!(answer.status < 500, "{path} {body}: {} {}", answer.status, answer.text());
            sent += 1;
        }
    }
    for path in ["/reset_prefix_cache", "/server_info", "/sleep", "/collective_rpc", "/v1/load_lora_adapter"] {
        assert_eq!(client.post(path, "{}").await.status, 404, "{path}");
    }
    until_ready(&[&pair.aggregated, &pair.prefill, &pair.decode]).await;
    println!("vllm: {:?}: {sent} requests with parameters of their own, both servers live", pair.connector);
    the_next_is_right(pair).await;
}

/// Kills the prefill server when the decode leg is on its way, asks, and returns the answer; the next question is answered
/// by decode alone.
async fn ask_without_prefill(pair: &Pair) -> (Question, Answer) {
    let killed = question(pair, CHAT, 900, false).await;
    let pid = pair.prefill.process.pid();
    pair.gate.before_the_next(move || kill(pid));
    let start = Instant::now();
    let answer = killed.ask(pair).await;
    assert!(pair.gate.is_done());
    println!(
        "vllm: {:?}: prefill killed between the legs: status {} after {:.1} s",
        pair.connector,
        answer.status,
        start.elapsed().as_secs_f64()
    );
    // Entries come some time after their answers.
    let last = async || pair.rig.access_log().pop().filter(|entry| entry["decision"] == "split");
    let logged = pd_support::wait::until("the access log has it", last).await;
    assert_eq!((&logged["decision"], &logged["reason"]), (&json!("split"), &json!("prefilled")), "{logged}");
    (killed, answer)
}

/// The next request finds no prefill server.
async fn the_next_is_right(pair: &Pair) {
    for stream in [false, true] {
        let next = question(pair, CHAT, 700, stream).await;
        next.assert_right(pair, &next.ask(pair).await);
    }
}

/// Where decode does not compute the prompt itself, the client gets an error.
pub async fn a_prefill_server_killed_between_the_legs_is_an_error(pair: &Pair, status: u16) {
    let (_, answer) = ask_without_prefill(pair).await;
    assert_eq!(answer.status, status, "{}", answer.text());
    the_next_is_right(pair).await;
}

/// Where decode may compute the prompt itself, or has got the KV cache already, nobody notices.
pub async fn a_prefill_server_killed_between_the_legs_goes_unnoticed(pair: &Pair) {
    let (question, answer) = ask_without_prefill(pair).await;
    question.assert_right(pair, &answer);
    the_next_is_right(pair).await;
}

/// Ends a server and all that it has started, at once.
fn kill(pid: u32) {
    let killed = std::process::Command::new("kill").args(["-9", "--", &format!("-{pid}")]).status();
    assert!(killed.is_ok_and(|status| status.success()), "no process group {pid}");
}
