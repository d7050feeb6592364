"""What `import dllm_ray` offers."""

import pytest

import dllm_ray


@pytest.mark.parametrize("name", dllm_ray.__all__)
def test_every_public_name_is_there(name):
    assert getattr(dllm_ray, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dllm_ray' has no attribute 'lood'"):
        _ = dllm_ray.lood


def test_the_package_knows_its_version():
    assert dllm_ray.__version__[0].isdigit()
