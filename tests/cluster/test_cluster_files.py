"""What holds for every file of `cluster/`: commands that work, pinned images, no secrets."""

import re
from pathlib import Path

import pytest
from cluster_testing import CLUSTER, ROOT, check_job, commands, documents, values

from dllm_ray.serving.config import KEYS

PAGES = [ROOT / "README.md", *sorted(CLUSTER.glob("*/README.md"))]
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
_SECRET = re.compile(
    r"\b\w*(?:password|token|secret|api_keys?|access_key)\w*['\"]?[ \t]*[=:][ \t]*(?P<value>\S+)", re.IGNORECASE
)
_IN_URL = re.compile(r"://[^/\s:@]+:[^/\s@]+@")
_ELSEWHERE = ("$", "{", "~", "/", "~/", "secrets.")  # a variable, a reference, a file, one that is drawn

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CLUSTER)))


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.parent.name)
def test_commands_of_a_page_are_jobs_and_files_that_are_there(page, monkeypatch):
    monkeypatch.setenv(KEYS, "key")
    checked = 0
    for words in commands(page):
        start = next((at for at, word in enumerate(words[1:]) if re.search(r"jobs/\w+\.py$", word)), None)
        if start is not None:
            check_job(words[start:])
            checked += 1
        for word in words:
            if word.startswith("cluster/") and "*" not in word and not word.endswith("/.env"):
                assert (ROOT / word).exists() or word.endswith("secrets.env"), word
    assert checked > 0


def test_the_readme_leads_to_every_page():
    told = PAGES[0].read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"cluster/{page.parent.name}" in told


def secrets(text: str) -> list[str]:
    """What looks like a secret in plain text."""
    found = [match[0] for match in _SECRET.finditer(text) if not match["value"].startswith(_ELSEWHERE)]
    return found + _IN_URL.findall(text)


@every_file
def test_no_secret_is_in_a_file(path):
    assert secrets(path.read_text(encoding="utf-8")) == []
    if path.suffix == ".yaml":
        assert "Secret" not in {tree.get("kind") for tree in documents(path)}


@pytest.mark.parametrize(
    "text",
    ["POSTGRES_PASSWORD: hunter2", "export HF_TOKEN=hf_abc", "api_key: 'abc'", "postgresql://mlflow:pw@postgres/x"],
)
def test_a_secret_would_be_found(text):
    assert secrets(text)


@pytest.mark.parametrize("path", [item for item in FILES if item.suffix == ".yaml"], ids=lambda path: path.stem)
def test_images_have_a_version(path):
    for image in values(documents(path), "image"):
        assert is_pinned(image), image


def is_pinned(image: str) -> bool:
    _, _, tag = image.rpartition("/")[2].partition(":")
    return bool(re.search(r"\d", tag)) and not tag.startswith("latest")


def test_an_image_without_a_version_would_be_found():
    assert not is_pinned("postgres")
    assert not is_pinned("registry.example.com:5000/dllm-ray:latest")


def test_what_holds_secrets_is_never_committed_or_copied_into_the_image():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {".env", "secrets.env"} <= set(ignored)
    assert (CLUSTER / "docker" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()[1] == "*"
    for name in ("docker/.env.example", "kuberay/secrets.env.example"):
        text = Path(CLUSTER / name).read_text(encoding="utf-8")
        filled = {line for line in text.splitlines() if re.fullmatch(r"\w*(TOKEN|PASSWORD|KEYS?)=.+", line)}
        assert filled == set()
