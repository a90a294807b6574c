//! Forced tool calls and structured output: the decode server follows the grammar from its first token on, of a prompt that
//! another server has computed.

use pd_support::body::CHAT;
use serde_json::{Value, json};

use crate::Pair;
use crate::checks::new_prompt;
use crate::servers::client;

/// What both servers may say: few values, so that random weights come to an end.
fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome", "Lima"]}, "days": {"enum": [1, 2, 3]}},
        "required": ["city", "days"],
        "additionalProperties": false,
    })
}

fn body(more: Value) -> Value {
    let mut body = json!({
        "model": "tiny",
        "temperature": 0,
        "max_tokens": 200,
        "messages": [{"role": "user", "content": new_prompt(900)}],
    });
    if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
        body.extend(more);
    }
    body
}

/// What a message says: names and arguments of its tool calls, or else its text.
fn said(answer: &Value) -> Value {
    let message = &answer["choices"][0]["message"];
    match message["tool_calls"].as_array().map(Vec::as_slice) {
        Some([]) | None => message["content"].clone(),
        Some(calls) => {
            calls.iter().map(|call| json!([call["function"]["name"], call["function"]["arguments"]])).collect()
        }
    }
}

/// JSON texts of what a message says.
fn texts(said: &Value) -> Vec<&str> {
    match said.as_array() {
        Some(calls) => calls.iter().filter_map(|call| call[1].as_str()).collect(),
        None => said.as_str().into_iter().collect(),
    }
}

/// Each answer is that of one server and of a split request, and valid by the schema unless `max_tokens` cuts it.
pub async fn forced_calls_and_schemas_are_right(pair: &Pair) {
    let tool = json!({"type": "function", "function": {"name": "weather", "parameters": schema()}});
    let named = json!({"type": "function", "function": {"name": "weather"}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": schema(), "strict": true}});
    let split = "pd_requests_total{decision=\"split\"}";
    for (what, more) in [
        ("a named tool", json!({"tools": [tool], "tool_choice": named})),
        ("any tool", json!({"tools": [tool], "tool_choice": "required"})),
        ("a schema", json!({"response_format": format})),
        ("a choice", json!({"structured_outputs": {"choice": ["left", "right"]}})),
    ] {
        let body = body(more).to_string();
        let before = pair.rig.metric(split).await;
        let expected = pair.aggregated.client().await.post(CHAT, body.clone()).await;
        let answer = client(pair.rig.address()).await.post(CHAT, body).await;
        assert_eq!((expected.status, answer.status), (200, 200), "{what}: {}", answer.text());
        let said = said(&answer.json());
        assert_eq!(said, self::said(&expected.json()), "{what}");
        pair.rig.until_metric(split, |value| value == before + 1.0).await;
        // A random model may fill its limit before a call ends; a cut answer is no JSON.
        let is_cut = answer.json()["choices"][0]["finish_reason"] == "length";
        if what != "a choice" && !is_cut {
            let texts = texts(&said);
            assert!(!texts.is_empty(), "{what}: {said}");
            for text in texts {
                let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{what}: {error}: {text}"));
                assert!(value["city"].is_string() && value["days"].is_u64(), "{what}: {value}");
            }
        }
        println!("vllm: {:?}: {what}: right{}", pair.connector, if is_cut { ", cut by max_tokens" } else { "" });
    }
}
