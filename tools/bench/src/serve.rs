//! Streams measured as the field's serving benchmarks measure them: time to the first token, time per output token, gaps
//! between tokens.

use std::time::Duration;

use serde::Deserialize;

use crate::figures::percentile;

/// Bytes of one event at most: a longer one is no token.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// Splits a stream of server-sent events as it comes, whatever the pieces.
#[derive(Debug, Default)]
pub struct Events {
    buffer: Vec<u8>,
    /// Bytes in front that were given out.
    done: usize,
}

impl Events {
    /// The next bytes of the stream.
    ///
    /// # Errors
    /// When an event has no end within a mebibyte.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.buffer.drain(..std::mem::take(&mut self.done));
        // Line ends are one byte or two; without the carriage returns they are one.
        self.buffer.extend(bytes.iter().filter(|byte| **byte != b'\r'));
        if self.buffer.len() > MAX_EVENT_BYTES + bytes.len() {
            return Err(format!("an event of more than {MAX_EVENT_BYTES} bytes"));
        }
        Ok(())
    }

    /// Data of the next whole event that has any.
    pub fn next_data(&mut self) -> Option<String> {
        loop {
            let rest = self.buffer.get(self.done..)?;
            let end = rest.windows(2).position(|two| two == b"\n\n")?;
            let event = String::from_utf8_lossy(&rest[..end]).into_owned();
            self.done += end + 2;
            let lines: Vec<_> =
                event.lines().filter_map(|line| line.strip_prefix("data:")).map(str::trim_start).collect();
            if !lines.is_empty() {
                return Some(lines.join("\n"));
            }
        }
    }
}

/// What a request took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timing {
    /// To the first token.
    pub first_token: Duration,
    /// To the last one.
    pub whole: Duration,
    /// Between two events with tokens. Events that arrive in one read share the time since the read before in equal parts.
    pub gaps: Vec<Duration>,
    /// Output tokens: the server's count, else the events.
    pub output_tokens: u64,
    /// Prompt tokens, if the server reports them.
    pub input_tokens: Option<u64>,
}

impl Timing {
    /// Mean time of a token after the first. `None`: there was one token.
    #[must_use]
    pub fn per_token(&self) -> Option<Duration> {
        let rest = u32::try_from(self.output_tokens.checked_sub(1)?).ok()?;
        self.whole.checked_sub(self.first_token)?.checked_div(rest)
    }
}

/// Reads one answer's events.
#[derive(Debug, Default)]
pub struct Answer {
    first: Option<Duration>,
    last: Duration,
    gaps: Vec<Duration>,
    /// Time between the last read and the one before, and the events of the last read that share it.
    read: (Duration, u32),
    events: u64,
    usage: Option<Usage>,
    is_done: bool,
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    text: String,
    #[serde(default)]
    delta: Delta,
}

#[derive(Default, Deserialize)]
struct Delta {
    content: Option<String>,
    reasoning: Option<String>,
    reasoning_content: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
}

impl Choice {
    fn has_text(&self) -> bool {
        let Delta { content, reasoning, reasoning_content } = &self.delta;
        let parts = [content, reasoning, reasoning_content].into_iter().flatten();
        !self.text.is_empty() || parts.into_iter().any(|part| !part.is_empty())
    }
}

impl Answer {
    /// The data of an event that arrived `at` after the request was sent.
    ///
    /// # Errors
    /// When the event reports an error or is none of the API.
    pub fn take(&mut self, data: &str, at: Duration) -> Result<(), String> {
        if data == "[DONE]" {
            self.is_done = true;
            return Ok(());
        }
        let event: Event = serde_json::from_str(data).map_err(|error| format!("event {data:.200}: {error}"))?;
        if let Some(error) = event.error {
            return Err(format!("the stream reports {error:.200}"));
        }
        if event.usage.is_some() {
            self.usage = event.usage;
        }
        if event.choices.iter().any(Choice::has_text) {
            match self.first {
                None => self.first = Some(at),
                Some(_) if at > self.last => {
                    self.end_read();
                    self.read = (at.saturating_sub(self.last), 1);
                }
                Some(_) => self.read.1 += 1,
            }
            self.last = at;
            self.events += 1;
        }
        Ok(())
    }

    /// Divides the time before the last read among its events.
    fn end_read(&mut self) {
        let (time, events) = std::mem::take(&mut self.read);
        let gap = time.checked_div(events).unwrap_or_default();
        self.gaps.extend(std::iter::repeat_n(gap, events as usize));
    }

    /// What the answer took, once its stream has ended.
    ///
    /// # Errors
    /// When the stream ended before `[DONE]`, or without a token.
    pub fn timing(mut self) -> Result<Timing, String> {
        self.end_read();
        if !self.is_done {
            return Err(format!("the stream ended after {} tokens, before [DONE]", self.events));
        }
        let first_token = self.first.ok_or("there was no token in the stream")?;
        let reported = self.usage.map(|usage| usage.completion_tokens).filter(|tokens| *tokens > 0);
        Ok(Timing {
            first_token,
            whole: self.last,
            gaps: self.gaps,
            output_tokens: reported.unwrap_or(self.events),
            input_tokens: self.usage.map(|usage| usage.prompt_tokens).filter(|tokens| *tokens > 0),
        })
    }
}

/// Percentiles of one figure, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Percentiles {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl Percentiles {
    /// Of these times; zeros of none.
    #[must_use]
    pub fn of(times: impl IntoIterator<Item = Duration>) -> Self {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let mut sorted: Vec<u64> = times.into_iter().map(nanos).collect();
        sorted.sort_unstable();
        let quantile = |share| percentile(&sorted, share) as f64 * 1e-6;
        let sum: f64 = sorted.iter().map(|nanos| *nanos as f64).sum();
        Self {
            mean: sum / sorted.len().max(1) as f64 * 1e-6,
            p50: quantile(0.5),
            p90: quantile(0.9),
            p99: quantile(0.99),
        }
    }
}

/// What a run at one concurrency shows.
#[derive(Clone, Debug, PartialEq)]
pub struct Level {
    /// Requests under way at a time.
    pub concurrency: usize,
    /// Requests that were answered whole.
    pub requests: u64,
    /// Requests that were not.
    pub failures: u64,
    /// Seconds from the first request to the last answer.
    pub seconds: f64,
    /// Mean prompt tokens, by the server's count; 0: not reported.
    pub input_tokens: f64,
    /// Output tokens of all answers.
    pub output_tokens: u64,
    /// Time to the first token.
    pub ttft: Percentiles,
    /// Time per output token after the first.
    pub tpot: Percentiles,
    /// Gaps between tokens, of all answers together.
    pub itl: Percentiles,
}

/// Columns of the table and of the CSV.
pub const COLUMNS: [&str; 20] = [
    "concurrency",
    "requests",
    "failures",
    "seconds",
    "requests_per_s",
    "input_tokens",
    "output_tokens",
    "output_tokens_per_s",
    "ttft_ms_mean",
    "ttft_ms_p50",
    "ttft_ms_p90",
    "ttft_ms_p99",
    "tpot_ms_mean",
    "tpot_ms_p50",
    "tpot_ms_p90",
    "tpot_ms_p99",
    "itl_ms_mean",
    "itl_ms_p50",
    "itl_ms_p90",
    "itl_ms_p99",
];

impl Level {
    /// Sums a run up.
    #[must_use]
    pub fn new(concurrency: usize, elapsed: Duration, timings: &[Timing], failures: u64) -> Self {
        let inputs: Vec<u64> = timings.iter().filter_map(|timing| timing.input_tokens).collect();
        Self {
            concurrency,
            requests: timings.len() as u64,
            failures,
            seconds: elapsed.as_secs_f64(),
            input_tokens: inputs.iter().sum::<u64>() as f64 / inputs.len().max(1) as f64,
            output_tokens: timings.iter().map(|timing| timing.output_tokens).sum(),
            ttft: Percentiles::of(timings.iter().map(|timing| timing.first_token)),
            tpot: Percentiles::of(timings.iter().filter_map(Timing::per_token)),
            itl: Percentiles::of(timings.iter().flat_map(|timing| timing.gaps.iter().copied())),
        }
    }

    /// Output tokens a second.
    #[must_use]
    pub fn output_tokens_per_s(&self) -> f64 {
        self.output_tokens as f64 / self.seconds.max(1e-9)
    }

    /// Values in the order of [`COLUMNS`].
    #[must_use]
    pub fn row(&self) -> Vec<String> {
        let mut row = vec![
            self.concurrency.to_string(),
            self.requests.to_string(),
            self.failures.to_string(),
            format!("{:.2}", self.seconds),
            format!("{:.2}", self.requests as f64 / self.seconds.max(1e-9)),
            format!("{:.0}", self.input_tokens),
            self.output_tokens.to_string(),
            format!("{:.1}", self.output_tokens_per_s()),
        ];
        for Percentiles { mean, p50, p90, p99 } in [self.ttft, self.tpot, self.itl] {
            row.extend([mean, p50, p90, p99].map(|ms| format!("{ms:.2}")));
        }
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn all(stream: &[u8], piece: usize) -> Vec<String> {
        let (mut events, mut found) = (Events::default(), Vec::new());
        for bytes in stream.chunks(piece) {
            events.push(bytes).unwrap();
            found.extend(std::iter::from_fn(|| events.next_data()));
        }
        found
    }

    #[test]
    fn events_are_the_same_however_they_are_cut() {
        let stream =
            ": comment\n\ndata: {\"a\":\"ä\"}\r\n\r\nevent: x\ndata: 1\ndata: 2\n\n\ndata:[DONE]\n\n".as_bytes();
        for piece in 1..=stream.len() {
            assert_eq!(all(stream, piece), ["{\"a\":\"ä\"}", "1\n2", "[DONE]"], "pieces of {piece}");
        }
    }

    #[test]
    fn an_event_without_end_is_given_up() {
        let mut events = Events::default();
        let piece = vec![b'x'; 300_000];
        let outcomes: Vec<_> = (0..8).map(|_| events.push(&piece).is_ok()).collect();
        assert!(outcomes[0] && !outcomes[7]);
    }

    fn answer(events: &[(&str, u64)]) -> Result<Timing, String> {
        let mut answer = Answer::default();
        for (data, at) in events {
            answer.take(data, ms(*at))?;
        }
        answer.timing()
    }

    const ROLE: &str = r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}"#;
    const TOKEN: &str = r#"{"choices":[{"index":0,"delta":{"content":"a"}}]}"#;
    const USAGE: &str = r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":5}}"#;

    #[test]
    fn the_first_token_is_the_first_text() {
        let timing = answer(&[(ROLE, 1), (TOKEN, 10), (TOKEN, 14), (TOKEN, 20), (USAGE, 21), ("[DONE]", 22)]).unwrap();
        assert_eq!((timing.first_token, timing.whole), (ms(10), ms(20)));
        assert_eq!(timing.gaps, [ms(4), ms(6)]);
        assert_eq!((timing.output_tokens, timing.input_tokens), (5, Some(9)));
        assert_eq!(timing.per_token(), Some(Duration::from_micros(2_500)), "by the server's count");
    }

    #[test]
    fn events_of_one_read_share_the_time_since_the_read_before() {
        let timing =
            answer(&[(TOKEN, 10), (TOKEN, 10), (TOKEN, 19), (TOKEN, 19), (TOKEN, 19), (TOKEN, 20), ("[DONE]", 20)]);
        assert_eq!(timing.unwrap().gaps, [ms(0), ms(3), ms(3), ms(3), ms(1)]);
    }

    #[test]
    fn without_usage_events_are_counted() {
        let text = r#"{"choices":[{"index":0,"text":"a"}]}"#;
        let thought = r#"{"choices":[{"index":0,"delta":{"reasoning_content":"a"}}]}"#;
        let timing = answer(&[(text, 10), (thought, 12), ("[DONE]", 13)]).unwrap();
        assert_eq!((timing.output_tokens, timing.per_token()), (2, Some(ms(2))));
        assert_eq!(answer(&[(text, 10), ("[DONE]", 13)]).unwrap().per_token(), None);
    }

    #[test]
    fn an_answer_that_breaks_off_or_fails_is_a_failure() {
        assert!(answer(&[(TOKEN, 1)]).unwrap_err().contains("before [DONE]"));
        assert!(answer(&[(ROLE, 1), ("[DONE]", 2)]).unwrap_err().contains("no token"));
        assert!(answer(&[(TOKEN, 1), (r#"{"error":{"message":"x"}}"#, 2)]).unwrap_err().contains("reports"));
        assert!(answer(&[("rubbish", 1)]).unwrap_err().contains("rubbish"));
    }

    #[test]
    fn a_level_sums_up() {
        let timing = |first: u64| Timing {
            first_token: ms(first),
            whole: ms(first + 40),
            gaps: vec![ms(10); 4],
            output_tokens: 5,
            input_tokens: Some(100),
        };
        let level = Level::new(2, Duration::from_secs(1), &[timing(10), timing(30)], 1);
        assert_eq!((level.ttft.mean, level.ttft.p99, level.tpot.p50, level.itl.p90), (20.0, 30.0, 10.0, 10.0));
        assert_eq!((level.output_tokens_per_s(), level.input_tokens, level.failures), (10.0, 100.0, 1));
        assert_eq!(level.row().len(), COLUMNS.len());
    }
}
