//! A server of the test itself that the cluster reaches by a Service: it records requests and answers 200.

use std::sync::{Arc, Mutex};

use pd_cluster::network::NODE;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Name of the Service.
pub const NAME: &str = "test-listener";
/// Its answer: a header that external authorization may pass on.
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nx-auth-user: bob\r\ncontent-length: 0\r\n\r\n";

/// A running server.
pub struct Listener {
    requests: Arc<Mutex<Vec<String>>>,
    port: u16,
    task: JoinHandle<()>,
}

impl Listener {
    pub async fn start() -> Self {
        let listener = TcpListener::bind((NODE, 0)).await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let requests = Arc::<Mutex<Vec<String>>>::default();
        let recorded = Arc::clone(&requests);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&recorded)));
            }
        });
        Self { requests, port, task }
    }

    /// Service and addresses, as a document of a manifest.
    pub fn manifest(&self) -> String {
        let port = self.port;
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {NAME}, namespace: llm}}\n\
             spec: {{ports: [{{name: http, port: 80, targetPort: {port}}}]}}\n\
             ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: {NAME}, namespace: llm, labels: {{kubernetes.io/service-name: {NAME}}}}}\n\
             addressType: IPv4\nports: [{{name: http, port: {port}}}]\n\
             endpoints: [{{addresses: ['{NODE}'], conditions: {{ready: true}}}}]\n"
        )
    }

    /// The requests so far, each as text with its headers.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("requests").clone()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Requests with a `content-length`, which Envoy's buffer filter sets, and those without a body.
async fn serve(mut stream: TcpStream, recorded: Arc<Mutex<Vec<String>>>) {
    let mut read = Vec::new();
    loop {
        let Some(request) = one(&mut stream, &mut read).await else { return };
        recorded.lock().expect("requests").push(request);
        if stream.write_all(ANSWER).await.is_err() {
            return;
        }
    }
}

/// The next request; what was read beyond it stays in `read`.
async fn one(stream: &mut TcpStream, read: &mut Vec<u8>) -> Option<String> {
    let head = loop {
        if let Some(end) = read.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        more(stream, read).await?;
    };
    let text = String::from_utf8_lossy(&read[..head]).to_ascii_lowercase();
    let length = text.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse::<usize>().ok());
    let end = head + length.unwrap_or(0);
    while read.len() < end {
        more(stream, read).await?;
    }
    Some(String::from_utf8_lossy(&read.drain(..end).collect::<Vec<_>>()).into_owned())
}

async fn more(stream: &mut TcpStream, read: &mut Vec<u8>) -> Option<()> {
    (stream.read_buf(read).await.ok()? > 0).then_some(())
}
