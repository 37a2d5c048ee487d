"""vLLM's `/metrics`, under vLLM's own names."""

from tidegate.local.engines.driver import EngineDriver
from tidegate.local.engines.promtext import Histogram, family, labels


def render(driver: EngineDriver, model: str) -> str:
    """The Prometheus text of one engine. `model` is its first served name."""
    engine, stats = driver.engine, driver.stats
    text = labels({"model_name": model, "engine": "0"})
    config = engine.config
    cache = labels(
        {
            "block_size": config.block_size,
            "enable_prefix_caching": config.enable_prefix_caching,
            "engine": "0",
            "num_gpu_blocks": config.num_blocks,
        }
    )
    asleep = [(f'{text},sleep_state="{s}"', float(s == "awake")) for s in _SLEEP_STATES]
    finished = [(f'{text},finished_reason="{r}"', n) for r, n in stats.finished.items()]
    lines: list[str] = []
    for name, help_, value in (
        ("num_requests_running", "Number of requests in model execution batches.", len(engine.running)),
        ("num_requests_waiting", "Number of requests waiting to be processed.", engine.waiting),
        ("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", engine.kv_usage),
    ):
        lines += family(f"vllm:{name}", "gauge", help_, [(text, value)])
    lines += family("vllm:engine_sleep_state", "gauge", "Engine sleep state; awake = 1.", asleep)
    for name, help_, value in (
        ("num_preemptions_total", "Cumulative number of preemptions.", engine.counters.preemptions),
        ("prefix_cache_queries_total", "Prefix cache queries, in tokens.", engine.counters.cache_queries),
        ("prefix_cache_hits_total", "Prefix cache hits, in tokens.", engine.counters.cache_hits),
        ("prompt_tokens_total", "Number of prefill tokens processed.", stats.prompt_tokens),
        ("generation_tokens_total", "Number of generation tokens processed.", stats.generation_tokens),
    ):
        lines += family(f"vllm:{name}", "counter", help_, [(text, value)])
    lines += family("vllm:request_success_total", "counter", "Count of processed requests.", finished)
    histograms: tuple[tuple[str, str, Histogram], ...] = (
        ("time_to_first_token_seconds", "Histogram of time to first token.", stats.ttft),
        ("inter_token_latency_seconds", "Histogram of inter-token latency.", stats.inter_token),
        ("request_queue_time_seconds", "Histogram of time spent in WAITING phase.", stats.queue),
        ("e2e_request_latency_seconds", "Histogram of end to end request latency.", stats.end_to_end),
    )
    for name, help_, histogram in histograms:
        lines += histogram.render(f"vllm:{name}", help_, text)
    lines += family(
        "vllm:cache_config_info", "gauge", "Information of the LLMEngine CacheConfig", [(cache, 1)]
    )
    lines += stats.lag.render(
        "tidegate_emulator_lag_seconds", "How late emulated steps ended; large: timings say nothing.", text
    )
    return "\n".join(lines) + "\n"


_SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
