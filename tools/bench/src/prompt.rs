//! Chat requests of a given size.

use std::io::Write as _;

/// Digits that make a prompt unlike every other.
const MARK_DIGITS: usize = 16;

/// Tokens that each request asks for.
pub const COMPLETION_TOKENS: u64 = 128;

/// Requests that can be sent again and again with another mark each time, without building them anew.
#[derive(Clone, Debug)]
pub struct Template {
    bytes: Vec<u8>,
    /// Where the body begins.
    body: usize,
    mark: usize,
}

/// Where two prompts begin to differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sharing {
    /// At once: no two prompts have a block in common.
    None,
    /// In the middle.
    Half,
    /// Never: all prompts are equal.
    Whole,
}

impl Template {
    /// A chat request whose body has about `body_bytes`; `headers` are further lines, each ended by `\r\n`.
    #[must_use]
    pub fn chat(body_bytes: usize, sharing: Sharing, stream: bool, headers: &str) -> Self {
        const SENTENCE: &str =
            "The quick brown fox jumps over the lazy dog,\\nsays \\\"nothing to see here\\\" and goes. ";
        let (head, tail) = (
            r#"{"model":"m","messages":[{"role":"user","content":""#,
            format!(r#""}}],"max_tokens":{COMPLETION_TOKENS},"temperature":0.7,"stream":{stream}}}"#),
        );
        let room = body_bytes.saturating_sub(head.len() + tail.len() + MARK_DIGITS);
        let before = if sharing == Sharing::Half { room / 2 } else { 0 };
        let fill = |bytes: usize| {
            let mut text = SENTENCE.repeat(bytes / SENTENCE.len());
            text.extend(std::iter::repeat_n('x', bytes - text.len()));
            text
        };
        let mark = "0".repeat(MARK_DIGITS);
        let body = [head, &fill(before), &mark, &fill(room - before), &tail].concat();
        let lines = [
            "POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\nuser-agent: OpenAI/Python 1.99.0\r\n",
            "content-type: application/json\r\naccept: application/json\r\nauthorization: Bearer sk-none\r\n",
            headers,
        ]
        .concat();
        let mut bytes = format!("{lines}content-length: {}\r\n\r\n", body.len()).into_bytes();
        let (end, text, body) = (bytes.len() + head.len() + before, body, bytes.len());
        bytes.extend_from_slice(text.as_bytes());
        Self { bytes, body, mark: if sharing == Sharing::Whole { 0 } else { end } }
    }

    /// The request with a mark.
    pub fn marked(&mut self, mark: u64) -> &[u8] {
        if self.mark > 0
            && let Some(mut digits) = self.bytes.get_mut(self.mark..self.mark + MARK_DIGITS)
        {
            // Sixteen hexadecimal digits hold every u64.
            let _ = write!(digits, "{mark:016x}");
        }
        &self.bytes
    }

    /// The body of the request with a mark.
    pub fn marked_body(&mut self, mark: u64) -> &[u8] {
        let body = self.body;
        self.marked(mark).get(body..).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(template: &mut Template, mark: u64) -> Vec<u8> {
        let bytes = template.marked(mark);
        let index = bytes.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
        let body = bytes[index..].to_vec();
        assert_eq!(template.marked_body(mark), body);
        body
    }

    #[test]
    fn a_body_is_json_of_the_size_asked_for() {
        for size in [200, 4_000, 220_000] {
            let mut template = Template::chat(size, Sharing::None, true, "");
            let body = body(&mut template, 77);
            assert_eq!(body.len(), size);
            assert!(serde_json::from_slice::<serde_json::Value>(&body).unwrap()["stream"].as_bool().unwrap());
        }
    }

    #[test]
    fn marks_differ_where_they_should() {
        for (sharing, equal) in [(Sharing::None, 0.0..0.1), (Sharing::Half, 0.4..0.6), (Sharing::Whole, 0.9..1.1)] {
            let mut template = Template::chat(4_000, sharing, false, "");
            let (a, b) = (body(&mut template, 1 << 60), body(&mut template, 2 << 60));
            let same = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
            assert!(equal.contains(&(same as f64 / 4_000.0)), "{sharing:?}: {same}");
        }
    }
}
