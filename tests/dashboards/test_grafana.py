"""The Grafana dashboards, the files that provision them, and whether what they ask for is what our code exports.

They were not opened in Grafana here. `test_prometheus.py` asks a real Prometheus every query.
"""

import re
from collections import Counter
from itertools import combinations
from typing import ClassVar

import pytest
import yaml
from dashboards_testing import DASHBOARDS, MATCHER, ROOT, builder, metric_names, panels, queries, variables
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from dllm_ray import metrics
from dllm_ray.bulk_metrics import BulkMetrics
from dllm_ray.metrics import Board, Labels
from dllm_ray.serving import metrics as serving_metrics
from dllm_ray.training.metrics import TrainMetrics

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
UNITS = {"short", "s", "bytes", "percent", "percentunit", "reqps", "cps", "ops", "sci"}
OWN = {"le", "ip", "GpuIndex", "part"}
"""Labels that Prometheus, Ray or a query itself gives."""
every = pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)


@pytest.fixture
def exported(monkeypatch) -> dict[str, set[str]]:
    """Metric as Prometheus reads it -> its labels."""
    found: dict[str, set[str]] = {}

    class Recorder:
        suffixes: ClassVar[tuple[str, ...]]

        def __init__(self, name, description, *_bounds, tag_keys):
            assert description.endswith("."), name
            for suffix in self.suffixes:
                assert f"ray_{name}{suffix}" not in found, f"{name} is there twice"
                found[f"ray_{name}{suffix}"] = set(tag_keys)

        def set_default_tags(self, tags): ...

        def set(self, value, tags=None): ...

    kinds = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}
    for kind, suffixes in kinds.items():
        for module in (metrics, serving_metrics):
            monkeypatch.setattr(module, kind, type(kind, (Recorder,), {"suffixes": suffixes}))
    labels = Labels("sft", "run", "model")
    with Board(labels, "train") as board, BulkMetrics(labels):
        TrainMetrics(board, 10)
    serving_metrics.RequestMetrics()
    serving_metrics.ReplicaMetrics("model")
    return found


def test_the_committed_dashboards_are_what_their_source_makes():
    made = builder().dashboards()
    folder = ROOT / "dashboards" / "grafana" / "dashboards"
    assert {path.name: path.read_text() for path in folder.iterdir()} == made, "python dashboards/grafana/build.py"


def test_three_dashboards_with_names_of_their_own():
    assert set(DASHBOARDS) == {"training", "serving", "evaluation"}
    for key in ("uid", "title", "description"):
        assert len({dashboard[key] for dashboard in DASHBOARDS.values()}) == len(DASHBOARDS)


@every
def test_every_panel_says_what_it_shows(dashboard):
    for panel in panels(dashboard):
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["legendFormat"], panel["title"]
    titles = Counter((panel["title"], panel["type"]) for panel in panels(dashboard))
    assert max(titles.values()) <= 2, titles


@every
def test_every_panel_has_a_place_and_an_id_of_its_own(dashboard):
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    for place in places:
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24 and place["h"] > 0
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
    headings = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert dashboard["panels"][0]["type"] == "row" and len(headings) == len(set(headings))


@every
def test_data_come_from_the_chosen_source(dashboard):
    known = variables(dashboard)
    assert known["datasource"]["type"] == "datasource" and known["datasource"]["query"] == "prometheus"
    for panel in panels(dashboard):
        assert panel["datasource"] == SOURCE
        assert [target["datasource"] for target in panel["targets"]] == [SOURCE] * len(panel["targets"])
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs))
    for variable in known.values():
        assert variable["type"] == "datasource" or variable["datasource"] == SOURCE


@every
def test_every_variable_is_there_and_has_a_use(dashboard):
    known = variables(dashboard)
    own = {"__rate_interval"}
    asked = " ".join(target["expr"] for panel in panels(dashboard) for target in panel["targets"])
    used = set(re.findall(r"\$\{?(\w+)", asked)) - own
    assert used == set(known) - {"datasource"}
    earlier: set[str] = set()
    for name, variable in known.items():  # a variable may depend on those before it
        assert set(re.findall(r"\$(\w+)", str(variable["query"]))) <= earlier, name
        earlier.add(name)


def test_no_panel_asks_for_what_nothing_exports(exported):
    asked = {name for *_, expression in queries() for name in metric_names(expression)}
    asked |= {
        name
        for dashboard in DASHBOARDS.values()
        for variable in variables(dashboard).values()
        for name in metric_names(str(variable["query"]))
    }
    nodes = {f"ray_{name}" for name in METRICS_GAUGES}
    assert asked - set(exported) - nodes == set()
    ours = {re.sub("_(total|bucket|sum|count)$", "", name) for name in asked}
    silent = {re.sub("_(total|bucket|sum|count)$", "", name) for name in exported} - ours
    assert silent == set(), "exported, and no panel shows it"


def test_labels_are_those_of_the_metrics(exported):
    for dashboard, title, expression in queries():
        for name, matchers in re.findall(r"\b(ray_dllm_\w+)\{([^}]*)\}", expression):
            labels = {label for label, *_ in MATCHER.findall(matchers)}
            assert labels <= exported[name], (dashboard, title)
        known = set().union(*(exported.get(name, set()) for name in metric_names(expression))) | OWN
        for listed in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
            assert {label.strip() for label in listed.split(",")} <= known, (dashboard, title)


@every
def test_legends_name_labels_that_lines_have(dashboard):
    for panel in panels(dashboard):
        for target in panel["targets"]:
            kept = re.findall(r"\b(?:by) \(([^)]*)\)", target["expr"])
            labels = {label.strip() for listed in kept for label in listed.split(",")} | {"part"}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, panel["title"]


def test_percentiles_come_from_buckets():
    asked = [expression for *_, expression in queries() if "histogram_quantile" in expression]
    assert len(asked) > 10
    for expression in asked:
        assert re.match(r"histogram_quantile\(0\.\d+, sum by \(le, \w+\) \(rate\(ray_dllm_\w+_bucket\{", expression)


def test_provisioning_and_scraping():
    folder = ROOT / "dashboards" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus" and source["isDefault"] and source["url"].startswith("http://")
    (provider,) = yaml.safe_load((folder / "dashboards" / "dllm_ray.yml").read_text())["providers"]
    assert provider["type"] == "file" and provider["options"]["path"].startswith("/")
    scraped = yaml.safe_load((ROOT / "dashboards" / "prometheus" / "prometheus.yml").read_text())
    (job,) = scraped["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
