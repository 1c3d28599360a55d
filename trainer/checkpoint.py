"""Checkpoints: saved in the background, committed whole or not at all, verified when read, at any world size."""

import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

import mpt.checkpoint
from mpt import MptConfig, hub
from mpt.initialize import is_adapter
from mpt.manifest import (
    INDEX,
    LATEST,
    DamagedCheckpoint,
    Manifest,
    check_files,
    file_entry,
    find,
    fsync_folder,
    left_over,
    list_steps,
    plain,
    read_index,
    read_manifest,
    remove,
    write_manifest,
    write_text,
)
from trainer.errors import InputError
from trainer.named_state import Shape, compare_shapes, named_state, read, reason, whole_parameters, write
from trainer.quantized import load_quantized

__all__ = ["Checkpointer", "compare_shapes", "describe", "export_hf", "find", "load_weights", "verify"]

T = TypeVar("T")

# A rank may wait this long for another that is still writing.
_PATIENCE = timedelta(hours=1)


class Checkpointer:
    """The checkpoints of one run: `folder/step-N/`, and `folder/latest`, a text file that names the newest.

    A save goes to `step-N.tmp`; when all ranks have written and hashed their files, the manifest is written, all is
    flushed to disk, and a rename makes it `step-N`. Only then `latest` moves and old ones are deleted. So a process
    killed at any moment leaves the previous checkpoint as it was, and at most a temporary folder beside it.

    Every method is collective: all ranks call it, with the same step. The folder is one that all ranks share, and no
    other run writes to it.

    keep: how many checkpoints to keep, the newest ones; negative keeps all, and one is always kept.
    fingerprint: nested plain dict of what must not change when the run resumes. defaults: values, in the same nesting,
        of keys that a section of an older version's fingerprint lacks: what that version did.
    asynchronous: `save` returns once the state is copied to host memory, and a thread does the rest. The copy costs
        as much memory as the rank's parameters and optimizer state; on CUDA it is pinned and kept.
    on_error: what a failed save does: "continue" tells `say` and training goes on, "stop" raises InputError, from the
        next call of `save`, `wait` or `close` if the save was asynchronous. Either way the checkpoints before it stay.
    fsync: flush to disk before the rename; False only where losing a checkpoint at power failure does not matter.
    say: called on rank 0 with each message, also from the background thread; standard error by default.

    Raises InputError if the folder cannot be written. Temporary folders that a killed run left are deleted.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        fingerprint: dict[str, Any],
        defaults: dict[str, Any] | None = None,
        asynchronous: bool,
        on_error: Literal["continue", "stop"],
        fsync: bool = True,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = folder
        self._keep = keep
        self._fingerprint, self._defaults = plain(fingerprint), plain(defaults or {})
        self._asynchronous = asynchronous
        self._on_error = on_error
        self._fsync = fsync
        self._say = _to_stderr if say is None else say
        self._rank, self._world_size = _place()
        # Its own group: the thread's collectives must not meet the training's.
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if dist.is_initialized() else None
        self._stager: DefaultStager | None = None
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._known_good: set[int] = set()
        self._on_rank_0(self._prepare_folder)

    @property
    def failed(self) -> bool:
        """Whether the background save has failed and on_error is "stop": then the next `wait` raises, on all ranks.

        Ranks may see it change at different moments; sum it over ranks before acting on it.
        """
        return self._error is not None

    def holds(self, step: int) -> bool:
        """Whether `step-N` is known to be committed and good: saved by this object and awaited, or verified by it."""
        return step in self._known_good

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Save parameters, persistent buffers, optimizer state and `state` (counters; JSON types) as `step-N`.

        A save that is still being written is awaited first. If a good `step-N` exists, nothing is done; a damaged one
        is set aside. Raises InputError if on_error is "stop" and this or the previous save failed.
        """
        self.wait()
        if step in self._known_good:
            return
        config = getattr(model, "config", None)
        manifest = Manifest(
            step=step,
            world_size=self._world_size,
            torch=str(torch.__version__),
            fingerprint=self._fingerprint,
            model=plain(config.to_dict()) if config is not None else {},
            state=plain(state),
        )
        tensors = named_state(model, optimizer)
        try:
            if self._already_saved(step):
                return
            self._on_rank_0(lambda: self._check_space(tensors))
            if self._asynchronous:
                tensors = self._staged(tensors)
        except (InputError, OSError, RuntimeError) as e:
            self._fail(step, e)
        else:
            if self._asynchronous:
                self._thread = threading.Thread(target=self._commit, args=(tensors, manifest), daemon=True)
                self._thread.start()
                return
            self._commit(tensors, manifest)
        self.wait()

    def wait(self) -> None:
        """Return when no save is being written any more.

        Raises InputError if the last save failed and on_error is "stop".
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise InputError(error)

    def close(self) -> None:
        """Wait for the save in progress and release what this object holds. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            if self._stager is not None:
                self._stager.close()
                self._stager = None
            if self._group is not None and dist.is_initialized():
                dist.destroy_process_group(self._group)
            self._group = None

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Load the newest good checkpoint in place, and return the `state` saved with it; None if there is none.

        Parameters, buffers and optimizer state get the saved values bit for bit, also at another world size. Ranks
        share the verification and read only their parts. A damaged checkpoint is named and set aside as
        `step-N.damaged`, and the one before it used.

        Raises InputError, and changes no file, if the fingerprint differs (listing old and new), if the shapes do, or
        if there are checkpoints but none is good.
        """
        damaged: list[tuple[Path, DamagedCheckpoint]] = []
        names = self._on_rank_0(lambda: [path.name for _, path in list_steps(self.folder)])
        for path in (self.folder / name for name in names):
            try:
                manifest, index = self._verified(path)
            except DamagedCheckpoint as e:
                damaged.append((path, e))
                continue
            self._check_fingerprint(path, manifest)
            read(path, index, model, optimizer, self._group)
            self._known_good.add(manifest.step)
            for bad, error in damaged:
                self._tell(f"warning: checkpoint {bad} is damaged ({error}); {path.name} is used instead")
                self._on_rank_0(partial(self._set_aside_if_possible, bad))
            return manifest.state
        if damaged:
            reasons = "".join(f"\n  {error}" for _, error in damaged)
            raise InputError(
                f"no checkpoint in {self.folder} is usable:{reasons}\n"
                "repair them, or move that folder away to train from the beginning"
            )
        return None

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
            remove(left_over(self.folder))
        except OSError as e:
            raise InputError(
                f"checkpoint folder {self.folder} cannot be written ({e.strerror}); choose another save_folder"
            ) from None

    def _on_rank_0(self, action: Callable[[], T]) -> T:
        return cast(T, _agree(self._group, lambda: action() if self._rank == 0 else None)[0])

    def _tell(self, message: str) -> None:
        if self._rank == 0:
            self._say(message)

    def _verified(self, path: Path) -> tuple[Manifest, Metadata]:
        manifest, index = _verified(path, self._group)
        if path.name != f"step-{manifest.step}":
            # Under another name it would be taken for newer or older than it is.
            raise DamagedCheckpoint(f"{path} is renamed: it holds step {manifest.step}; name it step-{manifest.step}")
        return manifest, index

    def _check_fingerprint(self, path: Path, manifest: Manifest) -> None:
        old, new = _flat(manifest.fingerprint), _flat(self._fingerprint)
        sections = {name.rpartition(".")[0] for name in old}
        old = {n: v for n, v in _flat(self._defaults).items() if n in new and n.rpartition(".")[0] in sections} | old
        changed = [name for name in {**old, **new} if old.get(name, _ABSENT) != new.get(name, _ABSENT)]
        if changed:
            lines = "".join(f"\n  {n}: {_short(old.get(n, _ABSENT))} -> {_short(new.get(n, _ABSENT))}" for n in changed)
            # Of adapters alone the checkpoint is no model; the export is.
            weights = self.folder.parent / "export" if any(n.startswith("lora.") for n in old) else path
            raise InputError(
                f"checkpoint {path} belongs to another run (its value -> this run's):{lines}\n"
                f"restore these values, or choose another save_folder (load_path={weights} takes its weights only)"
            )

    def _set_aside_if_possible(self, path: Path) -> None:
        try:
            _set_aside(path)
        except OSError as e:
            self._say(f"warning: {path} could not be renamed ({e.strerror}); remove it by hand")

    def _already_saved(self, step: int) -> bool:
        path = self.folder / f"step-{step}"
        if not self._on_rank_0(path.exists):
            return False
        try:
            manifest, _ = self._verified(path)
        except DamagedCheckpoint as e:
            self._tell(f"warning: checkpoint {path} is damaged ({e}) and is replaced")
            self._on_rank_0(partial(_set_aside, path))
            return False
        self._check_fingerprint(path, manifest)
        self._known_good.add(step)
        return True

    def _check_space(self, tensors: Mapping[str, Tensor]) -> None:
        # A tensor is a small zip archive per shard, about 1.5 KB, and a line in the index.
        needed = sum(t.numel() * t.element_size() + 2048 * self._world_size for t in tensors.values())
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise InputError(f"{self.folder} has {free / 1e6:,.1f} MB free, a checkpoint needs {needed / 1e6:,.1f} MB")

    def _staged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A copy in host memory. On CUDA it is pinned, and kept for the next save: pinning costs more than copying."""
        cuda = any(t.is_cuda for t in tensors.values())
        if self._stager is None:
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=cuda,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=cuda,
                )
            )
        staged: dict[str, Tensor] = {}
        stager = self._stager
        _agree(self._group, lambda: staged.update(cast(dict[str, Tensor], stager.stage(tensors))))
        if not cuda:
            stager.close()
            self._stager = None
        return staged

    def _commit(self, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        """Write `step-N.tmp` and make it `step-N`. Never raises: all ranks learn of a failure, in _fail."""
        temporary = self.folder / f"step-{manifest.step}.tmp"
        try:
            self._on_rank_0(lambda: remove([temporary]))
            write(temporary, tensors, self._group, fsync=self._fsync)
            mine = [f"__{self._rank}_*", INDEX] if self._rank == 0 else [f"__{self._rank}_*"]
            entries = _agree(
                self._group, lambda: {p.name: file_entry(p) for pattern in mine for p in temporary.glob(pattern)}
            )
            for part in entries:
                manifest.files.update(part)
            self._on_rank_0(lambda: self._publish(temporary, manifest))
            self._known_good.add(manifest.step)
        except (Exception, CheckpointException) as e:
            if self._rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            self._fail(manifest.step, e)

    def _publish(self, temporary: Path, manifest: Manifest) -> None:
        for name, entry in manifest.files.items():
            if not (temporary / name).is_file() or (temporary / name).stat().st_size != entry["bytes"]:
                raise InputError(
                    f"process 0 does not see {temporary / name} as it was written; "
                    "save_folder has to be on a file system that all nodes share"
                )
        write_manifest(temporary, manifest, fsync=self._fsync)
        final = self.folder / f"step-{manifest.step}"
        temporary.rename(final)
        if self._fsync:
            fsync_folder(self.folder)
        write_text(self.folder / LATEST, final.name + "\n", fsync=self._fsync)
        try:
            self._prune(final)
        except OSError as e:
            self._say(f"warning: {final} is saved, but older checkpoints could not be deleted ({e})")

    def _prune(self, newest: Path) -> None:
        if self._keep < 0:
            return
        older = [path for _, path in list_steps(self.folder) if path != newest]
        remove(older[max(self._keep, 1) - 1 :])
        remove(self.folder.glob("step-*.damaged"))

    def _fail(self, step: int, error: BaseException) -> None:
        text = f"checkpoint at step {step} could not be saved: {reason(error)}; the checkpoints before it are unharmed"
        if self._on_error == "stop":
            self._error = f"{text}. Make room or repair the folder, then start again; on_save_error=continue trains on"
        else:
            self._tell(f"warning: {text}, training goes on")


def load_weights(path: Path | str, model: nn.Module) -> None:
    """Load parameters and buffers, not optimizer state or counters, in place; each rank reads only its part.

    path: a `step-N` folder, a run's folder (its latest checkpoint), or what else mpt.checkpoint.open_checkpoint takes:
    a Hugging Face directory, a name on the hub, a Composer file. What its configuration says differently is not
    warned of: validate notes it. Adapters are left as they are. Collective.
    Raises InputError if there is none, if it is damaged, or, with a table, if names or shapes are not the model's.
    """
    local = _agree(None, lambda: _as_input_error(hub.local_path, path))[_place()[0]]
    if not is_own(local) or any(is_adapter(name) for name, _ in model.named_parameters()):
        _agree(None, lambda: _as_input_error(_fill, model, local))
        return
    found = find(local)
    _, index = _verified(found, None)
    read(found, index, model, None, None)


def _fill(model: nn.Module, path: Path) -> None:
    source = load_quantized(model, mpt.checkpoint.open_checkpoint(path, check_hashes=True))
    mpt.checkpoint.fill(model, mpt.checkpoint.match(model, source))


def describe(path: Path | str) -> dict[str, Shape]:
    """Name -> shape of the weights that `load_weights` would load, without reading them; a classifier's head is none.
    Not collective.

    Raises InputError if there is no checkpoint at `path`, or if its manifest or index is damaged.
    """
    source = _as_input_error(mpt.checkpoint.open_checkpoint, path)
    tensors = source.tensors if source.kind == "run" else source.with_head()
    heads = tuple(mpt.checkpoint.CLASSIFIERS)
    return {name: stored.shape for name, stored in tensors.items() if not name.startswith(heads)}


def is_own(path: Path | str) -> bool:
    """Whether a path means a checkpoint that this program saved in training."""
    path = Path(path)
    return path.is_dir() and mpt.checkpoint.form_of(path) == "run"


def verify(path: Path | str) -> Manifest:
    """Check every file of a checkpoint (as `find` finds it) against its manifest, and return that. Not collective.

    Raises InputError if there is none, DamagedCheckpoint naming the file that is not as it was written.
    """
    found = find(path)
    manifest = read_manifest(found)
    check_files(found, manifest)
    read_index(found, manifest)
    return manifest


def export_hf(
    model: nn.Module,
    config: MptConfig,
    folder: Path,
    tokenizer_files: Sequence[Path] = (),
    dtype: torch.dtype | None = None,
    tensors: Iterable[tuple[str, Callable[[], Tensor]]] | None = None,
) -> None:
    """Write a sharded model as a Hugging Face directory (safetensors, config.json, tokenizer files). Collective.

    One parameter at a time is gathered, so no rank ever holds the model whole. dtype: of the file, the parameters' own
    if None. tensors: in place of the model's parameters, (name, function that all ranks call). Raises InputError, on
    all ranks, if `folder` cannot be written; an older export there stays then.
    """
    tensors = iter(whole_parameters(model) if tensors is None else tensors)
    error: Exception | None = None
    try:
        companions = {file.name: file.read_bytes() for file in tokenizer_files}
        mpt.checkpoint.save_hf(tensors, config, folder, dtype=dtype, write=_place()[0] == 0, companions=companions)
    except (OSError, ValueError, SafetensorError) as e:
        error = e
        for _, gather in tensors:  # the ranks that go on wait for this one in each
            gather()

    def check() -> None:
        if error is not None:
            text = str(error) if isinstance(error, ValueError) else reason(error)
            raise InputError(
                f"{folder} could not be written: {text}; the checkpoints are unharmed. Make room or move what "
                "is in the way, and run the same command again; export=false leaves the export out"
            ) from error

    _agree(None, check)


def _place() -> tuple[int, int]:
    """Rank and world size, also where torch.distributed is not initialised."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _agree(group: dist.ProcessGroup | None, action: Callable[[], T]) -> list[T]:
    """Call `action` on every rank; all ranks' results, or the same exception everywhere if it failed on any."""
    error: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as e:
        error = e
    if not dist.is_initialized():
        if error is not None:
            raise error
        return [cast(T, result)]
    # What is sent has to survive pickling: any exception's text does, these two kinds do as they are.
    sent = error if error is None or isinstance(error, InputError | OSError) else RuntimeError(reason(error))
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (result, sent), group=group)
    first = next((e for _, e in gathered if e is not None), None)
    if first is not None:
        raise first from error
    return [r for r, _ in gathered]


def _verified(path: Path, group: dist.ProcessGroup | None) -> tuple[Manifest, Metadata]:
    """Manifest and index of a checkpoint whose hashes the ranks have checked together."""
    rank, world_size = _place()
    found: list[tuple[Manifest, Metadata]] = []

    def check() -> None:
        manifest = read_manifest(path)
        check_files(path, manifest, part=rank, parts=world_size)
        found.append((manifest, read_index(path, manifest)))

    _agree(group, check)
    return found[0]


def _as_input_error(function: Callable[..., T], *arguments: Any) -> T:
    """What `function` returns; its last argument is the folder that it reads."""
    try:
        return function(*arguments)
    except InputError:
        raise
    except ValueError as e:
        raise InputError(str(e)) from e
    except (OSError, SafetensorError) as e:
        raise InputError(f"{arguments[-1]} cannot be read: {reason(e)}; copy it again") from e


def _set_aside(path: Path) -> None:
    """Take a damaged folder out of the list of checkpoints without deleting it."""
    aside = path.with_name(path.name + ".damaged")
    remove([aside] if aside.exists() else [])
    path.rename(aside)


_ABSENT = "(absent)"


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
