//! Bodies of requests and texts of answers.

use pd_sim::text_of_ids;
use serde_json::Value;

/// Path of chat completions.
pub const CHAT: &str = "/v1/chat/completions";
/// Path of completions.
pub const COMPLETIONS: &str = "/v1/completions";

/// Text of that many bytes, equal for equal seeds and unlike for unlike ones from the first word.
#[must_use]
pub fn words(seed: &str, bytes: usize) -> String {
    // FNV-1a, then Knuth's generator: any mixing does.
    let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let mut state = seed.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
    let mut text = String::with_capacity(bytes + 8);
    while text.len() < bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        for shift in [59, 54, 49, 44, 39] {
            text.push(char::from(b"abcdefghijklmnopqrstuvwxyzaeiour"[(state >> shift & 31) as usize]));
        }
        text.push(' ');
    }
    text.truncate(bytes);
    text
}

/// A chat of messages of the user and the assistant in turn; `rest` are more members, each with a comma in front.
#[must_use]
pub fn chat(turns: &[&str], rest: &str) -> String {
    let message = |(i, text): (usize, &&str)| {
        let role = if i % 2 == 0 { "user" } else { "assistant" };
        format!(r#"{{"role":"{role}","content":{}}}"#, Value::from(*text))
    };
    let messages: Vec<String> = turns.iter().enumerate().map(message).collect();
    format!(r#"{{"model":"sim","messages":[{}]{rest}}}"#, messages.join(","))
}

/// A completions request; `rest` as in [`chat`].
#[must_use]
pub fn completion(prompt: &str, rest: &str) -> String {
    format!(r#"{{"model":"sim","prompt":{}{rest}}}"#, Value::from(prompt))
}

/// A request for either path.
#[must_use]
pub fn request(path: &str, prompt: &str, rest: &str) -> String {
    if path == CHAT { chat(&[prompt], rest) } else { completion(prompt, rest) }
}

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
