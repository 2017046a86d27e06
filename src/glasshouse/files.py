"""Files that are either whole or absent: atomic writes, digests and manifests.

Every hand-over between stages is a folder written here. A write goes to a temporary name in the same folder, is
flushed to the disk, and takes its real name in one step, so a reader never sees half of it, whatever kills the writer.
A manifest names every file of a folder with its size and SHA-256, because safetensors, like every format of this
field, loads a flipped bit without a word. Knows nothing of what the files mean.
"""

import ctypes
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from glasshouse.errors import InputError

MANIFEST = "manifest.json"
MANIFEST_BYTES_LIMIT = 64 * 2**20
TORN = "the folder is torn or altered; copy it again or make it again"


def sha256_bytes(content: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Free space, in bytes, on the disk that holds `path` or its nearest existing parent."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_free(path: Path, needed: int) -> None:
    """Refuse, before anything is written, when the disk of `path` has less than `needed` bytes left."""
    free = free_bytes(path)
    if free < needed:
        raise InputError(
            f"not enough disk: {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free",
            str(path),
            "free some space or choose another --out",
        )


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace one file by `content` in one step; on any failure the old file stays and nothing else is left.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    # a lone surrogate, as in a file name that is not UTF-8, is written as JSON would escape it
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise write_error(error, path) from error


def write_error(error: OSError, path: Path) -> InputError:
    """The one-line form of a failed write."""
    return InputError(
        f"cannot write: {error.strerror or error}",
        str(path),
        "free some space, or choose a folder you may write to",
    )


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name, flushed and with a manifest, when the block ends well.

    An existing folder is replaced, and is still whole if the block or the replacing fails.

    Raises:
        InputError: the disk is full or the parent folder cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        temporary.chmod(0o755)
        yield temporary
        write_manifest(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors makes its files for the owner only
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        _flush_folder(temporary)
        _replace_folder(temporary, path)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(new: Path, path: Path) -> None:
    """Give `new` the name `path`: in one step where the kernel can exchange two names. Elsewhere the old folder steps
    aside first, and `recover_folder` brings it back if the process dies between the two renames."""
    if path.is_dir() and _exchange(new, path):
        _flush_folder(path.parent)
        return  # `new` is now the old folder, which the caller removes
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    _flush_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step (Linux's renameat2 with RENAME_EXCHANGE); False where that cannot be done."""
    here, exchange = -100, 2
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return call(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def recover_folder(path: Path) -> None:
    """Undo a replacement that a kill interrupted between its two renames, and clear temporary folders left behind."""
    path = Path(path)
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)
    pattern = (
        f".{glob.escape(path.name)}.????????.tmp"  # mkdtemp's names, and not those of a "NAME.best" beside it
    )
    for leftover in [old, *path.parent.glob(pattern)]:
        shutil.rmtree(leftover, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step. Non-finite numbers are written as null: JSON has no others."""
    write_atomic(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with every non-finite float, however deep, replaced by None."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: it is missing, or is not whole JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError("file not found", str(path), "check the path") from None
    except OSError as error:
        raise InputError(
            f"cannot read: {error.strerror}", str(path), "check the path and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"not valid JSON: {error}", str(path), "the file is torn or altered; make it again"
        ) from error


def _listed_files(folder: Path) -> list[Path]:
    """Everything in the folder but the manifest itself and real folders; a link to a folder counts as a file."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path != folder / MANIFEST and (path.is_symlink() or not path.is_dir())
    )


def write_manifest(folder: Path) -> str:
    """Write `manifest.json` with the size and SHA-256 of every file of the folder; returns its own digest."""
    folder = Path(folder)
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in _listed_files(folder)
    }
    write_json(folder / MANIFEST, {"format": 1, "files": files})
    return sha256_file(folder / MANIFEST)


def verify_manifest(folder: Path, digest: str | None = None) -> str:
    """Check every file of a folder against its manifest; returns the manifest's digest.

    Args:
        folder: the folder to check.
        digest: the digest that the manifest itself must have, where the caller knows it.

    Raises:
        InputError: a file is missing, unlisted, a link, of another size or altered; or the manifest is not the one
            expected. The file is named.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST
    if manifest.is_symlink():
        raise InputError("a link instead of a file", str(manifest), "replace it by the file itself")
    if manifest.is_file() and manifest.stat().st_size > MANIFEST_BYTES_LIMIT:
        raise InputError(
            "the manifest is too large", str(manifest), "copy the folder again from where it came"
        )
    content = read_json(manifest)
    found = sha256_file(manifest)
    if digest is not None and found != digest:
        raise InputError(
            "the manifest is not the one its run recorded",
            str(manifest),
            "the folder was altered; make it again",
        )
    listed = content.get("files") if isinstance(content, dict) else None
    if not isinstance(listed, dict):
        raise InputError(
            "the manifest names no files", str(manifest), "copy the folder again from where it came"
        )
    present = {str(path.relative_to(folder)) for path in _listed_files(folder)}
    for name in sorted(present - set(listed)):
        raise InputError("a file that the manifest does not name", str(folder / name), "remove it")
    for name in sorted(set(listed) - present):
        raise InputError("a file is missing", str(folder / name), TORN)
    for name, expected in listed.items():
        _verify_file(folder / name, expected)
    return found


def _verify_file(path: Path, expected: Any) -> None:
    if path.is_symlink():
        raise InputError("a link instead of a file", str(path), "replace it by the file itself")
    if not path.is_file() or not isinstance(expected, dict):
        raise InputError("not a file with a size and a checksum in the manifest", str(path), TORN)
    if path.stat().st_size != expected.get("bytes"):
        raise InputError(
            f"{path.stat().st_size} bytes where {expected.get('bytes')} are expected", str(path), TORN
        )
    if sha256_file(path) != expected.get("sha256"):
        raise InputError("its contents are not what was written (checksum differs)", str(path), TORN)
