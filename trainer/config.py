"""The configuration of a run: TrainConfig, reading it from YAML, and the checks that need more than one field."""

import copy
import difflib
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch

from kernels import backend
from mpt import MptConfig
from mpt.config import parameter_shapes
from mpt.hub import is_hub_name, local_path, looks_like_path
from trainer import foundry, lora, pretrained, samples, yamlfile
from trainer.checkpoint import compare_shapes, describe
from trainer.curriculum import LengthStage, check_curriculum, check_ends
from trainer.data import (
    ExampleBatches,
    LoaderConfig,
    TokenBatches,
    file_sha256,
    find_tokenizer,
    open_examples,
    open_loader,
    read_manifest,
)
from trainer.data.examples import Encoder
from trainer.data.tokenizer import TOKENIZER, open_tokenizer
from trainer.duration import Duration, parse
from trainer.errors import InputError
from trainer.loggers import LoggersConfig
from trainer.lora import LoraConfig
from trainer.metrics import ProfileConfig
from trainer.optim import OptimizerConfig, SchedulerConfig
from trainer.parallel import FsdpConfig, check_sizes
from trainer.plan import choose_micro_batch, divisors

RECIPES = Path(__file__).resolve().parent.parent / "yaml"

LIMIT = 2**31  # of sequences in a step and of tokens in a sequence: their products fit 64 bits
MOST_PATH_BYTES = 255  # of one component, on every file system of Linux
MOST_SECONDS = 366 * 24 * 3600
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|dbfs:", re.IGNORECASE)


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer that the shards were made with, or that examples are tokenised with.

    name: a tokenizer.json, a folder with one, or a Hugging Face hub name; null: the copy beside the training shards, or
        with examples the one in load_path. For shards, a local one, or a hub one that is in the local cache, has to
        match them.
    kwargs: llm-foundry's; only model_max_length is known, and it has to equal max_seq_len.
    """

    name: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Every field is the YAML key of the same name.

    run_name: one path component; in a YAML file it may be left to the environment's RUN_NAME.
    save_folder: the run folder; null: runs/{run_name}. load_path: weights to start from: a checkpoint, a run folder,
        a Hugging Face directory or name on its hub, a Composer .pt file. autoresume: go on from the run folder's
        newest checkpoint.
    max_duration, eval_interval, save_interval: durations (trainer.duration); an integer is optimizer steps; an interval
        of 0 means only at the end.
    precision: of the computation; weights, gradients' sums and optimizer state are fp32 in both.
    global_train_batch_size: sequences per optimizer step, over all ranks and micro-batches.
    device_train_microbatch_size: sequences of one forward on one rank; auto: estimated from the device's memory.
    context_parallel_size: ranks that share each sequence, every one with a part of its tokens.
    device_eval_batch_size: null: as the micro-batch. eval_subset_num_batches: -1: the whole validation split.
    save_num_checkpoints_to_keep: -1: all. on_save_error: whether a failed save (disk full) ends the run.
    length_curriculum: shorter sequences at first, see trainer.curriculum.
    activation_offload: blocks' inputs wait for the backward in host memory; needs activation_checkpointing.
    mlp_chunk_size: tokens that an MLP takes at a time; null: all.
    log_interval: optimizer steps. on_nonfinite: "stop", or "skip:N" to leave out up to N bad batches.
    dist_timeout: seconds. gradient_clip_norm: global L2 norm; null: no clipping.
    eval_first: also evaluate before the first step, which is the base model's loss in a fine-tune.
    export: write a Hugging Face directory at the end. sample_prompt: text continued into sample.txt at the end.
    sample_prompts: with examples, instructions answered in samples.md at the end; none: those of the first held-out
        examples.
    model: fields of mpt.MptConfig; max_seq_len may be left out there. A file may name a model in `pretrained`, whose
        configuration then fills in what is left out, see trainer.pretrained.
    lora: train adapters on the model that load_path names, which stays as it is; null: train the model.
    """

    run_name: str
    seed: int = 17
    save_folder: str | None = None
    load_path: str | None = None
    autoresume: bool = True
    max_seq_len: int = 2048
    length_curriculum: list[LengthStage] = field(default_factory=list)
    max_duration: int | str
    precision: Literal["fp32", "amp_bf16"] = "amp_bf16"
    global_train_batch_size: int
    device_train_microbatch_size: int | Literal["auto"] = "auto"
    context_parallel_size: int = 1
    device_eval_batch_size: int | None = None
    eval_interval: int | str = "1000ba"
    eval_subset_num_batches: int = -1
    eval_first: bool = False
    save_interval: int | str = "1000ba"
    save_num_checkpoints_to_keep: int = -1
    save_async: bool = True
    on_save_error: Literal["continue", "stop"] = "continue"
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    activation_offload: bool = False
    mlp_chunk_size: int | None = None
    compile: bool = False
    kernels: Literal["auto", "triton", "torch", "reference"] = "auto"
    log_interval: int = 10
    profile: ProfileConfig | None = None
    on_nonfinite: str = "stop"
    dist_timeout: float = 600.0
    gradient_clip_norm: float | None = 1.0
    export: bool = True
    sample_prompt: str | None = None
    sample_prompts: list[str] = field(default_factory=list)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: dict[str, Any]
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train_loader: LoaderConfig
    eval_loader: LoaderConfig | None = None
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    lora: LoraConfig | None = None
    fsdp_config: FsdpConfig = field(default_factory=FsdpConfig)
    loggers: LoggersConfig = field(default_factory=LoggersConfig)

    def __post_init__(self) -> None:
        _check_run_name(self.run_name)
        for name, least in (("max_seq_len", 1), ("global_train_batch_size", 1), ("log_interval", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}; expected at least {least}")
        for name in ("max_seq_len", "global_train_batch_size"):
            if getattr(self, name) >= LIMIT:
                raise InputError(f"{name}={getattr(self, name)}; expected a number below 2**31")
        for name in ("device_train_microbatch_size", "device_eval_batch_size", "gradient_clip_norm", "dist_timeout"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise InputError(f"{name}={value}; expected a number above 0")
        if self.mlp_chunk_size is not None and self.mlp_chunk_size < 1:
            raise InputError(f"mlp_chunk_size={self.mlp_chunk_size}; expected a number of tokens, at least 1, or null")
        if self.activation_offload and self.activation_checkpointing == "none":
            raise InputError(
                "activation_offload=true keeps the inputs of blocks that compute the rest again; set "
                "activation_checkpointing to full or selective as well"
            )
        if self.fsdp_config.cpu_offload and self.optimizer.offload:
            raise InputError(
                "optimizer.offload=true has no effect with fsdp_config.cpu_offload=true, which keeps the optimizer's "
                "state in host memory as well; set one of them"
            )
        check_curriculum(self.length_curriculum, self.max_seq_len)
        if self.length_curriculum and self.train_loader.name != "text":
            raise InputError(
                "length_curriculum cuts sequences into pieces, which examples cannot be; it is for a train_loader of "
                "name: text"
            )
        if self.seed >= 2**32:
            raise InputError(f"seed={self.seed}; expected a number below 2**32")
        if self.dist_timeout > MOST_SECONDS:
            raise InputError(f"dist_timeout={self.dist_timeout:g} seconds; expected at most {MOST_SECONDS} (a year)")
        for name in ("eval_subset_num_batches", "save_num_checkpoints_to_keep"):
            if getattr(self, name) != -1 and getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}; expected at least 1, or -1 for all")
        for name, value in _durations(self).items():
            parse(value, name)
        if parse(self.max_duration, "max_duration").value == 0:
            raise InputError(f"max_duration={self.max_duration} trains for no step; give it a length")
        _skip_limit(self.on_nonfinite)
        for name, path in _paths(self).items():
            if path and _REMOTE.match(path):
                raise InputError(f"{name}={path}: remote folders are not supported yet; give a local one")
            if path and re.search(r"[\x00-\x1f\x7f]", path):
                raise InputError(f"{name}={path!r}: a path with control characters; remove them")
            if path and any(len(os.fsencode(part)) > MOST_PATH_BYTES for part in path.split("/")):
                raise InputError(f"{name}={path[:40]}...: no name in a path can be longer than 255 bytes; shorten it")
            if path and path.startswith("~"):
                raise InputError(f"{name}={path}: ~ is not expanded here; write the folder out")
        self.train_loader.check("train_loader")
        if self.eval_loader is not None:
            self.eval_loader.check("eval_loader")
        for name, kind in (("sample_prompt", "text"), ("sample_prompts", "finetuning")):
            if getattr(self, name) and self.train_loader.name != kind:
                raise InputError(f"{name} is for a train_loader of name: {kind}; this one is {self.train_loader.name}")
        if self.lora is not None and self.load_path is None:
            raise InputError("lora trains adapters on a model that is there: name it in model.pretrained or load_path")
        if self.lora is not None and self.mlp_chunk_size is not None and self.lora.unfuses_mlp:
            raise InputError(
                f"mlp_chunk_size={self.mlp_chunk_size} has no effect with adapters on up_proj or down_proj, nor with "
                "lora.base_bits; leave it out"
            )
        if self.lora is not None and self.lora.base_bits is not None and self.fsdp_config.cpu_offload:
            raise InputError(
                f"lora.base_bits={self.lora.base_bits} keeps the model on the GPU, and fsdp_config.cpu_offload=true in "
                "host memory; set one of them only"
            )
        for key, value in self.tokenizer.kwargs.items():
            if key != "model_max_length" or value != self.max_seq_len:
                raise InputError(
                    f"tokenizer.kwargs.{key}={value} has no effect on prepared shards; remove it "
                    f"(known: model_max_length, equal to max_seq_len={self.max_seq_len})"
                )


@dataclass(frozen=True)
class Resolved:
    """What follows from a TrainConfig, the world size and the data.

    steps: optimizer steps of the whole run. steps_per_epoch: whole ones; None if the data was not opened.
    tokens_per_step: input tokens over all ranks; of examples the mean, padding aside. micro_batch: sequences per
    forward on a rank, `accumulation` forwards per step. warmup_steps, decay_steps: of the schedule, decay counted from
    step 0. eval_every, save_every: in steps; 0: only at the end. skip_nonfinite: bad batches that may be left out.
    tokenizer_path: the tokenizer.json; None if unknown. device_bytes: memory of this rank's GPU; None on a CPU. notes:
    what a reader of the plan should know.
    stages: (end in steps, length) of the length curriculum.
    train_data, eval_data: the opened loaders; None where there is none or the data was not opened.
    """

    model_config: MptConfig
    run_folder: Path
    steps: int
    steps_per_epoch: int | None
    tokens_per_step: int
    micro_batch: int
    accumulation: int
    eval_batch_size: int
    warmup_steps: int
    decay_steps: int
    eval_every: int
    save_every: int
    skip_nonfinite: int
    tokenizer_path: Path | None
    tokenizer_sha256: str | None
    device_bytes: int | None
    train_data: TokenBatches | ExampleBatches | None
    eval_data: TokenBatches | ExampleBatches | None
    stages: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe, ours or llm-foundry's, and apply `key.subkey=value` overrides.

    An llm-foundry file's ignored keys are listed on stderr, by rank 0. Raises InputError, with the file and line where
    there is one, for anything that cannot be used.
    """
    path = Path(path)
    if not path.is_file():
        raise _no_recipe(path)
    source = yamlfile.read(path)
    foreign_key = foundry.recognise(source.values)
    yamlfile.override(source, overrides, TrainConfig)
    yamlfile.resolve(source)
    if foreign_key:
        ignored = foundry.translate(source, [f.name for f in fields(TrainConfig)])
        if int(os.environ.get("RANK", "0")) == 0:
            print(foundry.notice(source.name, foreign_key, ignored), file=sys.stderr)
    pretrained.expand(source)
    if source.values.get("precision") == "amp_fp16":
        raise source.error(("precision",), "precision=amp_fp16 is not supported; use amp_bf16, or fp32")
    if source.values.get("run_name") in (None, ""):
        source.values["run_name"] = os.environ.get("RUN_NAME", "")
    config = yamlfile.build(TrainConfig, source)
    try:
        build_model_config(config)
    except InputError as e:
        raise source.locate(e) from e
    return config


def config_to_yaml(config: TrainConfig) -> str:
    """The configuration with every default filled in, as YAML that `load_config` reads back to an equal one."""
    return yamlfile.dump(asdict(config))


def build_model_config(config: TrainConfig) -> MptConfig:
    """The MptConfig of the `model` section, its max_seq_len filled in from the run's.

    Raises InputError if a key or value is not MPT's, or if the two lengths differ.
    """
    if config.model.get("max_seq_len", config.max_seq_len) != config.max_seq_len:
        raise InputError(
            f"model.max_seq_len={config.model['max_seq_len']} and max_seq_len={config.max_seq_len} differ; "
            "leave model.max_seq_len out and set max_seq_len"
        )
    try:
        return MptConfig.from_dict({**config.model, "max_seq_len": config.max_seq_len})
    except (ValueError, TypeError) as e:
        raise InputError(f"model: {e}") from e


def validate(config: TrainConfig, world_size: int, *, open_data: bool = True) -> Resolved:
    """Check everything that needs more than one field, and work out what follows from it.

    world_size: number of ranks. open_data=False leaves out data, tokenizer and checkpoint: durations in epochs cannot
    be resolved then. Raises InputError naming the fields, their values and a remedy.
    """
    notes: list[str] = []
    configured = build_model_config(config)
    model_config = _training_model(config, configured, notes)
    _check_mesh(config, world_size)
    _check_context(config, model_config)
    _check_kernels(config)
    per_rank = _rows_per_rank(config, world_size)
    micro_batch = _micro_batch(config, model_config, world_size, per_rank)
    eval_batch_size = config.device_eval_batch_size or micro_batch
    tokens_per_step = config.global_train_batch_size * config.max_seq_len

    tokenizer_path = tokenizer_sha256 = data = validation = None
    if open_data:
        if config.lora is not None:
            lora.check(config.lora, model_config)
        if config.load_path is not None:
            _check_load_path(config.load_path, model_config)
            notes += [f"load_path's {d}" for d in pretrained.differences(config.load_path, configured)]
        tokenizer_path, tokenizer_sha256 = _find_tokenizer(config, notes)
        _check_sample_prompt(config, model_config, tokenizer_path)
        tokenizer = (tokenizer_path, tokenizer_sha256)
        data = _open_run_data(config, model_config, tokenizer, training=True)
        _check_sample_prompts(config, model_config, tokenizer_path, data)
        tokens_per_step = round(config.global_train_batch_size * data.mean_tokens)
        notes += _vocabulary_note(config, model_config, data, tokenizer_path)
        if config.eval_loader is not None:
            validation = _open_run_data(config, model_config, tokenizer, training=False)
            eval_batch_size = min(eval_batch_size, validation.sequences)  # more would be filled up with repetitions
    epoch = Fraction(data.sequences, config.global_train_batch_size) if data else None

    def steps(name: str) -> int:
        duration = parse(_durations(config)[name], name)
        return _in_steps(duration, name, tokens_per_step, epoch)

    total = steps("max_duration")
    ends = {name: steps(name) for name in _durations(config) if name.startswith("length_curriculum")}
    check_ends(list(ends.values()), [f"{name}={_durations(config)[name]}" for name in ends], total)
    return Resolved(
        model_config=model_config,
        run_folder=Path(config.save_folder or f"runs/{config.run_name}"),
        steps=total,
        steps_per_epoch=data.steps_per_epoch if data else None,
        tokens_per_step=tokens_per_step,
        micro_batch=micro_batch,
        accumulation=per_rank // micro_batch,
        eval_batch_size=eval_batch_size,
        warmup_steps=steps("scheduler.t_warmup"),
        decay_steps=total if config.scheduler.t_max is None else steps("scheduler.t_max"),
        eval_every=steps("eval_interval"),
        save_every=steps("save_interval"),
        skip_nonfinite=_skip_limit(config.on_nonfinite),
        tokenizer_path=tokenizer_path,
        tokenizer_sha256=tokenizer_sha256,
        device_bytes=_device_bytes(config),
        train_data=data,
        eval_data=validation,
        stages=tuple((end, stage.max_seq_len) for end, stage in zip(ends.values(), config.length_curriculum)),
        notes=tuple(notes),
    )


def _training_model(config: TrainConfig, model_config: MptConfig, notes: list[str]) -> MptConfig:
    """The model as it trains: with packed examples, each sees itself only; `notes` says so where that is a change."""
    loaders = [loader for loader in (config.train_loader, config.eval_loader) if loader is not None]
    if not any(loader.dataset.packing for loader in loaders):
        return model_config
    if model_config.learned_positions:
        notes.append("dataset.packing with learned positions: they do not restart at each example")
    if not model_config.attn_config.attn_uses_sequence_id:
        model_config = copy.deepcopy(model_config)
        model_config.attn_config.attn_uses_sequence_id = True
        notes.append("dataset.packing: attn_config.attn_uses_sequence_id is true in training; the export keeps false")
    return model_config


def _open_run_data(
    config: TrainConfig, model_config: MptConfig, tokenizer: tuple[Path | None, str | None], *, training: bool
) -> TokenBatches | ExampleBatches:
    """The run's training data, or its validation data (which must be configured). tokenizer: its path and SHA-256."""
    section = config.train_loader if training else config.eval_loader
    assert section is not None
    path, sha256 = tokenizer
    length, batch, vocab_size = config.max_seq_len, config.global_train_batch_size, model_config.vocab_size
    if section.name == "text":
        return open_loader(section, seq_len=length, global_batch_size=batch, seed=config.seed, vocab_size=vocab_size,
                           tokenizer_sha256=sha256, training=training)  # fmt: skip
    if path is None:
        raise InputError("tokenizer.name is required to tokenise examples; give a tokenizer.json or a folder with one")
    return open_examples(section, seq_len=length, global_batch_size=batch, seed=config.seed, vocab_size=vocab_size,
                         tokenizer=path, training=training)  # fmt: skip


def _durations(config: TrainConfig) -> dict[str, int | str]:
    durations: dict[str, int | str] = {
        "max_duration": config.max_duration,
        "eval_interval": config.eval_interval,
        "save_interval": config.save_interval,
        "scheduler.t_warmup": config.scheduler.t_warmup,
    }
    if config.scheduler.t_max is not None:
        durations["scheduler.t_max"] = config.scheduler.t_max
    durations |= {f"length_curriculum[{i}].until": stage.until for i, stage in enumerate(config.length_curriculum)}
    return durations


def _in_steps(duration: Duration, name: str, tokens_per_step: int, epoch: Fraction | None) -> int:
    try:
        return duration.steps(tokens_per_step, epoch)
    except InputError as e:
        raise InputError(f"{name}={e}") from e


def _paths(config: TrainConfig) -> dict[str, str | None]:
    """Every field that names a file or folder, by its dotted key."""
    paths = {
        "save_folder": config.save_folder,
        "load_path": config.load_path,
        "tokenizer.name": config.tokenizer.name,
    }
    for section, loader in (("train_loader", config.train_loader), ("eval_loader", config.eval_loader)):
        if loader is not None:
            paths[f"{section}.dataset.local"] = loader.dataset.local
            for i, entry in enumerate(loader.dataset.mix or []):
                paths[f"{section}.dataset.mix[{i}].local"] = entry.local
    return paths


def _check_run_name(name: str) -> None:
    if not name:
        raise InputError("run_name is required: set it in the file, as run_name=NAME, or in the environment, RUN_NAME")
    if name in (".", "..") or name.startswith("-") or len(name) > 200 or re.search(r"[/\\\x00-\x1f]", name):
        raise InputError(f"run_name={name!r} has to be one folder name, without slashes; use letters, digits, - and _")


def _skip_limit(on_nonfinite: str) -> int:
    match = re.fullmatch(r"stop|skip:(\d{1,9})", on_nonfinite)
    if match is None:
        raise InputError(
            f'on_nonfinite={on_nonfinite!r}; expected "stop", or "skip:N" to leave out up to N bad batches'
        )
    return int(match[1] or 0)


def _check_mesh(config: TrainConfig, world_size: int) -> None:
    check_sizes(world_size, config.fsdp_config, config.context_parallel_size)
    if config.fsdp_config.cpu_offload and not _on_cuda(config):
        raise InputError("fsdp_config.cpu_offload=true needs a GPU to offload from; set it to false")


def _check_context(config: TrainConfig, model_config: MptConfig) -> None:
    size = config.context_parallel_size
    lengths = {f"length_curriculum[{i}].max_seq_len": s.max_seq_len for i, s in enumerate(config.length_curriculum)}
    for name, length in (lengths | {"max_seq_len": config.max_seq_len}).items():
        if size > length:
            raise InputError(
                f"context_parallel_size={size} processes cannot share the {length} tokens of a sequence ({name}); "
                "lower it"
            )
    if size > 1 and model_config.attn_config.prefix_lm:
        raise InputError(
            f"context_parallel_size={size} with model.attn_config.prefix_lm=true: a prefix is seen from both sides, "
            "which processes that share a sequence do not support; set one of them back"
        )


def _check_kernels(config: TrainConfig) -> None:
    device = "cuda" if _on_cuda(config) and torch.cuda.is_available() else "cpu"
    in_environment = "MPT_KERNELS" in os.environ  # which goes before the file's
    try:
        backend.choose("flash_attention", torch.empty(0, device=device), None if in_environment else config.kernels)
    except ValueError as e:
        raise InputError(f"{'environment' if in_environment else f'kernels={config.kernels}'}: {e}") from e


def _rows_per_rank(config: TrainConfig, world_size: int) -> int:
    """Sequences of a global batch that a rank reads, alone or with those that share them."""
    batch, context = config.global_train_batch_size, config.context_parallel_size
    readers = world_size // context
    if batch % readers:
        near = max(batch // readers, 1) * readers
        by = f"{readers} groups of {context} processes" if context > 1 else f"{readers} processes"
        raise InputError(
            f"global_train_batch_size={batch} is not divisible by the {by}; use {near} or "
            f"{near + readers}, or another number of processes"
        )
    return batch // readers


def _micro_batch(config: TrainConfig, model_config: MptConfig, world_size: int, per_rank: int) -> int:
    configured = config.device_train_microbatch_size
    if configured == "auto":
        return choose_micro_batch(config, model_config, world_size, _device_bytes(config))
    size = min(int(configured), per_rank)  # a recipe made for fewer ranks stays right on more
    if per_rank % size:
        near = ", ".join(str(n) for n in sorted(sorted(divisors(per_rank), key=lambda n: abs(n - size))[:3]))
        raise InputError(
            f"device_train_microbatch_size={size} does not divide the {per_rank} sequences of each process "
            f"(global_train_batch_size={config.global_train_batch_size} over "
            f"{world_size // config.context_parallel_size}); use {near} or auto"
        )
    return size


def _on_cuda(config: TrainConfig) -> bool:
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def _device_bytes(config: TrainConfig) -> int | None:
    """Memory of this rank's GPU in bytes, down to whole GiB so that equal GPUs agree; None on a CPU."""
    if not _on_cuda(config) or not torch.cuda.is_available():
        return None
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    return torch.cuda.get_device_properties(index).total_memory // 2**30 * 2**30


def _find_tokenizer(config: TrainConfig, notes: list[str]) -> tuple[Path | None, str | None]:
    """The tokenizer.json of the run, which can be read, and its SHA-256: the named one, else the copy beside the
    training shards, or for examples the one in load_path.

    For shards a hub name is looked up in the local cache only: training needs no network, and the shards carry the
    tokenizer. One that is not there could not be compared with the shards', which `notes` says then.
    """
    name = config.tokenizer.name
    if config.train_loader.name == "finetuning":
        found = _beside_weights(config.load_path) if name is None else find_tokenizer(name)
        return found, None if found is None else file_sha256(found)
    if name is not None:
        path: Path | None = None
        if Path(name).exists() or name.endswith(".json") or looks_like_path(name):
            path = find_tokenizer(name)
        else:
            path = _cached_tokenizer(name)
        if path is not None:
            open_tokenizer(path)
            return path, file_sha256(path)
    dataset = config.train_loader.dataset
    folder = dataset.mix[0].local if dataset.mix else dataset.local
    if folder is None:
        return None, None
    manifest = read_manifest(folder)
    beside = manifest.folder / manifest.tokenizer_file
    if name is not None:
        notes.append(f"tokenizer.name={name} is not in the local cache, so it was not compared with the shards'")
    if not beside.is_file():
        return None, manifest.tokenizer_sha256
    if file_sha256(beside) != manifest.tokenizer_sha256:
        raise InputError(
            f"{beside} is not the tokenizer that the shards beside it were made with (its SHA-256 is not the "
            "manifest's): copy the folder again, or prepare the data again"
        )
    open_tokenizer(beside)
    return beside, manifest.tokenizer_sha256


def _vocabulary_note(
    config: TrainConfig, model_config: MptConfig, data: TokenBatches | ExampleBatches, tokenizer: Path | None
) -> Iterator[str]:
    """What a reader should know where the shards' tokenizer, not compared with a named one, has far fewer tokens."""
    if isinstance(data, ExampleBatches):
        return
    manifests = [source.shards.manifest for source in data.sources]
    beside = [None, *(manifest.folder / manifest.tokenizer_file for manifest in manifests)]
    compared = config.tokenizer.name is not None and tokenizer not in beside
    largest = max(manifest.vocab_size for manifest in manifests)
    if not compared and model_config.vocab_size > 2 * largest:
        yield (
            f"model.vocab_size={model_config.vocab_size:,}, but the tokenizer of the shards has {largest:,} tokens: "
            "was another tokenizer meant? The other rows of the embedding stand for nothing"
        )


def _beside_weights(load_path: str | None) -> Path | None:
    """The tokenizer.json in the folder of a model, or in the export of a run."""
    if load_path is None:
        return None
    folder = local_path(load_path)
    return next((path for path in (folder / TOKENIZER, folder / "export" / TOKENIZER) if path.is_file()), None)


def _check_sample_prompt(config: TrainConfig, model_config: MptConfig, tokenizer_path: Path | None) -> None:
    if config.sample_prompt and tokenizer_path is not None and model_config.learned_positions:
        tokens = len(open_tokenizer(tokenizer_path).encode(config.sample_prompt).ids)
        if tokens > config.max_seq_len:
            raise InputError(
                f"sample_prompt has {tokens} tokens; learned positions end at max_seq_len={config.max_seq_len}: "
                "shorten it"
            )


def _check_sample_prompts(
    config: TrainConfig, model_config: MptConfig, tokenizer: Path | None, data: TokenBatches | ExampleBatches
) -> None:
    """Learned positions end at max_seq_len; a prompt that does not fit must not end the run when all is done."""
    if not (model_config.learned_positions and isinstance(data, ExampleBatches) and tokenizer is not None):
        return
    for asked in samples.questions(config.train_loader.dataset, config.sample_prompts, Encoder(tokenizer), data):
        if len(asked.ids) > config.max_seq_len:
            raise InputError(
                f"sample_prompts: one has {len(asked.ids)} tokens; learned positions end at "
                f"max_seq_len={config.max_seq_len}: shorten it"
            )


def _cached_tokenizer(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError as e:
        raise InputError(f"tokenizer.name={name}: neither a file or folder here nor a hub name") from e
    return Path(found) if isinstance(found, str) else None


def _check_load_path(load_path: str, model_config: MptConfig) -> None:
    if not Path(load_path).exists() and not is_hub_name(load_path):
        raise InputError(
            f"load_path={load_path} does not exist; give a checkpoint, a run folder, a Hugging Face directory, a name "
            "on the hub or a Composer .pt file"
        )
    expected, found = parameter_shapes(model_config), describe(load_path)
    if model_config.tie_word_embeddings:
        found = {name: shape for name, shape in found.items() if name != "lm_head.weight"}
    compare_shapes(load_path, expected, found)


def _no_recipe(path: Path) -> InputError:
    recipes = sorted(recipe.name for recipe in RECIPES.glob("*.yaml"))
    if path.is_dir():
        return InputError(f"{path} is a folder; give a recipe in it, such as yaml/mpt-125m.yaml")
    close = difflib.get_close_matches(path.stem, [recipe.removesuffix(".yaml") for recipe in recipes], n=1, cutoff=0.5)
    hint = f"; did you mean yaml/{close[0]}.yaml?" if close else ""
    listing = f"; recipes in yaml/: {', '.join(recipes)}" if recipes else ""
    return InputError(f"recipe {path} does not exist{hint or listing}")
