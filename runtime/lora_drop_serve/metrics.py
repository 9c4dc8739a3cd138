"""What Prometheus reads from /metrics."""

from __future__ import annotations

from collections.abc import Iterator

from lora_drop_runtime.plan.schedule import StepKind
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.samples import Sample

# Seconds. A step of a small model on a CPU takes milliseconds, a long prompt in a queue a minute
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_QUEUED = (0.001, 0.005, *_FIRST)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_TOKENS = tuple(2**power for power in range(3, 18))
# Codes of errors that a request may be refused with; `invalid` is a field of its body
INVALID = "invalid"
REASONS = (
    *("invalid_api_key", "model_not_found", "not_found", "method_not_allowed", "malformed", "json", INVALID),
    *("context_length_exceeded", "body_too_large", "too_slow", "queue_full", "closing", "engine_failed", "stalled"),
)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.info = Info("lora_drop", "What is served, and what requests get that do not say.", registry=registry)
        self.requests = Counter(
            "lora_drop_requests", "Answers by path and HTTP status.", ("path", "status"), registry=registry
        )
        refused = Counter(
            "lora_drop_refused_requests", "Requests that were not taken, by reason.", ("reason",), registry=registry
        )
        self.refused = {reason: refused.labels(reason) for reason in REASONS}
        self.whole = Histogram(
            "lora_drop_request_duration_seconds",
            "From the head of a request to the end of its answer, of those that were answered in full.",
            buckets=_WHOLE,
            registry=registry,
        )
        self.running = Gauge("lora_drop_rows_running", "Rows in slots.", registry=registry)
        self.waiting = Gauge("lora_drop_rows_waiting", "Rows that wait for a slot.", registry=registry)
        self.prompt_tokens = Counter("lora_drop_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.reused = Counter(
            "lora_drop_prompt_tokens_reused", "Tokens of prompts that were not run.", registry=registry
        )
        self.prompt_lengths = Histogram(
            "lora_drop_prompt_length_tokens", "Tokens of a row's prompt.", buckets=_TOKENS, registry=registry
        )
        tokens = Counter("lora_drop_tokens", "New tokens by the step that made them.", ("step",), registry=registry)
        self.tokens = {kind: tokens.labels(kind.value) for kind in StepKind}
        self.queued = Histogram(
            "lora_drop_time_in_queue_seconds",
            "From a request's place in the queue to a row's slot.",
            buckets=_QUEUED,
            registry=registry,
        )
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
