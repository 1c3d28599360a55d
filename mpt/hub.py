"""Models by their names on the Hugging Face hub: found in its cache, or downloaded, no more than is needed of them.

The library is huggingface_hub, so its environment counts: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT.
"""

import re
from pathlib import Path

from mpt.errors import InputError
from mpt.tensor_files import is_base_name, read_json, short

CONFIG = "config.json"
# What belongs to a model besides its weights and configuration; nothing else is downloaded or copied, and never code.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that there is, whole or in shards
_NAME = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)


def is_hub_name(path_or_name: str | Path) -> bool:
    """Whether this means a model on the hub: it has the form of one, and nothing of that name is here."""
    name = str(path_or_name)
    return _NAME.fullmatch(name) is not None and not looks_like_path(name) and not Path(name).exists()


def looks_like_path(name: str) -> bool:
    """Whether a name can only mean something here: it starts as paths do, or in a folder that exists, or has more
    components than a name on the hub.
    """
    first, slash, rest = name.partition("/")
    return name.startswith((".", "/", "~")) or "/" in rest or (slash != "" and Path(first).is_dir())


def download_file(name: str, file: str, revision: str | None = None) -> Path:
    """One file of a model on the hub, in the cache, downloaded where it is not there. Raises huggingface_hub's errors,
    and at once where the hub is out of reach: its own download would go on trying for half a minute, loudly.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, file, revision=revision), str):
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return Path(hf_hub_download(name, file, revision=revision))


def local_path(path_or_name: str | Path, *, revision: str | None = None, weights: bool = True) -> Path:
    """A path that is here as it is; for a hub name the folder of the cache that holds the model.

    What of it is not in the cache is downloaded: config.json, and with `weights` the tokenizer's files and the weights
    in one form, safetensors where there are any. revision: a branch, tag or commit; None is the main branch. InputError
    says what is not there and what to do, offline too.
    """
    if not is_hub_name(path_or_name):
        if not Path(path_or_name).exists():
            path = _NAME.fullmatch(str(path_or_name)) is not None
            why = f" (a path, as there is a folder {Path(path_or_name).parts[0]} here)" if path else ""
            raise InputError(
                f"{path_or_name} does not exist{why}; give a model's folder or checkpoint, or a name on the hub such "
                "as mosaicml/mpt-7b"
            )
        return Path(path_or_name)
    return _from_hub(str(path_or_name), revision, weights)


def _from_hub(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import errors  # here, as below: it brings a client for HTTP along, and most paths are local

    try:
        return _download(name, revision, weights)
    except errors.GatedRepoError:
        raise InputError(
            f"{name} is gated on the hub: ask for access on its page, then run `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"revision {revision} of {name} does not exist on the hub; give a branch, tag or commit of it"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(
            f"{name} is neither a path here nor a model on the hub that you can see; correct the name, or, where it is "
            "private, run `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.EntryNotFoundError as error:
        if not isinstance(error, errors.LocalEntryNotFoundError):
            wanted = f"{' or '.join(WEIGHTS)}, whole or in shards" if weights else CONFIG
            raise InputError(f"{name} has no {wanted} on the hub; give another model") from None
        raise _out_of_reach(name, error) from error
    except (errors.HTTPError, OSError) as error:
        raise _out_of_reach(name, error) from error


def _out_of_reach(name: str, error: Exception) -> InputError:
    from huggingface_hub import constants

    if isinstance(error, OSError) and error.strerror:  # such as a disk that is full
        return InputError(f"{name} could not be put into the cache {constants.HF_HUB_CACHE} ({error.strerror})")
    reason = short((str(error).splitlines() or [type(error).__name__])[0])
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the hub cannot be reached ({reason})"
    return InputError(
        f"{name} is not a path here, and not whole in the cache {constants.HF_HUB_CACHE}, and {why}: run "
        f"`hf download {name} --local-dir FOLDER` where there is a network, copy FOLDER here, and give its path"
    )


def _download(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if not weights:
        return download_file(name, CONFIG, revision).parent
    indexes = [f"{file}.index.json" for file in WEIGHTS]
    folder = _snapshot(name, revision, [CONFIG, *COMPANIONS, *indexes])
    for file, index in zip(WEIGHTS, indexes, strict=True):
        if (folder / index).is_file():
            weight_map = read_json(folder / index).get("weight_map")
            shards = {str(shard) for shard in weight_map.values()} if isinstance(weight_map, dict) else set()
            # Names that are no plain ones are left to the reader, which refuses them.
            return _snapshot(name, revision, [CONFIG, *sorted(filter(is_base_name, shards))])
        try:
            return Path(hf_hub_download(name, file, revision=revision)).parent
        except EntryNotFoundError:
            if file == WEIGHTS[-1]:
                raise
    raise AssertionError("a loop over WEIGHTS ends inside")


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        # Cached by another program, which took fewer files: what is there may be all that is needed.
        partly = getattr(error, "snapshot_path", None)
        if partly is None or not (Path(partly) / CONFIG).is_file():
            raise
        return Path(partly)
