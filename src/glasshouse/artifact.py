"""A model folder, opened and saved whole: config, weights, tokenizer, chat template, in Hugging Face's layout.

What it writes, transformers opens; what transformers wrote, it opens. A folder is written beside its place and takes
it in one step, with a manifest of checksums; a folder that is torn, altered, or not what its config says is refused by
name before a weight is used. No pickle is read or written. Knows no training and no text.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glasshouse.errors import InputError
from glasshouse.files import (
    MANIFEST,
    TORN,
    atomic_folder,
    read_json,
    recover_folder,
    require_free,
    sha256_bytes,
    sha256_file,
    verify_manifest,
    write_json,
)
from glasshouse.models.decoder import Decoder, quantize_head
from glasshouse.models.encoder import Encoder
from glasshouse.models.huggingface import (
    Model,
    ModelConfig,
    Stored,
    bits_of,
    build_model,
    canonical_name,
    config_from_huggingface,
    config_to_huggingface,
    copied_tensors,
    fit_to_tensors,
    quantization_facts,
    state_to_store,
    stored_tensors,
)
from glasshouse.text.tokenizer import Tokenizer, open_tokenizer

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CODE_DTYPES = {"weight_packed": ("I32",), "weight_scale": ("BF16",), "weight_shape": ("I64",)}
SIZE_LIMITS = {  # bytes; far above what any model needs, read only after this check
    "run.json": 2**24,
    CONFIG_FILE: 2**20,
    GENERATION_FILE: 2**20,
    "tokenizer_config.json": 2**24,
    "chat_template.jinja": 2**20,
    INDEX_FILE: 2**26,
    "tokenizer.json": 2**28,
}
RUN_FILE, MODEL_FOLDER = "run.json", "model"
HUB_PREFIX = "hub:"


@dataclass(frozen=True)
class Artifact:
    """A model that can be used.

    Args:
        model: of any family, in evaluation mode; `require_decoder` where only a decoder will do.
        tokenizer: its tokenizer.
        config: its shape.
        generation: what generation_config.json says.
        path: the model folder.
        digest: names these exact files: the SHA-256 of the manifest, or of the files' checksums where there is none.
            Empty when there is no manifest and the files were not to be verified.
        verified: whether every file was compared with the checksums of a manifest. A folder that another tool wrote
            has none.
    """

    model: Model
    tokenizer: Tokenizer
    config: ModelConfig
    generation: dict[str, Any]
    path: Path
    digest: str
    verified: bool


def require_decoder(artifact: Artifact) -> Decoder:
    """The model of an artifact, where the work needs one that predicts the next token.

    Raises:
        InputError: it is of another family.
    """
    if isinstance(artifact.model, Decoder):
        return artifact.model
    kind = type(artifact.model).__name__
    raise InputError(
        f"the model is an {kind}, and this needs a Decoder",
        str(artifact.path),
        "give a model that predicts the next token",
    )


# ---- saving


def save_artifact(
    folder: Path,
    model: Model,
    tokenizer: Tokenizer,
    *,
    generation: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
) -> str:
    """Write a model folder in one step; an older one there stays whole until the new one is.

    Args:
        folder: where; usually `run.model_path`.
        model: its parameters are written in the number format they have.
        tokenizer: saved beside it.
        generation: more keys for generation_config.json; its token ids replace the tokenizer's.
        shard_bytes: weights larger than this are cut into several files with an index.

    Returns:
        The digest: the SHA-256 of the manifest.

    Raises:
        InputError: no family holds this model, the tokenizer does not fit it, or the disk is full.
    """
    folder = Path(folder)
    tensors = {name: tensor.detach() for name, tensor in state_to_store(model).items()}
    stored = stored_tensors(model.config, tensors)
    _require_fit(tokenizer, model.config, folder)
    reads_only = isinstance(model, Encoder)
    start = tokenizer.start if reads_only else tokenizer.end_of_document
    ids: dict[str, Any] = {"bos_token_id": start, "eos_token_id": tokenizer.end_of_document}
    ids |= {"pad_token_id": tokenizer.pad, **(generation or {})}
    config = config_to_huggingface(model.config, ids, _dtype_name(tensors)) | quantization_facts(model)
    recover_folder(folder)
    require_free(folder, sum(tensor.nbytes for tensor in tensors.values()) + 2**20)
    with atomic_folder(folder) as temporary:
        write_json(temporary / CONFIG_FILE, config)
        if not reads_only:
            write_json(temporary / GENERATION_FILE, ids)
        tokenizer.save(temporary)
        _write_weights(temporary, stored, tensors, shard_bytes)
    return sha256_file(folder / MANIFEST)


def _dtype_name(tensors: Mapping[str, Tensor]) -> str:
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if not dtypes <= set(DTYPES.values()):
        raise InputError(
            f"weights in {dtypes - set(DTYPES.values())}", "model", "save float32, bfloat16 or float16"
        )
    return str(tensors["embedding.weight"].dtype).removeprefix("torch.")


def _write_weights(
    folder: Path, stored: Mapping[str, Stored], tensors: Mapping[str, Tensor], shard_bytes: int
) -> None:
    """One safetensors file, or several with an index; one shard is copied at a time."""
    sizes = {name: sum(tensors[part].nbytes for part in tensor.parts) for name, tensor in stored.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content = {name: stored[name].join(tensors).cpu().contiguous() for name in names}
        try:
            save_file(content, folder / file, {"format": "pt"})
        except SafetensorError as error:
            raise InputError(
                f"cannot write: {error}", str(folder.parent / file), "free some space"
            ) from error
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(
            folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
        )


# ---- opening


def open_artifact(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    verify: bool = True,
) -> Artifact:
    """Open a model, refusing by name what cannot be trusted or does not fit together.

    Weights on the CPU in the number format of the file are mapped, not read: they cost memory when they are used.

    Args:
        path: a run; a model folder; a folder that another tool wrote in Hugging Face's layout; or "hub:OWNER/NAME",
            which alone may fetch from the network.
        dtype: number format of the parameters; None for the file's.
        device: where to put them; None for the CPU.
        verify: compare every file with the manifest. Without it the files are still checked against the config.

    Raises:
        InputError: there is no such model, or the folder is torn, altered, unsafe or of an unknown family.
    """
    folder, expected_digest = _locate(path)
    try:
        return _open_folder(folder, expected_digest, dtype, torch.device(device or "cpu"), verify)
    except OSError as error:
        raise InputError(
            f"cannot read: {error.strerror or error}",
            str(error.filename or folder),
            "check its permissions; if a run is writing it just now, try again",
        ) from error


def _open_folder(
    folder: Path, expected_digest: str | None, dtype: torch.dtype | None, device: torch.device, verify: bool
) -> Artifact:
    if (folder / MANIFEST).exists() or expected_digest:
        digest = _manifest_digest(folder, expected_digest, verify)
    else:
        digest = ""
    files = _weight_files(folder)
    config, bits = _read_config(folder)
    found = _find_tensors(folder, files, config)
    config = fit_to_tensors(config, found)
    with torch.device("meta"):
        model = build_model(config, bits)
    _load_weights(model, found, dtype, device)
    if bits is not None and isinstance(model, Decoder):
        quantize_head(model)
    generation = _read_object(folder, GENERATION_FILE) if (folder / GENERATION_FILE).exists() else {}
    for name in TOKENIZER_FILES:
        if name == "tokenizer.json" or (folder / name).exists():
            _check_file(folder, name)
    tokenizer = open_tokenizer(folder)
    _require_fit(tokenizer, config, folder)
    verified = bool(digest) and verify
    if not digest and verify:
        digest = _digest_without_manifest(folder, files)
    return Artifact(model.eval(), tokenizer, config, generation, folder, digest, verified)


def _require_fit(tokenizer: Tokenizer, config: ModelConfig, folder: Path) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model's embedding {config.vocab_size:,}",
            str(folder),
            "use the tokenizer that the model was trained with",
        )


def _locate(path: Path | str) -> tuple[Path, str | None]:
    """The model folder, and the digest its manifest must have where a finished run says so."""
    if str(path).startswith(HUB_PREFIX):
        return _fetch(str(path).removeprefix(HUB_PREFIX)), None
    path = Path(path).expanduser()
    if not path.is_dir():
        found = "not a folder" if path.exists() else "no such model"
        raise InputError(
            found, str(path), f"give a run, a model folder, or {HUB_PREFIX}OWNER/NAME to fetch one"
        )
    if not (path / RUN_FILE).exists():
        return path, None
    facts = _read_object(path, RUN_FILE)
    folder = path / MODEL_FOLDER
    if not folder.is_dir():
        raise InputError(
            "the run holds no model", str(path), "give a run of pretrain or finetune that saved one"
        )
    if facts.get("status") != "finished":
        return folder, None
    if not isinstance(facts.get("digest"), str):
        raise InputError("the run is finished but names no digest", str(path / RUN_FILE), TORN)
    return folder, facts["digest"]


def _fetch(name: str) -> Path:
    """Fetch a model of the Hugging Face hub into its cache, weights as safetensors only."""
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            "huggingface_hub is not installed", HUB_PREFIX + name, "pip install huggingface_hub"
        ) from None
    repository, _, revision = name.partition("@")
    patterns = [CONFIG_FILE, GENERATION_FILE, MANIFEST, *TOKENIZER_FILES, "*.safetensors", INDEX_FILE]
    try:
        return Path(
            huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
        )
    except Exception as error:  # the hub's client raises errors of four libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot fetch the model: {reason}", HUB_PREFIX + name, "check the name and the network"
        ) from error


def _manifest_digest(folder: Path, expected: str | None, verify: bool) -> str:
    if not (folder / MANIFEST).is_file():
        raise InputError("the manifest is missing", str(folder / MANIFEST), TORN)
    if verify:
        return verify_manifest(folder, expected)
    digest = sha256_file(folder / MANIFEST)
    if expected is not None and digest != expected:
        raise InputError("the manifest is not the one its run recorded", str(folder / MANIFEST), TORN)
    return digest


def _digest_without_manifest(folder: Path, files: list[str]) -> str:
    names = [CONFIG_FILE, *files, *(name for name in TOKENIZER_FILES if (folder / name).exists())]
    return sha256_bytes("".join(f"{name} {sha256_file(folder / name)}\n" for name in sorted(names)).encode())


def _check_file(folder: Path, name: str) -> Path:
    """The path of a file of the folder that is there, is no link out of it, and is not absurdly large."""
    path = folder / name
    if not path.is_file():
        raise InputError("a file is missing", str(path), TORN)
    cache = folder.resolve().parent  # the hub's cache links snapshots/REVISION/FILE to blobs/HASH
    blobs = cache.parent / "blobs" if cache.name == "snapshots" else None
    if path.is_symlink() and path.resolve().parent != blobs:
        raise InputError("a link instead of a file", str(path), "replace it by the file itself")
    size, limit = path.stat().st_size, SIZE_LIMITS.get(name, 2**62)
    if size == 0:
        raise InputError("the file is empty", str(path), TORN)
    if size > limit:
        raise InputError(f"{size:,} bytes where at most {limit:,} make sense", str(path), TORN)
    return path


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    path = _check_file(folder, name)
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError("not a JSON object", str(path), TORN)
    return value


def _read_config(folder: Path) -> tuple[ModelConfig, int | None]:
    """The model's shape, and the bits of its weights where they are few."""
    facts = _read_object(folder, CONFIG_FILE)
    try:
        return config_from_huggingface(facts), bits_of(facts)
    except InputError as error:
        raise InputError(error.what, f"{folder / CONFIG_FILE}, {error.where}", error.fix) from None


def _weight_files(folder: Path) -> list[str]:
    """The safetensors files of the folder; pickles are refused, because opening one runs what is in it."""
    if (folder / WEIGHTS_FILE).exists() or (folder / WEIGHTS_FILE).is_symlink():
        files = [WEIGHTS_FILE]
    elif (folder / INDEX_FILE).exists():
        weight_map = _read_object(folder, INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError("the index names no files", str(folder / INDEX_FILE), TORN)
        files = sorted(set(map(str, weight_map.values())))
        for name in files:
            if not re.fullmatch(r"[\w][\w.-]*\.safetensors", name):
                raise InputError(
                    f"the index names {name[:80]!r}",
                    str(folder / INDEX_FILE),
                    "only files beside it are read",
                )
    else:
        pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
        if pickles:
            raise InputError(
                "weights in a pickle are never opened: a pickle runs whatever code is in it",
                str(folder / pickles[0]),
                "save them as safetensors with the tool that made them (transformers: save_pretrained)",
            )
        raise InputError("no weights here", str(folder), f"a model folder holds {WEIGHTS_FILE}")
    for name in files:
        _check_file(folder, name)
    return files


# ---- weights


@dataclass(frozen=True)
class _Found:
    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def _find_tensors(folder: Path, files: list[str], config: ModelConfig) -> dict[str, _Found]:
    """What the weight files hold, from their headers alone, by the family's full names."""
    found: dict[str, _Found] = {}
    for file in files:
        path = folder / file
        try:
            with safe_open(path, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    full = canonical_name(config, name)
                    if full is None:
                        continue
                    if full in found:
                        raise InputError(f"the tensor {full} is there twice", str(path), TORN)
                    piece = handle.get_slice(name)
                    found[full] = _Found(path, name, tuple(piece.get_shape()), piece.get_dtype())
        except (SafetensorError, OSError) as error:
            raise InputError(f"not a whole safetensors file: {error}", str(path), TORN) from error
    return found


def _load_weights(
    model: Model, found: dict[str, _Found], dtype: torch.dtype | None, device: torch.device
) -> None:
    """Give a model without memory its parameters, one tensor at a time."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = stored_tensors(model.config, shapes)
    _drop_copies(copied_tensors(model.config), found)
    for name in stored:
        if name not in found:
            file = next(iter(found.values())).file if found else WEIGHTS_FILE
            raise InputError(f"the tensor {name} is missing", str(file), TORN)
    state: dict[str, Tensor] = {}
    for name, tensor in found.items():
        _check_tensor(name, tensor, stored, shapes)
    dtype = (
        dtype
        or DTYPES[next(found[name].dtype for name in stored if stored[name].parts == ("embedding.weight",))]
    )
    for name, tensor in found.items():
        for part, piece in stored[name].split(_read_tensor(tensor), shapes).items():
            kept = part.rpartition(".")[2] in CODE_DTYPES
            state[part] = piece.to(device=device, dtype=None if kept else dtype).contiguous()
    model.load_state_dict(state, assign=True)


def _drop_copies(copies: Mapping[str, str], found: dict[str, _Found]) -> None:
    """Some tools write a tied head a second time; it is read only to see that it is the embedding."""
    for name, original in copies.items():
        if name not in found:
            continue
        copy = found.pop(name)
        if original not in found:
            found[original] = copy
        elif not torch.equal(_read_tensor(copy), _read_tensor(found[original])):
            raise InputError(
                f"the config ties {name} to {original}, but the file holds two different tensors",
                f"{copy.file}, {copy.name}",
                "set tie_word_embeddings to false in config.json",
            )


def _check_tensor(
    name: str, tensor: _Found, stored: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    where = f"{tensor.file}, {tensor.name}"
    if name not in stored:
        raise InputError(
            f"the tensor {name} has no place", where, "it is not the model that config.json describes"
        )
    expected = stored[name].shape(shapes)
    if tensor.shape != expected:
        raise InputError(f"shape {list(tensor.shape)} where the config means {list(expected)}", where, TORN)
    allowed = CODE_DTYPES.get(name.rpartition(".")[2], DTYPES)
    if tensor.dtype not in allowed:
        raise InputError(
            f"numbers in the format {tensor.dtype}", where, f"readable here: {', '.join(allowed)}"
        )


def _read_tensor(tensor: _Found) -> Tensor:
    """The tensor, mapped from its file. The file is opened anew for each, so that a converted one leaves no map."""
    with safe_open(tensor.file, framework="pt") as handle:
        return handle.get_tensor(tensor.name)
