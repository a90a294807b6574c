//! Images, sounds and documents in prompts: they count by themselves, not as text.

use pd_support::body::{CHAT, chat};
use pd_support::client::{BOTH, Http};
use pd_tests::rig::{Rig, run};
use serde_json::json;

use crate::support::{assert_right, logged_chat, new_id};

/// A PNG of 560 by 700 pixels in `bytes` bytes of base64, unlike any before.
fn image(bytes: usize) -> String {
    let mut data = format!("iVBORw0KGgoAAAANSUhEUgAAAjAAAAK8CAIAAAAA{}", new_id("image").replace('-', "/"));
    data.extend(std::iter::repeat_n('A', bytes.saturating_sub(data.len())));
    data
}

fn parts(bytes: usize) -> Vec<String> {
    let url = format!("data:image/png;base64,{}", image(bytes));
    vec![
        format!(r#"{{"type":"image_url","image_url":{{"url":"{url}","detail":"high"}}}}"#),
        format!(r#"{{"type":"input_audio","input_audio":{{"data":"{}","format":"wav"}}}}"#, image(bytes)),
        format!(
            r#"{{"type":"file","file":{{"filename":"a.pdf","file_data":"data:application/pdf;base64,{}"}}}}"#,
            image(bytes)
        ),
    ]
}

fn ask_about(part: &str) -> String {
    let text = new_id("what is this");
    format!(
        r#"{{"model":"sim","messages":[{{"role":"user","content":[{part},{{"type":"text","text":"{text}"}}]}}],"max_tokens":8}}"#
    )
}

#[test]
fn four_megabytes_of_an_image_are_neither_shed_nor_counted_as_text() {
    run(async {
        let rig = Rig::builder().pool(json!({"max_tokens": 20_000})).start().await;
        for http in BOTH {
            let mut client = rig.client(http).await;
            for part in parts(4 << 20) {
                let body = ask_about(&part);
                let before = rig.metric("pd_prompt_tokens_total").await;
                let answer = client.send(client.json(CHAT, body.clone(), &[("x-pd-deadline-ms", b"2000")])).await;
                assert_right(&answer, &body);
                let after = rig.until_metric("pd_prompt_tokens_total", |value| value > before).await;
                assert!((100.0..4_000.0).contains(&(after - before)), "{}", after - before);
            }
        }
        rig.until_idle().await;
    });
}

#[test]
fn images_leave_the_bytes_per_token_and_the_threshold_as_they_are() {
    run(async {
        let rig = Rig::start().await;
        let mut client = rig.client(Http::One).await;
        for _ in 0..30 {
            for part in parts(200_000) {
                let body = ask_about(&part);
                assert_right(&client.post(CHAT, body.clone()).await, &body);
            }
        }
        // A prompt of 300 tokens is still split: its length is estimated as before.
        let body = chat(&[&pd_support::body::words(&new_id("prompt"), 1_200)], r#","max_tokens":8"#);
        let (request, path) = logged_chat(&client, &body, &[]);
        assert_right(&client.send(request).await, &body);
        assert_eq!(rig.access_log_of(&path).await["decision"], "split");
    });
}

#[test]
fn a_conversation_about_an_image_stays_where_the_image_is() {
    run(async {
        let rig = Rig::start().await;
        let mut client = rig.client(Http::One).await;
        for _ in 0..4 {
            let body = ask_about(&parts(50_000)[0]);
            let (request, path) = logged_chat(&client, &body, &[]);
            assert_right(&client.send(request).await, &body);
            let first = rig.access_log_of(&path).await;
            assert_eq!(first["decision"], "split", "an image is long");
            let second = body.replacen(
                "}],\"max",
                "},{\"role\":\"assistant\",\"content\":\"A cat.\"},{\"role\":\"user\",\"content\":\"And?\"}],\"max",
                1,
            );
            let (request, path) = logged_chat(&client, &second, &[]);
            assert_right(&client.send(request).await, &second);
            let log = rig.access_log_of(&path).await;
            assert_eq!((&log["reason"], &log["decode"]), (&json!("cached"), &first["decode"]));
        }
    });
}
