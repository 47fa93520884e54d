"""What the server counts, and how Prometheus reads it: vLLM's metric names, with `dsv2:` for `vllm:`.

Counts are plain numbers that one thread writes each, since locks and labels for every token would cost more than
counting. Knows nothing of HTTP.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from dsv2.engine.core import Engine
    from dsv2.engine.outputs import Delta
    from dsv2.serve.loop import Call

_FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_NEXT_TOKEN_S = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Histogram:
    """How many of the observed values are at most each of `bounds`."""

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)  # the last: above all bounds
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: list[str]) -> None:
        names = [*map(str, self._bounds), "+Inf"]
        family.add_metric(labels, list(zip(names, accumulate(self._counts), strict=True)), self._sum)


class Stats:
    """Totals since the server started. `count` is called in one thread, which need not be the readers'."""

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_cached_tokens = 0
        """Tokens of prompts that the prefix cache had."""
        self.num_preemptions = 0
        self.num_finished: Counter[str] = Counter()
        """Sequences by finish reason."""
        self.first_token_s = Histogram(_FIRST_TOKEN_S)
        self.next_token_s = Histogram(_NEXT_TOKEN_S)
        self.request_s = Histogram(_REQUEST_S)

    def count(self, call: Call, deltas: Iterable[Delta], now_s: float) -> None:
        """Take in what one step, which ended at `now_s`, said to a call."""
        for delta in deltas:
            key = delta.request_id, delta.index
            last_s = call.last_token_s.get(key)
            call.last_token_s[key] = now_s
            self.num_generation_tokens += len(delta.token_ids)
            if last_s is None:
                self.first_token_s.observe(now_s - call.arrived_s)
                self.num_prompt_tokens += len(call.prompts[call.request_ids.index(delta.request_id)])
                self.num_cached_tokens += delta.num_cached_tokens
            else:
                self.next_token_s.observe(now_s - last_s)
            if delta.finish_reason:
                self.num_finished[delta.finish_reason] += 1
                self.request_s.observe(now_s - call.arrived_s)


class _Collector(Collector):
    """Reads `stats` and the engine's own counts whenever somebody asks."""

    def __init__(self, stats: Stats, engine: Engine, model_name: str) -> None:
        self._stats, self._scheduler, self._drafts = stats, engine.scheduler, engine.draft_counts
        self._labels = {"model_name": model_name}

    def collect(self) -> Iterator[Metric]:
        stats, scheduler = self._stats, self._scheduler
        pool = scheduler.pool
        yield self._gauge("num_requests_running", "Sequences that hold pages.", len(scheduler.running))
        yield self._gauge("num_requests_waiting", "Sequences that wait for pages.", scheduler.num_waiting)
        usage = 1 - pool.num_available / pool.num_pages
        yield self._gauge("kv_cache_usage_perc", "Share of the cache's pages in use, 0 to 1.", usage)
        yield self._counter("prompt_tokens", "Tokens of prompts.", stats.num_prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.num_generation_tokens)
        yield self._counter("prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.num_prompt_tokens)
        yield self._counter("prefix_cache_hits", "Tokens found in the prefix cache.", stats.num_cached_tokens)
        yield self._counter("num_preemptions", "Times a sequence lost its pages.", stats.num_preemptions)
        drafts = self._drafts
        yield self._counter("spec_decode_num_drafts", "Drafts, each of a sequence's step.", drafts.num_drafts)
        yield self._counter("spec_decode_num_draft_tokens", "Tokens drafted.", drafts.num_tokens)
        yield self._counter(
            "spec_decode_num_accepted_tokens", "Drafted tokens that were right.", drafts.num_accepted_tokens
        )
        yield self._finished()
        for name, text, histogram in (
            (
                "time_to_first_token_seconds",
                "From a request's arrival to a sequence's first tokens.",
                stats.first_token_s,
            ),
            ("inter_token_latency_seconds", "Between the steps that gave a sequence tokens.", stats.next_token_s),
            ("e2e_request_latency_seconds", "From a request's arrival to a sequence's end.", stats.request_s),
        ):
            family = HistogramMetricFamily(f"dsv2:{name}", text, labels=list(self._labels))
            histogram.add_to(family, list(self._labels.values()))
            yield family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"dsv2:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"dsv2:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _finished(self) -> Metric:
        labels = [*self._labels, "finished_reason"]
        family = CounterMetricFamily("dsv2:request_success", "Sequences finished, by reason.", labels=labels)
        for reason in ("stop", "length", "abort"):
            family.add_metric([*self._labels.values(), reason], self._stats.num_finished[reason])
        return family


def registry_of(stats: Stats, engine: Engine, model_name: str) -> CollectorRegistry:
    """A registry of its own, so that several servers fit into a process."""
    registry = CollectorRegistry()
    registry.register(_Collector(stats, engine, model_name))
    return registry
