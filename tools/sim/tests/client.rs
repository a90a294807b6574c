//! A client that sends bytes as they are and reads answers of both kinds.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, Request};
use pd_sim::Handle;
use pd_support::body;
pub use pd_support::body::{CHAT, COMPLETIONS};
use pd_support::client::{Broken, Client, Http, Streaming, full};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

/// An answer that ended properly.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
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
pub async fn send(request: Request<Bytes>) -> Result<Answer, Broken> {
    exchange(request, Http::One).await.0
}

/// As [`send`], and what of the body came before an error.
pub async fn exchange(request: Request<Bytes>, http: Http) -> (Result<Answer, Broken>, Option<String>) {
    let (parts, body) = request.into_parts();
    let address = parts.uri.authority().expect("an address").as_str().parse().expect("an address");
    let mut client = match Client::try_connect(address, http).await {
        Ok(client) => client,
        Err(error) => return (Err(error), None),
    };
    let path = parts.uri.path_and_query().expect("a path").as_str();
    let mut request = client.request(parts.method.as_str(), path);
    request.headers_mut().extend(parts.headers);
    *request.body_mut() = full(body);
    let mut streaming = match client.try_open(request).await {
        Ok(streaming) => streaming,
        Err(error) => return (Err(error), None),
    };
    let mut text = Vec::new();
    let whole = loop {
        match streaming.piece().await {
            Ok(Some(piece)) => text.extend_from_slice(&piece),
            Ok(None) => break true,
            Err(_) => break false,
        }
    };
    let text = String::from_utf8(text).expect("text");
    let Streaming { status, headers, .. } = streaming;
    if whole {
        (Ok(Answer { status, headers, text }), None)
    } else {
        // Callers that expect a broken body look at the second value only.
        (Ok(Answer { status, headers, text: String::new() }), Some(text))
    }
}

pub fn get(handle: &Handle, path: &str) -> Request<Bytes> {
    Request::get(format!("{}{path}", handle.url())).body(Bytes::new()).unwrap()
}

pub fn post(handle: &Handle, path: &str, body: &str) -> Request<Bytes> {
    Request::post(format!("{}{path}", handle.url()))
        .header("content-type", "application/json")
        .body(Bytes::copy_from_slice(body.as_bytes()))
        .unwrap()
}

/// A whole exchange that must succeed as HTTP.
pub async fn ask(handle: &Handle, path: &str, body: &str) -> Answer {
    send(post(handle, path, body)).await.unwrap()
}

/// As [`ask`], with a fault for this request.
pub async fn ask_with_fault(handle: &Handle, fault: &str, body: &str) -> Result<Answer, Broken> {
    let mut request = post(handle, CHAT, body);
    request.headers_mut().insert(pd_sim::FAULT_HEADER, fault.parse().unwrap());
    send(request).await
}

/// A chat body: one user message and other fields.
pub fn chat(content: &str, fields: &str) -> String {
    body::chat(&[content], fields)
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
