"""The metric that settings are compared by, and its value for each document."""

from dataclasses import replace

import numpy as np
import pytest
from lm_eval.api.metrics import mean, median, perplexity

from dllm_ray.errors import ConfigError, EvaluationError
from dllm_ray.evaluation.run import Loaded
from dllm_ray.tuning.scores import choose, label, per_document

MATHS = Loaded("maths", 20, {"exact_match": mean, "length": mean}, {"exact_match": True, "length": False}, ("a", "b"))
OTHER = Loaded("other", 20, {"exact_match": mean}, {"exact_match": True}, ("b",))
RANK = Loaded("rank", 20, {"ppl": perplexity, "middle": median}, {"ppl": False, "middle": True}, ("none",))


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (None, ("exact_match", "a")),
        ("exact_match", ("exact_match", "a")),
        ("exact_match,b", ("exact_match", "b")),
        ("exact_match.b", ("exact_match", "b")),
    ],
)
def test_a_metric_is_named_as_lm_eval_or_our_tables_do(metric, expected):
    assert choose([MATHS], metric) == expected


@pytest.mark.parametrize(
    ("tasks", "metric", "message"),
    [
        ([MATHS], "acc", "task maths has no metric 'acc', but exact_match, length"),
        ([MATHS], "exact_match,c", "task maths has no filter 'c', but a, b"),
        ([MATHS], "length", "less of length of task maths is better"),
        ([MATHS, OTHER], "exact_match,a", "task other has no filter 'a', but b"),
        ([MATHS, OTHER], None, "task other has no filter 'a', but b"),
        ([OTHER, RANK], None, "task rank has no metric 'exact_match', but ppl, middle"),
        ([RANK], "middle", "middle of task rank is no mean over documents.*: none"),
        ([RANK], None, "ppl of task rank is no mean"),
    ],
)
def test_a_metric_that_settings_can_not_be_compared_by_is_refused(tasks, metric, message):
    with pytest.raises(ConfigError, match=message) as error:
        choose(tasks, metric)
    assert error.value.field == "sweep.metric"


def test_means_that_could_be_compared_are_named():
    mixed = Loaded("mixed", 9, {"middle": median, "acc": mean}, {}, ("none",))
    with pytest.raises(ConfigError, match="those that are: acc"):
        choose([mixed], "middle")


def sample(place, way="none", **metrics):
    return {"doc_id": place, "filter": way, "metrics": list(metrics), **metrics}


def test_scores_are_in_the_order_of_places_and_of_the_filter_asked_for():
    samples = {
        "one": [sample(place, way, acc=float(place == 10) / 2 + (way == "b")) for way in "ab" for place in (10, 9, 2)],
        "a/two": [sample(0, "b", acc=1)],
    }
    assert per_document({"samples": samples}, "acc", "a") == {"one/2": 0.0, "one/9": 0.0, "one/10": 0.5}
    found = per_document({"samples": samples}, "acc", "b")
    assert list(found) == ["a/two/0", "one/2", "one/9", "one/10"]
    assert list(found.values()) == [1.0, 1.0, 1.0, 1.5]


def test_documents_that_a_metric_passes_over_have_no_score():
    samples = {"t": [sample(0, acc=1.0), sample(1, other=1.0), sample(2, acc=0.0)]}
    assert per_document({"samples": samples}, "acc", "none") == {"t/0": 1.0, "t/2": 0.0}


@pytest.mark.parametrize("value", [True, 1, np.float32(1), np.int64(1), np.bool_(True), np.float64(1)])
def test_any_kind_of_number_is_a_score(value):
    (found,) = per_document({"samples": {"t": [sample(0, acc=value)]}}, "acc", "none").values()
    assert found == 1.0 and type(found) is float


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1.0", None, (1, 2)])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(EvaluationError, match=r"task t gives .* as a document's acc: expected a number"):
        per_document({"samples": {"t": [sample(0, acc=value)]}}, "acc", "none")


def test_documents_none_of_which_has_a_score_are_refused():
    with pytest.raises(EvaluationError, match="no document has acc"):
        per_document({"samples": {"t": [sample(0, other=1.0), sample(1, "a", acc=1.0)]}}, "acc", "none")


def test_a_task_that_generates_nothing_is_refused():
    with pytest.raises(ConfigError, match="no setting of the sampler changes"):
        choose([replace(MATHS, output_type="multiple_choice")], None)


def test_a_score_is_called_with_its_filter_where_there_are_several():
    assert label([MATHS], ("exact_match", "b")) == "exact_match,b"
    assert label([replace(MATHS, filters=("none",))], ("exact_match", "none")) == "exact_match"
