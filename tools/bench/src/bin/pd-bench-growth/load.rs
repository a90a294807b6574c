//! Kinds of load beside the closed loop: at a fixed rate, a connection for each request, and streams that stay open.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use pd_bench::engine::{INTERVAL_HEADER, TOKENS_HEADER, head_length};
use pd_bench::prompt::{Sharing, Template};
use pd_support::client::{Client, Http, Streaming};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// As many as engines' clients of HTTP/2 open without asking what the server allows.
const STREAMS_PER_CONNECTION: usize = 100;

/// Sends requests of so many bytes at a fixed rate, each on a connection that no other request uses at that time. Returns
/// the nanoseconds of each from the moment at which it was due, sorted.
///
/// # Errors
/// When an answer is not 200.
pub async fn at_rate(gateway: SocketAddr, bytes: usize, rate: f64, time: Duration, mark: &mut u64) -> Result<Vec<u64>> {
    let (mut free, mut busy, mut latencies) = (Vec::<TcpStream>::new(), JoinSet::new(), Vec::new());
    let template = Template::chat(bytes, Sharing::None, false, "");
    let begun = Instant::now();
    for number in 0..(rate * time.as_secs_f64()) as u64 {
        let due = begun + Duration::from_secs_f64(number as f64 / rate);
        tokio::time::sleep_until(due.into()).await;
        while let Some(done) = busy.try_join_next() {
            let (stream, nanos) = done.context("a request's task failed")??;
            free.push(stream);
            latencies.push(nanos);
        }
        let stream = match free.pop() {
            Some(stream) => stream,
            None => connect(gateway).await?,
        };
        *mark += 1;
        let request = template.clone().marked(*mark).to_vec();
        busy.spawn_local(async move {
            let stream = exchange(stream, &request).await?;
            anyhow::Ok((stream, due.elapsed().as_nanos() as u64))
        });
    }
    while let Some(done) = busy.join_next().await {
        latencies.push(done.context("a request's task failed")??.1);
    }
    latencies.sort_unstable();
    Ok(latencies)
}

/// Opens a connection for each request, `tasks` at once, for this time. Returns the number of requests.
///
/// # Errors
/// When an answer is not 200.
pub async fn new_connections(gateway: SocketAddr, tasks: u64, time: Duration, mark: u64) -> Result<u64> {
    let mut running = JoinSet::new();
    let end = Instant::now() + time;
    for task in 0..tasks {
        running.spawn_local(async move {
            let mut template = Template::chat(4_000, Sharing::None, false, "");
            let mut requests = 0;
            while Instant::now() < end {
                let request = template.marked(mark + (task << 24) + requests).to_vec();
                exchange(connect(gateway).await?, &request).await?;
                requests += 1;
            }
            anyhow::Ok(requests)
        });
    }
    let mut requests = 0;
    while let Some(done) = running.join_next().await {
        requests += done.context("a connection's task failed")??;
    }
    Ok(requests)
}

/// Requests that wait for an answer. Dropping it ends them.
pub struct Open {
    streams: Vec<TcpStream>,
}

impl Open {
    /// None yet.
    pub fn new() -> Self {
        Self { streams: Vec::new() }
    }

    /// Sends requests of so many bytes that nobody answers, until there are so many.
    ///
    /// # Errors
    /// When a connection fails.
    pub async fn requests(&mut self, gateway: SocketAddr, count: usize, bytes: usize, mark: u64) -> Result<()> {
        let mut template = Template::chat(bytes, Sharing::None, false, "");
        while self.streams.len() < count {
            let mut stream = connect(gateway).await?;
            stream.write_all(template.marked(mark + self.streams.len() as u64)).await?;
            self.streams.push(stream);
        }
        Ok(())
    }
}

/// Streams of which the first event is there. Dropping it ends them.
///
/// They share connections of HTTP/2: of a process that may open 20,000 files, Envoy then has 10,000 streams, with one
/// connection to an engine for each.
pub struct Streams {
    clients: Vec<Client>,
    open: Vec<Streaming>,
}

impl Streams {
    /// None yet.
    pub fn new() -> Self {
        Self { clients: Vec::new(), open: Vec::new() }
    }

    /// Opens streams until there are so many, each with a token every minute.
    ///
    /// # Errors
    /// When an answer is not 200.
    pub async fn open(&mut self, gateway: SocketAddr, count: usize, mark: u64) -> Result<()> {
        let mut template = Template::chat(4_000, Sharing::None, true, "");
        let headers: [(&str, &[u8]); 2] = [(TOKENS_HEADER, b"1000"), (INTERVAL_HEADER, b"60000")];
        while self.open.len() < count {
            if self.open.len() >= self.clients.len() * STREAMS_PER_CONNECTION {
                self.clients.push(Client::try_connect(gateway, Http::Two).await?);
            }
            let client = self.clients.last_mut().context("there is a connection")?;
            let body = template.marked_body(mark + self.open.len() as u64).to_vec();
            let mut stream = client.try_open(client.json("/v1/chat/completions", body, &headers)).await?;
            let first = stream.event().await?;
            ensure!(stream.status == 200 && first.is_some(), "status {} {first:?}", stream.status);
            self.open.push(stream);
        }
        Ok(())
    }
}

async fn connect(gateway: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(gateway).await.context("connect to Envoy")?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Sends a request and reads an answer that says its length.
async fn exchange(mut stream: TcpStream, request: &[u8]) -> Result<TcpStream> {
    stream.write_all(request).await?;
    let mut answer = Vec::new();
    let mut buffer = vec![0; 16 << 10];
    loop {
        let read = stream.read(&mut buffer).await?;
        ensure!(read > 0, "Envoy closed a connection instead of an answer");
        answer.extend_from_slice(&buffer[..read]);
        let Some(head) = head_length(&answer) else { continue };
        ensure!(answer.starts_with(b"HTTP/1.1 200"), "Envoy answered: {}", String::from_utf8_lossy(&answer));
        let text = String::from_utf8_lossy(&answer[..head]).into_owned();
        let length = text.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse().ok());
        if answer.len() >= head + length.unwrap_or(0_usize) {
            return Ok(stream);
        }
    }
}
