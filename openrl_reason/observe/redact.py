"""The one place that takes secrets out of what is shown, written or sent: configs, errors, logs, trackers. Standard library only.

What is recognised: fields and flags named like secrets; the values of environment variables named like secrets, wherever they turn up;
``user:password@`` in URLs; query values such as ``?token=``; Authorization headers. What is not: a secret that came from elsewhere and stands
alone in a sentence. Every pattern is bounded or anchored, so a text of megabytes costs time in proportion to its length.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

HIDDEN = "***"

_WORD = r"(?:api_?keys?|access_?keys?|secret_?keys?|private_?keys?|secrets?|passwords?|passwd|passphrase|credentials?|authorization|cookie)"
_SECRET_NAME = re.compile(rf"(?:{_WORD}|token|(?:api|auth|access|refresh|bearer|hub|hf)_?tokens)$", re.IGNORECASE)
# Tokens of a vocabulary, which a config may name.
_NO_SECRET = re.compile(r"(?:^|_)(?:eos|bos|pad|unk|mask|sep|cls|stop|special|label|image|per|next|last|first)_?token$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(?:API|ACCESS|SECRET|PRIVATE)_?KEY)$", re.IGNORECASE)
_SHORTEST_VALUE = 8  # of a variable: a shorter one ("true", "none") would be found in innocent text

_NAMED = rf"(?:[\w-]{{0,64}}(?:{_WORD}|token))"
_USER_INFO = re.compile(r"(?<=://)[^\s/?#\"'<>]*@")
_QUERY_VALUE = re.compile(
    r"([?&][\w.-]{0,64}(?:token|key|secret|password|passwd|pwd|signature|sig|credential|auth)=)[^&\s#\"'<>]+", re.IGNORECASE
)
_AUTHORIZATION = re.compile(r"(\b(?:proxy-)?authorization[\"']?\s{0,4}[:=]\s{0,4}[\"']?)(?:(?:bearer|basic|token)\s{1,4})?[^\s\"',}]+", re.IGNORECASE)
_BEARER = re.compile(r"(\bbearer\s{1,4})(?=[\w.~+/-]{0,256}\d)[\w.~+/=-]{8,}", re.IGNORECASE)
_FLAG_VALUE = re.compile(rf"((?<![\w-])--(?!-)(?:[\w-]{{0,64}}\.){{0,8}}{_NAMED}(?:=|\s{{1,4}}))(?!--)(\"[^\"]*\"|'[^']*'|\S+)", re.IGNORECASE)
_ASSIGNED = re.compile(rf"(?<![\w-])(({_NAMED})[\"']?\s{{0,4}}[=:]\s{{0,4}})(\"[^\"\n]*\"|'[^'\n]*'|[^\s,;\"'&}})\]]+)", re.IGNORECASE)


def is_secret_name(name: str) -> bool:
    """Whether a field, flag or header is named like a secret: ``api_key``, ``X-Api-Key``, ``hf_token``; not ``max_new_tokens``, ``pad_token``."""
    name = name.replace("-", "_")
    return bool(_SECRET_NAME.search(name)) and not _NO_SECRET.search(name)


def secret_values() -> list[str]:
    """Values of environment variables named like secrets (``WANDB_API_KEY``, ``HF_TOKEN``, ``*_SECRET``, ...), the longest first."""
    values = {value for name, value in os.environ.items() if len(value) >= _SHORTEST_VALUE and _SECRET_VARIABLE.search(name)}
    return sorted(values | {quote(value, safe="") for value in values}, key=len, reverse=True)


def redact_values(text: str) -> str:
    """``text`` without :func:`secret_values`. For texts of models, in which the patterns of :func:`redact_text` could hit innocent words."""
    for value in secret_values():
        text = text.replace(value, HIDDEN)
    return text


def redact_text(text: str) -> str:
    """``text`` without anything that looks like a secret, for error messages, command lines and log lines."""
    text = redact_values(text)
    text = _USER_INFO.sub(f"{HIDDEN}@", text)
    text = _QUERY_VALUE.sub(rf"\1{HIDDEN}", text)
    text = _AUTHORIZATION.sub(rf"\1{HIDDEN}", text)
    text = _BEARER.sub(rf"\1{HIDDEN}", text)
    text = _FLAG_VALUE.sub(lambda match: match[1] + HIDDEN if is_secret_name(match[1].rstrip("= \t\n")) else match[0], text)
    return _ASSIGNED.sub(lambda match: match[1] + HIDDEN if is_secret_name(match[2]) and HIDDEN not in match[3] else match[0], text)


def redact(value: Any, name: str = "") -> Any:
    """A copy of a nested value (dicts, lists, tuples, strings) without secrets; ``name`` is the field that it stands in.

    What stands under a name like a secret becomes ``***`` as a whole (unless it is empty, a switch or a float); other strings lose the secrets
    inside them. Tuples become lists.
    """
    if is_secret_name(name) and value and not isinstance(value, (bool, float)):
        return HIDDEN
    if isinstance(value, str):
        return _redact_setting(value)
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return value


def _redact_setting(text: str) -> str:
    """A setting is data, not a sentence: URLs, headers and known values are looked for, and ``name=value`` pairs are left alone."""
    text = _QUERY_VALUE.sub(rf"\1{HIDDEN}", _USER_INFO.sub(f"{HIDDEN}@", redact_values(text)))
    return _BEARER.sub(rf"\1{HIDDEN}", _AUTHORIZATION.sub(rf"\1{HIDDEN}", text))
