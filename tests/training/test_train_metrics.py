"""What a training run tells Prometheus of the events that its workers report."""

from metrics_testing import record

from dllm_ray.metrics import Board, Labels
from dllm_ray.training.metrics import TrainMetrics


def test_events_become_metrics(monkeypatch):
    told = record(monkeypatch)

    def last(name):
        return told[f"dllm_train_{name}"][-1]

    with Board(Labels("sft", "run", "model"), "train") as board:
        metrics = TrainMetrics(board, 40)
        assert last("planned_steps") == (40, {}) and last("skipped_steps") == (0, {})
        values = {"train/loss": 2.5, "train/peak_memory_gb": 1.5, "train/data_wait": 0.25, "train/unknown": 1.0}
        metrics.on_events(
            [
                {"kind": "start", "step": 0, "workers": 2},
                {"kind": "metrics", "step": 3, "values": values},
                {"kind": "valid", "step": 4, "values": {"valid/nll": 1.75, "valid/ppl": 5.75}},
                {"kind": "not_finite", "step": 5, "what": "step 5"},
                {"kind": "checkpoint", "step": 6, "given": {"a": (4, 100), "b": (2, 50)}},
                {"kind": "user_error", "step": 0, "error": ValueError()},
            ]
        )
        metrics.on_events([{"kind": "start", "step": 6, "workers": 1}])
    assert [last(name)[0] for name in ("loss", "data_wait_ratio", "valid_nll")] == [2.5, 0.25, 1.75]
    assert last("peak_memory_bytes")[0] == 1.5e9
    assert [last(name)[0] for name in ("step", "workers", "starts")] == [6, 1, 2]
    assert [last(name)[0] for name in ("checkpoints", "checkpoint_step", "skipped_steps")] == [1, 6, 1]
    assert (100.0, {"source": "a"}) in told["dllm_train_source_tokens"]
