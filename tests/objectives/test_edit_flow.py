"""The Edit Flow objective: its loss against the recorded one, its pairs, and the rates it learns against true ones."""

import json
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.errors import ConfigError
from dllm_ray.models import edit_heads
from dllm_ray.models.spec import IGNORE_INDEX, DiffusionSpec
from dllm_ray.objectives import MDLM, EditFlow, Part, build
from dllm_ray.objectives.alignment import BLANK, align
from dllm_ray.objectives.config import ObjectiveConfig
from dllm_ray.objectives.edit_pairs import EditPairs, noised

SPEC = DiffusionSpec("bert", mask_token_id=4, eos_token_id=2, pad_token_id=0, bos_token_id=1)


def padded(rows: list[list[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[BLANK] * (width - len(row))] for row in rows])


def rows_of(seed: int, rows: int = 6, width: int = 12) -> dict[str, torch.Tensor]:
    """Rows of different lengths with prompts of 1 to 4 tokens."""
    source = np.random.default_rng(seed)
    length = source.integers(6, width + 1, rows)
    place = np.arange(width)
    ids = np.where(place < length[:, None], source.integers(10, 60, (rows, width)), 0)
    prompt = source.integers(1, 5, rows)
    labelled = (place >= prompt[:, None]) & (place < length[:, None])
    arrays = {
        "input_ids": ids,
        "labels": np.where(labelled, ids, IGNORE_INDEX),
        "attention_mask": (place < length[:, None]).astype(np.int64),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture
def recorded(golden) -> dict:
    [found] = json.loads((golden / "editflow_modernbert" / "losses.json").read_text())
    return found


def test_the_recorded_loss_and_gradient(recorded, golden_lm):
    lm = golden_lm("editflow_modernbert")
    objective = EditFlow(lm.spec, kappa="cubic", max_weight=recorded["max_w"])
    z0, z1, zt = (padded(recorded[name]) for name in ("z0", "z1", "zt"))
    batch = {"input_ids": z1, "labels": z1.clamp(min=0), "z0": z0, "z1": z1}
    t = torch.tensor(recorded["t"])
    noisy = objective.corrupt(batch, t=t, made=(zt == z1) & (zt != z0))
    assert torch.equal(noisy.zt, zt)
    for at_once in (512, 2):
        lm.model.zero_grad()
        result = EditFlow(lm.spec, logits_at_once=at_once).loss(lm, noisy)
        assert result.loss.item() == pytest.approx(recorded["loss"], rel=1e-5)
        result.loss.backward()
        norm = torch.stack([p.grad.double().norm() for p in lm.model.parameters() if p.grad is not None]).norm()
        assert norm.item() == pytest.approx(recorded["grad_norm"], rel=1e-4)
    lm.model.zero_grad()


def test_parts_of_a_batch_add_up_to_the_whole(make_lm):
    lm = edit_heads.attach(make_lm("bert"))
    objective = EditFlow(lm.spec, vocabulary=60, x0=("empty", "masks", "noised", "uniform"), x0_length=5)
    batch = rows_of(0)
    whole = objective.corrupt(batch, torch.Generator().manual_seed(3))
    total = objective.denominator(whole)
    loss = objective.loss(lm, whole).loss.item()
    arrays = objective.pairs({name: tensor.numpy() for name, tensor in batch.items()}, step=7)
    dealt = {name: torch.from_numpy(array) for name, array in arrays.items()}
    in_one = objective.corrupt(dealt, torch.Generator().manual_seed(3))
    parts = [
        objective.corrupt(
            {name: tensor[start : start + 3] for name, tensor in dealt.items()},
            torch.Generator().manual_seed(3),
            part=Part(start, 6),
        )
        for start in (0, 3)
    ]
    expected = objective.loss(lm, in_one).loss.item()
    assert sum(objective.loss(lm, part, total).loss.item() for part in parts) == pytest.approx(expected, rel=1e-5)
    assert sum(objective.loss(lm, in_one.rows(row, row + 1), total).loss.item() for row in range(6)) == pytest.approx(
        expected, rel=1e-5
    )
    assert loss > 0
    filler = {**dealt, "labels": torch.full_like(dealt["labels"], IGNORE_INDEX)}
    nothing = objective.corrupt(filler, torch.Generator().manual_seed(3))
    assert objective.loss(lm, nothing).loss.item() == 0 and objective.denominator(nothing).item() == 0


@given(st.integers(0, 2**30), st.sampled_from(["empty", "masks", "uniform", "noised"]), st.integers(12, 20))
def test_pairs_begin_and_end_with_what_they_should(seed, kind, longest):
    pairs = EditPairs((kind,), 5, 0.3, 60, (0, 1, 2, 4), 4, 1, longest, seed)
    batch = {name: tensor.numpy() for name, tensor in rows_of(seed).items()}
    made = pairs(batch, step=1)
    assert made["z0"].shape == made["z1"].shape
    for row in range(len(batch["input_ids"])):
        own = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        start = int((batch["labels"][row] != IGNORE_INDEX).argmax())
        z0, z1 = made["z0"][row], made["z1"][row]
        assert z1[z1 != BLANK].tolist() == own.tolist()
        assert z0[:start].tolist() == z1[:start].tolist() == own[:start].tolist()  # the prompt stays as it is
        answer = z0[start:][z0[start:] != BLANK]
        assert ((z0 != BLANK) | (z1 != BLANK)).sum() <= longest
        room = 5 if start + max(5, len(own) - start) + 5 <= longest else None
        if kind == "empty":
            assert not len(answer)
        elif kind == "masks":
            assert set(answer.tolist()) <= {4} and (room is None or len(answer) == room)
            assert len(answer) >= min(5, longest - len(own))
        elif kind == "uniform":
            assert (room is None or len(answer) == room) and not set(answer.tolist()) & {0, 1, 2, 4}
        alone = align(answer, own[start:])
        width = len(alone[0])
        assert z0[start : start + width].tolist() == alone[0].tolist()
    if kind == "noised":
        return
    part = {name: array[2:4] for name, array in batch.items()}
    again = pairs(part, step=1, first=2)
    width = min(again["z0"].shape[1], made["z0"].shape[1])
    assert np.array_equal(again["z0"][:, :width], made["z0"][2:4, :width])


def test_a_noised_copy_has_no_end_and_its_mistakes_are_tokens_of_the_batch():
    pairs = EditPairs(("noised",), 5, 1.0, 0, (0, 1, 2), None, 1, None, 0)
    ids = np.array([[1, 11, 12, 13, 14, 15, 16, 2]] * 50 + [[1, 21, 22, 23, 24, 25, 26, 2]] * 50)
    labels = np.where(ids > 11, ids, IGNORE_INDEX)
    labels[:, -1] = 2
    z0 = pairs({"input_ids": ids, "labels": labels}, step=0)["z0"]
    left = set(z0[:50][z0[:50] != BLANK].tolist())
    assert left & {22, 23, 24, 25, 26} and 2 not in left and left <= set(ids.flatten().tolist())


def test_a_draft_is_whole_where_the_sequences_on_the_way_have_room():
    pairs = EditPairs(("noised",), 5, 0.01, 0, (), None, 1, 12, 0)
    ids = np.arange(20, 32)[None].repeat(40, axis=0)
    labels = np.where(ids > 20, ids, IGNORE_INDEX)
    z0 = pairs({"input_ids": ids, "labels": labels}, step=0)["z0"]
    assert ((z0 != BLANK).sum(axis=1) >= 11).mean() > 0.8


def test_only_answers_are_written_whatever_stands_between_them():
    pairs = EditPairs(("empty",), 5, 0.3, 0, (), None, 1, None, 0)
    ids = np.array([[10, 11, 20, 21, 30, 31, 40, 41]])
    labels = np.where(np.isin(ids, (20, 21, 40, 41)), ids, IGNORE_INDEX)
    made = pairs({"input_ids": ids, "labels": labels}, step=0)
    assert made["z0"].tolist() == [[10, 11, BLANK, BLANK, 30, 31, BLANK, BLANK]]
    assert made["z1"].tolist() == ids.tolist()


def test_rows_draw_their_own_beginnings_anew_in_every_step():
    pairs = EditPairs(("empty", "masks", "uniform"), 5, 0.3, 60, (4,), 4, 1, None, 0)
    batch = {name: tensor.numpy() for name, tensor in rows_of(1, rows=60).items()}
    first, second = (pairs(batch, step=step)["z0"] for step in (0, 1))
    assert first.shape != second.shape or not np.array_equal(first, second)
    prompt = (batch["labels"] == IGNORE_INDEX) & (batch["attention_mask"] == 1)
    kinds = Counter()
    for row in range(60):
        left = first[row][first[row] != BLANK][prompt[row].sum() :]
        kinds["empty" if not len(left) else "masks" if set(left.tolist()) == {4} else "uniform"] += 1
    assert all(10 <= kinds[kind] <= 32 for kind in ("empty", "masks", "uniform"))


@pytest.mark.parametrize("most", [None, 0.5, 3.0])
def test_the_weight_of_late_times_is_bounded_as_asked(make_lm, most):
    lm = edit_heads.attach(make_lm("bert"))
    objective, free = (EditFlow(lm.spec, kappa="linear", max_weight=bound) for bound in (most, None))
    batch = {name: tensor[:1] for name, tensor in rows_of(2).items()}
    noisy = objective.corrupt(batch, torch.Generator().manual_seed(0), t=torch.tensor([0.9]))
    expected = 1.0 if most is None else most / 10
    ratio = objective.loss(lm, noisy).loss / free.loss(lm, noisy).loss
    assert ratio.item() == pytest.approx(expected, rel=1e-3)


def test_a_document_begins_with_a_token_that_stays():
    pairs = EditPairs(("empty",), 5, 0.3, 0, (), None, 1, None, 0)
    ids = np.array([[11, 12, 13], [1, 12, 13]])
    made = pairs({"input_ids": ids, "labels": ids}, step=0)
    assert made["z1"].tolist() == [[1, 11, 12, 13], [1, 12, 13, BLANK]]
    assert made["z0"].tolist() == [[1, BLANK, BLANK, BLANK], [1, BLANK, BLANK, BLANK]]


def test_a_noised_copy_has_about_as_many_mistakes_as_asked_for():
    random, tokens = np.random.default_rng(0), np.arange(30_000)
    copy = noised(tokens, 0.3, np.full(30_000, -7), random)
    counts = Counter(copy.tolist())
    replaced = counts.pop(-7)
    doubled = sum(count == 2 for count in counts.values())
    dropped = 30_000 - replaced - len(counts)
    for found in (replaced, doubled, dropped):
        assert found == pytest.approx(3_000, rel=0.1)
    assert noised(tokens[:0], 0.3, tokens[:0], random).tolist() == []


def test_settings_that_can_not_be(make_lm):
    for bad, field in (
        ({"x0": ("full",)}, "x0"),
        ({"x0": ()}, "x0"),
        ({"x0_length": 0}, "x0_length"),
        ({"x0_noise": 0.0}, "x0_noise"),
        ({"kappa": "square"}, "kappa"),
        ({"max_weight": 0.0}, "max_weight"),
        ({"norm": "masked"}, "norm"),
        ({"weight": "uniform"}, "weight"),
        ({"block_times": True}, "block_times"),
    ):
        with pytest.raises(ConfigError) as error:
            EditFlow(SPEC, **bad)
        assert error.value.field == field
    with pytest.raises(ConfigError, match="no effect on mdlm"):
        MDLM(SPEC, kappa="linear")
    with pytest.raises(ConfigError, match="vocabulary"):
        EditFlow(SPEC, x0=("uniform",))
    with pytest.raises(ConfigError, match="only edit_flow trains"):
        build(ObjectiveConfig(), edit_heads.attach(make_lm("bert")).spec)
    assert build(ObjectiveConfig("edit_flow"), SPEC).config.norm == "sequence"
    assert build(ObjectiveConfig(), SPEC).config.norm == "token"


class _Table(torch.nn.Module):
    """Free rates and token distributions for each (sequence, position): what an unlimited model could learn."""

    def __init__(self, sequences: list[tuple[int, ...]], vocabulary: int):
        super().__init__()
        self.number = {sequence: number for number, sequence in enumerate(sequences)}
        width = max(map(len, sequences))
        self.rates = torch.nn.Parameter(torch.zeros(len(sequences), width, 3))
        self.tokens = torch.nn.Parameter(torch.zeros(len(sequences), width, 2, vocabulary))

    def edits(self, x_BT, valid_BT, t, substitutions, substitutes, insertions, inserts, at_once=None, most=None):
        lengths = valid_BT.sum(dim=1).tolist()
        own = [tuple(row[:length]) for row, length in zip(x_BT.tolist(), lengths, strict=True)]
        number_B = torch.tensor([self.number[sequence] for sequence in own])
        width = x_BT.shape[1]
        log = self.tokens.log_softmax(-1)

        def of(place, token, kind):
            return log[number_B[place // width], place % width, kind, token]

        rates = torch.nn.functional.softplus(self.rates)[number_B, :width]
        return rates, of(substitutions, substitutes, 0), of(insertions, inserts, 1)


@pytest.mark.slow
def test_the_learned_rates_are_the_true_ones():
    """A world small enough to enumerate: BOS and two letters, in texts of up to two, with given probabilities.

    From the empty text, under a linear schedule, each edit of the alignment is made by time t with probability t. So
    what remains, given the sequence and the time, is known; and since rates don't depend on the time (times of a
    stratum close to each other are drawn only), they are the expected number of edits that remain.
    """
    bos, letters = 1, (5, 6)
    targets = {(bos, *text): 0.0 for length in range(3) for text in product(letters, repeat=length)}
    weights = dict(zip(targets, (0.1, 0.15, 0.05, 0.3, 0.1, 0.1, 0.2), strict=True))
    t = 0.4
    # the true conditional law, by enumeration: sequence -> expected insertions behind each position, by token
    mass: Counter = Counter()
    expected: Counter = Counter()
    for target, weight in weights.items():
        z0, z1 = align([bos], target)
        open_columns = [column for column in range(len(z1)) if z0[column] != z1[column]]
        for made in product([True, False], repeat=len(open_columns)):
            chance = weight * np.prod([t if one else 1 - t for one in made])
            zt = z0.copy()
            for column, one in zip(open_columns, made, strict=True):
                zt[column] = z1[column] if one else z0[column]
            sequence = tuple(zt[zt != BLANK].tolist())
            mass[sequence] += chance
            for column, one in zip(open_columns, made, strict=True):
                if not one:
                    before = int((zt[:column] != BLANK).sum()) - 1
                    expected[sequence, before, int(z1[column])] += chance
    model = _Table(sorted(mass), vocabulary=8)
    objective = EditFlow(SPEC, kappa="linear", norm="batch")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    chosen = torch.distributions.Categorical(torch.tensor(list(weights.values())))
    texts = list(weights)
    torch.manual_seed(0)
    steps = 1_500
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / steps)
        rows = [texts[number] for number in chosen.sample((512,)).tolist()]
        pairs = [align([bos], row) for row in rows]
        z0, z1 = (padded([pair[side].tolist() for pair in pairs]) for side in (0, 1))
        batch = {"input_ids": z1, "labels": z1.clamp(min=0), "z0": z0, "z1": z1}
        noisy = objective.corrupt(batch, t=torch.full((len(rows),), t))
        optimizer.zero_grad()
        objective.loss(model, noisy).loss.backward()
        optimizer.step()
    rates = torch.nn.functional.softplus(model.rates.detach())
    tokens = model.tokens.detach().softmax(-1)
    for sequence, weight in mass.items():
        number = model.number[sequence]
        for place in range(len(sequence)):
            assert rates[number, place, :2].max() < 0.02, "nothing is ever replaced or deleted here"
            true = {token: expected[sequence, place, token] / weight for token in letters}
            assert rates[number, place, 2].item() == pytest.approx(sum(true.values()), abs=0.05), (sequence, place)
            if sum(true.values()) > 0.05:
                for token in letters:
                    share = true[token] / sum(true.values())
                    assert tokens[number, place, 1, token].item() == pytest.approx(share, abs=0.05), (sequence, place)
