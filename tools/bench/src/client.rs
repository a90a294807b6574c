//! Closed-loop load: each connection sends its next request when the answer to the last is there.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::engine::{framing, head_length, skip_body};
use crate::prompt::Template;

/// When a run ends. Requests in flight are always waited for.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// After this time.
    Elapsed(Duration),
    /// After this many requests.
    Requests(u64),
}

/// What a run saw.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Requests answered with 200. Where several make one unit, units.
    pub requests: u64,
    /// From the first request to the last answer.
    pub elapsed: Duration,
    /// Nanoseconds of each request, sorted.
    pub latencies: Vec<u64>,
    /// Reads that brought answers.
    pub reads: u64,
}

impl Outcome {
    /// Takes another run's outcome in.
    pub fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.elapsed += other.elapsed;
        self.reads += other.reads;
        self.latencies.extend(other.latencies);
        self.latencies.sort_unstable();
    }
}

/// Sends `steps`, one after the other and again from the start, on so many connections. All steps make one request of
/// the outcome. Marks start at `mark` and go on there.
///
/// # Errors
/// On the first answer that is not 200, and when a connection ends.
pub async fn run(
    gateway: SocketAddr,
    steps: &[Template],
    connections: usize,
    until: Until,
    mark: &Rc<Cell<u64>>,
) -> Result<Outcome> {
    let mut streams = Vec::with_capacity(connections);
    for _ in 0..connections {
        let stream = TcpStream::connect(gateway).await.context("connect to Envoy")?;
        stream.set_nodelay(true)?;
        streams.push(stream);
    }
    let left = Rc::new(Cell::new(match until {
        Until::Elapsed(_) => u64::MAX,
        Until::Requests(requests) => requests,
    }));
    let start = Instant::now();
    let deadline = match until {
        Until::Elapsed(elapsed) => start + elapsed,
        Until::Requests(_) => start + Duration::from_secs(600),
    };
    let mut tasks = JoinSet::new();
    for stream in streams {
        let (steps, left, mark) = (steps.to_vec(), Rc::clone(&left), Rc::clone(mark));
        tasks.spawn_local(drive(stream, steps, left, mark, deadline));
    }
    let mut outcome = Outcome::default();
    while let Some(done) = tasks.join_next().await {
        let (latencies, reads) = done.context("a connection's task failed")??;
        outcome.latencies.extend(latencies);
        outcome.reads += reads;
    }
    outcome.elapsed = start.elapsed();
    outcome.requests = outcome.latencies.len() as u64;
    outcome.latencies.sort_unstable();
    Ok(outcome)
}

async fn drive(
    mut stream: TcpStream,
    mut steps: Vec<Template>,
    left: Rc<Cell<u64>>,
    mark: Rc<Cell<u64>>,
    deadline: Instant,
) -> Result<(Vec<u64>, u64)> {
    let (mut latencies, mut reads) = (Vec::new(), 0);
    let mut buffer = vec![0; 64 << 10];
    let mut begun = Instant::now();
    while left.get() > 0 && begun < deadline {
        left.set(left.get() - 1);
        let this = mark.get();
        mark.set(this + 1);
        for step in &mut steps {
            stream.write_all(step.marked(this)).await.context("Envoy closed a connection")?;
            reads += answer(&mut stream, &mut buffer).await?;
        }
        let ended = Instant::now();
        latencies.push((ended - begun).as_nanos() as u64);
        begun = ended;
    }
    Ok((latencies, reads))
}

async fn answer(stream: &mut TcpStream, buffer: &mut [u8]) -> Result<u64> {
    let mut filled = 0;
    let mut reads = 0;
    let head_bytes = loop {
        let read = stream.read(&mut buffer[filled..]).await?;
        if read == 0 {
            bail!("Envoy closed a connection instead of an answer");
        }
        filled += read;
        reads += 1;
        if let Some(bytes) = head_length(&buffer[..filled]) {
            break bytes;
        }
    };
    let head = &buffer[..head_bytes];
    if head.get(9..12) != Some(b"200") {
        bail!("Envoy answered: {}", String::from_utf8_lossy(&buffer[..filled]));
    }
    let framing = framing(head);
    Ok(reads + skip_body(stream, framing, buffer, head_bytes..filled).await? as u64)
}
