//! Bodies of requests.

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
