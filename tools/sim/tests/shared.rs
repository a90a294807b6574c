//! Hand-over through a shared directory.

use pd_sim::{Config, Engine, Role, expected_text, start};

use crate::client::{CHAT, ask, chat, prefill_leg};

#[tokio::test]
async fn decode_finds_what_prefill_left_in_the_directory() {
    let directory = tempfile::tempdir().unwrap();
    let config =
        |role| Config { engine: Engine::VllmShared, shared_dir: Some(directory.path().to_owned()), ..Config::of(role) };
    let (prefill, decode) = (start(config(Role::Prefill)).await.unwrap(), start(config(Role::Decode)).await.unwrap());
    let content = "A prompt that fills some blocks. ".repeat(10);
    let answer = ask(&prefill, CHAT, &prefill_leg(&content)).await;
    assert_eq!(answer.params(), "null");
    let body = chat(&content, "");
    let answer = ask(&decode, CHAT, &body).await;
    assert_eq!(answer.choice(0), expected_text("sim", &body));
    let stats = decode.stats();
    // Whole blocks only: the rest is computed.
    assert_eq!((stats.decode_legs, stats.local_prefills), (1, 0));
    assert!(stats.external_tokens > 0 && stats.external_tokens % 16 == 0 && stats.computed_tokens < 16);
    ask(&decode, CHAT, &chat("Another prompt, which nobody has computed before, of several blocks. So.", "")).await;
    assert_eq!(decode.stats().local_prefills, 1);
}

#[tokio::test]
async fn a_shared_directory_is_asked_for() {
    let config = Config { engine: Engine::VllmShared, ..Config::default() };
    assert!(start(config).await.err().unwrap().to_string().contains("--shared-dir"));
}
