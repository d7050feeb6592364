"""A server on Ray Serve over HTTP: models of every kind answer as `Sampler` does, whatever befalls their replicas."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import psutil
import pytest
import ray
from openai import OpenAI
from ray import serve

from dllm_ray.models.adapters import add_lora, save_adapter
from dllm_ray.models.config import LoRAConfig
from dllm_ray.models.convert import Target, to_native
from dllm_ray.models.load import load
from dllm_ray.sampling.sampler import Sampler
from dllm_ray.serving import server
from dllm_ray.serving.config import ServeConfig, ServedModel
from dllm_ray.serving.limits import Limits

pytestmark = pytest.mark.slow

SAMPLER = {"max_new_tokens": 16, "block_size": 8, "steps": 16, "temperature": 0.8}
WORDS = ["reverse", "sort", "the quick", "brown fox", "lazy dog", "Hello!"]


@pytest.fixture(scope="module")
def folders(sharp_lm, make_lm, tmp_path_factory) -> dict[str, Path]:
    """Model directories: a masked one and another like it, a block-causal one, an adapter, and one that was made of an
    autoregressive model."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("mdlm", 0), ("other", 1)):
        sharp_lm("bert", seed=seed).save(root / name)
    causal = sharp_lm("llama", seed=2)
    causal.model.save_pretrained(root / "plain")
    causal.tokenizer.save_pretrained(root / "plain")
    for name, target in (("ar", Target("mdlm")), ("bd3lm", Target("bd3lm", block_size=8))):
        (root / name).mkdir()
        to_native(str(root / "plain"), root / name, target)
    tuned = add_lora(load(root / "mdlm"), LoRAConfig(rank=2), seed=3)
    for parameter in tuned.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5)
    save_adapter(tuned.model, root / "lora")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def config(folders) -> ServeConfig:
    def model(name: str, **settings) -> ServedModel:
        path = settings.pop("path", folders[name])
        sampler = SAMPLER | settings.pop("sampler", {})
        return ServedModel(name=name, path=str(path), sampler=sampler, cpus_per_replica=0.5, threads=1, **settings)

    return ServeConfig(
        port=_free_port(),
        models=[
            model("mdlm", replicas=2),
            model("bd3lm", sampler={"cache": "block"}),
            model("lora", path=folders["mdlm"], adapter=str(folders["lora"])),
            model("ar", limits={"max_rows": 1, "max_queue": 2}),
        ],
        limits=Limits(max_rows=4, max_queue=64),
        drain_s=30.0,
    )


@pytest.fixture(scope="module")
def address(config) -> Iterator[str]:
    ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        yield server.start(config)
        server.stop(config)
    finally:
        serve.shutdown()
        ray.shutdown()


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def expected(config: ServeConfig, name: str, prompt: str, seed: int, count: int = 1) -> list[str]:
    """What `Sampler` writes, alone and in this process."""
    (model,) = (model for model in config.served() if model.name == name)
    lm = load(model.path, adapter=model.adapter)
    sampler = Sampler(lm, replace(model.sampler_for(model.path), seed=seed))
    ids = lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    from dllm_ray.chat import decode

    return [decode(lm.tokenizer, tokens) for tokens in sampler.sample([ids] * count).completions]


def body(model: str, number: int, **settings) -> dict:
    return {"model": model, "prompt": WORDS[number % len(WORDS)], "seed": number, **settings}


def complete(address: str, **settings) -> httpx2.Response:
    return httpx2.post(f"{address}/v1/completions", json=settings, timeout=60)


def pids(name: str) -> list[int]:
    """Processes of a model's replicas."""
    ours = psutil.Process().children(recursive=True)
    return sorted(
        process.pid for process in ours if f"ServeReplica:dllm_ray:model-{name}-" in " ".join(_words(process))
    )


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended
        return []


@contextmanager
def load_on(address: str, model: str, clients: int = 4, stream: bool = False) -> Iterator[list]:
    """Clients that ask one thing after another as long as the block runs; collects (time, status, text)."""
    seen: list[tuple[float, int | str, str]] = []
    is_over = False

    def ask_on(client: int) -> None:
        number = client
        while not is_over:
            number += clients
            try:
                if stream:
                    with httpx2.stream(
                        "POST", f"{address}/v1/completions", json=body(model, number, stream=True), timeout=60
                    ) as response:
                        seen.append((time.time(), response.status_code, "".join(response.iter_text())))
                else:
                    response = complete(address, **body(model, number))
                    seen.append((time.time(), response.status_code, response.text))
            except httpx2.HTTPError as error:
                seen.append((time.time(), type(error).__name__, str(error)))

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(ask_on, client) for client in range(clients)]
        try:
            yield seen
        finally:
            is_over = True
            for one in running:
                one.result()


def test_every_kind_of_model_answers_as_the_sampler_does_while_others_are_asked(address, config):
    asked = [(model, number) for number in range(6) for model in ("mdlm", "bd3lm", "lora")]

    def one(model: str, number: int) -> str:
        return complete(address, **body(model, number)).json()["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda which: one(*which), asked))
    for (model, number), text in zip(asked, got, strict=True):
        assert [text] == expected(config, model, WORDS[number % len(WORDS)], number), (model, number)
    assert one("ar", 5) == expected(config, "ar", WORDS[5], 5)[0]


def test_a_stream_through_serve_is_the_same_text(address, config):
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    pieces = list(client.completions.create(model="mdlm", prompt="sort", seed=4, n=2, stream=True))
    texts = [
        "".join(piece.choices[0].text for piece in pieces if piece.choices and piece.choices[0].index == index)
        for index in (0, 1)
    ]
    assert texts == expected(config, "mdlm", "sort", 4, count=2)


def test_models_are_listed_with_their_own_settings(address):
    listed = {item["id"]: item["diffusion"] for item in httpx2.get(f"{address}/v1/models").json()["data"]}
    assert set(listed) == {"mdlm", "bd3lm", "lora", "ar"}
    assert (listed["bd3lm"]["sampler"]["cache"], listed["mdlm"]["sampler"]["cache"]) == ("block", "none")
    assert complete(address, model="other", prompt="x").status_code == 404


def test_a_request_has_one_id_through_all_processes(address):
    response = httpx2.get(f"{address}/healthz", headers={"X-Request-Id": "mine-1"})
    assert response.headers.get_list("x-request-id") == ["mine-1"]


def test_over_the_queue_limit_calls_are_refused_at_once_and_in_the_words_of_the_api(address):
    async def crowd() -> list[tuple[httpx2.Response, float]]:
        async with httpx2.AsyncClient(timeout=60, limits=httpx2.Limits(max_connections=None)) as client:

            async def one(number: int) -> tuple[httpx2.Response, float]:
                began = time.monotonic()
                response = await client.post(f"{address}/v1/completions", json=body("ar", number))
                return response, time.monotonic() - began

            return await asyncio.gather(*map(one, range(40)))

    answered = asyncio.run(crowd())
    assert {response.status_code for response, _ in answered} == {200, 429}
    refused = [(response, seconds) for response, seconds in answered if response.status_code == 429]
    assert all(int(response.headers["retry-after"]) >= 1 for response, _ in refused)
    assert all(response.json()["error"]["type"] == "rate_limit_error" for response, _ in refused)


def test_a_client_that_leaves_frees_its_row(address, config):
    handle = serve.get_deployment_handle(_deployment("mdlm"), config.name)
    for number in range(6):
        with httpx2.stream(
            "POST", f"{address}/v1/completions", json=body("mdlm", number, stream=True, max_tokens=32), timeout=60
        ) as response:
            next(response.iter_bytes())
    _until(lambda: all(figures.active + figures.queued == 0 for figures in handle.broadcast("figures").results()), 10)


def test_kill_9_of_a_replica_is_unseen_by_those_who_don_t_stream(address):
    _until(lambda: len(pids("mdlm")) == 2, 60)
    with load_on(address, "mdlm") as seen:
        time.sleep(2)
        os.kill(pids("mdlm")[0], signal.SIGKILL)
        time.sleep(6)
    assert Counter(status for _, status, _ in seen).keys() == {200}
    assert len(seen) > 10


def test_kill_9_of_a_replica_ends_its_streams_and_no_others(address):
    _until(lambda: len(pids("mdlm")) == 2, 60)
    with load_on(address, "mdlm", stream=True) as seen:
        time.sleep(2)
        killed = time.time()
        os.kill(pids("mdlm")[0], signal.SIGKILL)
        time.sleep(10)
    assert {status for _, status, _ in seen} <= {200, 503}
    cut = [when for when, status, text in seen if status != 200 or not text.rstrip().endswith("[DONE]")]
    assert len(cut) <= 4  # those under way
    for when, status, text in seen:
        if when in cut and status == 200:
            assert json.loads(text.strip().rpartition("data: ")[2])["error"]["type"] == "server_error"
    assert any(killed < when < killed + 10 and when not in cut for when, _, _ in seen)


def test_other_settings_and_then_another_model_under_load_fail_no_request(address, config, folders):
    first = config.models[0]
    quicker = replace(first, sampler=first.sampler | {"steps": 4})
    other = replace(quicker, path=str(folders["other"]))
    try:
        for changed in (quicker, other):
            updated = replace(config, models=[changed, *config.models[1:]])
            stayed = [pid for name in ("bd3lm", "lora", "ar") for pid in pids(name)]
            with load_on(address, "mdlm") as seen:
                time.sleep(1)
                server.start(updated)
                time.sleep(1)
            assert Counter(status for _, status, _ in seen).keys() == {200}
            text = complete(address, **body("mdlm", 3)).json()["choices"][0]["text"]
            assert [text] == expected(updated, "mdlm", WORDS[3], 3)
            assert stayed == [pid for name in ("bd3lm", "lora", "ar") for pid in pids(name)]
    finally:
        server.start(config)


def _deployment(name: str) -> str:
    (found,) = (
        deployment
        for app in serve.status().applications.values()
        for deployment in app.deployments
        if deployment.startswith(f"model-{name}-")
    )
    return found


def _until(is_so: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came to be so"
        time.sleep(0.2)
