"""Fixtures shared by all tests: small models made on the spot, and the reference numbers where they are at hand."""

import os

# Before transformers is imported: tests never reach out to the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from dllm_ray.models.config import ScratchConfig
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.load import load
from dllm_ray.models.scratch import build
from dllm_ray.models.tokenizers import train_bpe

settings.register_profile("untimed", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("DLLM_RAY_SHARED", ROOT.parent / "shared"))
"""Reference numbers (`golden/`), real data sets (`data/`) and schemas (`facts/`), beside the checkout."""

TEXTS = ["reverse 123456", "sort 987", "the quick brown fox jumps over the lazy dog", "Hello! Ça va? 日本語 🙂"] * 8


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests first: what is left at the end is short, so that all processes end together."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # stable: files stay in one piece, and their tests in order


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of some 300 tokens."""
    return train_bpe(TEXTS, 300)


@pytest.fixture(scope="session")
def make_lm(tokenizer):
    """Builds a model of a few thousand parameters: `make_lm("llama", seed=1, hidden_size=32)`."""

    def make(architecture: str = "bert", seed: int = 0, **sizes) -> DiffusionLM:
        defaults = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
        }
        return build(ScratchConfig(architecture=architecture, vocab_size=300, **(defaults | sizes)), tokenizer, seed)

    return make


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers."""
    return _at_hand("golden")


@pytest.fixture(scope="session")
def golden_lm(golden):
    """Loads a reference checkpoint, once: `golden_lm("dream")`."""

    @cache
    def open_checkpoint(name: str) -> DiffusionLM:
        return load(golden / name / "checkpoint")

    return open_checkpoint


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets."""
    return _at_hand("data")


@pytest.fixture(scope="session")
def facts() -> Path:
    """The folder of published facts and schemas."""
    return _at_hand("facts")


@pytest.fixture(autouse=True)
def _one_thread():
    """Small matrices gain nothing from more, and Ray's processes share the cores."""
    torch.set_num_threads(1)


def _at_hand(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, which is not there")
    return folder
