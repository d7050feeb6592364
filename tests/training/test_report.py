"""What a run says of itself: the account of its data, its progress, its model card."""

import re

import pytest
import yaml

from dllm_ray.config import to_dict
from dllm_ray.data import prepare
from dllm_ray.data.config import DataConfig
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.training import report


class Recorder:
    """Stands in for a tracking run."""

    def __init__(self):
        self.metrics, self.tags, self.artifacts = [], {}, {}

    def log_many(self, entries):
        self.metrics += entries

    def tag(self, tags):
        self.tags |= tags

    def json(self, name, value):
        self.artifacts[name] = value


@pytest.fixture
def prepared(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    rows = ['{"prompt": "sort 21", "response": "12"}'] * 19 + ['{"prompt": "sort 21", "response": ""}']
    path.write_text("\n".join(rows))
    config = DataConfig(path=str(path))
    corpus = prepare.resolve(config, config.path, 64)
    return prepare.prepare(config, corpus, None, tokenizer, [1], 0, seed=0)


def play(watcher):
    values = {"train/loss": 2.0, "train/tokens_per_s": 1234.5}
    watcher.on_events(
        [
            {"kind": "start", "step": 0, "workers": 2, "device": "cpu", "architecture": "BertForMaskedLM",
             "parameters": 1000, "trainable": 1000},
            {"kind": "valid", "step": 0, "values": {"valid/nll": 3.0, "valid/ppl": 20.1}},
            {"kind": "metrics", "step": 10, "values": values},
            {"kind": "checkpoint", "step": 10},
            {"kind": "samples", "step": 10,
             "samples": [{"prompt": "sort 21", "sampled": "12", "expected": "12"}], "problem": None},
        ]
    )  # fmt: skip
    watcher.close()


def test_dropped_rows_are_told_with_reason_count_and_first_example(prepared):
    text = report.data_line(prepared)
    assert "20 rows read, 19 usable" in text
    assert "18 rows to train on, 1 for validation (1 held out)" in text
    assert re.search(r"dropped 1: empty answer; the first: .*rows\.jsonl, line 20", text)


def test_the_facts_for_machines_agree(prepared):
    facts = report.data_facts(prepared)
    assert (facts["rows_read"], facts["rows_usable"], facts["rows_train"], facts["rows_valid"]) == (20, 19, 18, 1)
    assert facts["dropped"] == {"empty answer": 1}
    assert len(facts["fingerprint"]) == 64


def test_events_become_metrics_tags_artifacts_and_lines(capsys):
    run = Recorder()
    play(report.Watcher(10, run))
    assert ({"train/loss": 2.0, "train/tokens_per_s": 1234.5}, 10) in run.metrics
    assert run.tags == {"dllm_ray.parameters": 1000, "dllm_ray.checkpoint_step": 10}
    assert run.artifacts["samples.json"][0]["sampled"] == "12"
    lines = capsys.readouterr().out
    assert "for 10 steps with 2 workers on cpu" in lines
    assert "step 10/10  loss 2.0000  tokens/s 1,23" in lines and "valid nll 3.0000" in lines
    assert "'sort 21' -> '12' (expected '12')" in lines


def test_why_there_are_no_samples_is_said(capsys):
    report.Watcher(10, Recorder()).on_events([{"kind": "samples", "step": 10, "samples": [], "problem": "no room"}])
    assert "sample    none: no room" in capsys.readouterr().out


def test_only_the_commonest_reasons_are_told_one_by_one(prepared):
    prepared.account.dropped.update({f"reason {number}": 1 for number in range(12)})
    prepared.account.examples.update({f"reason {number}": "x" for number in range(12)})
    assert "dropped 3 for 3 other reasons" in report.data_line(prepared)


def test_the_model_card_has_front_matter_figures_settings_and_a_program_that_compiles(prepared):
    watcher = report.Watcher(10, Recorder())
    play(watcher)
    settings = {
        "output_dir": "outputs/my-run/",
        "model": {"path": None},
        "objective": {"name": "mdlm"},
        "data": {"path": "rows.jsonl"},
        "sampler": to_dict(SamplerConfig(max_new_tokens=8, policy="random", block_size=None)),
    }
    card = report.model_card(settings, prepared, watcher)
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert text.startswith("# my-run\n")
    assert "| 0 | 3.0000 |" in text
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(program, "card", "exec")
    assert "SamplerConfig(max_new_tokens=8, block_size=None, policy='random')" in program
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]) == settings
