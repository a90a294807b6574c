//! APIs without a prompt: embeddings, media, batches of chats and counts of tokens.
//!
//! Each answer depends on the request's body, so a test sees a body that changed on its way.

use bytes::Bytes;
use http::request::Parts;
use http::{Method, Response, StatusCode};
use serde_json::{Value, json};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::answer::{self, Body};
use crate::api_error::ApiError;
use crate::engine::Pod;
use crate::record::base64;
use crate::tokens::BYTES_PER_TOKEN;

/// Numbers of an embedding.
const DIMENSIONS: u64 = 8;

/// The answer of one of these APIs; `None` for another path.
pub(crate) fn serve(pod: &Pod, parts: &Parts, body: &Bytes) -> Option<Response<Body>> {
    if parts.method != Method::POST {
        return None;
    }
    let answer = match parts.uri.path() {
        "/v1/embeddings" => read(body).and_then(|request| embeddings(pod, &request)),
        "/v1/messages/count_tokens" => read(body).and_then(|request| {
            check_model(pod, &request["model"])?;
            Ok(json!({"input_tokens": tokens(&request["messages"].to_string())}))
        }),
        "/v1/chat/completions/batch" => read(body).and_then(|request| chats(pod, &request)),
        "/v1/audio/transcriptions" | "/v1/audio/translations" => {
            form(pod, body, "file").map(|file| json!({"text": file, "usage": {"type": "duration", "seconds": 1}}))
        }
        "/v1/images/edits" => {
            form(pod, body, "image").map(|image| json!({"created": 0, "data": [{"b64_json": image}]}))
        }
        "/v1/images/generations" => read(body).and_then(|request| {
            check_model(pod, &request["model"])?;
            Ok(json!({"created": 0, "data": [{"b64_json": hash(&request["prompt"].to_string())}]}))
        }),
        _ => return None,
    };
    Some(match answer {
        Ok(answer) => answer::json(StatusCode::OK, answer.to_string()),
        Err(error) => answer::error(&error),
    })
}

fn read(body: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(body).map_err(|error| ApiError::bad_request(format!("JSON decode error: {error}")))
}

fn check_model(pod: &Pod, model: &Value) -> Result<(), ApiError> {
    let Some(name) = model.as_str() else { return Err(ApiError::bad_field("model", "Field required")) };
    let is_served = pod.config.models.iter().chain(&pod.loras()).any(|served| served == name);
    if is_served { Ok(()) } else { Err(ApiError::unknown_model(name)) }
}

fn tokens(text: &str) -> usize {
    text.len().div_ceil(BYTES_PER_TOKEN)
}

fn embeddings(pod: &Pod, request: &Value) -> Result<Value, ApiError> {
    check_model(pod, &request["model"])?;
    let inputs = match &request["input"] {
        Value::Array(list) if list.iter().all(|input| input.is_string() || input.is_array()) => list.clone(),
        input @ (Value::Array(_) | Value::String(_)) => vec![input.clone()],
        _ => return Err(ApiError::bad_field("input", "Field required")),
    };
    let texts: Vec<String> = inputs.iter().map(Value::to_string).collect();
    let data: Vec<Value> = texts
        .iter()
        .enumerate()
        .map(|(index, text)| {
            let of = |seed| (xxh3_64_with_seed(text.as_bytes(), seed) >> 40) as f32 / (1 << 24) as f32;
            let vector: Vec<f32> = (0..DIMENSIONS).map(of).collect();
            let embedding = if request["encoding_format"] == "base64" {
                base64(&vector.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>()).into()
            } else {
                json!(vector)
            };
            json!({"index": index, "object": "embedding", "embedding": embedding})
        })
        .collect();
    let used: usize = texts.iter().map(|text| tokens(text)).sum();
    let usage = json!({"prompt_tokens": used, "total_tokens": used, "completion_tokens": 0});
    Ok(json!({"id": "embd-1", "object": "list", "created": 0, "model": request["model"], "data": data, "usage": usage}))
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|window| window == wanted)
}

/// vLLM's batch: a conversation in each element of `messages`.
fn chats(pod: &Pod, request: &Value) -> Result<Value, ApiError> {
    check_model(pod, &request["model"])?;
    let Value::Array(conversations) = &request["messages"] else {
        return Err(ApiError::bad_field("messages", "Field required"));
    };
    let choice = |(index, chat): (usize, &Value)| {
        let message = json!({"role": "assistant", "content": hash(&chat.to_string())});
        json!({"index": index, "message": message, "finish_reason": "stop"})
    };
    let choices: Vec<Value> = conversations.iter().enumerate().map(choice).collect();
    let used = tokens(&request["messages"].to_string());
    let usage = json!({"prompt_tokens": used, "completion_tokens": 1, "total_tokens": used + 1});
    let answer = json!({"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": request["model"]});
    let mut answer = answer.as_object().cloned().unwrap_or_default();
    answer.extend([("choices".to_owned(), choices.into()), ("usage".to_owned(), usage)]);
    Ok(answer.into())
}

fn hash(text: &str) -> String {
    format!("{:016x}", xxh3_64(text.as_bytes()))
}

/// Reads a form with a model and a file; the hash of the file.
fn form(pod: &Pod, body: &[u8], file: &'static str) -> Result<String, ApiError> {
    // The first line is the delimiter. Of a form of another kind nothing is read.
    let delimiter = find(body, b"\r\n").map(|end| &body[..end]).filter(|line| line.starts_with(b"--"));
    let Some(delimiter) = delimiter else {
        return Err(ApiError { status: 415, ..ApiError::bad_request("not multipart/form-data") });
    };
    let field = |name: &str| -> Option<&[u8]> {
        let start = find(body, format!("name=\"{name}\"").as_bytes())?;
        let content = &body[start..];
        let content = &content[find(content, b"\r\n\r\n")? + 4..];
        Some(&content[..find(content, &[b"\r\n", delimiter].concat())?])
    };
    check_model(pod, &field("model").map_or(Value::Null, |model| String::from_utf8_lossy(model).into()))?;
    let Some(content) = field(file) else { return Err(ApiError::bad_field(file, "Field required")) };
    Ok(format!("{:016x}", xxh3_64(content)))
}
