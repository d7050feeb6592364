"""The masked-diffusion objective: slow loops, draws, and how parts of a global batch add up."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_ray.errors import ConfigError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.objectives import MDLM, Part
from dllm_ray.objectives.samples import needs_bos
from dllm_ray.objectives.schedules import alpha_schedule
from dllm_ray.objectives.weights import context_adaptive

ROWS, WIDTH = 5, 9
NORMS = pytest.mark.parametrize("norm", ["token", "sequence", "batch", "masked"])


@pytest.fixture(scope="module")
def lm(make_lm):
    return make_lm("bert")


def a_batch(rows: int = ROWS, width: int = WIDTH, seed: int = 0, prompt: int = 2) -> dict[str, torch.Tensor]:
    """Random tokens; labels leave out the first `prompt` columns, some others, and the whole second row."""
    source = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(10, 250, (rows, width), generator=source)
    labelled = torch.rand(rows, width, generator=source) < 0.7
    labelled[:, :prompt] = False
    labelled[:, prompt] = True
    if rows > 1:
        labelled[1] = False
    return {"input_ids": input_ids, "labels": torch.where(labelled, input_ids, -100)}


def rows_of(batch, start, stop):
    return {name: tensor[start:stop] for name, tensor in batch.items()}


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(lm: DiffusionLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    lm.model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in lm.model.named_parameters()}


# --- the loss, spelled out


@NORMS
@pytest.mark.parametrize("weight", ["schedule", "uniform"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_loss_is_what_a_slow_loop_adds_up(lm, norm, weight, schedule):
    objective = MDLM(lm.spec, schedule=schedule, weight=weight, norm=norm)
    batch = a_batch()
    noisy = objective.corrupt(batch, seeded())

    total = weighted = 0.0
    counts = [sum(label != -100 for label in row) for row in batch["labels"].tolist()]
    log_p = lm.model(input_ids=noisy.input_ids).logits.log_softmax(-1).tolist()
    for b in range(ROWS):
        t = noisy.t[b].double()
        slope = -alpha_schedule(schedule).derivative(t) / (1 - alpha_schedule(schedule).alpha(t))
        w = slope.item() if weight == "schedule" else 1.0
        for i in range(WIDTH):
            if noisy.input_ids[b, i] == lm.spec.mask_token_id:
                cost = -w * log_p[b][i][batch["input_ids"][b, i]]
                weighted += cost
                total += cost / counts[b] if norm == "sequence" else cost
    divisors = {"token": sum(counts), "masked": int((noisy.input_ids == lm.spec.mask_token_id).sum())}
    rows_with_labels = ROWS - 1
    expected = total / divisors.get(norm, rows_with_labels)

    result = objective.loss(lm, noisy)
    assert result.loss.item() == pytest.approx(expected, rel=1e-4)
    assert result.nll_sum.item() == pytest.approx(weighted, rel=1e-4)
    assert result.tokens.item() == sum(counts)


def test_the_vocabulary_head_sees_the_masked_positions_only(lm):
    objective = MDLM(lm.spec)
    noisy = objective.corrupt(a_batch(), seeded())
    seen = []
    head = lm.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:-1].numel()))
    objective.loss(lm, noisy)
    handle.remove()
    assert seen == [int(noisy.masked.sum())]
    assert 0 < seen[0] < ROWS * WIDTH


@NORMS
def test_a_batch_without_labels_costs_nothing_and_leaves_finite_gradients(lm, norm):
    batch = a_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    objective = MDLM(lm.spec, norm=norm)
    result = objective.loss(lm, objective.corrupt(batch, seeded()))
    assert (result.loss.item(), result.nll_sum.item(), result.tokens.item()) == (0, 0, 0)
    assert all(grad.count_nonzero() == 0 and grad.isfinite().all() for grad in gradients(lm, result.loss).values())


def test_nothing_but_labelled_positions_is_masked(lm):
    batch = a_batch()
    everything = torch.ones(ROWS, WIDTH, dtype=torch.bool)
    noisy = MDLM(lm.spec).corrupt(batch, t=torch.ones(ROWS), masked=everything)
    assert torch.equal(noisy.masked, batch["labels"] != -100)
    assert torch.equal(noisy.input_ids[~noisy.masked], batch["input_ids"][~noisy.masked])
    assert (noisy.input_ids[noisy.masked] == lm.spec.mask_token_id).all()


def test_padding_out_of_sight_changes_nothing(lm):
    objective, batch = MDLM(lm.spec), a_batch(width=6)
    batch["attention_mask"] = torch.ones(ROWS, 6, dtype=torch.long)
    padded = {
        name: torch.nn.functional.pad(tensor, (0, 3), value={"labels": -100}.get(name, 0))
        for name, tensor in batch.items()
    }
    noisy = objective.corrupt(batch, seeded())
    wider = objective.corrupt(padded, t=noisy.t, masked=torch.nn.functional.pad(noisy.masked, (0, 3)))
    torch.testing.assert_close(objective.loss(lm, wider).loss, objective.loss(lm, noisy).loss)


# --- times


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("seed", range(5))
def test_stratified_times_fall_one_in_each_slice(lm, rows, seed):
    epsilon = 0.01
    t = MDLM(lm.spec, time_epsilon=epsilon).corrupt(a_batch(rows), seeded(seed)).t.double()
    assert (t >= epsilon).all()
    assert (t < 1).all()
    slices = ((t - epsilon) / (1 - epsilon) * rows).floor().int().tolist()
    assert sorted(slices) == list(range(rows))


def test_stratified_times_come_in_random_order(lm):
    first_slices = {int(MDLM(lm.spec).corrupt(a_batch(8), seeded(seed)).t[0] * 8) for seed in range(60)}
    assert first_slices == set(range(8))


def test_independent_times_are_uniform_and_may_share_a_slice(lm):
    t = MDLM(lm.spec, time_epsilon=0.5, stratified=False).corrupt(a_batch(1000), seeded()).t
    assert ((t >= 0.5) & (t < 1)).all()
    assert t.mean().item() == pytest.approx(0.75, abs=0.02)
    assert len(set(((t - 0.5) * 2000).int().tolist())) < 1000


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_share_of_masks_follows_the_schedule(lm, schedule):
    ids = torch.full((4, 5000), 20)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])
    noisy = MDLM(lm.spec, schedule=schedule).corrupt({"input_ids": ids, "labels": ids}, seeded(), t=t)
    expected = 1 - alpha_schedule(schedule).alpha(t)
    torch.testing.assert_close(noisy.masked.float().mean(dim=1), expected, atol=0.03, rtol=0)


# --- parts of a global batch

cuts = st.sets(st.integers(1, ROWS - 1)).map(lambda inner: [0, *sorted(inner), ROWS])


@NORMS
@given(workers=cuts, micro=st.integers(1, ROWS), seed=st.integers(0, 2**31))
@settings(max_examples=15)
def test_a_global_batch_is_the_sum_of_its_parts(lm, norm, workers, micro, seed):
    objective, batch = MDLM(lm.spec, norm=norm), a_batch()
    whole = objective.corrupt(batch, seeded(seed))
    parts = [
        objective.corrupt(rows_of(batch, start, stop), seeded(seed), part=Part(start, ROWS))
        for start, stop in itertools.pairwise(workers)
    ]
    for field in ("t", "masked", "input_ids"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field)), field

    denominator = sum(objective.denominator(part) for part in parts)
    assert denominator == objective.denominator(whole)
    pieces = [part.rows(start, start + micro) for part in parts for start in range(0, len(part.t), micro)]
    results = [objective.loss(lm, piece, denominator) for piece in pieces]
    expected = objective.loss(lm, whole)
    for field in ("loss", "nll_sum", "tokens"):
        torch.testing.assert_close(sum(getattr(result, field) for result in results), getattr(expected, field))


@NORMS
def test_gradients_of_micro_batches_add_up(lm, norm):
    objective = MDLM(lm.spec, norm=norm)
    noisy = objective.corrupt(a_batch(), seeded())
    whole = gradients(lm, objective.loss(lm, noisy).loss)
    pieces = [objective.loss(lm, noisy.rows(row, row + 1), objective.denominator(noisy)).loss for row in range(ROWS)]
    torch.testing.assert_close(gradients(lm, sum(pieces)), whole, rtol=1e-4, atol=1e-6)


def test_filler_rows_beyond_the_global_batch_add_nothing(lm):
    objective, batch = MDLM(lm.spec), a_batch()
    whole = objective.corrupt(batch, seeded())
    filler = {"input_ids": batch["input_ids"][:2], "labels": torch.full((2, WIDTH), -100)}
    last = {name: torch.cat([tensor[3:], filler[name]]) for name, tensor in batch.items()}
    noisy = objective.corrupt(last, seeded(), part=Part(3, ROWS))
    assert torch.equal(noisy.masked[:2], whole.masked[3:])
    assert objective.loss(lm, noisy).nll_sum == pytest.approx(objective.loss(lm, whole.rows(3, 5)).nll_sum.item())


def test_the_loss_is_deterministic_and_the_noise_follows_the_generator(lm):
    objective, batch = MDLM(lm.spec), a_batch()
    one, again, other = (objective.corrupt(batch, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(objective.loss(lm, one).loss, objective.loss(lm, again).loss)
    assert not torch.equal(one.t, other.t)


# --- shifted logits


def test_shifted_logits_read_one_position_to_the_left_behind_a_bos(make_lm):
    lm = make_lm("llama")
    batch = a_batch(prompt=0)
    objective = MDLM(lm.spec, shift_logits=True, weight="uniform")
    noisy = objective.corrupt(batch, t=torch.full((ROWS,), 0.5), masked=torch.ones(ROWS, WIDTH + 1, dtype=torch.bool))

    first = lm.spec.eos_token_id if lm.spec.bos_token_id is None else lm.spec.bos_token_id
    assert noisy.input_ids[:, 0].tolist() == [first] * ROWS
    assert torch.equal(noisy.targets[:, 1:], batch["input_ids"])
    log_p = lm.model(input_ids=noisy.input_ids).logits.log_softmax(-1)
    nll = -log_p[:, :-1].gather(2, batch["input_ids"].unsqueeze(2)).squeeze(2)
    expected = nll[batch["labels"] != -100].mean()
    torch.testing.assert_close(objective.loss(lm, noisy).loss, expected)


def test_a_part_is_told_whether_the_global_batch_needs_a_bos(make_lm):
    objective, prompts = MDLM(make_lm("llama").spec, shift_logits=True), a_batch(prompt=2)
    batch = {name: torch.cat([tensor, a_batch(prompt=0)[name]]) for name, tensor in prompts.items()}
    whole = objective.corrupt(batch, seeded())
    bos = needs_bos(batch)
    part = objective.corrupt(rows_of(batch, 0, ROWS), seeded(), part=Part(0, 2 * ROWS, bos))
    assert bos is True
    assert torch.equal(part.input_ids, whole.input_ids[:ROWS])
    assert torch.equal(part.masked, whole.masked[:ROWS])


def test_the_bos_is_seen_where_padding_is_not(make_lm):
    batch = a_batch(prompt=0) | {"attention_mask": torch.tensor([[1] * 6 + [0] * 3] * ROWS)}
    noisy = MDLM(make_lm("llama").spec, shift_logits=True).corrupt(batch, seeded())
    assert noisy.attention_mask.tolist() == [[1] * 7 + [0] * 3] * ROWS


def test_no_bos_is_added_before_prompts_or_without_shifted_logits(lm):
    prompts, texts = a_batch(prompt=2), a_batch(prompt=0)
    assert MDLM(lm.spec, shift_logits=True).corrupt(prompts, seeded()).input_ids.shape == (ROWS, WIDTH)
    assert MDLM(lm.spec).corrupt(texts, seeded()).input_ids.shape == (ROWS, WIDTH)


def test_shifting_is_as_the_spec_says_unless_told(lm):
    shifted = dataclasses.replace(lm.spec, shift_logits=True)
    assert [MDLM(lm.spec).shift_logits, MDLM(shifted).shift_logits] == [False, True]
    assert MDLM(shifted, shift_logits=False).shift_logits is False


# --- validation and settings


def test_validation_measures_the_elbo_whatever_training_weighs(lm):
    training = MDLM(lm.spec, schedule="cosine", weight="uniform", norm="batch", stratified=False, time_epsilon=0.2)
    elbo = MDLM(lm.spec, schedule="cosine", weight="schedule", time_epsilon=0.2)
    noisy, expected = (objective.corrupt(a_batch(), seeded()) for objective in (training.for_validation(), elbo))
    assert torch.equal(noisy.input_ids, expected.input_ids)
    assert training.for_validation().loss(lm, noisy).nll_sum == elbo.loss(lm, expected).nll_sum
    assert training.loss(lm, noisy).nll_sum != elbo.loss(lm, expected).nll_sum


def test_validation_reads_logits_as_training_does(lm):
    assert MDLM(lm.spec, shift_logits=True).for_validation().shift_logits is True


@pytest.mark.parametrize(
    "setting",
    [
        {"schedule": "quadratic"},
        {"weight": "cubic"},
        {"norm": "tokens"},
        {"time_epsilon": -0.1},
        {"time_epsilon": 1},
        {"noise_range": (0.5, 0.5)},
        {"noise_range": (-0.1, 0.5)},
        {"noise_range": (0.3, 0.8), "schedule": "cosine"},
        {"cart_p": 1.0},
        {"logits_at_once": 0},
        {"block_times": True},
    ],
    ids=str,
)
def test_unknown_or_impossible_settings_are_refused(lm, setting):
    with pytest.raises(ConfigError) as caught:
        MDLM(lm.spec, **setting)
    assert caught.value.field == next(iter(setting))


# --- published variants


def test_a_range_of_noise_is_drawn_evenly(lm):
    t = MDLM(lm.spec, noise_range=(0.3, 0.8), weight="uniform").corrupt(a_batch(100), seeded()).t
    assert sorted(((t - 0.3) / 0.5 * 100).floor().int().tolist()) == list(range(100))


def test_validation_measures_the_elbo_over_all_times(lm):
    objective = MDLM(lm.spec, noise_range=(0.3, 0.8), weight="uniform").for_validation()
    t = objective.corrupt(a_batch(100), seeded()).t
    assert t.min() < 0.02
    assert t.max() > 0.98


def test_times_may_go_down_to_nothing(lm):
    objective = MDLM(lm.spec, time_epsilon=0)
    noisy = objective.corrupt(a_batch(), t=torch.zeros(ROWS))
    assert not noisy.masked.any()
    assert objective.loss(lm, noisy).loss == 0


def slow_cart(clean: list[bool], p: float) -> list[float]:
    places = [place for place, is_clean in enumerate(clean) if is_clean]
    return [sum(0.5 * p * (1 - p) ** (abs(i - j) - 1) for j in places if j != i) for i in range(len(clean))]


@given(
    rows=st.lists(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=3), min_size=1),
    p=st.sampled_from([0.1, 0.3, 0.9]),
)
@settings(max_examples=50)
def test_context_adaptive_weights_are_what_a_slow_loop_adds_up_and_stay_in_their_sample(rows, p):
    """Rows of packed samples, each a list that says which positions are clean."""
    width = max(sum(map(len, row)) for row in rows) + 1
    shape = len(rows), width
    clean, expected = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    segments, places = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for b, row in enumerate(rows):
        start = 0
        for number, sample in enumerate(row, start=1):
            part = slice(start, start + len(sample))
            clean[b, part], expected[b, part] = torch.tensor(sample), torch.tensor(slow_cart(sample, p))
            segments[b, part], places[b, part] = number, torch.arange(len(sample))
            start += len(sample)
    found = context_adaptive(clean, p, segments, places)
    asked = ~clean & (segments > 0)
    torch.testing.assert_close(found[asked], expected[asked], rtol=1e-4, atol=1e-5)
    alone = torch.tensor(slow_cart(clean[0].tolist(), p), dtype=torch.float)
    torch.testing.assert_close(context_adaptive(clean[:1], p, None, None)[0][~clean[0]], alone[~clean[0]])


def test_few_logits_at_once_are_the_same_loss(lm):
    batch = a_batch()
    whole, parts = MDLM(lm.spec), MDLM(lm.spec, logits_at_once=3)
    noisy = whole.corrupt(batch, seeded())
    expected, found = whole.loss(lm, noisy), parts.loss(lm, noisy)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(gradients(lm, found.loss), gradients(lm, expected.loss), rtol=1e-4, atol=1e-6)
