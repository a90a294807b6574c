//! Bodies of answers.

use pd_sim::text_of_ids;
use serde_json::Value;

/// Text of the first choice, of a whole answer or of a stream's events, whatever the API.
#[must_use]
pub fn text(answer: &[u8]) -> String {
    if answer.starts_with(b"{") {
        return choice_text(&serde_json::from_slice(answer).unwrap_or_default());
    }
    let answer = String::from_utf8_lossy(answer);
    let data = answer.lines().filter_map(|line| line.strip_prefix("data: "));
    data.map(|event| choice_text(&serde_json::from_str(event).unwrap_or_default())).collect()
}

fn choice_text(answer: &Value) -> String {
    let choice = &answer["choices"][0];
    let texts = [
        &choice["message"]["content"],
        &choice["delta"]["content"],
        &choice["text"],
        // `/v1/responses`
        &answer["output"][0]["content"][0]["text"],
        &answer["delta"],
        // `/v1/messages`
        &answer["content"][0]["text"],
        &answer["delta"]["text"],
    ];
    // `/inference/v1/generate`
    let ids = choice["token_ids"].as_array().map(|ids| ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()));
    texts.into_iter().find_map(Value::as_str).map_or_else(|| ids.map(text_of_ids).unwrap_or_default(), str::to_owned)
}

/// Whether a stream came to its end.
#[must_use]
pub fn is_done(stream: &[u8]) -> bool {
    stream.ends_with(b"data: [DONE]\n\n")
}
