"""Lines of a suite and variants of a job, with all settings worked out."""

import pytest

from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.config import EvaluateConfig, LikelihoodConfig, Setting
from dllm_ray.evaluation.suite import asks
from dllm_ray.sampling.config import SamplerConfig

SAMPLER = SamplerConfig(max_new_tokens=64, steps=64, block_size=32)
LINES = [
    Setting("gsm8k", num_fewshot=5, sampler={"steps": 32}, until=["Q:"], reference="GSM8K", origin={"script": "a.sh"}),
    Setting("gsm8k", name="gsm8k-long", sampler={"max_new_tokens": 128, "steps": 128}, limit=7),
    Setting("arc_easy", likelihood={"mc_num": 16}, chat_template=False, data_file="arc.jsonl"),
]


def found(chosen=None, changes=None, lines=LINES, **settings):
    config = EvaluateConfig(suite=lines, **settings)
    return asks(config, SAMPLER, LikelihoodConfig(), chosen, changes)


def test_a_line_changes_what_it_names_and_nothing_else():
    first, long, choice = found(limit=100, until=["###"])
    assert (first.name, first.evaluate.tasks, first.evaluate.num_fewshot) == ("gsm8k", ("gsm8k",), 5)
    assert (first.sampler.steps, first.sampler.max_new_tokens, first.evaluate.limit) == (32, 64, 100)
    assert first.evaluate.until == ["###", "Q:"]
    assert (first.reference, first.origin) == ("GSM8K", {"script": "a.sh"})
    assert (long.name, long.sampler.steps, long.evaluate.limit) == ("gsm8k-long", 128, 7)
    assert (choice.likelihood.mc_num, choice.evaluate.chat_template) == (16, False)
    assert choice.evaluate.data_files == {"arc_easy": "arc.jsonl"}
    assert not any(ask.evaluate.suite for ask in (first, long, choice))


def test_lines_are_chosen_by_name_or_by_task():
    assert [ask.name for ask in found("gsm8k")] == ["gsm8k", "gsm8k-long"]
    assert [ask.name for ask in found("arc_easy, gsm8k-long")] == ["gsm8k-long", "arc_easy"]


def test_settings_can_win_over_every_line():
    changes = "sampler.steps=16, sampler.suppress_tokens=[1, 2],likelihood.mc_num=4, evaluate.limit=3"
    for ask in found(changes=changes):
        assert (ask.sampler.steps, ask.sampler.suppress_tokens) == (16, (1, 2))
        assert (ask.likelihood.mc_num, ask.evaluate.limit) == (4, 3)


def test_variants_are_asked_beside_the_jobs_own_settings():
    plain, few = asks(EvaluateConfig(variants=[{"steps": 4}]), SAMPLER, LikelihoodConfig())
    assert (plain.name, plain.sampler) == ("", SAMPLER)
    assert (few.name, few.sampler.steps) == ("steps=4", 4)
    assert few.evaluate == plain.evaluate


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"chosen": "gsm9k"}, "suite: no line 'gsm9k'; the nearest: gsm8k"),
        ({"chosen": ","}, "suite: name lines: gsm8k, gsm8k-long, arc_easy"),
        ({"lines": [LINES[0], LINES[0]]}, "evaluate.suite: two settings are called 'gsm8k'"),
        ({"lines": [Setting("a", name="../b")]}, "evaluate.suite: '../b' can't be a name"),
        ({"lines": [Setting("answers")]}, "evaluate.suite: 'answers' can't be a name"),
        ({"lines": [Setting("a", sampler={"step": 4})]}, "evaluate.suite: line a: sampler.*did you mean steps"),
        ({"lines": [Setting("a", likelihood={"mc_num": 0})]}, "evaluate.suite: line a: .*mc_num: must be a whole"),
        ({"lines": [Setting("a", limit=0)]}, "evaluate.suite: line a: limit: must be at least 1"),
        ({"variants": [{"steps": 4}]}, "evaluate.variants: a suite's lines have settings of their own"),
        ({"changes": "steps=4"}, "set: expected section.field=value"),
        ({"changes": "sampler.steps"}, "set: expected section.field=value"),
        ({"changes": "sampler.step=4"}, "sampler.*did you mean steps"),
        ({"changes": "evaluate.tasks=[a]"}, "set: evaluate.tasks can't be set for every line, only num_fewshot"),
        ({"changes": "evaluate.limit=abc"}, "set: gsm8k: evaluate.*limit"),
        ({"changes": "evaluate.chat_template=maybe"}, "set: gsm8k: evaluate.*chat_template"),
        ({"changes": "sampler.steps=["}, "set: 'sampler.steps=\\[': the value is no YAML"),
    ],
)
def test_what_can_not_be_asked_is_named(settings, said):
    with pytest.raises(ConfigError, match=said):
        found(**settings)


def test_equal_variants_are_refused():
    with pytest.raises(ConfigError, match="two settings are called 'steps=4'"):
        asks(EvaluateConfig(variants=[{"steps": 4}, {"steps": 4}]), SAMPLER, LikelihoodConfig())


def test_lines_are_chosen_in_a_suite_only():
    with pytest.raises(ConfigError, match=r"suite: chooses among the lines of evaluate\.suite, and there are none"):
        asks(EvaluateConfig(), SAMPLER, LikelihoodConfig(), "gsm8k")
