"""API keys: who holds one, and what is kept of them."""

import hashlib

import pytest

from dllm_ray.errors import ConfigError
from dllm_ray.serving.keys import bearer, digest, holder, is_digest
from dllm_ray.serving.settings import AppSettings

KEYS = (digest("first"), digest("zweiter Schlüssel"))


def test_a_digest_is_what_sha256sum_says():
    assert digest("first") == hashlib.sha256(b"first").hexdigest()
    assert is_digest(digest("first"))


@pytest.mark.parametrize("header", ["Bearer first", "bearer first", "BEARER  first ", "Bearer zweiter Schlüssel"])
def test_a_key_is_let_in(header):
    assert holder(header, KEYS).startswith("key-")


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "first", "Basic first", "Bearer First", "Bearer first2", f"Bearer {KEYS[0]}"],
)
def test_anything_else_is_not(header):
    assert holder(header, KEYS) is None


def test_no_key_is_let_in_even_where_the_digest_of_nothing_is_known():
    assert holder("Bearer ", (digest(""),)) is None


def test_holders_have_names_that_tell_them_apart_but_not_their_keys():
    names = [holder(f"Bearer {key}", KEYS) for key in ("first", "zweiter Schlüssel")]
    assert len(set(names)) == 2
    assert not any("first" in name or len(name) > 12 for name in names)


def test_the_key_of_a_header():
    assert bearer("Bearer abc") == "abc"
    assert bearer("Basic abc") is None


@pytest.mark.parametrize("keys", [("first",), (KEYS[0], "x" * 64), (KEYS[0].upper(),)])
def test_settings_take_digests_only_and_do_not_show_keys(keys):
    with pytest.raises(ConfigError, match="SHA-256") as caught:
        AppSettings(api_keys=keys)
    assert not any(key in str(caught.value) for key in keys)
