//! Sends the requests, each at its time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use pd_bench::blocks;
use pd_bench::drive::Gateway;
use pd_bench::trace::{Entry, entries_before, unloaded_time};
use pd_sim::Timing;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use crate::Args;
use crate::report::Record;

/// Client of a gateway. What comes of its requests goes to a channel, which closes when it is dropped and all requests
/// have ended.
pub struct Sender {
    gateway: Gateway,
    permits: Arc<Semaphore>,
    records: mpsc::UnboundedSender<Record>,
    args: Arc<Args>,
    begun: Instant,
}

impl Sender {
    /// A client whose time begins now.
    pub fn new(
        gateway: Gateway,
        permits: Arc<Semaphore>,
        records: mpsc::UnboundedSender<Record>,
        args: Arc<Args>,
    ) -> Self {
        Self { gateway, permits, records, args, begun: Instant::now() }
    }

    /// Sends the requests at their times, whether or not earlier ones are answered.
    pub async fn open_loop(self, entries: impl Iterator<Item = Result<Entry>>, scale: f64) -> Result<()> {
        for (number, entry) in entries.enumerate() {
            let entry = entry?;
            let due = milliseconds(entry.at_ms, scale);
            self.send(number, entry, due, |_| ()).await?;
        }
        Ok(())
    }

    /// Sends the first turn of each session at its time, and each other one as long after the answer before it as the
    /// trace has between them, less what that answer takes when nothing waits.
    pub async fn closed_loop(self, entries: Vec<Entry>, scale: f64) -> Result<()> {
        let timing = Timing::new(&pd_sim::Config { speed: self.args.speed, ..pd_sim::Config::default() });
        let (mut due, next) = schedule(&entries, &timing, scale);
        let mut entries: Vec<Option<Entry>> = entries.into_iter().map(Some).collect();
        let (ended, mut ends) = mpsc::unbounded_channel();
        let mut open = 0_usize;
        loop {
            let at = due.peek().map(|Reverse((at, _))| *at);
            tokio::select! {
                Some(number) = ends.recv(), if open > 0 => {
                    open -= 1;
                    let now = self.begun.elapsed();
                    let turns: &[(usize, Duration)] = next.get(number).map_or(&[], Vec::as_slice);
                    due.extend(turns.iter().map(|(turn, pause)| Reverse((now + *pause, *turn))));
                }
                () = tokio::time::sleep_until(self.begun + at.unwrap_or_default()), if at.is_some() => {
                    let Some(Reverse((at, number))) = due.pop() else { continue };
                    let entry = entries.get_mut(number).and_then(Option::take).context("a request comes once")?;
                    let ended = ended.clone();
                    open += 1;
                    // The receiver lives as long as this run.
                    self.send(number, entry, at, move |number| _ = ended.send(number)).await?;
                }
                else => return Ok(()),
            }
        }
    }

    /// Sends a request at its time, as soon as there are not too many others.
    async fn send(
        &self,
        number: usize,
        entry: Entry,
        due: Duration,
        ended: impl FnOnce(usize) + Send + 'static,
    ) -> Result<()> {
        tokio::time::sleep_until(self.begun + due).await;
        let permit = Arc::clone(&self.permits).acquire_owned().await.context("no more requests")?;
        let late = self.begun.elapsed().saturating_sub(due);
        let (gateway, records, args) = (self.gateway.clone(), self.records.clone(), Arc::clone(&self.args));
        // Every share of streams is spread evenly, and the same in every run.
        let stream = ((number + 1) as f64 * args.streams).floor() > (number as f64 * args.streams).floor();
        tokio::spawn(async move {
            let body = blocks::chat_body(&args.model, &entry, stream);
            let expected = pd_sim::expected_text(&args.model, &body);
            let answer = gateway.ask(body, number as u64).await;
            drop(permit);
            // The receiver lives as long as this run.
            let _ = records.send(Record::new(number as u64, due, late, &entry, answer, &expected));
            ended(number);
        });
        Ok(())
    }
}

fn milliseconds(ms: f64, scale: f64) -> Duration {
    Duration::from_secs_f64(ms * scale / 1e3)
}

/// Requests and when they are due.
type Due = BinaryHeap<Reverse<(Duration, usize)>>;
/// For each request those that follow it, and how long after its answer.
type Next = Vec<Vec<(usize, Duration)>>;

/// The first turn of each session, and those that follow each request.
fn schedule(entries: &[Entry], timing: &Timing, scale: f64) -> (Due, Next) {
    let before = entries_before(entries);
    let (mut due, mut next) = (Due::new(), vec![Vec::new(); entries.len()]);
    for (number, entry) in entries.iter().enumerate() {
        let Some(after) = before[number] else {
            due.push(Reverse((milliseconds(entry.at_ms, scale), number)));
            continue;
        };
        let of = &entries[after];
        let gap = milliseconds(entry.at_ms - of.at_ms, scale);
        let answer = unloaded_time(of, before[after].map(|before| &entries[before]), timing);
        next[after].push((number, gap.saturating_sub(answer)));
    }
    (due, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_comes_after_the_pause_of_the_trace() {
        let entry = |at_ms: f64, blocks: &[u64]| Entry {
            at_ms,
            input_tokens: blocks.len() as u64 * 512,
            output_tokens: 100,
            blocks: blocks.to_vec(),
        };
        let entries =
            [entry(500.0, &[1, 2]), entry(700.0, &[7]), entry(9_000.0, &[1, 2, 3]), entry(9_001.0, &[1, 2, 3, 4])];
        let timing = Timing::new(&pd_sim::Config { speed: 0.1, ..pd_sim::Config::default() });
        let (due, next) = schedule(&entries, &timing, 0.1);
        let due: Vec<_> = due.into_sorted_vec().into_iter().rev().map(|Reverse(due)| due).collect();
        assert_eq!(due, [(Duration::from_millis(50), 0), (Duration::from_millis(70), 1)]);
        let answer = timing.prefill(1_024, 0) + timing.transfer(1_024) + timing.token(1) * 100;
        assert_eq!(next[0], [(2, Duration::from_millis(850) - answer)]);
        assert_eq!(next[2], [(3, Duration::ZERO)], "the trace has less time than the answer takes");
        assert!(next[1].is_empty() && next[3].is_empty());
    }
}
