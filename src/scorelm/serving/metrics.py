"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counters of one server; several can live in a process."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("scorelm_requests", "Requests answered", ["route", "status"], registry=own)
        self.seconds = Histogram(
            "scorelm_request_seconds", "Time of a request", ["route"], buckets=SECONDS, registry=own
        )
        self.waiting = Gauge("scorelm_waiting_requests", "Requests that wait for their turn", registry=own)
        self.rows = Gauge("scorelm_rows", "Texts that are being written", registry=own)
        self.tokens = Counter("scorelm_tokens", "Tokens of finished texts", registry=own)
        self.evaluation = Histogram(
            "scorelm_evaluation_seconds", "Time of an evaluation of the network", buckets=SECONDS, registry=own
        )
