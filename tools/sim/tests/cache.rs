//! The prefix cache, seen through usage and counters.

use pd_sim::{Config, start};

use crate::client::{CHAT, COMPLETIONS, ask, chat};

fn cached(answer: &crate::client::Answer) -> u64 {
    answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

#[tokio::test]
async fn the_same_prompt_hits_all_but_its_last_block() {
    let sim = start(Config::default()).await.unwrap();
    // 32 tokens: two full blocks, of which the second holds the last token.
    let body = format!(r#"{{"model":"sim","prompt":"{}","max_tokens":1}}"#, "12345678".repeat(16));
    assert_eq!(cached(&ask(&sim, COMPLETIONS, &body).await), 0);
    assert_eq!(cached(&ask(&sim, COMPLETIONS, &body).await), 16);
    let longer = body.replace(r#"","max"#, r#"x","max"#);
    assert_eq!(cached(&ask(&sim, COMPLETIONS, &longer).await), 32);
    let salted = body.replace('}', r#","cache_salt":"s"}"#);
    assert_eq!(cached(&ask(&sim, COMPLETIONS, &salted).await), 0);
    let stats = sim.stats();
    assert_eq!((stats.cached_tokens, stats.computed_tokens, stats.local_prefills), (48, 32 + 16 + 1 + 32, 4));
}

#[tokio::test]
async fn the_next_turn_hits_prompt_and_answer() {
    let sim = start(Config::default()).await.unwrap();
    let question = "A question of some length, so that it fills a few blocks. ".repeat(5);
    let first = ask(&sim, CHAT, &chat(&question, r#","max_tokens":64,"ignore_eos":true"#)).await;
    let usage = first.json()["usage"]["total_tokens"].as_u64().unwrap();
    let second = format!(
        r#"{{"model":"sim","messages":[{{"role":"user","content":"{question}"}},{{"role":"assistant","content":"{}"}},{{"role":"user","content":"And?"}}]}}"#,
        first.choice(0)
    );
    assert_eq!(cached(&ask(&sim, CHAT, &second).await), usage / 16 * 16);
}

#[tokio::test]
async fn a_small_cache_forgets_the_oldest() {
    let sim = start(Config { cache_tokens: 96, ..Config::default() }).await.unwrap();
    let body =
        |letter: char| format!(r#"{{"model":"sim","prompt":"{}","max_tokens":1}}"#, letter.to_string().repeat(4 * 40));
    assert_eq!(cached(&ask(&sim, COMPLETIONS, &body('a')).await), 0);
    assert_eq!(cached(&ask(&sim, COMPLETIONS, &body('a')).await), 32);
    for letter in ['b', 'c', 'd'] {
        ask(&sim, COMPLETIONS, &body(letter)).await;
    }
    assert_eq!(cached(&ask(&sim, COMPLETIONS, &body('a')).await), 0);
    sim.clear_cache();
    assert_eq!(cached(&ask(&sim, COMPLETIONS, &body('a')).await), 0);
    let too_long = format!(r#"{{"model":"sim","prompt":"{}","max_tokens":1}}"#, "a".repeat(4 * 97));
    assert_eq!(ask(&sim, COMPLETIONS, &too_long).await.status, 500);
}
