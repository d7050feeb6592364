"""What `jobs/benchmark.py serve` puts beside each other: an engine alone, and a server in one process without Ray.

Each has a process of its own, so that neither they nor the load share an interpreter.
"""

import asyncio
import dataclasses
import json
import multiprocessing
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from dllm_ray.errors import ConfigError, ResourceError
from dllm_ray.models.config import ModelConfig
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.serving.limits import Limits
from dllm_ray.serving.load import Question, Run, Timing

_START_S = 300.0
_POLL_S = 0.1
_STOP_S = 10.0


def random_model(config: ModelConfig, seed: int, folder: Path) -> tuple[list[int], list[int]]:
    """Writes a model with random weights and a vocabulary whose every token is text, all but the bytes a word.

    Args:
        config: its sizes (`scratch`) and dtype.
        seed: of the weights.
        folder: where it goes.

    Returns:
        The words, and the other tokens: suppressing those makes every answer as long as it may be, and text of it.

    Raises:
        ConfigError: the vocabulary has no room for words.
    """
    from dllm_ray.models.load import open_model

    scratch = config.scratch
    tokenizer, words = _wide_tokenizer(scratch.vocab_size)
    open_model(dataclasses.replace(config, path=None), tokenizer, seed).save(folder)
    return words, list(range(words[0]))


def _wide_tokenizer(size: int):
    """A tokenizer of so many tokens, and those that are words."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from dllm_ray.models.tokenizers import train_bpe

    small = train_bpe([], size)  # bytes and special tokens
    state = json.loads(small.backend_tokenizer.to_str())
    words = list(range(len(small), size))
    if not words:
        raise ConfigError(f"a vocabulary of {size} has no room for words beside the bytes", "model.scratch.vocab_size")
    state["model"]["vocab"] |= {f"Ġw{token}": token for token in words}
    wide = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token=small.pad_token,
        eos_token=small.eos_token,
        mask_token=small.mask_token,
        clean_up_tokenization_spaces=False,
    )
    wide.chat_template = small.chat_template
    return wide, words


class EngineAlone:
    """An engine in a process of its own; a context manager.

    Args:
        config: the model.
        threads: torch threads on a CPU.
    """

    def __init__(self, config: ModelConfig, threads: int | None = None):
        spawn = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, spawn, initializer=_open, initargs=(config, threads))

    def __enter__(self) -> "EngineAlone":
        return self

    def __exit__(self, *_exception) -> None:
        self._process.shutdown(cancel_futures=True)

    def run(self, asked: Sequence[Question], sampler: SamplerConfig, batch: int, scales: bool = True) -> Run:
        """Answers everything, `batch` rows at a time.

        Args:
            asked: the questions.
            sampler: settings of an answer of `max_new_tokens`.
            batch: rows at a time.
            scales: longer answers have more steps, as those that a server denoises by its own settings.

        Raises:
            DllmRayError: it can't.
        """
        return self._process.submit(_run, asked, sampler, batch, scales).result()


_lm = None  # the model of the process of an `EngineAlone`


def _open(config: ModelConfig, threads: int | None) -> None:
    global _lm
    _lm = _loaded(config, threads)


def _loaded(config: ModelConfig, threads: int | None):
    import torch

    from dllm_ray.models.load import open_model

    if threads is not None:
        torch.set_num_threads(threads)
    return open_model(config, device="cuda" if torch.cuda.is_available() else "cpu")


def _run(asked: Sequence[Question], config: SamplerConfig, batch: int, scales: bool) -> Run:
    from dllm_ray.sampling.output import until_stop
    from dllm_ray.sampling.sampler import Sampler, engine_for, row_seeds

    rows = []
    for key, question in enumerate(asked):
        new = question.new_tokens
        sampler = Sampler(_lm, config.for_length(new) if scales else dataclasses.replace(config, max_new_tokens=new))
        [row] = sampler.rows([question.prompt], row_seeds(question.seed, [0]))
        rows.append(dataclasses.replace(row, key=key))
    engine = engine_for(_lm, max_rows=batch)
    began = time.perf_counter()
    for row in rows:
        engine.admit(row)
    while engine.busy:
        engine.step()
    finished = engine.take_finished()  # on a GPU its tokens are on the host by now
    run = Run(seconds=time.perf_counter() - began)
    for done in finished:
        is_answer = done.answer or rows[done.row].open
        written = [token for token, is_its in zip(done.tokens, is_answer, strict=True) if is_its]
        answer = until_stop(written[: asked[done.row].new_tokens], _lm.spec.stop_token_ids)
        run.timings.append(Timing(began, tokens=len(answer), nfe=done.nfe))
    return run


@contextmanager
def serving_locally(
    name: str, config: ModelConfig, sampler: SamplerConfig, limits: Limits, threads: int | None = None
) -> Iterator[str]:
    """A server in one process, for the time of a `with` block; gives its address.

    Args:
        name: of the model.
        config: the model.
        sampler: its settings.
        limits: of calls.
        threads: torch threads on a CPU.

    Raises:
        ResourceError: it doesn't come up.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, name, config, sampler, limits, threads), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(_START_S):
            raise ResourceError(f"the server has not come up in {_START_S:.0f} s")
        yield f"http://127.0.0.1:{ours.recv()}"
    except EOFError:
        raise ResourceError("the server's process ended before it came up; its own message stands above") from None
    finally:
        process.terminate()
        process.join(_STOP_S)
        process.kill()


def _serve(parent, name: str, config: ModelConfig, sampler: SamplerConfig, limits: Limits, threads: int | None) -> None:
    import uvicorn

    from dllm_ray.serving.app import create_app
    from dllm_ray.serving.local import LocalModel
    from dllm_ray.serving.settings import AppSettings

    model = LocalModel(name, _loaded(config, 1), limits, sampler, threads=threads)
    server = uvicorn.Server(
        uvicorn.Config(create_app({name: model}, AppSettings()), log_level="warning", timeout_graceful_shutdown=2)
    )

    async def run(listener: socket.socket) -> None:
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(_POLL_S)
        parent.send(listener.getsockname()[1])
        await serving

    with socket.create_server(("127.0.0.1", 0)) as listener:
        asyncio.run(run(listener))
    model.close()
