"""Finding a tokenizer's files, its end-of-document token and its SHA-256."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mpt.hub import download_file, looks_like_path
from mpt.tensor_files import short
from trainer.errors import InputError

TOKENIZER = "tokenizer.json"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
GENERATION = "generation_config.json"
DEFAULT_EOS = "<|endoftext|>"

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def find_tokenizer(name: str | Path) -> Path:
    """The tokenizer.json that `name` means: a path to one, a folder with one, or a name on the Hugging Face hub.

    Hub files come from the local cache where they are there (HF_HOME, HF_HUB_OFFLINE are honoured), with the settings
    files beside them. InputError says what was tried.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / TOKENIZER).is_file():
            raise InputError(f"tokenizer {name}: no {TOKENIZER} in this folder; save the tokenizer in its fast form")
        return path / TOKENIZER
    if path.is_file():
        return path
    if looks_like_path(str(name)) or not HUB_NAME.fullmatch(str(name)) or str(name).endswith(".json"):
        raise InputError(f"tokenizer {name}: no such file or folder")
    return _from_hub(str(name))


def _from_hub(name: str) -> Path:
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    try:
        path = download_file(name, TOKENIZER)
    except (EntryNotFoundError, HTTPError, OSError, ValueError) as error:
        reason = short((str(error).strip().splitlines() or [type(error).__name__])[0])
        raise InputError(
            f"tokenizer {name}: not a file or folder here, and its {TOKENIZER} could not be had from the hub "
            f"({reason}); give a local folder, or the path of a {TOKENIZER}; with HF_HUB_OFFLINE=1 only the cache is "
            "looked at"
        ) from None
    for settings in SETTINGS:
        try:
            download_file(name, settings)
        except (EntryNotFoundError, HTTPError, OSError):
            continue  # optional: many repositories have only one of the two
    return path


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json; InputError where the tokenizers library cannot read it."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path}: the tokenizers library cannot read it ({error}); give a whole file") from None


def keep_as_text(tokenizer: Tokenizer, control: Iterable[int]) -> None:
    """Let a text that spells a special token, or one of the added tokens `control`, special or not, be encoded as any
    other text. In place.
    """
    tokenizer.add_special_tokens([name for i in control if (name := tokenizer.id_to_token(i)) is not None])
    tokenizer.encode_special_tokens = True


def model_tokenizer(files: Mapping[str, bytes], vocab_size: int) -> Tokenizer:
    """The tokenizer among a model's files (name -> contents), which cuts and pads nothing. InputError where there is
    none, it cannot be read, or it has tokens that the model has not.
    """
    if TOKENIZER not in files:
        raise InputError(f"the checkpoint has no {TOKENIZER}; name a tokenizer with --tokenizer")
    try:
        tokenizer = Tokenizer.from_buffer(files[TOKENIZER])
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{TOKENIZER}: the tokenizers library cannot read it ({error}); give a whole file") from None
    if (tokens := max(tokenizer.get_vocab().values(), default=-1) + 1) > vocab_size:
        raise InputError(
            f"{TOKENIZER} has {tokens} tokens, the model {vocab_size}: they do not belong together; name the model's "
            "with --tokenizer"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def model_ends(configured: int | Sequence[int] | None, files: Mapping[str, bytes], tokenizer: Tokenizer) -> list[int]:
    """Ids that end a text: those of the model's configuration, else of the generation_config.json among its files, else
    the tokenizer's end token, where there is one.
    """
    if configured is None:
        configured = _setting(files, GENERATION, "eos_token_id")
    if configured is not None:
        ids = [configured] if isinstance(configured, int) else list(configured)
        if not all(isinstance(i, int) for i in ids):
            raise InputError(f"{GENERATION}: eos_token_id is {configured!r}; it must be an id or a list of ids")
        return ids
    names = [_setting(files, file, "eos_token") for file in SETTINGS]
    names = [name.get("content") if isinstance(name, dict) else name for name in [*names, DEFAULT_EOS]]
    known = (tokenizer.token_to_id(name) for name in names if isinstance(name, str))
    return [i for i in known if i is not None][:1]


def _setting(files: Mapping[str, bytes], file: str, key: str) -> Any:
    try:
        return json.loads(files.get(file, b"{}")).get(key)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file}: not a JSON mapping ({error}); repair or remove it") from None


def settings_files(tokenizer: Path) -> list[Path]:
    """The settings files that lie beside a tokenizer.json."""
    return [tokenizer.parent / name for name in SETTINGS if (tokenizer.parent / name).is_file()]


def find_eos(
    tokenizer: Path, given: str | None = None, *, remedy: str = "name the token that ends a document with --eos"
) -> tuple[str, int]:
    """The token that ends a document, and its id: `given`, else the settings' eos_token, else `<|endoftext|>`.

    InputError where the tokenizer has no such token; remedy: what to do then.
    """
    ids = added_tokens(tokenizer)
    if given is not None:
        if given not in ids:
            raise InputError(f"--eos {given}: {tokenizer} has no such added token; it has {_some(ids)}")
        return given, ids[given]
    for path in settings_files(tokenizer):
        try:
            eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
            raise InputError(f"{path}: not a JSON mapping ({error}); repair or remove it") from None
        eos = eos.get("content") if isinstance(eos, dict) else eos
        if eos in ids:
            return eos, ids[eos]
    if DEFAULT_EOS in ids:
        return DEFAULT_EOS, ids[DEFAULT_EOS]
    raise InputError(
        f"{tokenizer}: no eos_token in the settings beside it and no {DEFAULT_EOS}, which would end a document; "
        f"{remedy}; added tokens are {_some(ids)}"
    )


def added_tokens(tokenizer: Path) -> dict[str, int]:
    """The added (special) tokens of a tokenizer.json with their ids."""
    try:
        data = json.loads(tokenizer.read_text(encoding="utf-8"))
        return {token["content"]: token["id"] for token in data["added_tokens"]}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{tokenizer}: not a {TOKENIZER} that can be read ({error}); give a whole file") from None
    except (KeyError, TypeError):
        raise InputError(
            f"{tokenizer}: JSON, but not a {TOKENIZER} as the tokenizers library writes it, which lists added_tokens; "
            "give the file that is saved beside a model"
        ) from None


def _some(ids: dict[str, int]) -> str:
    names = sorted(ids, key=lambda name: ids[name])
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; of tokenizer.json it is what a manifest calls tokenizer.sha256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
