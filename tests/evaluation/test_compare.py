"""What a comparison says of a run: its score, the published ones, and every setting that isn't the official one."""

import math
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_ray.config import flatten
from dllm_ray.evaluation import compare, reference
from dllm_ray.evaluation.compare import Line, Score
from dllm_ray.evaluation.compare_report import cells, columns, markdown, metrics, page, tree, verdict

LLADA = "GSAI-ML/LLaDA-8B-Instruct"
SUITE = """
model: {path: GSAI-ML/LLaDA-8B-Instruct, dtype: bfloat16}
sampler: {max_new_tokens: 512, steps: 512, block_size: 512}
likelihood: {mc_num: 128}
evaluate:
  suite:
    - {task: gsm8k_cot, name: gsm8k, num_fewshot: 5, sampler: {begin_suppress_tokens: [126081]}}
    - {task: gsm8k_cot, name: gsm8k-dual, num_fewshot: 5, sampler: {cache: dual, block_size: 32}}
    - {task: arc_challenge, likelihood: {cfg_scale: 0.5}}
"""


@dataclass
class Run:
    """What a tracking store gives."""

    metrics: dict = field(default_factory=dict)
    tags: dict = field(default_factory=lambda: {"dllm_ray.model": LLADA, "dllm_ray.eval.task": "gsm8k_cot"})
    params: dict = field(default_factory=dict)
    run_id: str = "1"
    status: str = "FINISHED"
    started: int = 0


@pytest.fixture
def lines(tmp_path) -> list[Line]:
    (tmp_path / "llada.yaml").write_text(SUITE)
    (tmp_path / "other.yaml").write_text("evaluate: {tasks: [digits]}")
    return compare.official_lines(tmp_path, [LLADA], lambda model: {})


def score_of(line: Line, **changes) -> Score:
    """A score that was had with the settings of a line."""
    metric = "acc" if line.task == "arc_challenge" else "exact_match"
    known = {"run_id": "1", "model": LLADA, "task": line.task, "setting": line.name, "metric": metric, "value": 70.0}
    return Score(**(known | {"settings": dict(line.settings)} | changes))


def row_of(score: Score, lines) -> compare.Row:
    return compare.row(score, reference.find(reference.names_of(score.model), score.benchmark), lines)


def test_lines_have_all_their_settings_and_those_of_other_models_are_left_out(lines, tmp_path):
    assert [line.name for line in lines] == ["gsm8k", "gsm8k-dual", "arc_challenge"]
    assert lines[0].settings["sampler.temperature"] == 0.0 and lines[0].settings["sampler.steps"] == 512
    assert lines[2].settings["likelihood.mc_num"] == 128 and lines[2].settings["likelihood.cfg_scale"] == 0.5
    assert compare.official_lines(tmp_path, ["outputs/digits/final"]) == []


def test_settings_that_come_with_the_model_hold_where_a_line_is_silent(tmp_path):
    (tmp_path / "llada.yaml").write_text(SUITE)
    found = compare.official_lines(tmp_path, [LLADA], lambda model: {"temperature": 0.2, "steps": 3})
    assert found[0].settings["sampler.temperature"] == 0.2 and found[0].settings["sampler.steps"] == 512


def test_a_run_as_the_official_line_says_so(lines):
    row = row_of(score_of(lines[0], value=71.0, stderr=1.2), lines)
    assert row.differences == ()
    assert verdict(row) == "as the official line [llada: gsm8k]"
    assert (row.official.score, row.reproduced.score) == (69.4, 74.7)
    assert row.points == pytest.approx(1.6) and row.errors == pytest.approx(1.6 / 1.2)


def test_settings_that_differ_are_named(lines):
    changed = dict(lines[0].settings) | {"sampler.steps": 64, "limit": 100, "num_fewshot": 0, "sampler.seed": 7}
    row = row_of(score_of(lines[0], settings=changed, limited=True), lines)
    assert verdict(row) == "steps 64 instead of 512, num_fewshot 0 instead of 5, limit 100 [llada: gsm8k]"


def test_acceleration_differs_from_the_published_way_even_where_a_line_has_it(lines):
    row = row_of(score_of(lines[1]), lines)
    assert row.line.name == "gsm8k"
    assert "cache dual instead of none" in verdict(row)
    assert "block_size 32 instead of 512" in verdict(row)


def test_only_settings_that_matter_to_the_task_are_compared(lines):
    changed = dict(lines[2].settings) | {"sampler.steps": 1, "likelihood.mc_num": 32, "likelihood.batch_size": 5}
    assert verdict(row_of(score_of(lines[2], settings=changed), lines)) == (
        "mc_num 32 instead of 128 [llada: arc_challenge]"
    )


def test_an_adapter_and_another_task_are_differences(lines):
    changed = dict(lines[0].settings) | {"model.adapter": "lora"}
    adapted = row_of(score_of(lines[0], task="gsm8k_file", settings=changed), lines)
    assert cells(adapted)["model"] == f"{cells(row_of(score_of(lines[0]), lines))['model']} + lora"
    said = verdict(adapted)
    assert said == "task gsm8k_file instead of gsm8k_cot, adapter lora instead of none [llada: gsm8k]"


def test_a_published_score_that_was_had_otherwise_says_so_where_there_is_no_line():
    score = Score("1", "GSAI-ML/LLaDA-8B-Base", "bbh", value=40.0, settings={"sampler.max_new_tokens": 64})
    row = row_of(score, [])
    assert verdict(row) == "no official line to compare settings with"
    row = row_of(replace(score, model="GSAI-ML/LLaDA-1.5", task="gsm8k"), [])
    assert "max_new_tokens 64 instead of 256" in verdict(row)


def test_metrics_become_percentages_with_their_errors_and_counts():
    run = Run({"eval/gsm8k_cot/exact_match": 0.5, "eval/gsm8k_cot/exact_match_stderr": 0.05, "sampler/tpf": 2.0})
    results = {"n-samples": {"gsm8k_cot": {"effective": 100, "original": 1319}}}
    [score] = compare.scores(run, {"limit": 100}, results)
    assert (score.value, score.stderr, score.documents, score.limited, score.tpf) == (50.0, 5.0, 100, True, 2.0)


def test_a_limit_above_the_number_of_documents_is_none():
    results = {"n-samples": {"gsm8k_cot": {"effective": 10, "original": 10}}}
    [score] = compare.scores(Run({"eval/gsm8k_cot/exact_match": 0.5}), {"limit": 500}, results)
    assert not score.limited and score.settings["limit"] is None


def test_a_group_counts_the_documents_of_its_tasks():
    results = {
        "group_subtasks": {"gsm8k_cot": ["a", "b"], "b": ["c"]},
        "n-samples": {name: {"effective": 5, "original": 8} for name in ("a", "c")},
    }
    [score] = compare.scores(Run({"eval/gsm8k_cot/exact_match": 0.5}), {}, results)
    assert (score.documents, score.limited) == (10, True)


def test_perplexities_are_no_percentages_and_stand_beside_no_percentage():
    tags = {"dllm_ray.model": LLADA, "dllm_ray.eval.reference": "GSM8K"}
    [score] = compare.scores(Run({"eval/text/word_perplexity": 0.9}, tags), {}, {})
    row = row_of(score, [])
    assert score.value == 0.9 and not score.percent and row.against is None and row.points is None


@pytest.mark.parametrize(
    ("tag", "chosen"),
    [("exact_match,flexible-extract", 40.0), ("exact_match,strict-match", 30.0), (None, 30.0)],
)
def test_the_metric_that_the_line_names_counts_or_the_first(tag, chosen):
    metrics = {"eval/t/exact_match.flexible-extract": 0.4, "eval/t/exact_match.strict-match": 0.3}
    metrics |= {"eval/t/exact_match.strict-match_stderr": 0.1}
    run = Run(metrics, {"dllm_ray.eval.task": "t"} | ({"dllm_ray.eval.metric": tag} if tag else {}))
    results = {"results": {"t": {"alias": "t", "exact_match,strict-match": 0.3, "exact_match,flexible-extract": 0.4}}}
    [score] = compare.scores(run, {}, results)
    assert score.value == chosen


def test_a_run_without_scores_is_marked():
    run = Run({"eval/gsm8k_cot/exact_match": math.nan}, status="RUNNING")
    [score] = compare.scores(run, {}, {})
    row = row_of(score, [])
    assert row.remarks == ["still running", "no score"]
    assert cells(row)["ours"] == "-" and row.points is None
    assert compare.scores(Run(tags={}), {"evaluate": {"tasks": ["digits"], "suite": [{"task": "a"}]}}, {}) == []


def test_the_newest_run_with_a_score_stands_for_its_like(lines):
    old, new, broken = (score_of(lines[0], run_id=str(at), started=at) for at in (1, 2, 3))
    broken = replace(broken, value=None)
    other = score_of(lines[0], run_id="4", settings=dict(lines[0].settings) | {"sampler.steps": 64})
    reseeded = score_of(lines[0], run_id="0", settings=dict(lines[0].settings) | {"sampler.seed": 64})
    kept = compare.newest([broken, new, old, other, reseeded])
    assert [score.run_id for score in kept] == ["2", "4"]


def test_a_model_of_ones_own_stands_above_every_published_one(lines):
    mine = Score("1", "outputs/mine", "gsm8k_file", metric="exact_match", value=12.0)
    rows = compare.table([mine], lines, [])
    assert rows[0].ours is mine and rows[0].against is None
    assert {"LLaDA-8B-Instruct", "ModernBERT-base-chat-v0.1"} <= {row.model for row in rows[1:]}
    assert {row.benchmark for row in rows} == {"GSM8K"}
    assert [row.model for row in compare.table([mine], lines, ["LLaDA-1.5"])] == ["outputs/mine", "LLaDA-1.5"]


def test_on_a_task_of_ones_own_well_known_models_stand_below():
    rows = compare.table([Score("1", "outputs/digits/final", "digits", metric="exact_match", value=81.0)], [], [])
    assert {row.model for row in rows[1:]} == set(compare.WELL_KNOWN)
    assert {"GSM8K", "MBPP"} <= {row.benchmark for row in rows}


def test_metrics_and_columns_have_names_that_mlflow_takes(lines):
    from mlflow.utils.validation import _validate_metric_name

    mine = Score("1", "/tmp/../ö;'\"%/m" + "x" * 300, "../t", metric="acc", value=1.0)
    rows = compare.table([score_of(lines[0]), mine], lines, [])
    found = metrics(rows)
    assert found["compare/GSAI-ML/LLaDA-8B-Instruct/gsm8k_cot/gsm8k/official"] == 69.4
    for name in [*found, *(name for column in columns(rows).values() for name in column.scores)]:
        _validate_metric_name(name)
    assert columns(rows)["LLaDA-8B-Instruct reproduced"].scores["score/GSM8K"] == 74.7


TEXT = st.text(max_size=30)
NUMBERS = st.none() | st.floats(0, 100)


@settings(max_examples=60)
@given(
    model=TEXT | st.sampled_from([LLADA, "<script>alert(1)</script>", "a|b\n# c", "GSAI-ML/LLaDA-8B-Base"]),
    task=TEXT | st.sampled_from(["gsm8k", "arc_challenge", "</table>"]),
    setting=TEXT,
    value=NUMBERS,
    stderr=NUMBERS,
    documents=st.none() | st.integers(0, 10**6),
    percent=st.booleans(),
    told=st.dictionaries(
        st.sampled_from(["sampler.steps", "limit", "likelihood.cfg_scale", "until"]), NUMBERS | TEXT | st.lists(TEXT)
    ),
)
def test_any_score_makes_a_row_and_harmless_pages(model, task, setting, value, stderr, documents, percent, told):
    score = Score("1", model, task, setting, metric="acc", value=value, stderr=stderr, percent=percent)
    score = replace(score, documents=documents, settings=told)
    row = row_of(score, [])
    assert (row.points is None) == (value is None or not percent or row.against is None)
    if row.points is not None:
        assert row.points == value - row.against.score
        assert (row.errors is None) == (not stderr)
    assert flatten({"rows": tree([row])["rows"][0]})["rows.model"] == model
    text = page([row], [])
    assert text.isascii() and "<script" not in text and text.count("</table>") == text.count("<table>")
    body = markdown([row], []).splitlines()
    assert len(body) == 5 and body[4].replace("\\\\", "").replace("\\|", "").count("|") == 13
