"""API keys: only digests are kept, and comparing them takes as long whether they match or not."""

import hashlib
import hmac
import re

_DIGEST = re.compile(r"[0-9a-f]{64}")


def digest(key: str) -> str:
    """SHA-256 of a key, in hexadecimal. Keys are long random strings, which need no salt."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def is_digest(text: str) -> bool:
    """Whether a text is a digest as `digest` writes it."""
    return _DIGEST.fullmatch(text) is not None


def bearer(authorization: str | None) -> str | None:
    """The key of an `Authorization: Bearer KEY` header; None where there is none."""
    scheme, _, key = (authorization or "").strip().partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def holder(authorization: str | None, digests: tuple[str, ...]) -> str | None:
    """Who holds the key of a header, as a short name fit for logs; None: it is none of ours."""
    key = bearer(authorization)
    if key is None:
        return None
    found = digest(key)
    matches = [hmac.compare_digest(found, known) for known in digests]  # all of them, matched or not
    return f"key-{found[:8]}" if any(matches) else None
