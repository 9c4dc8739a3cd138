"""What Prometheus reads from /metrics."""

from __future__ import annotations

from collections.abc import Iterator

from lora_drop_runtime.plan.schedule import StepKind
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.samples import Sample

# Seconds. A step of a small model on a CPU takes milliseconds, a long prompt in a queue a minute
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "lora_drop_requests", "Answers by path and HTTP status.", ("path", "status"), registry=registry
        )
        self.running = Gauge("lora_drop_rows_running", "Rows in slots.", registry=registry)
        self.waiting = Gauge("lora_drop_rows_waiting", "Rows that wait for a slot.", registry=registry)
        self.prompt_tokens = Counter("lora_drop_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.reused = Counter(
            "lora_drop_prompt_tokens_reused", "Tokens of prompts that were not run.", registry=registry
        )
        tokens = Counter("lora_drop_tokens", "New tokens by the step that made them.", ("step",), registry=registry)
        self.tokens = {kind: tokens.labels(kind.value) for kind in StepKind}
        self.first = Histogram(
            "lora_drop_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=_FIRST,
            registry=registry,
        )
        self.between = Histogram(
            "lora_drop_time_between_tokens_seconds",
            "Between two tokens of a row.",
            buckets=_BETWEEN,
            registry=registry,
        )
        kv = Gauge(
            "lora_drop_kv_bytes", "Valid K/V of the rows that run, and what is allocated.", ("of",), registry=registry
        )
        self.kv = {name: kv.labels(name) for name in ("kept", "dropped", "allocated")}
        drafts = Counter(
            "lora_drop_drafts", "Drafts that refreshes verified, by outcome.", ("outcome",), registry=registry
        )
        self.accepted, self.rejected = drafts.labels("accepted"), drafts.labels("rejected")

    def samples(self) -> Iterator[Sample]:
        """Every figure, with its name and labels, but for the times when they were made."""
        samples = (sample for family in self._registry.collect() for sample in family.samples)
        return (sample for sample in samples if not sample.name.endswith("_created"))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
