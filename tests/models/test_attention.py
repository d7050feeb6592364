"""Who sees whom: the block-causal mask against a plain double loop, and what models make of masks."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from dllm_ray.models.attention import Pattern, additive, block_causal, dense, flex
from dllm_ray.models.lm import DiffusionLM, LogitsModule

WIDTH, BLOCK = 12, 4
IDS = torch.randint(0, 260, (3, WIDTH), generator=torch.Generator().manual_seed(0))
ARCHITECTURES = ["llama", "qwen3", "gpt2", "bert", "modernbert", "roberta"]

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def lm(make_lm, architecture):
    return make_lm(architecture, seed=1)


def blockwise(lm: DiffusionLM, size: int = BLOCK) -> DiffusionLM:
    """The same weights with block-causal attention."""
    return DiffusionLM(lm.model, lm.tokenizer, replace(lm.spec, attention="block_causal", block_size=size))


def counted(rows: int = 1, width: int = WIDTH) -> torch.Tensor:
    return torch.arange(width).expand(rows, width)


# --- the mask


def slow_block_causal(positions: list[list[int]], size: int, visible: list[list[bool]] | None) -> list:
    """The definition, one pair at a time."""
    made = []
    for row, places in enumerate(positions):
        pattern = []
        for query in range(len(places)):
            line = []
            for key in range(len(places)):
                sees = places[key] // size <= places[query] // size
                if visible is not None and not (visible[row][key] and visible[row][query]):
                    sees = False
                line.append(sees or query == key)
            pattern.append(line)
        made.append([pattern])
    return made


@st.composite
def grids(draw):
    rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    row = st.lists(st.integers(0, 20), min_size=width, max_size=width)
    flags = st.lists(st.booleans(), min_size=width, max_size=width)
    positions = draw(st.one_of(st.just([list(range(width))] * rows), st.lists(row, min_size=rows, max_size=rows)))
    visible = draw(st.none() | st.lists(flags, min_size=rows, max_size=rows))
    return positions, draw(st.integers(1, 10)), visible


@settings(max_examples=100)
@given(grid=grids(), dtype=st.sampled_from([torch.int64, torch.bool, torch.float32]))
def test_the_mask_is_what_the_definition_says(grid, dtype):
    positions, size, visible = grid
    padding = None if visible is None else torch.tensor(visible).to(dtype)
    mask = block_causal(torch.tensor(positions), size, padding)
    assert mask.dtype == torch.bool
    assert mask.tolist() == slow_block_causal(positions, size, visible)


@settings(max_examples=30)
@given(width=st.integers(1, 12), size=st.integers(1, 15))
def test_the_same_positions_for_all_rows_need_be_given_once(width, size):
    padding = torch.randint(0, 2, (3, width), generator=torch.Generator().manual_seed(width))
    once = block_causal(counted(1, width), size, padding)
    assert once.shape == (3, 1, width, width)
    assert torch.equal(once, block_causal(counted(3, width), size, padding))
    assert block_causal(counted(1, width), size).shape == (1, 1, width, width)


def test_blocks_of_one_are_causal_and_a_block_of_all_is_full():
    assert torch.equal(block_causal(counted(), 1)[0, 0], torch.ones(WIDTH, WIDTH).tril().bool())
    assert block_causal(counted(), WIDTH).all()


def test_blocks_are_counted_from_position_0_not_from_the_first_column():
    """Rows that are padded on the left keep the grid of their text."""
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5]])
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    text = block_causal(positions, 4, padding)[0, 0, 2:, 2:]
    assert torch.equal(text, block_causal(counted(1, 6), 4)[0, 0])


def test_padding_is_seen_by_nobody_but_itself():
    padding = torch.tensor([[1, 1, 1, 0, 1, 0, 0, 0], [0] * 8])
    mask = block_causal(counted(2, 8), 4, padding)
    for row in range(2):
        for key in range(8):
            if not padding[row, key]:
                seen_by = mask[row, 0, :, key].nonzero().flatten().tolist()
                assert seen_by == [key]


# --- as numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_an_additive_mask_adds_nothing_where_true_and_the_lowest_number_where_false(dtype):
    mask = block_causal(counted(), BLOCK)
    numbers = additive(mask, dtype)
    assert numbers.dtype == dtype and numbers.shape == mask.shape
    assert numbers[mask].eq(0).all()
    assert numbers[~mask].eq(torch.finfo(dtype).min).all()
    assert torch.equal(numbers == 0, mask)


# --- models with block-causal attention


@every_architecture
def test_a_block_causal_spec_means_the_explicit_mask(lm):
    explicit = block_causal(counted(), BLOCK)
    assert torch.equal(blockwise(lm).logits(IDS), lm.logits(IDS, explicit))
    assert not torch.allclose(blockwise(lm).logits(IDS), lm.logits(IDS), atol=1e-4)


@every_architecture
def test_a_block_causal_spec_and_padding_mean_both_together(lm):
    padding = torch.tensor([[1] * 12, [1] * 9 + [0] * 3, [1] * 5 + [0] * 7])
    explicit = block_causal(counted(), BLOCK, padding)
    blocks = blockwise(lm)
    together = blocks.logits(IDS, padding)
    assert torch.equal(together, lm.logits(IDS, explicit))
    for row, length in enumerate(padding.sum(dim=1)):
        alone = blocks.logits(IDS[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], rtol=0, atol=1e-5)


@every_architecture
def test_earlier_blocks_do_not_change_with_a_later_token_and_its_own_block_and_later_ones_do(lm):
    blocks = blockwise(lm)
    before = blocks.logits(IDS[:1])
    for column in range(WIDTH):
        other = IDS[:1].clone()
        other[0, column] = (other[0, column] + 1) % 260
        change = (blocks.logits(other) - before).abs().amax(dim=-1)[0]
        start = column // BLOCK * BLOCK
        assert (change[:start] < 1e-7).all(), column
        assert (change[start:] > 1e-6).all(), column


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "bert"])
def test_a_row_padded_on_the_left_has_the_logits_of_its_text(lm):
    text, before = IDS[:1, :9], 3
    row = torch.cat([torch.full((1, before), lm.spec.pad_token_id), text], dim=1)
    padding = (torch.arange(WIDTH) >= before).long()[None]
    positions = (torch.arange(WIDTH) - before).clamp(min=0)[None]
    blocks = blockwise(lm)
    found = blocks.logits(row, padding, positions)[:, before:]
    torch.testing.assert_close(found, blocks.logits(text), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rows_may_have_positions_of_their_own(lm):
    blocks = blockwise(lm)
    positions = torch.stack([torch.arange(WIDTH), torch.arange(2, WIDTH + 2), torch.arange(5, WIDTH + 5)])
    together = blocks.logits(IDS, position_ids=positions)
    for row in range(3):
        alone = blocks.logits(IDS[row : row + 1], position_ids=positions[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(together, lm.logits(IDS, block_causal(positions, BLOCK), positions), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_chosen_positions_of_a_block_causal_model_are_those_of_the_whole_grid(lm):
    blocks = blockwise(lm)
    chosen = torch.tensor([0, 5, 12, 23, 35])
    whole = blocks.logits(IDS).flatten(0, 1)
    torch.testing.assert_close(blocks.logits(IDS, positions=chosen), whole[chosen], rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_one_block_as_wide_as_the_row_is_full_attention(lm):
    torch.testing.assert_close(blockwise(lm, WIDTH).logits(IDS), lm.logits(IDS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama"])
def test_a_block_size_means_nothing_where_attention_is_full(lm):
    full = DiffusionLM(lm.model, lm.tokenizer, replace(lm.spec, attention="full", block_size=BLOCK))
    assert torch.equal(full.logits(IDS), lm.logits(IDS))


# --- masks that are given


@every_architecture
def test_a_given_pattern_is_taken_as_it_is_even_by_a_block_causal_model(lm):
    pattern = torch.rand((3, 1, WIDTH, WIDTH), generator=torch.Generator().manual_seed(1)) < 0.5
    pattern |= torch.eye(WIDTH, dtype=torch.bool)
    assert torch.equal(blockwise(lm).logits(IDS, pattern), lm.logits(IDS, pattern))
    everything = torch.ones((1, 1, WIDTH, WIDTH), dtype=torch.bool)
    torch.testing.assert_close(blockwise(lm).logits(IDS, everything), lm.logits(IDS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_each_row_follows_its_own_pattern(lm):
    sizes = [3, 4, 12]
    patterns = torch.cat([block_causal(counted(), size) for size in sizes])
    together = lm.logits(IDS, patterns)
    for row, size in enumerate(sizes):
        alone = blockwise(lm, size).logits(IDS[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-5)


@every_architecture
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_a_pattern_of_ones_and_zeros_is_a_pattern_of_true_and_false(lm, dtype):
    pattern = block_causal(counted(), BLOCK)
    assert torch.equal(lm.logits(IDS, pattern.to(dtype)), lm.logits(IDS, pattern))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_a_pattern_of_numbers_is_added_to_the_scores_as_it_is(lm):
    pattern = block_causal(counted(), BLOCK)
    torch.testing.assert_close(
        lm.logits(IDS, additive(pattern, torch.float32)), lm.logits(IDS, pattern), rtol=0, atol=1e-6
    )


# --- "eager", which adds masks to the scores


def decoder(implementation: str, kind: str = "llama") -> LogitsModule:
    """The same weights under either implementation of attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=260, max_position_embeddings=64, pad_token_id=0, **sizes)
    config.is_causal = False
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    assert model.config._attn_implementation == implementation
    return LogitsModule(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rows", [1, 3], ids=["one pattern for all rows", "a pattern for each row"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_eager_and_sdpa_agree_on_a_pattern(kind, rows, dtype):
    pattern = block_causal(counted(rows), BLOCK).to(dtype)
    eager, sdpa = decoder("eager", kind), decoder("sdpa", kind)
    torch.testing.assert_close(eager(IDS, pattern), sdpa(IDS, pattern), rtol=0, atol=1e-5)
    assert not torch.allclose(eager(IDS, pattern), eager(IDS), atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_eager_and_sdpa_agree_on_a_block_causal_model_with_padding(kind):
    padding = torch.tensor([[1] * 12, [1] * 9 + [0] * 3, [0] * 2 + [1] * 10])
    eager, sdpa = (LogitsModule(decoder(name, kind).model, BLOCK) for name in ("eager", "sdpa"))
    torch.testing.assert_close(eager(IDS, padding), sdpa(IDS, padding), rtol=0, atol=1e-5)


def test_a_later_block_is_never_seen_under_eager():
    module = LogitsModule(decoder("eager").model, BLOCK)
    other = IDS.clone()
    other[:, 2 * BLOCK] = (other[:, 2 * BLOCK] + 1) % 260
    assert torch.equal(module(other)[:, : 2 * BLOCK], module(IDS)[:, : 2 * BLOCK])
    assert (module(other) - module(IDS))[:, 2 * BLOCK :].abs().amax(dim=-1).gt(1e-6).all()


def test_a_pattern_works_under_eager_with_weights_of_half_width():
    pattern = block_causal(counted(), BLOCK)
    eager, exact = decoder("eager"), decoder("sdpa")(IDS, pattern)
    eager.model.to(torch.bfloat16)
    found = eager(IDS, pattern)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() / exact.norm() < 0.02


# --- patterns, which stand for masks


@st.composite
def patterns(draw):
    """Rows of samples with places, blocks of them, and a copy of each position that is clean or noisy."""
    rows, width = draw(st.integers(1, 2)), draw(st.integers(1, 10))
    numbers = lambda most: st.lists(st.integers(0, most), min_size=width, max_size=width)  # noqa: E731
    grid = lambda most: torch.tensor([draw(numbers(most)) for _ in range(rows)])  # noqa: E731
    blocks = draw(st.sampled_from(["none", "blocks", "noisy"]))
    block = None if blocks == "none" else grid(3)
    return Pattern(grid(2), grid(9), block, grid(1).bool() if blocks == "noisy" else None)


def slow_pattern(pattern: Pattern, window: int | None) -> list:
    made = []
    for row, samples in enumerate(pattern.sample.tolist()):
        lines = []
        for query, key in itertools.product(range(len(samples)), repeat=2):
            sees = samples[query] == samples[key] > 0
            if pattern.block is not None:
                block_query, block_key = pattern.block[row, query], pattern.block[row, key]
                noisy_query, noisy_key = (
                    (False, False) if pattern.noisy is None else (pattern.noisy[row, query], pattern.noisy[row, key])
                )
                if noisy_key:
                    sees &= bool(noisy_query and block_query == block_key)
                elif noisy_query:
                    sees &= bool(block_key < block_query)
                else:
                    sees &= bool(block_key <= block_query)
            if window is not None:
                sees &= abs(int(pattern.position[row, query] - pattern.position[row, key])) <= window
            lines.append(sees or query == key)
        made.append([torch.tensor(lines).view(len(samples), -1).tolist()])
    return made


@settings(max_examples=60)
@given(pattern=patterns(), window=st.none() | st.integers(0, 5))
def test_a_pattern_is_the_mask_that_its_definition_says(pattern, window):
    mask = dense(pattern, window)
    assert mask.tolist() == slow_pattern(pattern, window)
    blocks = flex(pattern, window)
    assert torch.equal(create_mask(blocks.mask_mod, mask.shape[0], 1, *mask.shape[2:], device="cpu"), mask)


BD3LM_PATTERN = Pattern(
    sample=torch.tensor([[1] * 6 + [1] * 6, [1, 1, 1, 2, 2, 0] + [1, 1, 1, 2, 2, 0]]),
    position=torch.tensor([[0, 1, 2, 3, 4, 5] * 2, [0, 1, 2, 0, 1, 0] * 2]),
    block=torch.tensor([[0, 0, 1, 1, 2, 2] * 2, [0, 0, 1, 0, 0, 0] * 2]),
    noisy=torch.tensor([[True] * 6 + [False] * 6] * 2),
)
LOCAL = {"local_attention": 4, "layer_types": ["sliding_attention", "full_attention"]}  # sees two to each side


@pytest.mark.slow
def test_flex_attention_sees_what_sdpa_sees(make_lm):
    lm = make_lm("qwen3", num_hidden_layers=1)
    arguments = IDS[:2], BD3LM_PATTERN, BD3LM_PATTERN.position
    expected = lm.logits(*arguments)
    lm.model.config._attn_implementation = "flex_attention"
    found = lm.logits(*arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_local_layers_keep_their_window_under_every_kind_of_mask(make_lm):
    lm = make_lm("modernbert", seed=1, extra=LOCAL | {"layer_types": ["sliding_attention"] * 2})
    everything = torch.ones((1, 1, WIDTH, WIDTH), dtype=torch.bool)
    alone = lm.logits(IDS)
    for mask in (everything, Pattern(torch.ones_like(IDS), counted(3)), torch.ones_like(IDS)):
        torch.testing.assert_close(lm.logits(IDS, mask), alone, rtol=0, atol=1e-5)
    moved = IDS.clone()
    moved[:, 0] = 251
    change = (lm.logits(moved, everything) - lm.logits(IDS, everything)).abs().amax(dim=(0, 2))
    assert change[:5].gt(1e-7).all()
    assert change[5:].eq(0).all()


@pytest.mark.parametrize("architecture", ["llama"])
def test_a_pattern_without_blocks_takes_those_of_a_block_causal_model(lm):
    pattern = Pattern(torch.ones_like(IDS), counted(3))
    assert torch.equal(blockwise(lm).logits(IDS, pattern), blockwise(lm).logits(IDS))
