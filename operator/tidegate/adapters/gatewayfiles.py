"""API keys and key sets from mounted Secrets and ConfigMaps, and files for Envoy renamed into place."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tidegate.api.common import InvalidObject
from tidegate.api.identity import IdentitySources

MIN_KEY: Final = 16
MAX_KEY: Final = 1024
"""Characters of an API key."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """What callers are checked by, as GatewayAuth takes it: keys by client, key sets by provider."""

    keys: Mapping[str, tuple[str, ...]] = field(repr=False)
    jwks: Mapping[str, str] = field(repr=False)


def read_secrets(sources: IdentitySources) -> Secrets:
    """Everything that Envoy is to check callers by. Raises InvalidObject, which quotes no key."""
    keys = read_keys(map(Path, sources.api_keys.directories)) if sources.api_keys.enabled else {}
    if sources.api_keys.enabled and not keys:
        raise InvalidObject("apiKeys.directories: no key is there; a Secret's entry is client: key")
    files = {p.name: Path(p.jwks.file) for p in sources.jwt.providers if p.jwks.file is not None}
    for provider in sources.jwt.providers:
        if provider.jwks.inline is not None:
            _checked(provider.jwks.inline, f"jwt.providers {provider.name}: jwks.inline")
    return Secrets(keys, {name: _read_jwks(path) for name, path in files.items()})


def read_keys(folders: Iterable[Path]) -> dict[str, tuple[str, ...]]:
    """API keys by client: a file is named as its client, and each of its lines is a key.

    Raises:
        InvalidObject: A key is too short, holds what no header can, or is there twice.
    """
    owners: dict[str, str] = {}
    for folder in folders:
        try:
            # A mounted Secret keeps its versions in entries that begin with a dot.
            files = sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.is_file())
            texts = {p: p.read_text(encoding="utf-8") for p in files}
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidObject(f"apiKeys.directories: {folder} cannot be read: {error}") from error
        for path, text in texts.items():
            for number, line in enumerate(text.splitlines(), 1):
                key = line.strip()
                if key:
                    _check_key(key, f"{path} line {number}", path.name, owners)
                    owners[key] = path.name
    found: dict[str, tuple[str, ...]] = {}
    for key, client in owners.items():
        found[client] = (*found.get(client, ()), key)
    return found


def write_files(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Write those that differ, each renamed into place, readable by their owner only. Returns their names."""
    changed = []
    for name, text in sorted(files.items()):
        target = folder / name
        if target.is_file() and target.read_text(encoding="utf-8") == text:
            continue
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")  # 0600
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(target)
        changed.append(name)
    return changed


def _check_key(key: str, where: str, client: str, owners: Mapping[str, str]) -> None:
    if not MIN_KEY <= len(key) <= MAX_KEY:
        raise InvalidObject(f"{where}: a key has {MIN_KEY} to {MAX_KEY} characters, this one {len(key)}")
    if not all("!" <= c <= "~" for c in key):
        raise InvalidObject(f"{where}: a key is printable ASCII without spaces")
    other = owners.get(key)
    if other is not None:
        raise InvalidObject(f"{where}: {client} has a key that {other} has too; keys must differ")


def _read_jwks(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidObject(f"jwks.file {path} cannot be read: {error}") from error
    return _checked(text, str(path))


def _checked(text: str, where: str) -> str:
    """A key set as it is: whether its keys are good is for Envoy to say."""
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise InvalidObject(f"{where} is not JSON: {error}") from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get("keys"), list) or not parsed["keys"]:
        raise InvalidObject(f'{where} must be a JSON Web Key Set: {{"keys": [...]}} with at least one key')
    return text
