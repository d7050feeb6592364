"""Any autoregressive decoder becomes a diffusion model: converted, loaded, and its attention measured token by token.

What is measured here doesn't use `dllm_ray.models.probe`, which the conversion itself relies on.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from dllm_ray.errors import ModelError
from dllm_ray.models.convert import Target, to_native
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.load import load

CONTEXT, WIDTH, BLOCK = 32, 12, 4
SEEN, UNSEEN = 1e-6, 1e-7
"""Changes of a logit above the one are seen, below the other not."""

ARCHITECTURES = {
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma": {},
    "glm": {},
    "gpt2": {},
    "gpt_neox": {},
    "granite": {},
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "olmo": {},
    "olmo2": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "smollm3": {},
}
WINDOWED = {
    "gemma2": {"sliding_window": CONTEXT, "num_hidden_layers": 1},
    "gemma3_text": {"sliding_window": CONTEXT, "num_hidden_layers": 1},
    "mistral": {"sliding_window": CONTEXT, "num_hidden_layers": 1},
}
"""Architectures with sliding windows, here as wide as the context. One layer: two would see twice as far."""

KINDS = [*ARCHITECTURES, *(f"{kind} with a window" for kind in WINDOWED)]

every_architecture = pytest.mark.parametrize("kind", KINDS)
both_objectives = pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])


class Converted(NamedTuple):
    """An ordinary causal model and what became of it."""

    source: Path
    directory: Path
    lm: DiffusionLM


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def tokenizer_without_mask():
    """A byte-level tokenizer of 257 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([], trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


TOKENS = 257


def config_of(kind: str, **extra):
    """The config of a tiny model of a kind."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(kind).to_dict()
    sizes = {
        "vocab_size": TOKENS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": CONTEXT,
    }
    optional = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    sizes |= {name: value for name, value in optional.items() if name in known}
    return AutoConfig.for_model(kind, **(sizes | extra))


def causal_directory(folder: Path, kind: str, **extra) -> Path:
    """An ordinary causal model with random weights, whose tokenizer has no mask token."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config_of(kind, **extra)).save_pretrained(folder)
    tokenizer_without_mask().save_pretrained(folder)
    return folder


def converted_to(folder: Path, source: Path, target: Target) -> Converted:
    folder.mkdir()
    to_native(str(source), folder, target)
    return Converted(source, folder, load(folder))


@pytest.fixture(scope="module")
def convert(tmp_path_factory):
    """Makes and converts a model of a kind, once: `convert("llama", "bd3lm")`."""

    @cache
    def source(kind: str) -> Path:
        name, _, window = kind.partition(" ")
        return causal_directory(tmp_path_factory.mktemp(name), name, **(WINDOWED if window else ARCHITECTURES)[name])

    @cache
    def make(kind: str, objective: str) -> Converted:
        folder = tmp_path_factory.mktemp(objective) / "native"
        return converted_to(folder, source(kind), Target(objective, block_size=BLOCK))

    return make


def causal(path: Path):
    """A directory as plain transformers opens it."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
    return model.eval()


def some_ids(width: int = WIDTH, rows: int = 1) -> torch.Tensor:
    return torch.randint(1, TOKENS, (rows, width), generator=torch.Generator().manual_seed(0))


def influence(logits, ids: torch.Tensor) -> torch.Tensor:
    """[T, T]: how much the logits of a row change, at most, with the token of a column. One run for each token."""
    before = logits(ids)
    columns = []
    for column in range(ids.shape[1]):
        other = ids.clone()
        other[0, column] = (other[0, column] + 7) % TOKENS
        columns.append((logits(other) - before)[0].abs().amax(dim=-1))
    return torch.stack(columns, dim=1)


def assert_seen_exactly_where(pattern: torch.Tensor, changes: torch.Tensor) -> None:
    assert (changes[pattern] > SEEN).all(), (pattern & ~(changes > SEEN)).nonzero().tolist()
    assert (changes[~pattern] < UNSEEN).all(), (~pattern & ~(changes < UNSEEN)).nonzero().tolist()


def block_pattern(width: int = WIDTH) -> torch.Tensor:
    """[T, T] of who sees whom in blocks of BLOCK."""
    return torch.tensor([[key // BLOCK <= query // BLOCK for key in range(width)] for query in range(width)])


FULL = torch.ones(WIDTH, WIDTH, dtype=torch.bool)
CAUSAL = FULL.tril()


# --- attention, measured


@every_architecture
def test_before_it_is_converted_a_position_sees_only_those_before_it(convert, kind):
    """The measure itself tells causal from bidirectional."""
    model = causal(convert(kind, "mdlm").source)
    assert_seen_exactly_where(CAUSAL, influence(lambda ids: model(ids, use_cache=False).logits, some_ids()))


@every_architecture
def test_every_position_sees_every_other(convert, kind):
    assert_seen_exactly_where(FULL, influence(convert(kind, "mdlm").lm.logits, some_ids()))


@every_architecture
def test_every_position_sees_every_other_across_the_whole_context(convert, kind):
    everything = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool)
    assert_seen_exactly_where(everything, influence(convert(kind, "mdlm").lm.logits, some_ids(CONTEXT)))


@every_architecture
@both_objectives
def test_padding_that_is_masked_out_changes_nothing(convert, kind, objective):
    lm = convert(kind, objective).lm
    ids, lengths = some_ids(WIDTH + 5, rows=3), [WIDTH + 5, WIDTH, 3]
    mask = torch.tensor([[1] * length + [0] * (WIDTH + 5 - length) for length in lengths])
    together = lm.logits(ids, mask)
    assert together.isfinite().all()
    for row, length in enumerate(lengths):
        alone = lm.logits(ids[row : row + 1, :length])[0]
        assert (together[row, :length] - alone).abs().max() < 1e-5


@every_architecture
def test_padding_that_is_not_masked_out_is_text(convert, kind):
    lm, ids = convert(kind, "mdlm").lm, some_ids(WIDTH + 5)
    assert not torch.allclose(lm.logits(ids)[:, :WIDTH], lm.logits(ids[:, :WIDTH]), atol=1e-5)


@every_architecture
def test_a_block_causal_mask_is_honoured_exactly(convert, kind):
    lm, mask = convert(kind, "mdlm").lm, block_pattern()[None, None]
    assert_seen_exactly_where(block_pattern(), influence(lambda ids: lm.logits(ids, mask), some_ids()))


@every_architecture
def test_each_row_of_a_batch_follows_its_own_mask(convert, kind):
    lm, ids = convert(kind, "mdlm").lm, some_ids(rows=2)
    together = lm.logits(ids, torch.stack([block_pattern(), FULL])[:, None])
    torch.testing.assert_close(together[:1], lm.logits(ids[:1], block_pattern()[None, None]), rtol=0, atol=1e-5)
    torch.testing.assert_close(together[1:], lm.logits(ids[1:]), rtol=0, atol=1e-5)


@every_architecture
def test_a_block_causal_model_sees_its_block_and_those_before_it(convert, kind):
    lm = convert(kind, "bd3lm").lm
    assert (lm.spec.attention, lm.spec.block_size) == ("block_causal", BLOCK)
    assert_seen_exactly_where(block_pattern(), influence(lm.logits, some_ids()))


@every_architecture
def test_a_block_causal_model_is_the_full_one_with_the_mask(convert, kind):
    full, blocks = convert(kind, "mdlm").lm, convert(kind, "bd3lm").lm
    ids = some_ids()
    assert torch.equal(blocks.logits(ids), full.logits(ids, block_pattern()[None, None]))


@every_architecture
@both_objectives
def test_logits_at_chosen_positions_are_those_of_the_whole_grid(convert, kind, objective):
    lm, ids = convert(kind, objective).lm, some_ids(rows=2)
    chosen = torch.tensor([0, 5, WIDTH - 1, WIDTH, 2 * WIDTH - 1])
    whole = lm.logits(ids).flatten(0, 1)
    torch.testing.assert_close(lm.logits(ids, positions=chosen), whole[chosen], rtol=0, atol=1e-6)


# --- what is written


@every_architecture
@both_objectives
def test_weights_are_those_of_the_source_but_for_the_rows_of_new_tokens(convert, kind, objective):
    made = convert(kind, objective)
    rows = made.lm.spec.mask_token_id + 1  # Qwen2's tokenizer also adds a padding token
    assert rows > TOKENS
    before, after = causal(made.source).state_dict(), causal(made.directory).state_dict()
    assert set(before) == set(after)
    grown = set()
    for name, old in before.items():
        new = after[name]
        if new.shape != old.shape:
            grown.add(name)
            assert new.shape == (rows, *old.shape[1:])
            torch.testing.assert_close(new[TOKENS:], old.mean(dim=0).expand_as(new[TOKENS:]), rtol=0, atol=1e-6)
        assert torch.equal(new[: len(old)] if name in grown else new, old), name
    assert grown, "no embedding has a row for the mask token"


@every_architecture
def test_the_directory_opens_with_plain_transformers_and_sees_both_ways(convert, kind):
    made = convert(kind, "mdlm")
    model = causal(made.directory)
    rows = model.get_input_embeddings().num_embeddings
    assert model.config.vocab_size == rows == made.lm.spec.mask_token_id + 1
    assert type(model).__name__ == made.lm.architecture == model.config.architectures[0]
    ids = some_ids()
    plain = model(ids, use_cache=False).logits
    torch.testing.assert_close(plain, made.lm.logits(ids), rtol=0, atol=1e-6)
    assert_seen_exactly_where(FULL, influence(lambda ids: model(ids, use_cache=False).logits, ids))


@every_architecture
@both_objectives
def test_the_directory_says_what_the_model_became(convert, kind, objective):
    made = convert(kind, objective)
    config = json.loads((made.directory / "config.json").read_text())
    assert config["model_type"] == kind.partition(" ")[0]
    assert config["is_causal"] is False
    assert config["diffusion"] == made.lm.spec.to_dict()
    assert config["diffusion"]["attention"] == {"mdlm": "full", "bd3lm": "block_causal"}[objective]
    assert made.lm.tokenizer.mask_token_id == made.lm.spec.mask_token_id >= TOKENS
    assert made.lm.max_length == CONTEXT


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("spare_rows", [0, 1, 16])
def test_the_mask_token_takes_a_spare_row_where_there_is_one(tmp_path, spare_rows, tied):
    rows = TOKENS + spare_rows
    source = causal_directory(tmp_path / "source", "llama", vocab_size=rows, tie_word_embeddings=tied)
    made = converted_to(tmp_path / "native", source, Target("mdlm"))
    assert made.lm.spec.mask_token_id == TOKENS
    before, after = causal(source), causal(made.directory)
    for table in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, table)().weight, getattr(after, table)().weight
        assert len(new) == max(rows, TOKENS + 1)
        assert torch.equal(new[:TOKENS], old[:TOKENS])
        assert torch.equal(new[TOKENS + 1 :], old[TOKENS + 1 :])
        torch.testing.assert_close(new[TOKENS], old[:TOKENS].mean(dim=0), rtol=0, atol=1e-6)
    assert (after.get_input_embeddings().weight is after.get_output_embeddings().weight) is tied


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_tokenizer_with_a_mask_token_leaves_all_weights_alone(tmp_path, tokenizer, kind):
    source = causal_directory(tmp_path / "source", kind, **(ARCHITECTURES[kind] | {"vocab_size": len(tokenizer)}))
    tokenizer.save_pretrained(source)
    made = converted_to(tmp_path / "native", source, Target("bd3lm", block_size=BLOCK))
    assert made.lm.spec.mask_token_id == tokenizer.mask_token_id
    before, after = causal(source).state_dict(), causal(made.directory).state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# --- what can't be one


def refused(folder: Path, config: dict) -> str:
    """What is said of a directory with this config, which has no weights: they are not even asked for."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer_without_mask().save_pretrained(folder)
    target = folder.with_name("native")
    target.mkdir()
    with pytest.raises(ModelError) as error:
        to_native(str(folder), target, Target("mdlm"))
    assert "\n" not in str(error.value)
    assert not list(target.iterdir())
    return str(error.value)


def saved(folder: Path, config) -> dict:
    """A config as transformers writes it."""
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


NARROW = CONTEXT // 2
GATED_DELTA = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
SLIDING, ONE_WAY = f"sliding-window attention (window {NARROW}, context {CONTEXT})", "read text in one direction only"


@pytest.mark.parametrize(
    ("kind", "extra", "said"),
    [
        ("mistral", {"sliding_window": NARROW}, SLIDING),
        ("mistral", {"sliding_window": CONTEXT - 1}, f"(window {CONTEXT - 1}, context {CONTEXT})"),
        ("gemma2", {"sliding_window": NARROW}, SLIDING),
        ("gemma3_text", {"sliding_window": NARROW}, SLIDING),
        ("olmo3", {"sliding_window": NARROW}, SLIDING),
        ("gpt_oss", {"sliding_window": NARROW, "num_local_experts": 4}, SLIDING),
        ("starcoder2", {"sliding_window": NARROW}, SLIDING),
        ("qwen2", {"use_sliding_window": True, "sliding_window": NARROW, "max_window_layers": 1}, SLIDING),
        ("mamba", {"state_size": 4}, ONE_WAY),
        ("falcon_mamba", {"state_size": 4}, ONE_WAY),
        ("recurrent_gemma", {}, ONE_WAY),
        ("qwen3_next", GATED_DELTA, ONE_WAY),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, ONE_WAY),
        ("stablelm", {}, "attention stays causal"),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}, "attention stays causal"),
        ("openai-gpt", {}, "attention stays causal"),
        ("nemotron", {}, "attention stays causal"),
    ],
)
def test_an_architecture_that_cannot_see_its_whole_canvas_is_refused_with_the_reason(tmp_path, kind, extra, said):
    assert said in refused(tmp_path / "source", saved(tmp_path, config_of(kind, **extra)))


def test_chunked_attention_is_refused_with_the_size_of_its_chunks(tmp_path):
    config = config_of("llama4_text", attention_chunk_size=NARROW, num_local_experts=2)
    said = refused(tmp_path / "source", saved(tmp_path, config))
    assert f" {NARROW}, context {CONTEXT})" in said


@pytest.mark.parametrize("kind", ["bloom", "xglm"])
def test_an_architecture_that_cannot_take_a_mask_is_refused_with_what_it_said(tmp_path, kind):
    said = refused(tmp_path / "source", saved(tmp_path, config_of(kind)))
    assert "can't be run as a diffusion model: ValueError while its attention was checked: " in said


@pytest.mark.parametrize("kind", ["t5", "bart", "pegasus", "whisper"])
def test_an_encoder_decoder_is_refused(tmp_path, kind):
    from transformers import AutoConfig

    said = refused(tmp_path / "source", saved(tmp_path, AutoConfig.for_model(kind)))
    assert f"{kind} is an encoder-decoder; expected an encoder or a decoder" in said


@pytest.mark.parametrize("kind", ["vit", "clip", "wav2vec2", "nonsense", None])
def test_what_is_no_language_model_is_refused(tmp_path, kind):
    said = refused(tmp_path / "source", {"model_type": kind})
    assert f"model_type {kind!r} is neither a published diffusion family" in said


@pytest.mark.parametrize("kind", ["fuyu", "emu3"])
def test_a_model_of_images_and_text_is_refused(tmp_path, kind):
    from transformers import AutoConfig

    refused(tmp_path / "source", saved(tmp_path, AutoConfig.for_model(kind)))


ALL_FULL = {"layer_types": ["full_attention"]}


@pytest.mark.parametrize("kind", ["mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2"])
def test_a_window_is_refused_whatever_layer_types_say_where_the_architecture_has_none(tmp_path, kind):
    """These always use their `sliding_window`; a `layer_types` in config.json means nothing to them."""
    extra = ARCHITECTURES.get(kind, {}) | {"sliding_window": NARROW, "num_hidden_layers": 1, "use_sliding_window": True}
    config = saved(tmp_path, config_of(kind, **extra)) | ALL_FULL
    said = refused(tmp_path / "source", config)
    assert SLIDING in said or "misses positions" in said


@pytest.mark.parametrize(
    ("kind", "remedy", "advice", "harmful"),
    [
        ("gemma2", ALL_FULL, "layer_types to full_attention", "sliding_window to null"),
        ("gemma3_text", ALL_FULL, "layer_types to full_attention", "sliding_window to null"),
        ("mistral", {"sliding_window": None}, "sliding_window to null", "only layer_types"),
    ],
)
def test_a_window_may_be_taken_away_in_the_config_as_the_refusal_says(tmp_path, kind, remedy, advice, harmful):
    """Gemma can't do without a `sliding_window`, even where no layer uses it; Mistral has no `layer_types`."""
    source = causal_directory(tmp_path / "source", kind, sliding_window=NARROW, num_hidden_layers=1)
    config = json.loads((source / "config.json").read_text())
    said = refused(tmp_path / "refused", config)
    (source / "config.json").write_text(json.dumps(config | remedy))
    made = converted_to(tmp_path / "full", source, Target("mdlm"))
    everything = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool)
    assert_seen_exactly_where(everything, influence(made.lm.logits, some_ids(CONTEXT)))
    assert advice in said and harmful not in said


def test_a_decoder_that_does_not_name_its_trunk_is_converted(tmp_path):
    """`Llama4ForCausalLM.base_model` is itself: there is no trunk to cut positions out of."""
    extra = {"layer_types": ["full_attention"] * 2, "num_local_experts": 2}
    made = converted_to(
        tmp_path / "native", causal_directory(tmp_path / "source", "llama4_text", **extra), Target("mdlm")
    )
    assert_seen_exactly_where(FULL, influence(made.lm.logits, some_ids()))
    chosen = torch.tensor([0, 5, WIDTH - 1])
    logits = made.lm.logits(some_ids(), positions=chosen)
    torch.testing.assert_close(logits, made.lm.logits(some_ids())[0, chosen], rtol=0, atol=1e-6)


def test_a_config_whose_special_tokens_must_be_numbers_is_converted(tmp_path):
    source = causal_directory(tmp_path / "source", "cwm", sliding_window=CONTEXT)
    made = converted_to(tmp_path / "native", source, Target("mdlm"))
    assert_seen_exactly_where(FULL, influence(made.lm.logits, some_ids()))
