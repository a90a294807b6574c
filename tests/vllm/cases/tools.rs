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

/// Whether what a message says is valid by the schema. vLLM 0.32 lets a random model say a number in place of a named tool's
/// object, on one server too.
fn is_valid(said: &Value) -> bool {
    let is_valid = |text: &&str| {
        let value: Value = serde_json::from_str(text).unwrap_or_default();
        value["city"].is_string() && value["days"].is_u64()
    };
    let texts = texts(said);
    !texts.is_empty() && texts.iter().all(is_valid)
}

/// Each answer to a split request is that of one server, and that of a schema is valid by it unless `max_tokens` cuts it.
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
        // A random model may fill its limit before an object ends; a cut answer is no JSON.
        let is_cut = answer.json()["choices"][0]["finish_reason"] == "length";
        assert!(what != "a schema" || is_cut || is_valid(&said), "{what}: {said}");
        let valid = match what {
            "a choice" => "",
            _ if is_valid(&said) => ", valid by the schema",
            _ if is_cut => ", cut by max_tokens",
            _ => ", not valid by the schema",
        };
        println!("vllm: {:?}: {what}: as from one server{valid}", pair.connector);
    }
}
