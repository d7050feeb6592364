"""How a cluster is divided among workers, on paper."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray import cluster
from dllm_ray.cluster import Shares, shares
from dllm_ray.errors import ResourceError


@pytest.fixture
def has(monkeypatch):
    def has(cpus: float, gpus: float = 0.0) -> None:
        resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: resources)

    return has


@pytest.mark.parametrize(
    ("cpus", "gpus", "asked", "given"),
    [
        (8, 0, (None, None, None), Shares(workers=2, cpus=1, gpus=0, data_cpus=1)),
        (32, 4, (None, None, None), Shares(workers=4, cpus=1, gpus=1, data_cpus=1)),
        (32, 4, (2, 4, None), Shares(workers=2, cpus=4, gpus=1, data_cpus=1)),
        (32, 1, (2, None, 0.5), Shares(workers=2, cpus=1, gpus=0.5, data_cpus=1)),
        (32, 4, (2, None, 0), Shares(workers=2, cpus=1, gpus=0, data_cpus=1)),
        (2, 0, (None, None, None), Shares(workers=2, cpus=0.5, gpus=0, data_cpus=1)),
        (1, 0, (1, None, None), Shares(workers=1, cpus=0.5, gpus=0, data_cpus=0.5)),
        (4, 0, (2, 1.75, None), Shares(workers=2, cpus=1.75, gpus=0, data_cpus=0.5)),
    ],
)
def test_workers_get_their_share_and_data_tasks_get_room(has, cpus, gpus, asked, given):
    has(cpus, gpus)
    assert shares(*asked, "train.") == given


@pytest.mark.parametrize(
    ("cpus", "gpus", "asked", "said"),
    [
        (32, 1, (2, None, None), "2 workers with 1 GPUs each need 2, the cluster has 1: lower train.workers"),
        (32, 0, (2, None, 0.5), "the cluster has 0"),
        (4, 0, (2, 2, None), "leave none of the cluster's 4 for data tasks: lower train.cpus_per_worker"),
        (4, 0, (2, 3, None), "leave none of the cluster's 4"),
        (0, 0, (1, None, None), "leave none of the cluster's 0"),
    ],
)
def test_what_the_cluster_cannot_give_is_refused_with_what_to_set(has, cpus, gpus, asked, said):
    has(cpus, gpus)
    with pytest.raises(ResourceError) as refused:
        shares(*asked, "train.")
    assert said in str(refused.value)


@given(cpus=st.integers(1, 512), workers=st.integers(1, 64))
def test_the_default_share_of_cpus_always_fits_and_leaves_half_a_cpu(cpus, workers):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": float(cpus)})
        share = shares(workers, None, None, "train.")
    assert share.workers * share.cpus + share.data_cpus <= cpus + 1e-9
    assert share.data_cpus >= 0.5
    assert share.cpus > 0
