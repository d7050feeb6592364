"""Likelihoods equal what a slow sum over all masks gives, whatever shares a forward with them."""

import itertools
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.evaluation.config import LikelihoodConfig
from dllm_ray.evaluation.likelihood import DECIDED, FIRST_ROUND, estimate, log_likelihood
from dllm_ray.models.lm import DiffusionLM

PAIRS = [([20, 21, 22], [30, 31]), ([23] * 9, [32, 33, 34, 35]), ([24], [36]), ([25, 26], [37, 38, 39])]


@pytest.fixture(scope="module", params=["bert", "qwen3", "modernbert"])
def lm(request, make_lm):
    extra = {"local_attention": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return sharp(make_lm(request.param, extra=extra if request.param == "modernbert" else {}))


@pytest.fixture(scope="module")
def decoder(make_lm):
    return sharp(make_lm("qwen3"))


def sharp(lm: DiffusionLM) -> DiffusionLM:
    """Weights whose predictions depend on what is visible."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5, generator=source)
    return lm


def like(lm: DiffusionLM, **changes) -> DiffusionLM:
    return DiffusionLM(lm.model, lm.tokenizer, replace(lm.spec, **changes))


def blocks_of(lm: DiffusionLM, size: int) -> DiffusionLM:
    return like(lm, attention="block_causal", block_size=size)


def slow(lm: DiffusionLM, prefix, target, scale: float = 0.0) -> float:
    """Block by block, mask by mask, with the logits of whole rows."""
    text, total = list(prefix) + list(target), 0.0
    size = lm.spec.grid or len(text)
    for first in range(len(prefix) // size * size, len(text), size):
        places = range(max(first, len(prefix)), min(first + size, len(text)))
        for count in range(1, len(places) + 1):
            for hidden in itertools.combinations(places, count):
                row = text[: first + size]
                for place in hidden:
                    row[place] = lm.spec.mask_token_id
                with torch.inference_mode():
                    logits = lm.logits(torch.tensor([row]))[0]
                    blind = [lm.spec.mask_token_id] * len(prefix) + row[len(prefix) :]
                    unguided = lm.logits(torch.tensor([blind]))[0] if scale else logits
                log_p = (unguided + (1 + scale) * (logits - unguided)).log_softmax(-1)
                weight = 1 / (count * math.comb(len(places), count))
                total += weight * sum(log_p[place, text[place]].item() for place in hidden)
    return total


def ask(lm, pairs, seeds=None, **settings):
    groups, sizes = settings.pop("groups", None), settings.pop("sizes", None)
    return estimate(lm, pairs, LikelihoodConfig(**settings), seeds or range(len(pairs)), groups, sizes)


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_short_targets_are_exact(lm, scale):
    for pair, found in zip(PAIRS, ask(lm, PAIRS, mc_num=15, batch_size=4, cfg_scale=scale), strict=True):
        assert found.mean == pytest.approx(slow(lm, *pair, scale), abs=1e-4)
        assert found.stderr == 0 and found.copies == 2 ** len(pair[1]) - 1 and not found.greedy


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_block_causal_models_sum_over_their_blocks(decoder, size, shift, scale):
    lm = like(blocks_of(decoder, size), shift_logits=shift)
    pairs = [*PAIRS, ([27] * 5, [40, 41, 42, 43, 44])]
    for pair, found in zip(pairs, ask(lm, pairs, mc_num=31, batch_size=5, cfg_scale=scale), strict=True):
        assert found.mean == pytest.approx(slow(lm, *pair, scale), abs=1e-4) and found.stderr == 0


def test_an_encoder_with_blocks_sums_over_them(lm):
    lm = blocks_of(lm, 3)
    for pair, found in zip(PAIRS, ask(lm, PAIRS, mc_num=7), strict=True):
        assert found.mean == pytest.approx(slow(lm, *pair), abs=1e-4)


def test_blocks_of_one_token_are_the_chain_rule(decoder):
    lm = blocks_of(decoder, 1)
    prefix, target = [20, 21, 22], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39]
    expected, text = 0.0, list(prefix)
    for token in target:
        row = torch.tensor([[*text, lm.spec.mask_token_id]])
        expected += lm.logits(row)[0, -1].log_softmax(-1)[token].item()
        text.append(token)
    [found] = ask(lm, [(prefix, target)])
    assert found.mean == pytest.approx(expected, abs=1e-4)
    assert (found.stderr, found.copies) == (0, 1)


def test_shifted_logits_are_read_one_to_the_left(decoder):
    lm = like(decoder, shift_logits=True)
    for pair, found in zip(PAIRS, ask(lm, PAIRS, mc_num=15), strict=True):
        assert found.mean == pytest.approx(slow(lm, *pair), abs=1e-4)
    with pytest.raises(ConfigError, match=r"pair 1 has an empty prefix.* BOS"):
        log_likelihood(lm, [([5], [6]), ([], [6])])


@pytest.mark.parametrize("block", [None, 5])
def test_an_estimate_is_the_pairs_own(decoder, block):
    lm = decoder if block is None else blocks_of(decoder, block)
    pairs = [(list(range(20, 20 + size)), list(range(60, 60 + 5 * size))) for size in (3, 1, 5, 2)]
    seeds = [7, -3, 2**63 - 1, 0]
    for scale in (1.0, 0.0):
        together = ask(lm, pairs, seeds, mc_num=12, batch_size=32, cfg_scale=scale)
        turned = ask(lm, pairs[::-1], seeds[::-1], mc_num=12, batch_size=5, cfg_scale=scale)[::-1]
        for pair, seed, one, other in zip(pairs, seeds, together, turned, strict=True):
            [alone] = ask(lm, [pair], [seed], mc_num=12, batch_size=1, cfg_scale=scale)
            for found in (one, other):
                assert found.mean == pytest.approx(alone.mean, abs=1e-3)
                assert found.stderr == pytest.approx(alone.stderr, abs=1e-3)
                assert found.stderr > 0 and found.copies <= 12
    assert ask(lm, pairs, [8, 9, 10, 11], mc_num=12)[0].mean != pytest.approx(together[0].mean, abs=1e-3)


@pytest.mark.parametrize("block", [None, 6])
def test_estimates_spread_as_they_say_around_the_exact_value(decoder, block):
    lm = decoder if block is None else blocks_of(decoder, block)
    pair = ([20, 21, 22], [30, 31, 32, 33, 34, 35, 36, 37])
    found = ask(lm, [pair] * 100, range(100), mc_num=16)
    means = np.array([item.mean for item in found])
    told = np.mean([item.stderr**2 for item in found]) ** 0.5
    assert abs(means.mean() - slow(lm, *pair)) < 4 * means.std() / 10
    assert told == pytest.approx(means.std(), rel=0.3)


def test_one_copy_is_an_estimate_without_an_error(decoder):
    [found] = ask(decoder, [([20], [30, 31, 32])], mc_num=1)
    assert math.isfinite(found.mean) and math.isnan(found.stderr) and found.copies == 1


def test_the_vocabulary_head_sees_masked_positions_only(decoder):
    rows = []
    hook = decoder.model.lm_head.register_forward_hook(lambda _module, inputs, _out: rows.append(inputs[0].numel()))
    try:
        ask(decoder, [([20] * 9, [30, 31, 32])], mc_num=7)
    finally:
        hook.remove()
    assert sum(rows) == (3 + 2 * 3 + 3) * decoder.model.config.hidden_size


def test_copies_of_a_block_causal_target_share_one_clean_copy_of_what_is_before_it(decoder):
    lm, widths = blocks_of(decoder, 8), []
    hook = lm.model.model.embed_tokens.register_forward_hook(lambda _m, _in, out: widths.append(out.shape[:2]))
    try:
        [found] = ask(lm, [([20] * 40, list(range(30, 38)))], mc_num=24, batch_size=32)
    finally:
        hook.remove()
    assert widths == [(1, 40 + 8 * found.copies)]


def test_many_masked_positions_change_nothing_but_how_they_are_cut(decoder):
    pair = ([20], list(range(30, 80)))
    one = ask(decoder, [pair], mc_num=64, batch_size=64)
    other = ask(decoder, [pair], mc_num=64, batch_size=3)
    assert one[0].mean == pytest.approx(other[0].mean, abs=1e-2)


# ---- greedy ----


def denoised(lm: DiffusionLM, prefix, count: int, scale: float) -> list[int]:
    """Greedy denoising, one position and one token a step."""
    mask, size = lm.spec.mask_token_id, lm.spec.grid or len(prefix) + count
    row = list(prefix) + [mask] * count
    while mask in row:
        stop = (row.index(mask) // size + 1) * size
        logits = lm.logits(torch.tensor([row]))[0]
        if scale:
            unguided = lm.logits(torch.tensor([[mask] * len(prefix) + row[len(prefix) :]]))[0]
            logits = unguided + (1 + scale) * (logits - unguided)
        share = logits.softmax(-1)
        share[:, mask] = 0
        places = [place for place, token in enumerate(row[:stop]) if token == mask]
        best = max(places, key=lambda place: share[place].max().item())
        row[best] = int(share[best].argmax())
    return row[len(prefix) :]


@pytest.mark.parametrize(
    ("block", "shift", "scale"), [(None, False, 0.0), (None, True, 1.0), (3, False, 0.0), (3, True, 0.5)]
)
def test_greedy_denoising_is_followed_to_its_end(decoder, block, shift, scale):
    lm = like(decoder if block is None else blocks_of(decoder, block), shift_logits=shift)
    with torch.inference_mode():
        written = [(prefix, denoised(lm, prefix, 5, scale)) for prefix, _ in PAIRS]
    wrong = [
        (prefix, [*target[:place], target[place] + 1, *target[place + 1 :]])
        for prefix, target in written
        for place in (0, 4)
    ]
    found = ask(lm, written + wrong, check_greedy=True, mc_num=2, batch_size=3, cfg_scale=scale)
    assert [item.greedy for item in found] == [True] * len(written) + [False] * len(wrong)


# ---- adaptive ----


def test_a_decided_question_stops_early_and_keeps_its_order(decoder):
    source = torch.Generator().manual_seed(3)
    pairs, groups, sizes = [], [], []
    for question in range(4):
        groups.append(range(len(pairs), len(pairs) + 3))
        for choice in range(3):
            size = 10 * (choice + 1) if question % 2 else 12
            pairs.append(([20 + question] * 3, torch.randint(20, 250, (size,), generator=source).tolist()))
            sizes.append(size)
    settings = {"mc_num": 128, "groups": groups}
    full = ask(decoder, pairs, **settings)
    adaptive = ask(decoder, pairs, adaptive=True, **settings)
    both = ask(decoder, pairs, adaptive=True, sizes=sizes, **settings)
    for group in groups:
        copies = {adaptive[pair].copies for pair in group}
        leads = sorted(full[pair].mean for pair in group)
        clear = leads[-1] - leads[-2] > 2 * DECIDED * max(full[pair].stderr for pair in group)
        if clear:
            assert max(group, key=lambda pair: adaptive[pair].mean) == max(group, key=lambda pair: full[pair].mean)
        assert max(copies) <= 128 and min(copies) >= FIRST_ROUND - 1
        assert all(both[pair].copies >= adaptive[pair].copies for pair in group)
    assert min(item.copies for item in adaptive) <= FIRST_ROUND
    assert sum(item.copies for item in adaptive) < 0.7 * sum(item.copies for item in full)


def test_rounds_of_an_undecided_question_come_to_one_estimate(decoder):
    pair = ([20, 21, 22], [30, 31, 32, 33, 34, 35, 36, 37])
    settings = {"mc_num": 64, "adaptive": True, "groups": [[0, 1]]}
    found = [item for seed in range(30) for item in ask(decoder, [pair] * 2, [seed, seed + 99], **settings)]
    counts = Counter(item.copies for item in found)
    assert max(counts) <= 64 and counts.most_common(1)[0][0] > 50
    full = [item for item in found if item.copies > 50]
    means = np.array([item.mean for item in full])
    assert abs(means.mean() - slow(decoder, *pair)) < 4 * means.std() / len(full) ** 0.5
    told = np.mean([item.stderr**2 for item in full]) ** 0.5
    assert told == pytest.approx(means.std(), rel=0.4)


def test_pairs_without_rivals_get_all_their_copies(decoder):
    pair = ([20], list(range(30, 42)))
    [alone, other] = ask(decoder, [pair, pair], mc_num=64, adaptive=True, groups=[[0]])
    assert min(alone.copies, other.copies) > 50


# ---- the reference's numbers ----


@pytest.mark.parametrize("name", ["llada", "a2d_qwen3"])
def test_recorded_estimates_agree(golden, golden_lm, name):
    lm = golden_lm(name)
    arrays = np.load(golden / name / "loglikelihood.npz")
    cases = json.loads((golden / name / "loglikelihood.json").read_text())
    pairs = [tuple(arrays[f"{case['case']}/{part}"].tolist() for part in ("prefix", "target")) for case in cases]
    for case, found in zip(cases, ask(lm, pairs, mc_num=1023, batch_size=128, check_greedy=True), strict=True):
        error = math.hypot(found.stderr, case["expected_stderr"])
        assert abs(found.mean - case["expected_mean"]) <= 3 * error + 1e-4
        assert found.greedy == case["is_greedy"]
        if case["exact_expectation"] is not None:
            assert found.mean == pytest.approx(case["exact_expectation"], abs=1e-4) and found.stderr == 0
    for case, found in zip(cases, ask(lm, pairs, mc_num=64), strict=True):
        # 4,096 samples of the reference, each of one copy, say how far 64 would spread
        assert abs(found.mean - case["expected_mean"]) <= 3 * math.hypot(found.stderr, case["expected_stderr"]) + 1e-4
        assert found.stderr <= case["expected_stderr"] * (4096 / found.copies) ** 0.5


# ---- what can't be ----


def test_what_has_no_likelihood_is_refused(decoder):
    assert log_likelihood(decoder, []) == []
    with pytest.raises(ConfigError, match="pair 0 has an empty target"):
        log_likelihood(decoder, [([5], [])])
    with pytest.raises(ConfigError, match=r"pair 0 has 60 \+ 8 tokens, and the model's context is 64"):
        log_likelihood(decoder, [([5] * 60, [6] * 8)])
    with pytest.raises(ModelError, match="no mask token"):
        log_likelihood(like(decoder, mask_token_id=None), [([5], [6])])


def test_a_broken_model_is_named_in_place_of_a_score(make_lm):
    lm = make_lm()
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[lm.spec.mask_token_id] = torch.nan
    with pytest.raises(ModelError, match=r"logits are not numbers \(NaN\)"):
        log_likelihood(lm, [([5], [6, 7])], mc_num=4)
