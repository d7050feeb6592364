"""Commits applied to lists: as a plain version does it, and as the engine's own sequences say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.models import edit_heads
from dllm_ray.sampling import Sampler, SamplerConfig
from dllm_ray.sampling.edits import after, in_turn
from dllm_ray.sampling.engine import Commit, Edit

FATES = st.sampled_from([None, "delete", "substitute"])


@st.composite
def edited(draw) -> tuple[list[int], list[Edit]]:
    """A sequence, and edits of a step; every new token is another."""
    tokens = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    edits, fresh = [], iter(range(100, 200))
    for position in range(len(tokens)):
        fate, inserts = draw(FATES), draw(st.booleans())
        if fate is not None:
            edits.append(Edit(fate, position, None if fate == "delete" else next(fresh)))
        if inserts:
            edits.append(Edit("insert", position, next(fresh)))
    return tokens, edits


def plainly(tokens: list[int], edits: list[Edit]) -> list[tuple[int, bool]]:
    """What becomes of each position in its turn, and what is new."""
    made = []
    for position, token in enumerate(tokens):
        own = {edit.kind: edit.token for edit in edits if edit.position == position}
        if "substitute" in own:
            made.append((own["substitute"], True))
        elif "delete" not in own:
            made.append((token, False))
        if "insert" in own:
            made.append((own["insert"], True))
    return made


def commit_of(tokens: list[int], edits: list[Edit]) -> Commit:
    made = plainly(tokens, edits)
    places = [place for place, (_, is_new) in enumerate(made) if is_new]
    return Commit(0, 0, places, [made[place][0] for place in places], [0.5] * len(places), False, edits)


@given(edited())
def test_edits_make_what_a_plain_version_makes(case):
    tokens, _ = case
    commit, made = commit_of(*case), plainly(*case)
    assert after(commit, tokens, commit.tokens) == [token for token, _ in made]
    marks = after(commit, ["old"] * len(tokens), ["new"] * len(commit.tokens))
    assert marks == ["new" if is_new else "old" for _, is_new in made]


@given(edited())
def test_in_turn_every_new_token_stands_where_it_stays(case):
    commit = commit_of(*case)
    turns = list(in_turn(commit.edits))
    assert [edit.position for edit in turns if edit.kind != "delete"] == commit.positions
    assert [edit[::2] for edit in turns] == [edit[::2] for edit in commit.edits]


def test_a_step_that_writes_in_place_is_followed_too():
    tokens = [7, 0, 0, 0]
    commit = Commit(0, 0, [1, 3], [5, 6], [0.5, 0.25], False)
    assert after(commit, tokens, commit.tokens) == [7, 5, 0, 6]
    assert after(commit, [1.0] * 4, commit.confidences) == [1.0, 0.5, 1.0, 0.25]
    assert tokens == [7, 0, 0, 0]
    assert after(Commit(0, 1, [], [], [], True), tokens, []) == tokens


@pytest.mark.parametrize("changes", [{}, {"start_tokens": 3}, {"edit_prompt": True, "edit_probability": 0.3}], ids=str)
def test_the_engines_commits_lead_from_its_canvases_to_its_sequences(make_lm, changes):
    lm = edit_heads.attach(make_lm("llama"))
    config = SamplerConfig(max_new_tokens=16, steps=32, temperature=1.0, seed=3, **changes)
    sampler, prompts = Sampler(lm, config), [[1, 20, 21], [1] * 6, [9]]
    output, kinds = sampler.sample(prompts, trace=True), set()
    for tokens, commits, history, final in zip(
        sampler.canvases(prompts), output.commits, output.history, output.sequences, strict=True
    ):
        states = [tokens]
        for commit in commits:
            kinds |= {edit.kind for edit in commit.edits}
            tokens = after(commit, tokens, commit.tokens)
            assert [tokens[place] for place in commit.positions] == commit.tokens
            if commit.edits:
                states.append(tokens)
        assert tokens == final
        assert states == [[token for token in state if token >= 0] for state in history.tolist()]
    assert kinds == {"insert", "delete", "substitute"}
