"""Every line of configs/evaluate is a setting that works, and every setting on record is one line, field by field."""

import json
import math
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dllm_ray.config import load_yaml, read
from dllm_ray.evaluation import reference
from dllm_ray.evaluation.config import EvaluateConfig, LikelihoodConfig, Setting
from dllm_ray.evaluation.suite import Ask, asks
from dllm_ray.sampling.config import SamplerConfig

ROOT = Path(__file__).resolve().parents[2]

FILES = sorted((ROOT / "configs" / "evaluate").glob("*.yaml"))
TABLES = [path for path in FILES if path.stem not in ("digits", "lengths")]
OUR_DEFAULTS = {"llada-8b-instruct": "GSAI-ML/LLaDA-8B-Instruct", "dream-7b-base": "Dream-org/Dream-v0-Base-7B"}

POLICIES = {"confidence_threshold": "maskgit_plus", "entropy_bound": "low_confidence"}
DEFAULTS_OF = {
    ("dllm lm-eval fork", "llada"): "llada",
    ("dllm lm-eval fork", "fastdllm_llada"): "fastdllm_llada",
    ("dllm lm-eval fork", "dream"): "dream",
    ("dllm lm-eval fork", "fastdllm_dream"): "fastdllm_dream",
    ("dllm lm-eval fork", "bert"): "bert",
    ("dllm lm-eval fork", "a2d_mdlm"): "a2d_mdlm",
    ("dllm lm-eval fork", "a2d_bd3lm"): "a2d_bd3lm",
    ("dllm lm-eval fork", "diffusiongemma"): "diffusiongemma (branch)",
    ("lm_eval==0.4.8 (official LLaDA)", "llada_dist"): "official_llada_lm_eval",
    ("lm-eval (official Fast-dLLM)", "llada_dist"): "official_llada_lm_eval",
    ("lm-eval (official Dream eval)", "dream"): "official_dream_eval",
    ("lm-eval (official Fast-dLLM)", "dream"): "official_dream_eval",
    ("lm-eval fork in Dream/eval_instruct (model diffllm)", "diffllm"): "official_dream_eval_instruct",
}


class Line(NamedTuple):
    """A line of a table, and what it comes to."""

    path: str
    model: dict[str, Any]
    setting: Setting
    ask: Ask


@cache
def lines_of(path) -> list[Line]:
    tree = load_yaml(path)
    config = read(EvaluateConfig, tree["evaluate"], path.name)
    sampler = read(SamplerConfig, tree.get("sampler", {}), path.name)
    found = asks(config, sampler, read(LikelihoodConfig, tree.get("likelihood", {}), path.name))
    return [Line(path.stem, tree["model"], *pair) for pair in zip(config.suite, found, strict=True)]


@pytest.fixture(scope="module")
def facts(golden):
    """The settings on record, and what a harness takes where a command line says nothing."""
    folder = golden.parent / "facts"
    read_json = [json.loads((folder / f"eval_{name}.json").read_text()) for name in ("settings", "defaults")]
    records, defaults = read_json
    return records, defaults | defaults["dllm"]


@pytest.fixture(scope="module")
def lines():
    return [line for path in TABLES for line in lines_of(path)]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_line_of_a_table_works_and_has_a_name_of_its_own(path):
    found = lines_of(path)
    names = [line.ask.name for line in found]
    assert len(set(names)) == len(names) > 0
    assert all(line.setting.origin["framework"] and line.setting.origin["script"] for line in found)
    text = path.read_text()
    assert text.startswith("# ")
    assert all(len(row) <= 120 for row in text.splitlines())


def test_what_a_line_stands_beside_is_published_for_its_model(lines):
    models = {hub: name for name, hub in reference.hub_ids().items() if hub}
    published = defaultdict(set)
    for record in reference.published():
        published[record.model].add(reference.benchmark(record.task))
    for line in lines:
        if line.setting.reference is not None:
            names = [name for name, hub in reference.hub_ids().items() if hub == line.model["path"]]
            assert any(line.setting.reference in published[name] for name in names), (line.path, line.ask.name)
    assert {line.model["path"] for line in lines if line.setting.reference} <= set(models)


def test_no_line_gives_leave_to_run_code():
    for path in FILES:
        assert "confirm_run_unsafe_code" not in load_yaml(path)["evaluate"]


def test_every_setting_on_record_is_one_line_and_every_line_is_one_of_them(facts, lines):
    records, _ = facts
    places = defaultdict(list)
    for line in lines:
        if line.model["path"] != "dllm-hub/ModernBERT-base-chat-v0.1":  # asked like the large one, on record
            places[identity_of_line(line)].append(line)
    wanted = defaultdict(list)
    for record in records:
        wanted[identity(record)].append(record)
    assert {key: len(found) for key, found in places.items()} == {key: len(found) for key, found in wanted.items()}


def test_every_setting_on_record_is_expressed_field_by_field(facts, lines):
    records, defaults = facts
    left = [line for line in lines if line.model["path"] != "dllm-hub/ModernBERT-base-chat-v0.1"]
    for record in records:
        expected = expectation(record, defaults)
        matching = [line for line in left if identity_of_line(line) == identity(record) and said(line) == expected]
        assert matching, (record, expected, [said(line) for line in left if identity_of_line(line) == identity(record)])
        left.remove(matching[0])
    assert not left


@pytest.mark.parametrize(("name", "model"), OUR_DEFAULTS.items())
def test_the_plain_names_are_tables_of_the_models_they_name(name, model):
    assert {line.model["path"] for line in lines_of(ROOT / "configs" / "evaluate" / f"{name}.yaml")} == {model}


def identity(record) -> tuple:
    """Which row of which script a record is."""
    names = ("framework", "model", "variant", "harness_model_name", "task")
    return (*(record[name] for name in names), record["source_file"].replace("+", "/", 1))


def identity_of_line(line: Line) -> tuple:
    origin = line.setting.origin
    task = origin.get("task", line.setting.task)
    return (
        *(origin.get(name) for name in ("framework", "model", "variant", "harness")),
        task,
        origin["script"],
    )


def said(line: Line) -> dict[str, Any]:
    """What a line asks, in one flat mapping."""
    ask, setting, origin = line.ask, line.setting, line.setting.origin
    scored = bool(setting.likelihood)
    assert not (scored and setting.sampler)
    told = {
        "hf_id": line.model["path"],
        "dtype": line.model["dtype"],
        "num_fewshot": ask.evaluate.num_fewshot,
        "chat_template": ask.evaluate.chat_template,
        "add_bos_token": ask.evaluate.add_bos_token,
        "escape_until": ask.evaluate.escape_until,
        "until": ask.evaluate.until,
        "scored": scored,
        "batch_size": ask.likelihood.batch_size if scored else setting.batch_size,
        "flags": sorted(origin.get("flags", [])),
        "other": {name: origin[name] for name in ("dataset_config", "model_config", "entropy_bound") if name in origin},
        "variables": sorted(origin.get("variables", {})),
        "model_type": origin.get("variables", {}).get("model_type"),
        "has_note": bool(setting.note),
    }
    if scored:
        return told | {
            "mc_num": ask.likelihood.mc_num,
            "cfg_scale": ask.likelihood.cfg_scale,
            "check_greedy": ask.likelihood.check_greedy,
        }
    names = ("max_new_tokens", "block_size", "temperature", "top_p", "top_k", "policy", "threshold", "factor")
    names += ("cache", "cfg_scale", "suppress_tokens", "begin_suppress_tokens", "schedule", "shift_logits")
    sampler = {name: getattr(ask.sampler, name) for name in names}
    return told | sampler | {
        "steps": ask.sampler.steps_per_block or ask.sampler.steps,
        "alg_temperature": ask.sampler.alg_temperature or 0,
    }  # fmt: skip


def expectation(record, defaults) -> dict[str, Any]:
    """The same, as the record says it or the harness's defaults where the record is silent."""
    source = DEFAULTS_OF.get((record["framework"], record["harness_model_name"]))
    default = defaults[source] if source else {}
    flags = dict(record["other_flags"] or {})
    scored = record["metric_kind"] == "loglikelihood"
    assert record["metric_kind"] in ("loglikelihood", "generate")
    for name, tokens in (("logits_eos_inf", "suppress_tokens"), ("confidence_eos_eot_inf", "begin_suppress_tokens")):
        if name in flags:
            assert flags.pop(name) == bool(record[tokens])
    other = ("dataset_config", "model_config", "entropy_bound")
    listed = {name: flags[name] for name in other if name in flags}
    gemma = record["harness_model_name"] == "diffusiongemma"
    told = {
        "hf_id": "google/diffusiongemma-26B-A4B-it" if gemma else record["hf_id"],
        "dtype": record["dtype"] or "bfloat16",
        "num_fewshot": record["num_fewshot"],
        "chat_template": record["apply_chat_template"],
        "add_bos_token": bool(record["add_bos_token"]),
        "escape_until": bool(record["escape_until"]),
        "until": flags.get("stop_words", []),
        "scored": scored,
        "batch_size": record["batch_size"],
        "flags": sorted(name for name, value in flags.items() if value is True),
        "other": {name: value[0] if isinstance(value, list) else value for name, value in listed.items()},
        "variables": sorted(record["script_variables"] or {}),
        "model_type": (record["script_variables"] or {}).get("model_type"),
        "has_note": has_note(record),
    }
    if scored:
        silent = default.get("mc_num", defaults["MDLMEvalConfig"]["mc_num"])
        silent = 32 if source == "official_dream_eval_instruct" else silent  # its number of steps, as its note says
        return told | {
            "mc_num": record["mc_num"] or silent,
            "cfg_scale": record["cfg_scale"] or 0.0,
            "check_greedy": flags.get("is_check_greedy", False),
        }
    policy = record["algorithm"] or default.get("remasking") or default.get("alg") or "low_confidence"
    cache = record["cache"] or default.get("use_cache") or ("block" if source == "a2d_bd3lm" else "none")
    official_dream = "Dream" in record["framework"] or source == "official_dream_eval"
    by_time = official_dream and not (record["threshold"] and cache == "none")
    block_size = record["block_size"] or default.get("block_size") or default.get("block_length")
    if official_dream and cache != "none":
        block_size = 32  # of the cached sampler, as the record's note says
    return told | {
        "max_new_tokens": record["max_new_tokens"] or default.get("max_new_tokens", default.get("gen_length")),
        "steps": record["steps"] or default["steps"],
        "block_size": block_size,
        "temperature": first(record["temperature"], default.get("temperature"), 0.0),
        "top_p": first(record["top_p"], default.get("top_p")),
        "top_k": first(record["top_k"], default.get("top_k")),
        "alg_temperature": first(record["alg_temp"], default.get("alg_temp"), 0),
        "policy": POLICIES.get(policy, policy),
        "threshold": record["threshold"],
        "factor": record["factor"],
        "cache": cache,
        "cfg_scale": first(record["cfg_scale"], default.get("cfg_scale"), 0.0),
        "suppress_tokens": tuple(record["suppress_tokens"] or ()),
        "begin_suppress_tokens": tuple(record["begin_suppress_tokens"] or ()),
        "schedule": "dream" if by_time else "linear",
        "shift_logits": None,
    }


def has_note(record) -> bool:
    """Whether a reader of the line must be told something; guidance of 0 needs no remark about guidance."""
    suppressed = record["harness_model_name"] == "fastdllm_llada" and record["begin_suppress_tokens"]
    about_guidance = "CFG" in (record["note"] or "")
    unguided = about_guidance and math.isclose(record["cfg_scale"], 0)
    return bool(suppressed) or (bool(record["note"]) and not unguided)


def first(*values):
    return next((value for value in values if value is not None), None)
