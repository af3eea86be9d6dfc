"""What a server counts, as Prometheus reads it at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Meters:
    """Each server has a registry of its own, so that two in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "kava_requests",
            "Requests that were answered, by HTTP status; 499: the client went away.",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "kava_request_seconds",
            "From a request's arrival to its answer's end.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "kava_first_token_seconds",
            "From an answer's place in the queue to its first token: waiting, reading, thinking.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter(
            "kava_tokens",
            "Tokens of questions read (`question`) and of answers written (`answer`).",
            ["kind"],
            registry=self.registry,
        )
        self.passes = Counter(
            "kava_forward_passes",
            "Forward passes of answers: a call of the decoder counts once for each in the batch.",
            registry=self.registry,
        )
        self.calls = Counter("kava_decoder_calls", "Calls of the decoder.", registry=self.registry)
        self.rows = Histogram(
            "kava_batch_rows",
            "Answers in a call that writes a token.",
            buckets=_ROWS,
            registry=self.registry,
        )
        self.waiting = Gauge("kava_waiting", "Answers in the queue.", registry=self.registry)
        self.running = Gauge(
            "kava_running", "Answers that are being written.", registry=self.registry
        )
