"""What a server counts, for Prometheus."""

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from .batching import Waiting

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
PROMPTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    r"""
    The counters of one server.

    Args:
        num_waiting (`Callable`): Gives the number of prompts that wait.
        num_compiled (`Callable`): Gives the most responses at a time that have a compiled step.
    """

    def __init__(self, num_waiting: Callable[[], int], num_compiled: Callable[[], int]):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        waiting = Gauge("llm2slm_waiting_prompts", "Prompts that wait for a batch", registry=registry)
        waiting.set_function(num_waiting)
        compiled = Gauge(
            "llm2slm_compiled_responses", "Responses at a time that have a compiled step", registry=registry
        )
        compiled.set_function(num_compiled)
        self.requests = Counter(
            "llm2slm_requests", "Answers, by path and HTTP status", ["path", "status"], registry=registry
        )
        self.clients_left = Counter(
            "llm2slm_clients_left", "Requests whose client left before the end of the answer", registry=registry
        )
        self.prompt_tokens = Counter("llm2slm_prompt_tokens", "Tokens of answered prompts", registry=registry)
        self.response_tokens = Counter("llm2slm_response_tokens", "Tokens of responses", registry=registry)
        self.request_seconds = Histogram(
            "llm2slm_request_seconds", "From a request to its whole answer", registry=registry, buckets=SECONDS
        )
        self.queue_seconds = Histogram(
            "llm2slm_queue_seconds", "From a request to its batch", registry=registry, buckets=SECONDS
        )
        self.batch_prompts = Histogram(
            "llm2slm_batch_prompts", "Prompts of a batch", registry=registry, buckets=PROMPTS
        )

    def note_batch(self, batch: Sequence[Waiting]) -> None:
        """Counts a batch that begins."""
        self.batch_prompts.observe(len(batch))
        now = time.monotonic()
        for waiting in batch:
            self.queue_seconds.observe(now - waiting.came)

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self.registry)
