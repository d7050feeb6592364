"""The engine of models that edit: each row is what it would be alone, whatever changes length around it."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_testing import finish, sharpen

from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models import edit_heads
from dllm_ray.objectives.schedules import edit_share, kappa_schedule
from dllm_ray.sampling import Sampler, SamplerConfig
from dllm_ray.sampling.edit_flow import EditEngine
from dllm_ray.sampling.edit_state import State
from dllm_ray.sampling.noise import DELETE, EDIT, INSERT, uniform

PROMPTS = [[10, 20, 30], [40], [11, 12, 13, 14, 15, 16, 17, 18], [50, 60]]


@pytest.fixture(scope="module")
def make_edits(make_lm):
    """A model with heads that say something, and rates of which some are high and some low."""

    def make(architecture: str = "bert", time: bool = False, rate: float = -1.0):
        lm = edit_heads.attach(sharpen(make_lm(architecture), 0), time=time)
        source = torch.Generator().manual_seed(1)
        with torch.no_grad():
            lm.model.edit_heads.rates.weight.normal_(std=0.3, generator=source)
            lm.model.edit_heads.rates.bias.fill_(rate)
            if time:
                lm.model.edit_heads.time[2].weight.normal_(std=0.2, generator=source)
        return lm

    return make


@pytest.fixture(scope="module")
def lm(make_edits):
    return make_edits()


def config(**changes) -> SamplerConfig:
    return SamplerConfig(**{"max_new_tokens": 12, "steps": 24, "seed": 0} | changes)


@given(
    st.lists(st.integers(0, 2**40), min_size=2, max_size=6),
    st.sampled_from([0.0, 0.9]),
    st.integers(0, 4),
    st.sampled_from(["linear", "cubic", "cosine"]),
    st.sampled_from([None, 0.2]),
    st.integers(1, 6),
    st.booleans(),
)
@settings(max_examples=25)
def test_a_batch_gives_what_rows_give_alone(lm, seeds, temperature, start, kappa, probability, room, edit_prompt):
    chosen = config(
        temperature=temperature,
        top_p=0.95 if temperature else None,
        start_tokens=start,
        kappa=kappa,
        edit_probability=probability,
        edit_prompt=edit_prompt,
    )
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(seeds))]
    together = Sampler(lm, chosen, max_rows=room).sample(prompts, seeds=seeds, trace=True)
    for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = Sampler(lm, chosen).sample([prompt], seeds=[seed])
        assert alone.sequences[0] == together.sequences[number]
        assert alone.completions[0] == together.completions[number]
        assert alone.row_nfe[0] == together.row_nfe[number] <= chosen.steps
        assert len(alone.completions[0]) <= 12
        if not edit_prompt:
            assert together.sequences[number][: len(prompt)] == prompt
        last = together.history[number][-1]
        assert last[last >= 0].tolist() == together.sequences[number]


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_row_is_what_one_step_after_the_other_gives(make_edits, architecture):
    """The plain loop: a forward for every step, a coin for every position, a new list for every change."""
    lm = make_edits(architecture)
    heads, module, steps = lm.module.heads, lm.module, 24
    schedule = kappa_schedule("cubic")
    for seed in range(6):
        tokens, forwards = [*PROMPTS[0], *[lm.spec.mask_token_id] * 3], 0
        changed = True
        for step in range(steps):
            forwards += changed
            with torch.no_grad():
                hidden = module.hidden(torch.tensor([tokens]))
                sub, dele, ins = heads.rates_of(hidden, False)[0].double().unbind(-1)
                words = [head(hidden)[0] for head in (heads.substitute, heads.insert)]
            for head in words:
                head[:, lm.spec.mask_token_id] = -torch.inf
            share = edit_share(
                schedule, *(torch.tensor(n / steps, dtype=torch.float64) for n in (step, step + 1))
            ).item()

            def coin(place, stream, step=step, seed=seed):
                return uniform(*(torch.tensor([n]) for n in (seed, step, place)), stream).item()

            made, changed = [], False
            for place, token in enumerate(tokens):
                given = place < len(PROMPTS[0])
                gives_way = (sub + dele)[place].item()
                if not given and coin(place, EDIT) < min(gives_way * share, 1 - 1e-6):
                    changed = True
                    if coin(place, DELETE) >= dele[place].item() / (gives_way + 1e-8):
                        made.append(int(words[0][place].argmax()))
                else:
                    made.append(token)
                behind = not given or place == len(PROMPTS[0]) - 1
                if behind and len(tokens) < 53 and coin(place, INSERT) < min(ins[place].item() * share, 1 - 1e-6):
                    changed = True
                    made.append(int(words[1][place].argmax()))
            tokens = made
            assert len(tokens) < 53, "the rows of this test never meet their limit"
        settings_ = config(steps=steps, kappa="cubic", start_tokens=3, max_new_tokens=50)
        found = Sampler(lm, settings_).sample([PROMPTS[0]], seeds=[seed])
        assert found.sequences[0] == tokens
        assert found.row_nfe[0] <= forwards + 1


def test_the_recorded_probabilities(golden, golden_lm):
    """What the reference's coins were thrown with, at every step of its own histories."""
    lm = golden_lm("editflow_modernbert")
    for case in json.loads((golden / "editflow_modernbert" / "sampler.json").read_text()):
        coins = iter(case["bernoulli"])
        tau, prompt = case["tau"], len(case["prompt"])
        checked = 0
        for step, tokens in enumerate(case["histories"][:-1]):
            with torch.no_grad():
                hidden = lm.module.hidden(torch.tensor([tokens]))
                sub, dele, ins = lm.module.heads.rates_of(hidden, False)[0].unbind(-1)
            times = (torch.tensor(n * tau, dtype=torch.float64) for n in (step, step + 1))
            share = edit_share(kappa_schedule("linear"), *times).item()
            way, behind = (sub + dele) * share, ins * share
            if not case["edit_prompt"]:
                way[:prompt] = 0
                behind[: prompt - 1] = 0
            for expected in (way, behind):
                coin = next(coins, None)
                if coin is None:
                    break
                found = expected.clamp(max=1 - 1e-6)
                torch.testing.assert_close(found, torch.tensor(coin["p"]), rtol=0, atol=2e-5)
                checked += 1
        assert checked > 10


def test_edits_lead_from_each_sequence_to_the_next(lm):
    steps = Sampler(lm, config(start_tokens=4)).sample(PROMPTS, trace=True)
    kinds = set()
    for commits, history in zip(steps.commits, steps.history, strict=True):
        changes = [commit for commit in commits if commit.edits]
        assert len(changes) == len(history) - 1
        for commit, before, after in zip(changes, history[:-1], history[1:], strict=True):
            before, after = before[before >= 0].tolist(), after[after >= 0].tolist()
            made = []
            for place, token in enumerate(before):
                here = {edit.kind: edit.token for edit in commit.edits if edit.position == place}
                kinds |= set(here)
                if "substitute" in here:
                    made.append(here["substitute"])
                elif "delete" not in here:
                    made.append(token)
                made += [here["insert"]] if "insert" in here else []
            assert made == after
            assert [after[place] for place in commit.positions] == commit.tokens
            assert len(commit.confidences) == len(commit.tokens)
        assert [commit.done for commit in commits] == [False] * (len(commits) - 1) + [True]
    assert kinds == {"insert", "delete", "substitute"}


def test_nothing_happens_any_more_is_known_at_once(make_edits):
    still = make_edits(rate=-30.0)
    output = Sampler(still, config(steps=1000)).sample(PROMPTS)
    assert output.nfe == 1 and output.completions == [[]] * 4 and output.sequences == PROMPTS


def test_heads_that_know_the_time_are_asked_at_every_step(make_edits):
    timed = make_edits(time=True)
    output = Sampler(timed, config(steps=10)).sample(PROMPTS, seeds=[1, 2, 3, 4])
    assert output.row_nfe == [10] * 4
    alone = [
        Sampler(timed, config(steps=10)).sample([prompt], seeds=[n]).sequences[0] for n, prompt in enumerate(PROMPTS, 1)
    ]
    assert alone == output.sequences


@pytest.mark.parametrize("kappa", ["linear", "cubic", "cosine"])
@pytest.mark.parametrize(("steps", "probability"), [(1, None), (24, None), (24, 0.2), (500, 0.05)])
def test_every_schedule_makes_all_its_edits(make_edits, kappa, steps, probability):
    """An insertion behind the prompt at a rate of 1, and nothing else: it happens in every row, in whatever steps."""
    once = make_edits(rate=-60.0)
    with torch.no_grad():
        once.model.edit_heads.rates.weight.zero_()
        once.model.edit_heads.rates.bias[2] = float(np.log(np.e - 1))  # softplus gives 1
    chosen = config(kappa=kappa, steps=steps, edit_probability=probability, max_new_tokens=1)
    output = Sampler(once, chosen).sample(PROMPTS * 5, seeds=range(20))
    assert all(len(row) == len(prompt) + 1 for row, prompt in zip(output.sequences, PROMPTS * 5, strict=True))


@pytest.mark.parametrize("kappa", ["linear", "cubic", "cosine"])
def test_no_edit_of_a_longer_step_is_more_probable_than_asked_for(lm, kappa):
    rows = Sampler(lm, config(kappa=kappa, steps=1000, edit_probability=0.2)).rows(PROMPTS, range(4))
    state = State.of(rows, 0)
    fastest = np.array([0.1, 1.0, 3.0, 0.0])
    share, time = state.schedule(np.arange(4), fastest, 400)
    assert (np.diff(time, axis=1) >= 0).all()
    even = 1 / 1000
    for row, rate in enumerate(fastest):
        before = np.concatenate([[0.0], time[row, :-1]])
        longer = time[row] - before > even * 1.01
        assert np.allclose(rate * share[row][longer & (time[row] < 1)], 0.2, rtol=0, atol=1e-3)
        assert (rate * share[row][longer] <= 0.2 + 1e-3).all()
    assert time[0, 0] == 1.0 and time[3, 0] == 1.0  # even the likeliest is not that probable by the end


def test_longer_steps_take_fewer_forwards(make_edits):
    lm = make_edits(rate=-3.0)
    even, adaptive = (
        Sampler(lm, config(steps=500, edit_probability=p)).sample(PROMPTS * 8, seeds=range(32)) for p in (None, 0.5)
    )
    assert adaptive.nfe < even.nfe


def test_a_draft_is_revised_in_place_and_its_prompt_stays(lm):
    drafts = [[70, 71, 72], [], [80], [90] * 12]
    output = Sampler(lm, config()).edit(PROMPTS, drafts, trace=True)
    for prompt, draft, sequence, history in zip(PROMPTS, drafts, output.sequences, output.history, strict=True):
        first = history[0]
        assert first[first >= 0].tolist() == prompt + draft
        assert sequence[: len(prompt)] == prompt
    assert any(
        sequence != prompt + draft for prompt, draft, sequence in zip(PROMPTS, drafts, output.sequences, strict=True)
    )
    changed = Sampler(lm, config(edit_prompt=True)).edit(PROMPTS * 4, drafts * 4)
    assert any(row[: len(p)] != p for row, p in zip(changed.sequences, PROMPTS * 4, strict=True))
    assert all(row[0] == p[0] for row, p in zip(changed.sequences, PROMPTS * 4, strict=True))
    with pytest.raises(ConfigError, match="1 drafts for 4 prompts"):
        Sampler(lm, config()).edit(PROMPTS, drafts[:1])


@pytest.mark.parametrize("eager", [False, True])
def test_a_prompt_that_is_edited_and_its_answer_have_room_of_their_own(make_edits, eager):
    lm = make_edits(rate=2.0 if eager else -1.0)
    output = Sampler(lm, config(edit_prompt=True, max_new_tokens=4)).sample(PROMPTS * 8, seeds=range(32), trace=True)
    for prompt, sequence, completion, history in zip(
        PROMPTS * 8, output.sequences, output.completions, output.history, strict=True
    ):
        assert len(completion) <= 4 and len(sequence) <= 2 * len(prompt) + 4
        assert (history[:, 0] == prompt[0]).all()
    engine = EditEngine(lm)
    for row in Sampler(lm, config(edit_prompt=True, max_new_tokens=4)).rows(PROMPTS * 8, range(32)):
        engine.admit(row)
    while engine.busy:
        engine.step()
        for number in range(len(engine._items)):
            assert engine._state.gate[number].max() == 1, "the token before the answer stays"
        for item in engine.take_finished():
            assert sum(item.answer) <= 4


def test_gaps_have_room_of_their_own(make_edits):
    eager = make_edits(rate=3.0)
    mask = eager.spec.mask_token_id
    row = [10, mask, 20, *[mask] * 6, 30]
    for start in (0, 1, 6):
        output = Sampler(eager, config(start_tokens=start)).infill([row] * 12, seeds=range(12), trace=True)
        for sequence in output.sequences:
            first = len(sequence) - 1 - sequence[::-1].index(20) if sequence.count(20) == 1 else None
            if first is not None:
                assert first - 1 <= 1 and len(sequence) - first - 2 <= 6
            assert len(sequence) <= len(row)
    with pytest.raises(ConfigError, match="edit_prompt"):
        Sampler(eager, config(edit_prompt=True)).infill([row])


def test_ends_of_text_may_be_made_less_likely(make_edits):
    lm = make_edits(rate=3.0)
    with torch.no_grad():
        lm.model.edit_heads.rates.bias[:2] = -30.0
        for head in (lm.model.edit_heads.insert, lm.model.edit_heads.substitute):
            head.weight[lm.spec.eos_token_id] = head.weight.abs().mean(dim=0)
    few, many = (
        sum(row.count(lm.spec.eos_token_id) for row in Sampler(lm, config(eos_penalty=p)).sample(PROMPTS * 8).sequences)
        for p in (100.0, -100.0)
    )
    assert few == 0 < many


def test_gaps_are_filled_and_what_is_around_them_stays(lm):
    mask = lm.spec.mask_token_id
    row = [10, mask, mask, mask, 20, 21, mask, mask, 30]
    for start in (0, 2, 9):
        output = Sampler(lm, config(start_tokens=start)).infill([row] * 5, seeds=range(5))
        for sequence, completion in zip(output.sequences, output.completions, strict=True):
            assert sequence[0] == 10 and sequence[-1] == 30 and len(sequence) <= len(row)
            left = [token for token in sequence if token in (10, 20, 21, 30)]
            assert len(completion) == len(sequence) - 4 and left[:1] == [10]
        assert any(output.completions)
    with pytest.raises(ConfigError, match="gap at the beginning"):
        Sampler(lm, config()).infill([[mask, 10]])


def test_answers_end_at_their_limit_and_at_an_end_of_text(make_edits):
    eager = make_edits(rate=4.0)
    with torch.no_grad():
        eager.model.edit_heads.rates.bias[:2] = -30.0
    output = Sampler(eager, config(max_new_tokens=5)).sample(PROMPTS)
    assert {len(row) - len(prompt) for row, prompt in zip(output.sequences, PROMPTS, strict=True)} == {5}
    stop = eager.spec.eos_token_id
    for completion in output.completions:
        assert stop not in completion


def test_tokens_that_are_suppressed_are_never_written(lm):
    free = Sampler(lm, config()).sample(PROMPTS, seeds=range(4))
    written = {token for row in free.completions for token in row}
    output = Sampler(lm, config(suppress_tokens=tuple(written))).sample(PROMPTS, seeds=range(4))
    assert written and not written & {token for row in output.completions for token in row}


def test_rows_with_settings_of_their_own_share_a_batch(lm):
    engine = EditEngine(lm)
    expected = {}
    for key, chosen in enumerate((config(), config(temperature=1.0), config(temperature=0.5, top_k=3, steps=7))):
        [row] = Sampler(lm, chosen).rows([PROMPTS[key]], [key])
        row.key = key
        engine.admit(row)
        expected[key] = Sampler(lm, chosen).sample([PROMPTS[key]], seeds=[key]).sequences[0]
    assert finish(engine) == expected


def test_a_cancelled_row_goes_and_the_others_don_t_notice(lm):
    rows = Sampler(lm, config(start_tokens=3)).rows(PROMPTS, range(4))
    engine = EditEngine(lm, max_rows=3, trace=True)
    for row in rows:
        engine.admit(row)
    engine.step()
    gone, waiting = engine.cancel(1), engine.cancel(3)
    assert gone.nfe == 1 and waiting.nfe == 0 and waiting.tokens == rows[3].tokens and engine.cancel(9) is None
    assert gone.tokens[:1] == PROMPTS[1] and len(gone.answer) == len(gone.tokens)
    texts = finish(engine)
    alone = Sampler(lm, config(start_tokens=3)).sample(PROMPTS, seeds=range(4)).sequences
    assert texts == {0: alone[0], 2: alone[2]}


def test_what_can_not_be(make_lm, lm):
    with pytest.raises(ModelError, match="no edit heads"):
        EditEngine(make_lm("bert"))
    with pytest.raises(ConfigError, match="no edit heads"):
        Sampler(make_lm("bert"), config()).edit([[1]], [[2]])
    with pytest.raises(ConfigError, match="doesn't fit the model's context of 64"):
        Sampler(lm, config(max_new_tokens=64)).sample([[10]])
    with pytest.raises(ConfigError) as error:
        Sampler(lm, config(threshold=0.9)).sample([[10]])
    assert error.value.field == "threshold" and "model that edits" in str(error.value)
    with pytest.raises(ConfigError, match="outside the model's vocabulary"):
        Sampler(lm, config()).sample([[10_000]])
    broken = edit_heads.attach(make_lm("bert", seed=5))
    torch.nn.init.constant_(broken.model.edit_heads.rates.weight, float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        Sampler(broken, config()).sample([[10]])


def test_an_empty_prompt_begins_with_a_token_that_stays(lm):
    [sequence] = Sampler(lm, config()).sample([[]]).sequences
    assert sequence[0] == (lm.spec.eos_token_id if lm.spec.bos_token_id is None else lm.spec.bos_token_id)
    assert np.isfinite(len(sequence))
