//! Engines that do nothing but answer: one task per connection, a fixed answer, so that the CPU goes to Envoy.

use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Header by which a client asks for the prefill answer where no filter does.
pub const LEG_HEADER: &str = "x-bench-leg";
/// Header by which a client asks for a stream of so many tokens.
pub const TOKENS_HEADER: &str = "x-bench-tokens";
/// Header by which a client asks for more time between two tokens of a stream, in milliseconds.
pub const INTERVAL_HEADER: &str = "x-bench-interval-ms";
/// Time between two tokens of a stream, unless the client asks for more.
pub const TOKEN_INTERVAL: Duration = Duration::from_millis(2);

/// What an engine answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answers {
    /// One token and KV parameters.
    Prefill,
    /// A completion, or a stream if asked for.
    Decode,
    /// The one or the other, as [`LEG_HEADER`] says.
    Asked,
}

/// A listening engine; its connections end when this is dropped.
pub struct Engine {
    /// Its address.
    pub address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Engine {
    /// Starts an engine on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// When there is no port.
    pub async fn start(answers: Answers) -> Result<Self> {
        Self::start_at("127.0.0.1", answers).await
    }

    /// Starts an engine on a free port of an IPv4 address. With `0.0.0.0` each address in 127.0.0.0/8 is one of its own, so
    /// that it can stand for thousands of endpoints.
    ///
    /// # Errors
    /// When there is no port.
    pub async fn start_at(ip: &str, answers: Answers) -> Result<Self> {
        let listener = TcpListener::bind((ip, 0)).await?;
        let address = listener.local_addr()?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(async move {
                    // Envoy closed the connection, as it may.
                    let _ = serve(stream, answers).await;
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self { address, _tasks: tasks })
    }
}

/// How the end of a message's body is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// So many bytes.
    Length(usize),
    /// The last chunk.
    Chunked,
}

/// Value of a header in a head whose names are in lower case, as Envoy writes them.
pub(crate) fn header<'a>(head: &'a [u8], name: &str) -> Option<&'a [u8]> {
    head.split(|byte| *byte == b'\n').find_map(|line| {
        let value = line.strip_prefix(name.as_bytes())?.strip_prefix(b":")?;
        Some(value.trim_ascii())
    })
}

fn number(value: &[u8]) -> Option<usize> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

pub(crate) fn framing(head: &[u8]) -> Framing {
    match header(head, "content-length").and_then(number) {
        Some(bytes) => Framing::Length(bytes),
        None if header(head, "transfer-encoding").is_some() => Framing::Chunked,
        None => Framing::Length(0),
    }
}

/// Length of a message's head, its empty line included, if it is all there.
#[must_use]
pub fn head_length(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|index| index + 4)
}

const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// Reads past a body whose begin is in the buffer already, at `seen`. Says in how many reads.
///
/// What looks like the last chunk is taken for it: no text here holds that.
pub(crate) async fn skip_body(
    stream: &mut TcpStream,
    framing: Framing,
    buffer: &mut [u8],
    seen: Range<usize>,
) -> std::io::Result<usize> {
    let mut reads = 0;
    match framing {
        Framing::Length(bytes) => {
            let mut left = bytes.saturating_sub(seen.len());
            while left > 0 {
                let read = stream.read(buffer).await?;
                if read == 0 {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                left = left.saturating_sub(read);
                reads += 1;
            }
        }
        Framing::Chunked => {
            let mut tail = Vec::with_capacity(2 * LAST_CHUNK.len());
            let mut keep = |bytes: &[u8]| {
                tail.extend_from_slice(&bytes[bytes.len().saturating_sub(LAST_CHUNK.len())..]);
                let excess = tail.len().saturating_sub(LAST_CHUNK.len());
                tail.drain(..excess);
                tail == LAST_CHUNK
            };
            let mut ended = keep(&buffer[seen]);
            while !ended {
                let read = stream.read(buffer).await?;
                if read == 0 {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                ended = keep(&buffer[..read]);
                reads += 1;
            }
        }
    }
    Ok(reads)
}

async fn serve(mut stream: TcpStream, answers: Answers) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let (prefill, decode) = (answer(PREFILL_ANSWER), answer(DECODE_ANSWER));
    let mut buffer = vec![0; 128 << 10];
    let mut filled = 0;
    loop {
        let head_bytes = loop {
            if let Some(bytes) = head_length(&buffer[..filled]) {
                break bytes;
            }
            let read = stream.read(&mut buffer[filled..]).await?;
            if read == 0 {
                return Ok(());
            }
            filled += read;
        };
        let head = &buffer[..head_bytes];
        let is_prefill = match answers {
            Answers::Prefill => true,
            Answers::Decode => false,
            Answers::Asked => header(head, LEG_HEADER) == Some(b"prefill"),
        };
        let tokens = header(head, TOKENS_HEADER).and_then(number);
        let interval = header(head, INTERVAL_HEADER).and_then(number);
        let interval = interval.map_or(TOKEN_INTERVAL, |millis| Duration::from_millis(millis as u64));
        let framing = framing(head);
        skip_body(&mut stream, framing, &mut buffer, head_bytes..filled).await?;
        filled = 0;
        match tokens {
            Some(tokens) if !is_prefill => stream_tokens(&mut stream, tokens, interval).await?,
            _ => stream.write_all(if is_prefill { &prefill } else { &decode }).await?,
        }
    }
}

async fn stream_tokens(stream: &mut TcpStream, tokens: usize, interval: Duration) -> std::io::Result<()> {
    const HEAD: &str = "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
    const EVENT: &str = "data: {\"id\":\"chatcmpl-0f1e2d3c4b5a69788796a5b4c3d2e1f0\",\"object\":\"chat.completion.chunk\",\"created\":1790000000,\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n";
    let event = format!("{:x}\r\n{EVENT}\r\n", EVENT.len());
    stream.write_all(HEAD.as_bytes()).await?;
    let mut ticks = tokio::time::interval(interval);
    for _ in 0..tokens {
        ticks.tick().await;
        stream.write_all(event.as_bytes()).await?;
    }
    stream.write_all(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n").await
}

fn answer(body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-length: {length}\r\ncontent-type: application/json\r\n\r\n{body}"
    )
    .into_bytes()
}

/// As vLLM's NIXL connector answers a leg that ended by length.
const PREFILL_ANSWER: &str = r#"{"id":"chatcmpl-0f1e2d3c4b5a69788796a5b4c3d2e1f0","object":"chat.completion","created":1790000000,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"The","refusal":null,"annotations":null,"audio":null,"function_call":null,"tool_calls":[]},"logprobs":null,"finish_reason":"length","stop_reason":null}],"service_tier":null,"usage":{"prompt_tokens":50,"total_tokens":51,"completion_tokens":1},"kv_transfer_params":{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[101,102,103,104]],"remote_engine_id":"5f0c7e86-2d7a-4a53-9a55-0c6a8d1f3b21","remote_request_id":"chatcmpl-0f1e2d3c4b5a69788796a5b4c3d2e1f0-0","remote_host":"10.0.0.1","remote_port":5600,"tp_size":1}}"#;

const DECODE_ANSWER: &str = r#"{"id":"chatcmpl-0f1e2d3c4b5a69788796a5b4c3d2e1f0","object":"chat.completion","created":1790000000,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"The fox goes on, over hill and dale, past the mill and the river, until it finds another dog to jump over. There it stops for a while, looks back at the way it came, and thinks that a dog that is not lazy would be worth a longer story than this one. Then it goes home.","refusal":null,"annotations":null,"audio":null,"function_call":null,"tool_calls":[]},"logprobs":null,"finish_reason":"stop","stop_reason":null}],"service_tier":null,"usage":{"prompt_tokens":50,"total_tokens":114,"completion_tokens":64},"kv_transfer_params":null}"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_json() {
        for text in [PREFILL_ANSWER, DECODE_ANSWER] {
            assert!(serde_json::from_str::<serde_json::Value>(text).is_ok());
            assert!((600..900).contains(&text.len()), "{}", text.len());
        }
    }

    #[test]
    fn heads_are_read() {
        let head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 12\r\n\r\n";
        assert_eq!(head_length(head), Some(head.len()));
        assert_eq!(framing(head), Framing::Length(12));
        assert_eq!(header(head, "host"), Some(&b"a"[..]));
        assert_eq!(framing(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"), Framing::Chunked);
        assert_eq!(framing(b"GET / HTTP/1.1\r\n\r\n"), Framing::Length(0));
    }
}
