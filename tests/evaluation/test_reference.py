"""The published scores are those of their sources, and are found by whatever a model or a task is called."""

import json

import pytest

from dllm_ray.evaluation import reference


def test_every_record_of_the_facts_is_there_field_by_field(golden):
    wanted = json.loads((golden.parent / "facts" / "reference_scores.json").read_text())
    fields = ("model", "task", "score", "kind", "setting", "note", "model_type", "group")
    fields += ("raw_accuracy_cell", "raw_second_cell")
    expected = [(record["source"].replace("+", "/", 1), *(record.get(name) for name in fields)) for record in wanted]
    found = [(record.source, *(getattr(record, name) for name in fields)) for record in reference.published()]
    assert sorted(found, key=repr) == sorted(expected, key=repr)
    assert {record["model"] for record in wanted} == set(reference.hub_ids())


def test_scores_are_percentages_of_a_known_kind():
    for record in reference.published():
        assert record.kind in reference.KINDS
        assert record.score is None or 0 <= record.score <= 100


@pytest.mark.parametrize(
    "model",
    [
        "LLaDA-8B-Instruct",
        "GSAI-ML/LLaDA-8B-Instruct",
        "/models/llada-8b-instruct/",
        "/models/.cache/huggingface/hub/models--GSAI-ML--LLaDA-8B-Instruct/snapshots/0a1b2c",
    ],
)
def test_a_model_is_found_by_name_hub_id_and_path(model):
    assert reference.names_of(model) == ["LLaDA-8B-Instruct"]


def test_an_unknown_model_has_no_published_name():
    assert reference.names_of("outputs/digits/final") == []


def test_one_checkpoint_may_be_listed_in_two_modes():
    assert len(reference.names_of("google/diffusiongemma-26B-A4B-it")) == 2


@pytest.mark.parametrize(
    ("task", "benchmark"),
    [("gsm8k_cot", "GSM8K"), ("Math", "MATH"), ("minerva_math", "MATH"), ("Hellaswag", "HellaSwag")]
    + [("CEval", "C-Eval"), ("ceval-valid", "C-Eval"), ("arc_challenge", "ARC-C"), ("Winogrande", "WinoGrande")]
    + [("digits", "digits"), ("SciCode", "SciCode")],
)
def test_a_task_leads_to_its_benchmark(task, benchmark):
    assert reference.benchmark(task) == benchmark


def test_both_spellings_of_a_benchmark_are_found_and_empty_cells_are_not():
    spellings = {record.task for record in reference.find(["LLaDA-8B-Base"], "hellaswag")}
    assert spellings == {"Hellaswag", "HellaSwag"}
    assert all(record.score is not None for record in reference.find(["LLaDA-8B-Base"], "mmlu"))


@pytest.mark.parametrize(("length", "score"), [(256, 70.0), (512, 70.8), (1024, 70.3), (64, 70.3)])
def test_of_several_official_scores_the_one_with_our_settings_counts(length, score):
    settings = {"sampler.max_new_tokens": length, "sampler.steps": length, "sampler.block_size": length}
    found = reference.best(reference.find(["LLaDA-8B-Base"], "gsm8k"), "official", settings)
    assert found.score == score


@pytest.mark.parametrize(("scale", "score"), [(0.0, 45.9), (0.5, 47.9)])
def test_a_score_with_guidance_stands_beside_a_run_with_guidance(scale, score):
    records = reference.find(["LLaDA-8B-Base"], "arc_challenge")
    assert reference.best(records, "official", {"likelihood.cfg_scale": scale}).score == score
