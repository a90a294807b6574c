//! Whether a gateway does what it is there for: the KV cache moves, and the engine gets the client's body.

use anyhow::{Result, ensure};
use pd_bench::prompt::{Sharing, Template};
use pd_sim::Stats;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::gateways::{Gateway, Pods, Rig};

/// What one request showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checked {
    /// The decode server used the prefill server's KV cache; `None` where nothing is split.
    pub kv_moved: Option<bool>,
    /// How the client's body arrived.
    pub body: Body,
}

/// How a client's body arrived at the engine that generates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// Byte for byte, with one insertion at most.
    Bytes,
    /// Each of its members has its value; bytes differ.
    Values,
    /// A member is gone or has another value.
    Changed,
}

impl Body {
    pub fn name(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Values => "values",
            Self::Changed => "changed",
        }
    }

    fn of(sent: &[u8], got: &[u8]) -> Self {
        let front = sent.iter().zip(got).take_while(|(a, b)| a == b).count();
        let back = sent.iter().rev().zip(got.iter().rev()).take_while(|(a, b)| a == b).count();
        if front + back >= sent.len() && got.len() >= sent.len() {
            return Self::Bytes;
        }
        let members = |body: &[u8]| serde_json::from_slice::<serde_json::Map<String, Value>>(body).unwrap_or_default();
        let got = members(got);
        let is_kept = members(sent).iter().all(|(name, value)| got.get(name) == Some(value));
        if is_kept { Self::Values } else { Self::Changed }
    }
}

/// Sends one request that nobody has sent before, and looks at what the engines got.
///
/// # Errors
/// When the answer is not 200, or an engine gave a wrong text.
pub async fn one(rig: &Rig, gateway: Gateway, bytes: usize, stream: bool) -> Result<Checked> {
    let pods = rig.pods(gateway);
    let before = counts(pods);
    pods.all().for_each(pd_sim::Handle::clear_requests);
    let mut template = Template::chat(bytes, Sharing::None, stream, "connection: close\r\n");
    let request = template.marked(u64::MAX - std::process::id() as u64 - before.requests).to_vec();
    let mut connection = TcpStream::connect(rig.address(gateway)?).await?;
    connection.write_all(&request).await?;
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer).await?;
    ensure!(answer.starts_with(b"HTTP/1.1 200"), "answered: {}", String::from_utf8_lossy(&answer));
    let after = counts(pods);
    ensure!(after.wrong_text == before.wrong_text, "the text is wrong");
    let start = pd_bench::engine::head_length(&request).unwrap_or(0);
    let got = pods.decode.iter().flat_map(pd_sim::Handle::requests).find(|got| got.path.starts_with("/v1/chat"));
    Ok(Checked {
        kv_moved: gateway.splits().then_some(after.decode_legs > before.decode_legs),
        body: got.map_or(Body::Changed, |got| Body::of(&request[start..], &got.body)),
    })
}

/// Counters of all engines together, as far as they are read here.
fn counts(pods: &Pods) -> Stats {
    pods.all().map(pd_sim::Handle::stats).fold(Stats::default(), |mut sum, stats| {
        sum.requests += stats.requests;
        sum.decode_legs += stats.decode_legs;
        sum.wrong_text += stats.wrong_text;
        sum
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_compared_as_it_arrived() {
        let sent = br#"{"model":"m","temperature":0.70}"#;
        assert_eq!(Body::of(sent, sent), Body::Bytes);
        assert_eq!(Body::of(sent, br#"{"kv":{"a":1},"model":"m","temperature":0.70}"#), Body::Bytes);
        assert_eq!(Body::of(sent, br#"{"temperature":0.7,"model":"m","kv":1}"#), Body::Values);
        assert_eq!(Body::of(sent, br#"{"model":"m"}"#), Body::Changed);
        assert_eq!(Body::of(sent, b""), Body::Changed);
    }
}
