"""Health and metrics, read as Prometheus reads them."""

from collections.abc import Mapping
from dataclasses import replace

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from lowmoe.engine.statistics import PerTier
from lowmoe.errors import PromptError
from lowmoe.experts.ledger import Traffic
from lowmoe.server.numbers import Numbers
from tests.server.fake_service import FakeService, reading, saying
from tests.server.serving import serving

NUMBERS = Numbers(
    n_sequences=8,
    n_waiting=5,
    n_under_way=8,
    n_reading=2,
    asked=100,
    refused=1,
    failed=2,
    closed=3,
    ended={"end": 70, "length": 11},
    prompt_tokens=1000,
    reused_tokens=400,
    new_tokens=5000,
    steps=900,
    traffic=Traffic(gpu_requests=6, ram_requests=3, disk_requests=1, disk_bytes=4096),
    tokens_per_s=12.5,
    predicted_tokens_per_s=14.0,
    placement=PerTier(gpu=8e9, ram=60e9, disk=20e9),
)
ASK = {"model": "demo", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}


def samples(text: str) -> Mapping[tuple[str, str], float]:
    """Values by name and first label."""
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_whether_the_server_answers_is_told() -> None:
    with serving(FakeService()) as url:
        assert httpx2.get(f"{url}/health/live").json() == {"status": "alive"}
        assert httpx2.get(f"{url}/health/ready").json() == {"status": "ready"}
        told = {"status": "ready", "model": "demo", "context_tokens": 4096}
        assert httpx2.get(f"{url}/health").json() == told


def test_a_server_that_shuts_down_is_not_ready() -> None:
    with serving(FakeService(), numbers=lambda: replace(NUMBERS, is_closing=True)) as url:
        answer = httpx2.get(f"{url}/health/ready")
        assert httpx2.get(f"{url}/health/live").status_code == 200
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0


def test_the_workers_numbers_are_metrics() -> None:
    with serving(FakeService(), numbers=lambda: NUMBERS) as url:
        answer = httpx2.get(f"{url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = samples(answer.text)
    expected = {
        ("lowmoe_num_requests_waiting", ""): 5,
        ("lowmoe_num_requests_running", ""): 8,
        ("lowmoe_num_prompts_reading", ""): 2,
        ("lowmoe_max_num_seqs", ""): 8,
        ("lowmoe_requests_total", ""): 100,
        ("lowmoe_requests_unanswered_total", "refused"): 1,
        ("lowmoe_requests_unanswered_total", "failed"): 2,
        ("lowmoe_requests_unanswered_total", "client_gone"): 3,
        ("lowmoe_request_success_total", "end"): 70,
        ("lowmoe_request_success_total", "length"): 11,
        ("lowmoe_prompt_tokens_total", ""): 1000,
        ("lowmoe_prefix_cache_hits_total", ""): 400,
        ("lowmoe_generation_tokens_total", ""): 5000,
        ("lowmoe_decode_steps_total", ""): 900,
        ("lowmoe_expert_requests_total", "gpu"): 6,
        ("lowmoe_expert_requests_total", "ram"): 3,
        ("lowmoe_expert_requests_total", "disk"): 1,
        ("lowmoe_expert_read_bytes_total", "disk"): 4096,
        ("lowmoe_weight_bytes", "gpu"): 8e9,
        ("lowmoe_weight_bytes", "disk"): 20e9,
        ("lowmoe_achieved_tokens_per_second", ""): 12.5,
        ("lowmoe_predicted_tokens_per_second", ""): 14,
    }
    assert {name: found[name] for name in expected} == expected


def test_a_speed_that_nobody_predicts_is_no_metric() -> None:
    with serving(FakeService(), numbers=lambda: Numbers(n_sequences=1)) as url:
        found = samples(httpx2.get(f"{url}/metrics").text)
    assert ("lowmoe_predicted_tokens_per_second", "") not in found
    assert found["lowmoe_achieved_tokens_per_second", ""] == 0


def test_how_long_clients_waited_is_measured() -> None:
    service = FakeService([[*reading(0, 7), *saying("Hello", " world")], [PromptError("no")]])
    with serving(service) as url:
        for stream in (True, False):
            httpx2.post(f"{url}/v1/messages", json={**ASK, "stream": stream})
        found = samples(httpx2.get(f"{url}/metrics").text)
    # Of the one that was answered.
    for name in ("time_to_first_token", "e2e_request_latency"):
        assert found[f"lowmoe_{name}_seconds_count", ""] == 1
        assert 0 < found[f"lowmoe_{name}_seconds_sum", ""] < 10
