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

    def log(self, metrics, step=0):
        self.metrics.append((metrics, step))

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
    corpus = prepare.resolve(config, 64)
    return prepare.prepare(config, corpus, None, tokenizer, [1], 0, seed=0, batch_size=4, max_length=64)


def play(watcher):
    values = {"train/loss": 2.0, "train/tokens_per_s": 1234.5}
    watcher.on_events(
        [
            {"kind": "start", "step": 0, "workers": 2, "nodes": 2, "device": "cpu", "architecture": "BertForMaskedLM",
             "parameters": 1000, "trainable": 1000},
            {"kind": "valid", "step": 0, "values": {"valid/nll": 3.0, "valid/ppl": 20.1}},
            {"kind": "metrics", "step": 10, "values": values},
            {"kind": "not_finite", "step": 7, "what": "step 7: the gradient's norm is nan"},
            {"kind": "checkpoint", "step": 10, "accounts": {},
             "given": {"a.jsonl": [10, 300], "b.jsonl": [20, 100]}},
        ]
    )  # fmt: skip
    sample = {"prompt": "sort 21", "sampled": "12", "expected": "12"}
    watcher.on_seen(report.Seen(5, [sample], {"eval/digits/exact_match": 0.25}))
    watcher.on_seen(report.Seen(10, [sample], problems=["no evaluation: no task 'x'"]))
    watcher.close()


def test_dropped_rows_are_told_with_reason_count_and_first_example(prepared):
    text = report.data_line(prepared)
    assert "20 rows read, 19 usable" in text
    assert "18 rows to train on, 1 for validation (1 held out)" in text
    assert re.search(r"dropped 1: empty answer; the first: .*rows\.jsonl, line 20", text)


def test_the_facts_for_machines_agree(prepared):
    facts = report.data_facts(prepared, given={name: [40, 900] for name in prepared.accounts})
    assert (facts["rows_train"], facts["rows_valid"], len(facts["fingerprint"])) == (18, 1, 64)
    [(name, source)] = facts["sources"].items()
    assert name.endswith("rows.jsonl")
    assert (source["rows_read"], source["rows_usable"], source["dropped"]) == (20, 19, {"empty answer": 1})
    assert (source["given_rows"], source["given_tokens"]) == (40, 900)


def test_events_become_metrics_tags_artifacts_and_lines(prepared, capsys):
    run = Recorder()
    play(report.Watcher(10, run, prepared))
    assert ({"train/loss": 2.0, "train/tokens_per_s": 1234.5}, 10) in run.metrics
    assert ({"train/skipped_steps": 1}, 7) in run.metrics
    assert ({"data/a.jsonl/token_share": 0.75, "data/b.jsonl/token_share": 0.25}, 10) in run.metrics
    assert ({"eval/digits/exact_match": 0.25}, 5) in run.metrics
    assert run.tags == {"dllm_ray.parameters": 1000, "dllm_ray.checkpoint_step": 10}
    assert run.artifacts["samples/step_00000010.json"][0]["sampled"] == "12"
    assert list(run.artifacts["data.json"]["sources"]) == list(prepared.accounts)
    lines = capsys.readouterr().out
    assert "for 10 steps with 2 workers on cpu, on 2 nodes" in lines
    assert "step 10/10  loss 2.0000  tokens/s 1,23" in lines and "valid nll 3.0000" in lines
    assert "skipped   step 7: the gradient's norm is nan" in lines
    assert "look      step 5: digits/exact_match 0.2500" in lines
    assert "look      none at step 10: no evaluation: no task 'x'" in lines
    assert lines.count("'sort 21' -> '12' (expected '12')") == 1  # the last ones are shown


def test_only_the_commonest_reasons_are_told_one_by_one(prepared):
    prepared.account.dropped.update({f"reason {number}": 1 for number in range(12)})
    prepared.account.examples.update({f"reason {number}": "x" for number in range(12)})
    assert "dropped 3 for 3 other reasons" in report.data_line(prepared)


def test_the_model_card_has_front_matter_figures_settings_and_a_program_that_compiles(prepared):
    watcher = report.Watcher(10, Recorder(), prepared)
    play(watcher)
    settings = {
        "output_dir": "outputs/my-run/",
        "model": {"path": None},
        "objective": {"name": "mdlm"},
        "data": {"path": "rows.jsonl"},
        "sampler": to_dict(SamplerConfig(max_new_tokens=8, policy="random", block_size=None)),
    }
    card = report.model_card(settings, "sft", prepared, watcher)
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert text.startswith("# my-run\n")
    assert "| 0 | 3.0000 |" in text
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(program, "card", "exec")
    assert "SamplerConfig(max_new_tokens=8, block_size=None, policy='random')" in program
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]) == settings
