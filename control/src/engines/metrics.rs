//! Reads the metrics of vLLM, SGLang and TensorRT-LLM.
//!
//! The reader takes a page line by line as it arrives, so it never holds a page of a hundred kilobytes. Of lines with
//! other metrics it reads only the name.

use memchr::{memchr_iter, memchr3};

/// Longest line that is read. The reader skips longer ones.
const MAX_LINE_BYTES: usize = 16 << 10;
/// Metrics that are read.
const NAMES: &[&[u8]] = &[
    b"vllm:num_requests_waiting",
    b"sglang:num_queue_reqs",
    b"trtllm_num_requests_waiting",
    b"vllm:num_requests_running",
    b"sglang:num_running_reqs",
    b"trtllm_num_requests_running",
    b"vllm:kv_cache_usage_perc",
    b"vllm:gpu_cache_usage_perc",
    b"sglang:token_usage",
    b"trtllm_kv_cache_utilization",
    b"vllm:prefix_cache_queries_total",
    b"vllm:prefix_cache_hits_total",
    b"sglang:prompt_tokens_total",
    b"trtllm_request_success_total",
    b"vllm:cache_config_info",
    b"sglang:max_total_num_tokens",
    b"vllm:nixl_num_kv_expired_reqs_total",
    b"vllm:nixl_num_notifications_after_expiry_total",
    b"process_start_time_seconds",
    b"vllm:engine_sleep_state",
];

/// Load of one engine server, over all of its data-parallel ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineLoad {
    /// Requests that wait in the engine.
    pub waiting: Option<f64>,
    /// Requests that the engine computes.
    pub running: Option<f64>,
    /// Share of the KV cache in use, 0 to 1; the fullest rank's.
    pub kv_usage: Option<f64>,
    /// Tokens that the KV cache can hold; the largest rank's.
    pub cache_tokens: Option<u64>,
    /// Prompt tokens looked up in the prefix cache since the engine started.
    pub prefix_queries: Option<f64>,
    /// Prompt tokens found in the prefix cache since the engine started.
    pub prefix_hits: Option<f64>,
    /// Prompt tokens or requests since the engine started, of engines that do not count look-ups.
    pub work: Option<f64>,
    /// KV leases that expired before a decode server fetched the KV cache, since the engine started.
    pub expired_kv_leases: Option<f64>,
    /// KV caches that a decode server fetched after their KV lease, since the engine started. The text of such an
    /// answer may be wrong.
    pub late_fetches: Option<f64>,
    /// When the process started, seconds of Unix time.
    pub process_start: Option<f64>,
    /// Whether the engine sleeps: it has given its KV cache back.
    pub is_asleep: bool,
}

/// Reads a page in pieces.
#[derive(Debug, Default)]
pub struct Reader {
    load: EngineLoad,
    line: Vec<u8>,
    is_too_long: bool,
}

impl EngineLoad {
    /// Share of prompt tokens found in the prefix cache, 0 to 1; `None` before the first look-up.
    #[must_use]
    pub fn hit_ratio(&self) -> Option<f64> {
        let (queries, hits) = (self.prefix_queries?, self.prefix_hits?);
        (queries > 0.0).then(|| hits / queries)
    }

    /// A counter that begins anew with the engine's cache; `None` before the first request of some engines.
    #[must_use]
    pub fn counted(&self) -> Option<f64> {
        self.prefix_queries.or(self.work)
    }

    /// Whether the page had a metric of an engine.
    #[must_use]
    pub fn is_known(&self) -> bool {
        // The metrics of every Python program have its start time.
        Self { process_start: None, ..*self } != Self::default()
    }
}

impl Reader {
    /// Reads the next bytes of the page.
    pub fn push(&mut self, bytes: &[u8]) {
        let mut start = 0;
        for end in memchr_iter(b'\n', bytes) {
            let head = bytes.get(start..end).unwrap_or_default();
            start = end + 1;
            // Most lines are whole in one chunk.
            if self.line.is_empty() && !self.is_too_long && head.len() <= MAX_LINE_BYTES {
                self.load.take(head);
                continue;
            }
            self.extend(head);
            self.end_line();
        }
        self.extend(bytes.get(start..).unwrap_or_default());
    }

    /// Ends the page and returns the load.
    #[must_use]
    pub fn finish(mut self) -> EngineLoad {
        self.end_line();
        self.load
    }

    fn extend(&mut self, bytes: &[u8]) {
        self.is_too_long |= self.line.len() + bytes.len() > MAX_LINE_BYTES;
        if !self.is_too_long {
            self.line.extend_from_slice(bytes);
        }
    }

    fn end_line(&mut self) {
        if !self.is_too_long {
            self.load.take(&self.line);
        }
        self.line.clear();
        self.is_too_long = false;
    }
}

impl EngineLoad {
    fn take(&mut self, line: &[u8]) {
        // Some ten of a thousand lines matter. Of the others, only the name is read.
        let name = line.get(..memchr3(b'{', b' ', b'\t', line).unwrap_or(0)).unwrap_or_default();
        if !NAMES.contains(&name) {
            return;
        }
        let Some((name, labels, value)) = std::str::from_utf8(line).ok().and_then(|line| sample(line.trim())) else {
            return;
        };
        let sum = |present: &mut Option<f64>| *present = Some(present.unwrap_or(0.0) + value.max(0.0));
        match name {
            "vllm:num_requests_waiting" | "sglang:num_queue_reqs" | "trtllm_num_requests_waiting" => {
                sum(&mut self.waiting);
            }
            "vllm:num_requests_running" | "sglang:num_running_reqs" | "trtllm_num_requests_running" => {
                sum(&mut self.running);
            }
            "vllm:kv_cache_usage_perc"
            | "vllm:gpu_cache_usage_perc"
            | "sglang:token_usage"
            | "trtllm_kv_cache_utilization" => {
                self.kv_usage = Some(self.kv_usage.unwrap_or(0.0).max(value.clamp(0.0, 1.0)));
            }
            "vllm:prefix_cache_queries_total" => sum(&mut self.prefix_queries),
            "vllm:prefix_cache_hits_total" => sum(&mut self.prefix_hits),
            "sglang:prompt_tokens_total" | "trtllm_request_success_total" => sum(&mut self.work),
            "vllm:nixl_num_kv_expired_reqs_total" => sum(&mut self.expired_kv_leases),
            "vllm:nixl_num_notifications_after_expiry_total" => sum(&mut self.late_fetches),
            "vllm:engine_sleep_state" => {
                self.is_asleep |= label(labels, "sleep_state") == Some("awake") && value == 0.0;
            }
            "process_start_time_seconds" => self.process_start = Some(value),
            "vllm:cache_config_info" => {
                let number = |key: &str| label(labels, key)?.parse::<u64>().ok();
                if let (Some(size), Some(blocks)) = (number("block_size"), number("num_gpu_blocks")) {
                    self.take_cache(size.saturating_mul(blocks));
                }
            }
            "sglang:max_total_num_tokens" if value >= 0.0 => self.take_cache(value as u64),
            _ => {}
        }
    }

    fn take_cache(&mut self, tokens: u64) {
        if tokens > 0 {
            self.cache_tokens = self.cache_tokens.max(Some(tokens));
        }
    }
}

/// Name, labels (the text between the braces) and value of a sample; `None` for other lines and for values that are not
/// finite.
fn sample(line: &str) -> Option<(&str, &str, f64)> {
    let end = line.find(['{', ' ', '\t'])?;
    let (name, rest) = line.split_at_checked(end)?;
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(inner) => inner.rsplit_once('}')?,
        None => ("", rest),
    };
    let value: f64 = rest.split_whitespace().next()?.parse().ok()?;
    value.is_finite().then_some((name, labels, value))
}

/// The value of a label. It must have no escapes.
fn label<'a>(labels: &'a str, key: &str) -> Option<&'a str> {
    labels.match_indices(key).find_map(|(start, _)| {
        let is_start = start == 0 || labels.as_bytes().get(start - 1).is_some_and(|byte| matches!(byte, b',' | b' '));
        let value = labels.get(start + key.len()..)?.strip_prefix("=\"").filter(|_| is_start)?;
        value.split('"').next()
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> EngineLoad {
        let mut reader = Reader::default();
        reader.push(text.as_bytes());
        reader.finish()
    }

    const VLLM: &str = "# HELP vllm:num_requests_waiting Number.\n\
        vllm:num_requests_waiting{engine=\"0\",model_name=\"m\"} 3.0\n\
        vllm:num_requests_waiting{engine=\"1\",model_name=\"m\"} 4\n\
        vllm:num_requests_running{engine=\"0\",model_name=\"a}b\"} 2 1700000000\n\
        vllm:kv_cache_usage_perc{engine=\"0\"} 0.25\nvllm:kv_cache_usage_perc{engine=\"1\"} 0.5\n\
        vllm:prefix_cache_queries_total 10\nvllm:prefix_cache_hits_total 6\n\
        vllm:nixl_num_kv_expired_reqs_total{engine=\"0\"} 2.0\nvllm:nixl_num_kv_expired_reqs_total{engine=\"1\"} 1.0\n\
        vllm:nixl_num_notifications_after_expiry_total{engine=\"0\"} 1.0\n\
        process_start_time_seconds 1.79603e+09\n\
        vllm:cache_config_info{block_size=\"16\",num_cpu_blocks=\"9\",num_gpu_blocks=\"1000\"} 1.0";

    #[test]
    fn the_names_of_each_engine_are_known() {
        let vllm = EngineLoad {
            waiting: Some(7.0),
            running: Some(2.0),
            kv_usage: Some(0.5),
            cache_tokens: Some(16_000),
            prefix_queries: Some(10.0),
            prefix_hits: Some(6.0),
            work: None,
            expired_kv_leases: Some(3.0),
            late_fetches: Some(1.0),
            process_start: Some(1_796_030_000.0),
            is_asleep: false,
        };
        assert_eq!(read(VLLM), vllm);
        let sglang = read(
            "sglang:num_queue_reqs 1\nsglang:num_running_reqs 2\nsglang:token_usage 0.1\nsglang:max_total_num_tokens 5e4\n\
             sglang:prompt_tokens_total{model_name=\"m\"} 9\n",
        );
        let expected = EngineLoad {
            waiting: Some(1.0),
            running: Some(2.0),
            kv_usage: Some(0.1),
            cache_tokens: Some(50_000),
            work: Some(9.0),
            ..EngineLoad::default()
        };
        assert_eq!(sglang, expected);
        assert_eq!(read("trtllm_kv_cache_utilization{model_name=\"m\"} 0.75\n").kv_usage, Some(0.75));
    }

    #[test]
    fn an_engine_that_sleeps_has_no_cache() {
        let page = |awake: u8| {
            format!(
                "vllm:engine_sleep_state{{engine=\"0\",sleep_state=\"awake\"}} {awake}.0\n\
                 vllm:engine_sleep_state{{engine=\"0\",sleep_state=\"weights_offloaded\"}} 0.0\n"
            )
        };
        assert_eq!([0, 1].map(|awake| read(&page(awake)).is_asleep), [true, false]);
    }

    #[test]
    fn what_is_no_sample_is_nothing() {
        let long = format!("vllm:num_requests_waiting{{x=\"{}\"}} 1\n", "x".repeat(MAX_LINE_BYTES));
        for text in [
            "",
            "process_start_time_seconds 5",
            "vllm:num_requests_waiting",
            "vllm:num_requests_waiting NaN",
            "vllm:num_requests_waiting{ 1",
            &long,
        ] {
            assert!(!read(text).is_known(), "{text:.60}");
        }
        assert_eq!(read(&format!("{long}vllm:num_requests_running 1\n")).running, Some(1.0));
        let odd = "vllm:cache_config_info{xblock_size=\"16\",block_size=\"None\",num_gpu_blocks=\"7\"} 1";
        assert_eq!(read(odd).cache_tokens, None);
        let huge = "vllm:cache_config_info{block_size=\"9999999999999\",num_gpu_blocks=\"9999999999999\"} 1";
        assert_eq!(read(huge).cache_tokens, Some(u64::MAX));
    }

    proptest! {
        #[test]
        fn pieces_read_as_the_whole(cuts in prop::collection::vec(0..VLLM.len(), 0..8)) {
            let mut cuts = cuts;
            cuts.extend([0, VLLM.len()]);
            cuts.sort_unstable();
            let mut reader = Reader::default();
            for pair in cuts.windows(2) {
                reader.push(&VLLM.as_bytes()[pair[0]..pair[1]]);
            }
            prop_assert_eq!(reader.finish(), read(VLLM));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut reader = Reader::default();
            reader.push(b"vllm:cache_config_info{");
            reader.push(&bytes);
            let _ = reader.finish();
        }
    }
}
