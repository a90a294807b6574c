//! `GET /metrics` under vLLM's names.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::engine::Pod;

/// vLLM's buckets for the time to the first token, in seconds.
const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];

/// Times to first tokens.
#[derive(Default)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; TTFT_BUCKETS.len() + 1],
    sum_us: AtomicU64,
}

impl Histogram {
    pub(crate) fn observe(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let bucket = TTFT_BUCKETS.partition_point(|bound| *bound < seconds);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(time.as_micros() as u64, Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, labels: &str) {
        let mut total = 0;
        let bounds = TTFT_BUCKETS.iter().map(|bound| format!("{bound:?}")).chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(&self.buckets) {
            total += count.load(Relaxed);
            let _ = writeln!(out, "{name}_bucket{{{labels},le=\"{bound}\"}} {total}.0");
        }
        let _ = writeln!(out, "{name}_count{{{labels}}} {total}.0");
        let _ = writeln!(out, "{name}_sum{{{labels}}} {}", self.sum_us.load(Relaxed) as f64 * 1e-6);
    }
}

/// The whole page.
pub(crate) fn render(pod: &Pod) -> String {
    let (config, counters) = (&pod.config, &pod.lifetime);
    let model = config.models.first().map_or("", String::as_str);
    let labels = format!("engine=\"0\",model_name={}", label(model));
    let mut out = String::with_capacity(8_192);
    let mut family = |name: &str, kind: &str, help: &str, values: &[(String, f64)]| {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in values {
            let _ = writeln!(out, "{name}{{{labels}}} {value:?}");
        }
    };
    let one = |value: f64| [(labels.clone(), value)];
    let count = |counter: &AtomicU64| counter.load(Relaxed) as f64;
    family(
        "vllm:num_requests_running",
        "gauge",
        "Number of requests in model execution batches.",
        &one(count(&pod.running)),
    );
    family(
        "vllm:num_requests_waiting",
        "gauge",
        "Number of requests waiting to be processed.",
        &one(count(&pod.waiting)),
    );
    family("vllm:kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.", &one(pod.cache.usage()));
    family(
        "vllm:prefix_cache_queries_total",
        "counter",
        "Prefix cache queries, in terms of number of queried tokens.",
        &one(count(&counters.prompt_tokens)),
    );
    family(
        "vllm:prefix_cache_hits_total",
        "counter",
        "Prefix cache hits, in terms of number of cached tokens.",
        &one(count(&counters.cached_tokens)),
    );
    family(
        "vllm:external_prefix_cache_queries_total",
        "counter",
        "External prefix cache queries from KV connector cross-instance cache sharing, in terms of number of queried tokens.",
        &one(count(&counters.prompt_tokens) - count(&counters.cached_tokens)),
    );
    family(
        "vllm:external_prefix_cache_hits_total",
        "counter",
        "External prefix cache hits from KV connector cross-instance cache sharing, in terms of number of cached tokens.",
        &one(count(&counters.external_tokens)),
    );
    family(
        "vllm:prompt_tokens_total",
        "counter",
        "Number of prefill tokens processed.",
        &one(count(&counters.prompt_tokens)),
    );
    family(
        "vllm:generation_tokens_total",
        "counter",
        "Number of generation tokens processed.",
        &one(count(&counters.generated_tokens)),
    );
    let source = |name: &str, counter| (format!("{labels},source=\"{name}\""), count(counter));
    family(
        "vllm:prompt_tokens_by_source_total",
        "counter",
        "Number of prompt tokens by source.",
        &[
            source("local_compute", &counters.computed_tokens),
            source("local_cache_hit", &counters.cached_tokens),
            source("external_kv_transfer", &counters.external_tokens),
        ],
    );
    let finished = |name: &str, counter| (format!("{labels},finished_reason=\"{name}\""), count(counter));
    family(
        "vllm:request_success_total",
        "counter",
        "Count of successfully processed requests.",
        &[finished("stop", &counters.finished_stop), finished("length", &counters.finished_length)],
    );
    family(
        "vllm:cache_config_info",
        "gauge",
        "Information of the LLMEngine CacheConfig",
        &[(
            format!(
                "block_size=\"{}\",cache_dtype=\"auto\",enable_prefix_caching=\"True\",engine=\"0\",gpu_memory_utilization=\"0.9\",num_gpu_blocks=\"{}\"",
                config.block_tokens,
                pod.cache.capacity()
            ),
            1.0,
        )],
    );
    let (running, waiting) = pod.adapters();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    family(
        "vllm:lora_requests_info",
        "gauge",
        "Running stats on lora requests.",
        &[(
            format!(
                "max_lora=\"{}\",running_lora_adapters={},waiting_lora_adapters={}",
                config.loras.len(),
                label(&running),
                label(&waiting)
            ),
            now.as_secs_f64(),
        )],
    );
    let name = "vllm:time_to_first_token_seconds";
    let _ = writeln!(out, "# HELP {name} Histogram of time to first token in seconds.\n# TYPE {name} histogram");
    pod.ttft.write(&mut out, name, &labels);
    out
}

fn label(value: &str) -> String {
    format!("\"{}\"", value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n"))
}
