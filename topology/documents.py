"""JSON files with a schema: written atomically, read with messages that name the field.

Every file that tamoe writes carries ``schema`` and ``schema_version``. A reader refuses another
schema or another major version and keeps keys that it does not know.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tamoe.topology.errors import InputError


def check_writable(path: str | os.PathLike[str], name: str = "--output") -> None:
    """Make the folder of a file and try to write there, before work is spent on its content.

    Trying is the only test that holds for every file system and user.

    Raises
    ------
    InputError
        The path is a folder, its folder cannot be made or is not one, or writing is refused.
    """
    target = Path(path)
    if os.path.isdir(target):  # pathlib's raises where the folder above may not be read
        raise InputError(f"{name} is {str(path)!r}, a folder; allowed: the name of a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, trial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except (FileExistsError, NotADirectoryError):
        raise InputError(
            f"{name} is {str(path)!r}; {target.parent} is not a folder; allowed: a name in a folder"
        ) from None
    except OSError as error:
        raise InputError(
            f"{name} is {str(path)!r}: cannot write there: {error.strerror}; allowed: a place that "
            f"you may write to"
        ) from None
    os.close(handle)
    os.unlink(trial)


def write_document(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old or the new content, never half of one."""
    target = Path(path)
    if os.path.isdir(target):  # what the kernel says of replacing one is no help
        raise InputError(f"cannot write {target}: it is a folder; allowed: the name of a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, allow_nan=False)
            file.write("\n")
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files; this one is for others too
        os.replace(name, target)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise InputError(f"cannot write {target}: {error.strerror}") from None
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_document(path: str | os.PathLike[str], schema: str, version: str) -> dict[str, Any]:
    """Read a JSON file of the given schema and major version.

    Raises
    ------
    InputError
        The file is missing, no JSON, of another schema or of another major version.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file; expected JSON of schema {schema!r}") from None
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno} column {error.colno}: {error.msg}; "
            f"the file is truncated or not JSON"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers too long, lists too deep
        raise InputError(f"{path}: not a file of schema {schema!r} ({error})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a JSON object of schema {schema!r}")
    found = document.get("schema")
    if found != schema:
        raise InputError(f"{path}: schema is {found!r}, expected {schema!r}")
    found_version = str(document.get("schema_version"))
    if found_version.split(".")[0] != version.split(".")[0]:
        raise InputError(
            f"{path}: schema_version is {found_version}, this tamoe reads {version.split('.')[0]}.x"
        )
    return document


def field(document: Mapping[str, Any], key: str, where: str) -> Any:
    """The value of a required key.

    Raises
    ------
    InputError
        The key is missing or the document is not an object; the message says where.
    """
    if not isinstance(document, Mapping):
        raise InputError(f"{where}: expected an object, got {document!r}")
    if key not in document:
        raise InputError(f"{where}: missing field {key!r}")
    return document[key]


def number(
    document: Mapping[str, Any],
    key: str,
    where: str,
    *,
    default: float | None = None,
    minimum: float = 0.0,
    exclusive: bool = False,
) -> float:
    """A finite number of at least (``exclusive``: more than) ``minimum``.

    Raises
    ------
    InputError
        The field is missing without a default, not a number, NaN, infinite or too small.
    """
    value = document.get(key, default) if default is not None else field(document, key, where)
    allowed = f"a finite number {'>' if exclusive else '>='} {minimum:g}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where}: {key} is {value!r}; allowed: {allowed}")
    if value < minimum or (exclusive and value == minimum):
        raise InputError(f"{where}: {key} is {value!r}; allowed: {allowed}")
    return float(value)
