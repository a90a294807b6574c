//! Answers of the APIs beside OpenAI's completions, as vLLM writes them: `/v1/responses`, `/v1/messages` and
//! `/inference/v1/generate`.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::head::{Head, Usage};
use crate::rules::Api;
use crate::shape::CALL_ID;
use crate::tokens::{BYTES_PER_TOKEN, Finish, Output};

/// A whole answer; `kv` is the value of `kv_transfer_params`, absent: no such key.
pub(crate) fn whole<'a>(
    head: &Head,
    outputs: impl Iterator<Item = &'a Output>,
    usage: Usage,
    kv: Option<&str>,
) -> String {
    let mut outputs = outputs.peekable();
    let answer = match (head.api, outputs.peek()) {
        (Api::Responses, Some(output)) => response(head, Some(output), usage),
        (Api::Messages, Some(output)) => message(head, Some(output), usage),
        _ => generated(head, outputs, usage),
    };
    let mut text = answer.to_string();
    if let Some(kv) = kv {
        text.pop();
        text.push_str(&format!(r#","kv_transfer_params":{kv}}}"#));
    }
    text
}

fn response(head: &Head, output: Option<&Output>, usage: Usage) -> Value {
    let is_cut = output.is_some_and(|output| output.finish == Finish::Length && head.shape.tool().is_none());
    let status = match output {
        None => "in_progress",
        Some(_) if is_cut => "incomplete",
        Some(_) => "completed",
    };
    let items: Vec<Value> = output
        .map(|output| {
            let said = head.shape.whole(&output.text);
            if let Some(name) = head.shape.tool() {
                return function_call(head, name, &said, status);
            }
            let content = json!({"type": "output_text", "text": said, "annotations": []});
            json!({
                "type": "message", "id": format!("{}-0", head.id), "role": "assistant", "status": status,
                "content": [content],
            })
        })
        .into_iter()
        .collect();
    json!({
        "id": head.id,
        "object": "response",
        "created_at": head.created,
        "model": head.model,
        "status": status,
        "incomplete_details": is_cut.then(|| json!({"reason": "max_output_tokens"})),
        "output": items,
        "usage": output.map(|_| json!({
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt + usage.completion,
        })),
    })
}

fn function_call(head: &Head, name: &str, arguments: &str, status: &str) -> Value {
    json!({
        "type": "function_call", "id": format!("{}-0", head.id), "call_id": CALL_ID, "name": name, "arguments": arguments,
        "status": status,
    })
}

fn message(head: &Head, output: Option<&Output>, usage: Usage) -> Value {
    let part = |output: &Output| match head.shape.tool() {
        None => json!({"type": "text", "text": head.shape.whole(&output.text)}),
        Some(name) => json!({"type": "tool_use", "id": CALL_ID, "name": name, "input": {"said": output.text}}),
    };
    let content: Vec<Value> = output.map(part).into_iter().collect();
    let (reason, sequence) = output.map_or((None, None), |output| stop(head, output));
    json!({
        "id": head.id,
        "type": "message",
        "role": "assistant",
        "model": head.model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": sequence,
        "usage": {"input_tokens": usage.prompt, "output_tokens": usage.completion},
    })
}

/// Anthropic's reason for the end of a text, and the sequence that ended it.
fn stop<'a>(head: &Head, output: &'a Output) -> (Option<&'a str>, Option<&'a str>) {
    match &output.finish {
        _ if head.shape.tool().is_some() => (Some("tool_use"), None),
        Finish::End => (Some("end_turn"), None),
        Finish::Stop(sequence) => (Some("stop_sequence"), Some(sequence)),
        Finish::Length => (Some("max_tokens"), None),
    }
}

fn generated<'a>(head: &Head, outputs: impl Iterator<Item = &'a Output>, usage: Usage) -> Value {
    let choice = |(index, output): (usize, &Output)| {
        json!({
            "index": index,
            "logprobs": null,
            "finish_reason": output.finish.reason(),
            "token_ids": ids(&output.text),
        })
    };
    let usage: Value = serde_json::from_str(&usage.to_json()).unwrap_or_default();
    json!({
        "request_id": head.id,
        "choices": outputs.enumerate().map(choice).collect::<Vec<_>>(),
        "prompt_logprobs": null,
        "usage": usage,
    })
}

/// Token ids of a text: the bytes that make each.
fn ids(text: &str) -> Vec<u32> {
    let id = |token: &[u8]| token.iter().rev().fold(0_u32, |id, byte| id << 8 | u32::from(*byte));
    text.as_bytes().chunks(BYTES_PER_TOKEN).map(id).collect()
}

/// The text that token ids stand for: the inverse of what `/inference/v1/generate` answers with.
#[must_use]
pub fn text_of_ids(ids: impl IntoIterator<Item = u32>) -> String {
    let bytes: Vec<u8> = ids.into_iter().flat_map(u32::to_le_bytes).filter(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What a stream begins with.
pub(crate) fn first_events(head: &Head, usage: Usage) -> Vec<Bytes> {
    match head.api {
        Api::Responses => {
            let item = head.shape.tool().map(|name| function_call(head, name, "", "in_progress"));
            let added = item.map(|item| event("response.output_item.added", json!({"output_index": 0, "item": item})));
            let created = event("response.created", json!({"response": response(head, None, usage)}));
            [created].into_iter().chain(added).collect()
        }
        Api::Messages => {
            let block = match head.shape.tool() {
                None => json!({"type": "text", "text": ""}),
                Some(name) => json!({"type": "tool_use", "id": CALL_ID, "name": name, "input": {}}),
            };
            vec![
                event("message_start", json!({"message": message(head, None, usage)})),
                event("content_block_start", json!({"index": 0, "content_block": block})),
            ]
        }
        _ => Vec::new(),
    }
}

/// One piece of a choice's text.
pub(crate) fn token_event(head: &Head, index: usize, (text, is_first): (&str, bool), last: Option<&Output>) -> Bytes {
    let piece = head.shape.piece(text, is_first, last.is_some());
    let is_call = head.shape.tool().is_some();
    match head.api {
        Api::Responses if is_call => event(
            "response.function_call_arguments.delta",
            json!({"item_id": format!("{}-0", head.id), "output_index": 0, "delta": piece}),
        ),
        Api::Responses => event(
            "response.output_text.delta",
            json!({"item_id": format!("{}-0", head.id), "output_index": 0, "content_index": 0, "delta": piece}),
        ),
        Api::Messages => {
            let delta = match is_call {
                true => json!({"type": "input_json_delta", "partial_json": piece}),
                false => json!({"type": "text_delta", "text": piece}),
            };
            event("content_block_delta", json!({"index": 0, "delta": delta}))
        }
        _ => {
            let finish = last.map(|output| output.finish.reason());
            let choice = json!({"index": index, "logprobs": null, "finish_reason": finish, "token_ids": ids(text)});
            format!("data: {}\n\n", json!({"request_id": head.id, "choices": [choice]})).into()
        }
    }
}

/// What a stream ends with.
pub(crate) fn last_events(head: &Head, output: Option<&Output>, usage: Usage) -> Vec<Bytes> {
    match head.api {
        Api::Responses => {
            let answer = response(head, output, usage);
            let item = head.shape.tool().map(|_| answer["output"][0].clone());
            let done = item.map(|item| event("response.output_item.done", json!({"output_index": 0, "item": item})));
            done.into_iter().chain([event("response.completed", json!({"response": answer}))]).collect()
        }
        Api::Messages => {
            let (reason, sequence) = output.map_or((None, None), |output| stop(head, output));
            let delta = json!({"stop_reason": reason, "stop_sequence": sequence});
            let usage = json!({"input_tokens": usage.prompt, "output_tokens": usage.completion});
            vec![
                event("content_block_stop", json!({"index": 0})),
                event("message_delta", json!({"delta": delta, "usage": usage})),
                event("message_stop", json!({})),
            ]
        }
        _ => Vec::new(),
    }
}

/// An event that says its name twice, as both APIs have it.
fn event(name: &str, mut data: Value) -> Bytes {
    let mut members = Map::from_iter([("type".to_owned(), name.into())]);
    members.append(data.as_object_mut().unwrap_or(&mut Map::new()));
    format!("event: {name}\ndata: {}\n\n", Value::Object(members)).into()
}
