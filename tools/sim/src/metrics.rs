//! `GET /metrics` under vLLM's names.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::engine::Pod;
use crate::role::Engine;

/// The whole page.
pub(crate) fn render(pod: &Pod) -> String {
    let model = pod.config.models.first().map_or("", String::as_str);
    let mut page =
        Page { labels: format!("engine=\"0\",model_name={}", label(model)), text: String::with_capacity(8_192) };
    page.load(pod);
    page.tokens(pod);
    page.leases(pod);
    page.info(pod);
    let name = "vllm:time_to_first_token_seconds";
    let _ = writeln!(page.text, "# HELP {name} Histogram of time to first token in seconds.\n# TYPE {name} histogram");
    pod.ttft.write(&mut page.text, name, &page.labels);
    if matches!(pod.config.engine, Engine::VllmNixl | Engine::VllmNixlPush) {
        let name = "vllm:nixl_xfer_time_seconds";
        let help = "Histogram of transfer duration for NIXL KV Cache transfers.";
        let _ = writeln!(page.text, "# HELP {name} {help}\n# TYPE {name} histogram");
        pod.transfers.write(&mut page.text, name, &page.labels);
    }
    page.text
}

/// The page as it is written.
struct Page {
    /// Labels of every value.
    labels: String,
    text: String,
}

impl Page {
    /// A family of one value.
    fn one(&mut self, (name, kind, help): (&str, &str, &str), value: f64) {
        self.family((name, kind, help), &[("", value)]);
    }

    /// A family of values, each with labels of its own.
    fn family(&mut self, (name, kind, help): (&str, &str, &str), values: &[(&str, f64)]) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (own, value) in values {
            let comma = if own.is_empty() { "" } else { "," };
            let _ = writeln!(self.text, "{name}{{{}{comma}{own}}} {value:?}", self.labels);
        }
    }

    fn load(&mut self, pod: &Pod) {
        let running = ("vllm:num_requests_running", "gauge", "Number of requests in model execution batches.");
        self.one(running, count(&pod.running));
        let waiting = ("vllm:num_requests_waiting", "gauge", "Number of requests waiting to be processed.");
        self.one(waiting, count(&pod.waiting));
        let usage = ("vllm:kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.");
        self.one(usage, pod.cache.usage());
    }

    fn tokens(&mut self, pod: &Pod) {
        let counters = &pod.lifetime;
        let (prompt, cached) = (count(&counters.prompt_tokens), count(&counters.cached_tokens));
        let external = count(&counters.external_tokens);
        let totals = [
            ("vllm:prefix_cache_queries_total", "Prefix cache queries, in terms of number of queried tokens.", prompt),
            ("vllm:prefix_cache_hits_total", "Prefix cache hits, in terms of number of cached tokens.", cached),
            (
                "vllm:external_prefix_cache_queries_total",
                "External prefix cache queries from KV connector cross-instance cache sharing, in terms of number of queried tokens.",
                prompt - cached,
            ),
            (
                "vllm:external_prefix_cache_hits_total",
                "External prefix cache hits from KV connector cross-instance cache sharing, in terms of number of cached tokens.",
                external,
            ),
            ("vllm:prompt_tokens_total", "Number of prefill tokens processed.", prompt),
            (
                "vllm:generation_tokens_total",
                "Number of generation tokens processed.",
                count(&counters.generated_tokens),
            ),
        ];
        for (name, help, value) in totals {
            self.one((name, "counter", help), value);
        }
        self.family(
            ("vllm:prompt_tokens_by_source_total", "counter", "Number of prompt tokens by source."),
            &[
                ("source=\"local_compute\"", count(&counters.computed_tokens)),
                ("source=\"local_cache_hit\"", cached),
                ("source=\"external_kv_transfer\"", external),
            ],
        );
        self.family(
            ("vllm:request_success_total", "counter", "Count of successfully processed requests."),
            &[
                ("finished_reason=\"stop\"", count(&counters.finished_stop)),
                ("finished_reason=\"length\"", count(&counters.finished_length)),
            ],
        );
    }

    /// NIXL's counters of leases, and the one of Python's client library that names the process.
    fn leases(&mut self, pod: &Pod) {
        pod.end_leases(false);
        if matches!(pod.config.engine, Engine::VllmNixl | Engine::VllmNixlPush) {
            let expired = "Number of KV cache requests that expired before they were fetched.";
            let expired = ("vllm:nixl_num_kv_expired_reqs_total", "counter", expired);
            self.one(expired, count(&pod.lifetime.expired_leases));
            let late = "Number of completion notifications of requests that had expired.";
            let late = ("vllm:nixl_num_notifications_after_expiry_total", "counter", late);
            self.one(late, count(&pod.lifetime.late_pulls));
        }
        let name = "process_start_time_seconds";
        let help = "Start time of the process since unix epoch in seconds.";
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {:?}", pod.started_seconds());
    }

    fn info(&mut self, pod: &Pod) {
        let cache = format!(
            "block_size=\"{}\",cache_dtype=\"auto\",enable_prefix_caching=\"True\",engine=\"0\",gpu_memory_utilization=\"0.9\",num_gpu_blocks=\"{}\"",
            pod.config.block_tokens,
            pod.cache.capacity()
        );
        let _ = writeln!(
            self.text,
            "# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig\n# TYPE vllm:cache_config_info gauge\n\
             vllm:cache_config_info{{{cache}}} 1.0"
        );
        let (running, waiting) = pod.adapters();
        let adapters = format!(
            "max_lora=\"{}\",running_lora_adapters={},waiting_lora_adapters={}",
            pod.config.loras.len(),
            label(&running),
            label(&waiting)
        );
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let _ = writeln!(
            self.text,
            "# HELP vllm:lora_requests_info Running stats on lora requests.\n# TYPE vllm:lora_requests_info gauge\n\
             vllm:lora_requests_info{{{adapters}}} {:?}",
            now.as_secs_f64()
        );
    }
}

fn count(counter: &AtomicU64) -> f64 {
    counter.load(Relaxed) as f64
}

fn label(value: &str) -> String {
    format!("\"{}\"", value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n"))
}
