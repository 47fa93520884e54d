"""/metrics counts what went through, under the names that dashboards for vLLM know."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.live import MODEL, Gate, new_engine, serving

BODY = {"prompt": [7] * 70, "temperature": 0, "max_tokens": 3, "ignore_eos": True}


def samples(client: httpx.Client) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            assert sample.labels["model_name"] == MODEL
            rest = [value for name, value in sample.labels.items() if name != "model_name"]
            yield "/".join([sample.name, *rest]), sample.value


def test_totals_are_those_of_the_requests() -> None:
    with serving(new_engine()) as live, live.client() as client:
        for n in (1, 2):
            assert client.post("/v1/completions", json=BODY | {"n": n}).status_code == 200
        said = dict(samples(client))
    expected = {
        "dsv2:prompt_tokens_total": 210,
        "dsv2:generation_tokens_total": 9,
        "dsv2:prefix_cache_queries_total": 210,
        "dsv2:prefix_cache_hits_total": 128,  # a page for each of the second request's sequences
        "dsv2:num_preemptions_total": 0,
        "dsv2:request_success_total/length": 3,
        "dsv2:request_success_total/stop": 0,
        "dsv2:time_to_first_token_seconds_count": 3,
        "dsv2:inter_token_latency_seconds_count": 6,
        "dsv2:e2e_request_latency_seconds_count": 3,
        "dsv2:e2e_request_latency_seconds_bucket/+Inf": 3,
        "dsv2:num_requests_running": 0,
        "dsv2:num_requests_waiting": 0,
        "dsv2:kv_cache_usage_perc": 0,
    }
    assert {name: said[name] for name in expected} == expected
    assert 0 < said["dsv2:time_to_first_token_seconds_sum"] < said["dsv2:e2e_request_latency_seconds_sum"]


def test_gauges_show_what_is_going_on() -> None:
    engine = new_engine(max_num_seqs=1, num_pages=8)
    gate = Gate(engine)
    with serving(engine) as live, live.client() as client, ThreadPoolExecutor() as pool:
        answer = pool.submit(client.post, "/v1/completions", json=BODY | {"n": 2})
        gate.reached.wait()
        engine._launch()  # as the step would that is held
        with live.client() as other:
            said = dict(samples(other))
        gate.open()
        assert answer.result().status_code == 200
    assert said["dsv2:num_requests_running"] == said["dsv2:num_requests_waiting"] == 1
    assert said["dsv2:kv_cache_usage_perc"] == 2 / 8


def test_preemptions_are_counted() -> None:
    engine = new_engine(num_pages=4)
    with serving(engine) as live, live.client() as client:
        body = BODY | {"prompt": [[i] * 60 for i in range(2)], "max_tokens": 100}
        assert client.post("/v1/completions", json=body).status_code == 200
        assert dict(samples(client))["dsv2:num_preemptions_total"] > 0


def test_drafts_are_counted_under_vllms_names() -> None:
    engine = new_engine(num_draft_tokens=3)
    with serving(engine) as live, live.client() as client:
        # What repeats in the prompt is drafted, and a bias makes it right.
        body = BODY | {"max_tokens": 9, "logit_bias": {"7": 100}}
        assert client.post("/v1/completions", json=body).status_code == 200
        said = dict(samples(client))
    expected = {
        "dsv2:spec_decode_num_drafts_total": 2,
        "dsv2:spec_decode_num_draft_tokens_total": 6,
        "dsv2:spec_decode_num_accepted_tokens_total": 6,
    }
    assert {name: said[name] for name in expected} == expected
