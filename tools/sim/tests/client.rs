//! A client that sends bytes as they are and reads answers of both kinds.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::TokioExecutor;
use pd_sim::Handle;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

pub const CHAT: &str = "/v1/chat/completions";
pub const COMPLETIONS: &str = "/v1/completions";

/// An answer that ended properly.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// Data of the events of a stream.
    pub fn events(&self) -> Vec<&str> {
        assert_eq!(self.headers["content-type"], "text/event-stream; charset=utf-8");
        let events: Vec<_> = self.text.split_terminator("\n\n").collect();
        events.into_iter().map(|event| event.strip_prefix("data: ").expect("an event is one data line")).collect()
    }

    /// The text of a choice, of a whole answer or put together from a stream.
    pub fn choice(&self, index: u64) -> String {
        let chunks: Vec<Value> = if self.headers["content-type"] == "application/json" {
            vec![self.json()]
        } else {
            let (done, chunks) = self.events().split_last().map(|(done, chunks)| (*done, chunks.to_vec())).unwrap();
            assert_eq!(done, "[DONE]");
            chunks.into_iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect()
        };
        let mut text = String::new();
        for choice in chunks.iter().flat_map(|chunk| chunk["choices"].as_array().expect("choices")) {
            if choice["index"] == index {
                let content = [&choice["message"]["content"], &choice["delta"]["content"], &choice["text"]];
                text.extend(content.into_iter().filter_map(Value::as_str));
            }
        }
        text
    }

    /// `kv_transfer_params` as it stands in the answer.
    pub fn params(&self) -> String {
        #[derive(serde::Deserialize)]
        struct Body<'a> {
            #[serde(borrow)]
            kv_transfer_params: &'a RawValue,
        }
        serde_json::from_str::<Body<'_>>(&self.text).expect("params").kv_transfer_params.get().to_owned()
    }
}

/// Sends a request and reads the answer to its end.
pub async fn send(request: Request<Full<Bytes>>) -> Result<Answer, Error> {
    exchange(request, false).await.0
}

/// As [`send`], and what of the body came before an error.
pub async fn exchange(request: Request<Full<Bytes>>, http2: bool) -> (Result<Answer, Error>, Option<String>) {
    let client = Client::builder(TokioExecutor::new()).http2_only(http2).build_http();
    let response = match client.request(request).await {
        Ok(response) => response,
        Err(error) => return (Err(error), None),
    };
    let (parts, mut body) = response.into_parts();
    let mut text = Vec::new();
    let mut whole = true;
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => text.extend_from_slice(&frame.into_data().unwrap_or_default()),
            Err(_) => {
                whole = false;
                break;
            }
        }
    }
    let text = String::from_utf8(text).expect("text");
    if whole {
        (Ok(Answer { status: parts.status, headers: parts.headers, text }), None)
    } else {
        // Callers that expect a broken body look at the second value only.
        (Ok(Answer { status: parts.status, headers: parts.headers, text: String::new() }), Some(text))
    }
}

pub fn get(handle: &Handle, path: &str) -> Request<Full<Bytes>> {
    Request::get(format!("{}{path}", handle.url())).body(Full::default()).unwrap()
}

pub fn post(handle: &Handle, path: &str, body: &str) -> Request<Full<Bytes>> {
    Request::post(format!("{}{path}", handle.url()))
        .header("content-type", "application/json")
        .body(Full::new(Bytes::copy_from_slice(body.as_bytes())))
        .unwrap()
}

/// A whole exchange that must succeed as HTTP.
pub async fn ask(handle: &Handle, path: &str, body: &str) -> Answer {
    send(post(handle, path, body)).await.unwrap()
}

/// As [`ask`], with a fault for this request.
pub async fn ask_with_fault(handle: &Handle, fault: &str, body: &str) -> Result<Answer, Error> {
    let mut request = post(handle, CHAT, body);
    request.headers_mut().insert(pd_sim::FAULT_HEADER, fault.parse().unwrap());
    send(request).await
}

/// A chat body: one user message and other fields.
pub fn chat(content: &str, fields: &str) -> String {
    let content = serde_json::to_string(content).unwrap();
    format!(r#"{{"model":"sim","messages":[{{"role":"user","content":{content}}}]{fields}}}"#)
}

/// The prefill leg of a chat.
pub fn prefill_leg(content: &str) -> String {
    chat(content, r#","max_tokens":1,"kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false}"#)
}

/// The decode leg of a chat.
pub fn decode_leg(content: &str, params: &str, fields: &str) -> String {
    chat(content, &format!(r#"{fields},"kv_transfer_params":{params}"#))
}

/// A connection with a POST on its way, for tests that leave or look at the socket.
pub async fn begin(address: SocketAddr, path: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    stream
}
