"""One training run, from a configuration to a finished folder; `run` reads top to bottom."""

import contextlib
import fcntl
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError

import kernels.backend
from mpt import MptConfig, MptForCausalLM
from mpt.config import count_parameters
from mpt.context import ContextSplit, slopes_of
from mpt.initialize import init_weights
from mpt.manifest import list_steps
from trainer import samples
from trainer.checkpoint import Checkpointer, export_hf, load_weights
from trainer.config import Resolved, TrainConfig, build_model_config, config_to_yaml, validate
from trainer.curriculum import length_at
from trainer.data import ExampleBatches, Prefetcher, TokenBatches, unigram_entropy
from trainer.data.examples import Encoder
from trainer.data.tokenizer import open_tokenizer, settings_files
from trainer.errors import InputError
from trainer.evaluate import forward_arguments
from trainer.history import replace_file
from trainer.loggers import Loggers
from trainer.lora import LoraConfig, adapters, add_adapters, base_sha256, count_adapters, merged, save_adapters
from trainer.metrics import StepTimer, TokenAccuracy, flops_per_token, memory_gib, peak_flops, profiler
from trainer.optim import OptimizerConfig, build_optimizer, clip_grad_norm, lr_multiplier, set_lr
from trainer.parallel import (
    World,
    compile_blocks,
    give_back_freed_memory,
    join_world,
    materialize,
    shard_model,
    synchronise_gradients,
    world_size,
)
from trainer.plan import plan

Data = TokenBatches | ExampleBatches

NON_FINITE = 3  # exit code
SAMPLE_TOKENS = 120
REPEAT_S = 2.0  # a signal repeated within so many seconds is the same request


@dataclass
class TrainState:
    """All that a run carries from step to step besides parameters and optimizer state.

    step: optimizer steps behind it. tokens: input tokens they read. skipped: how many of them were refused
    because loss or gradient was not finite. evaluated: the step of the last evaluation.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    evaluated: int = 0


class StopSignals:
    """SIGINT and SIGTERM ask for a stop at the end of the step; another one later than REPEAT_S kills.

    Batch systems signal every process and torchrun passes its own on: one request may arrive twice.
    """

    def __init__(self) -> None:
        self.received = 0
        self._first = 0.0  # when, in seconds of the monotonic clock
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._first = number, now
        elif now - self._first > REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def run(config: TrainConfig) -> int:
    """Train as configured; resume where the run folder already holds a checkpoint.

    Returns the process's exit code: 0 done, 3 stopped at a non-finite loss or gradient, 130 or 143 stopped by SIGINT
    or SIGTERM after saving.
    Raises InputError for anything that the user has to change.
    """
    resolved = validate(config, world_size())
    with join_world(config.device, config.fsdp_config, config.dist_timeout, config.context_parallel_size) as world:
        with _own_folder(resolved.run_folder, world), _out_of_memory_advice(config, resolved):
            return _run(config, resolved, world)


def _run(config: TrainConfig, resolved: Resolved, world: World) -> int:
    if not config.autoresume and (steps := list_steps(resolved.run_folder / "checkpoints")):
        raise InputError(
            f"autoresume=false, but {resolved.run_folder} holds a run, at step {steps[0][0]}; "
            "give this one another run_name or save_folder, or go on with autoresume=true"
        )
    if world.sum(resolved.micro_batch) != [world.size * resolved.micro_batch]:
        raise InputError(
            "device_train_microbatch_size=auto gives different sizes on this run's unlike devices "
            f"({resolved.micro_batch} on process {world.rank}); set it to a number that suits the smallest"
        )
    kernels.backend.set_default(config.kernels)
    if world.device.type == "cpu":
        give_back_freed_memory()
    model = _sharded_model(config, resolved.model_config, world)
    optimizer = build_optimizer(config.optimizer, model)
    train_data, eval_data = resolved.train_data, resolved.eval_data
    assert train_data is not None

    checkpointer = Checkpointer(
        resolved.run_folder / "checkpoints",
        keep=config.save_num_checkpoints_to_keep,
        fingerprint=_fingerprint(config, resolved, train_data),
        defaults={
            "model": MptConfig().to_dict(extra=False),
            "optimizer": asdict(OptimizerConfig()),
            "lora": asdict(LoraConfig()),
        },
        asynchronous=config.save_async,
        on_error=config.on_save_error,
    )
    state = TrainState()
    if config.lora is not None:
        assert config.load_path is not None
        load_weights(config.load_path, model)  # checkpoints hold the adapters alone
    restored = checkpointer.restore(model, optimizer)
    if restored is not None:
        state = TrainState(**restored)
    elif config.lora is not None:
        init_weights(model, config.seed, only=adapters(model))
    elif config.load_path:
        load_weights(config.load_path, model)
    else:
        init_weights(model, config.seed)

    loggers = _open_loggers(config, resolved, state, world)
    loggers.message(str(plan(config, resolved, world.size)))
    loggers.message(f"data: {train_data.description()}")
    if isinstance(eval_data, ExampleBatches):
        loggers.message(f"held out: {eval_data.description()}")
    if restored is not None:
        loggers.message(f"resuming after step {state.step} of {resolved.steps}")
        if state.step > resolved.steps:
            loggers.message(
                f"warning: the run is already longer than max_duration={config.max_duration}, which is "
                f"{resolved.steps} steps: it trains no further, and is only evaluated and exported, as it is after "
                f"step {state.step}"
            )
    loop = Loop(config, resolved, world, model, optimizer, train_data, eval_data, checkpointer, loggers, state)
    try:
        code = loop.run()
        if code == 0:
            _finish(loop)
    finally:
        try:
            checkpointer.close()
        finally:
            loggers.close(loop.summary())
    return code


def _sharded_model(config: TrainConfig, model_config: MptConfig, world: World) -> MptForCausalLM:
    """The model, sharded and on its device, not yet initialised: built on meta, so no rank ever holds it whole."""
    with torch.device("meta"):
        model = MptForCausalLM(model_config)
        if config.lora is not None:
            # The blocks compute in this dtype: a base that does not train needs no other.
            bf16 = config.precision == "amp_bf16"
            add_adapters(model, config.lora, base_dtype=torch.bfloat16 if bf16 else torch.float32)
    model.transformer.set_activation_checkpointing(config.activation_checkpointing, offload=config.activation_offload)
    model.transformer.set_mlp_chunk_size(config.mlp_chunk_size)
    if config.compile:
        compile_blocks(model)
    shard_model(model, world.mesh, config.fsdp_config, bf16=config.precision == "amp_bf16")
    materialize(model, world.device, cpu_offload=config.fsdp_config.cpu_offload)
    return model


def _fingerprint(config: TrainConfig, resolved: Resolved, data: Data) -> dict[str, Any]:
    """What a run must not change when it resumes. Durations, intervals, loggers, micro-batch, offloading are free."""
    fingerprint = {
        "model": resolved.model_config.to_dict(extra=False),
        "data": data.fingerprint(),
        "seed": config.seed,
        "optimizer": {name: value for name, value in asdict(config.optimizer).items() if name != "offload"},
        "global_train_batch_size": config.global_train_batch_size,
    }
    if config.lora is not None:
        assert config.load_path is not None
        base = base_sha256(config.load_path, resolved.model_config)
        fingerprint["lora"] = asdict(config.lora) | {"base_sha256": base}
    return fingerprint


def _open_loggers(config: TrainConfig, resolved: Resolved, state: TrainState, world: World) -> Loggers:
    text = config_to_yaml(config)
    error: Exception | None = None
    if world.rank == 0:
        path = resolved.run_folder / "config.yaml"
        try:
            replace_file(path, text.encode())
        except OSError as e:
            error = InputError(f"{path} cannot be written ({e.strerror}); make room, or choose another save_folder")
    world.agree(error)
    return Loggers(
        config.loggers,
        resolved.run_folder,
        rank=world.rank,
        resume_step=state.step,
        run_name=config.run_name,
        run_config=text,
        total_steps=resolved.steps,
    )


@contextlib.contextmanager
def _own_folder(folder: Path, world: World) -> Iterator[None]:
    """Make the run folder, prove that it can be written, and keep a second run out of it while this one lives."""
    error: Exception | None = None
    lock = None
    if world.rank == 0:
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            # A link is not followed, and nothing cut: what is found there may be anyone's.
            lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            error = InputError(f"another run is writing to {folder}; give this one its own run_name or save_folder")
        except OSError as e:
            error = InputError(f"save_folder {folder} cannot be written ({e.strerror}); choose another save_folder")
    try:
        world.agree(error)
        yield
    finally:
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def _out_of_memory_advice(config: TrainConfig, resolved: Resolved) -> Iterator[None]:
    """Turn the allocators' errors (torch's, Python's and numpy's) into the settings that would help most."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        known = isinstance(e, torch.OutOfMemoryError | MemoryError)
        if not known and "DefaultCPUAllocator: can't allocate" not in str(e):
            raise
        reason = (str(e) or type(e).__name__).splitlines()[0]
        advice = []
        if resolved.micro_batch > 1:
            advice.append(f"device_train_microbatch_size={resolved.micro_batch // 2}")
        if config.activation_checkpointing != "full":
            advice.append("activation_checkpointing=full")
        if config.precision != "amp_bf16":
            advice.append("precision=amp_bf16")
        advice.append("more processes (each holds a smaller shard)")
        advice.append(f"context_parallel_size above {config.context_parallel_size} (each holds a part of a sequence)")
        advice.append(f"max_seq_len below {config.max_seq_len}")
        raise InputError(
            f"out of memory with device_train_microbatch_size={resolved.micro_batch}, "
            f"max_seq_len={config.max_seq_len}, precision={config.precision}, "
            f"activation_checkpointing={config.activation_checkpointing}: {reason}\n"
            f"what would help most: {'; '.join(advice[:3])}"
        ) from e


@dataclass
class Loop:
    """The training loop of one process: its parts, and what happens in a step, in order."""

    config: TrainConfig
    resolved: Resolved
    world: World
    model: MptForCausalLM
    optimizer: torch.optim.Optimizer
    train_data: Data
    eval_data: Data | None
    checkpointer: Checkpointer
    loggers: Loggers
    state: TrainState

    def __post_init__(self) -> None:
        self.signals = StopSignals()
        self.timer = StepTimer(self.world.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        compute_dtype = torch.bfloat16 if self.config.precision == "amp_bf16" else torch.float32
        self.slopes = slopes_of(self.resolved.model_config)
        self.peak_flops = peak_flops(self.world.device, compute_dtype)
        self.last_eval: dict[str, float | None] = {}
        self.unigram_entropy: float | None = None
        self.started = time.perf_counter()
        self.first_step = self.state.step
        self.reported_tokens = self.state.tokens
        self.eos_id = self.train_data.eos_id

    def run(self) -> int:
        """Steps until the duration is reached or something stops it. Returns the exit code of `trainer.run.run`."""
        resolved, state = self.resolved, self.state
        rows = self._micro_batches()
        depth = self.config.train_loader.num_workers
        batches = Prefetcher(self.train_data, lambda step: rows, start_step=state.step, depth=depth)
        profile = profiler(self.config.profile, resolved.run_folder / "profile", rank=self.world.rank)
        self.model.train()
        with self.signals, contextlib.closing(batches), profile as profile_step:
            if self.config.eval_first and state.step == 0:
                self.evaluate()
            if state.evaluated < state.step:
                self._evaluate_if_due()  # a signal took its place
            while state.step < resolved.steps:
                with self.timer("data"):
                    arrays = batches.get(state.step)
                    read = sum(self.train_data.tokens(array) for array in arrays) if self.world.counts else 0
                    length = length_at(state.step, resolved.stages, self.config.max_seq_len)
                    if resolved.stages:
                        arrays = [array.reshape(-1, length) for array in arrays]
                    micro_batches = [
                        forward_arguments(self.train_data, array, resolved.model_config) for array in arrays
                    ]
                    counted = sum(self._counted(batch) for batch in micro_batches)
                counted_everywhere, read_everywhere, stop, save_failed = self.world.sum(
                    counted, read, self.signals.received, self.checkpointer.failed
                )
                if save_failed:
                    self.checkpointer.wait()  # raises: a save failed in the background, and on_save_error is "stop"
                if stop:
                    return self._stop()
                loss = self._forward_backward(micro_batches, max(counted_everywhere, 1.0))
                row = self._update(loss)
                if row is None:
                    return NON_FINITE
                state.step += 1
                state.tokens += int(read_everywhere)
                profile_step()
                self._report(row)
                self._evaluate_if_due()
                if resolved.save_every and state.step % resolved.save_every == 0 and state.step < resolved.steps:
                    self.save()
            self.save()  # before the evaluation, which may take long
            self.evaluate()
            if any(self.world.sum(self.signals.received)):
                return self._stop()
        if not self._saved():
            self.loggers.message(f"warning: the last step, {state.step}, is in no checkpoint")
        return 0

    def _micro_batches(self) -> list[range]:
        """This rank's rows of every global batch, a range per micro-batch. Ranks that share sequences have the same."""
        per_rank = self.config.global_train_batch_size // self.world.data_size
        first = self.world.data_rank * per_rank
        size = self.resolved.micro_batch
        return [range(first + i, first + min(i + size, per_rank)) for i in range(0, per_rank, size)]

    def _counted(self, batch: dict[str, torch.Tensor]) -> int:
        """Labels that count, 0 where another of the ranks that share the sequences counts them."""
        return int((batch["labels"][:, 1:] != -100).sum()) if self.world.counts else 0

    def _context(self, batch: dict[str, torch.Tensor]) -> ContextSplit | None:
        """How this rank shares a batch's sequences with others, if it does."""
        if self.world.context is None:
            return None
        masks = {name: batch.get(name) for name in ("attention_mask", "sequence_id")}
        return self.world.context.split(batch["labels"].shape[1], alibi_slopes=self.slopes, **masks)

    def _forward(
        self, batch: dict[str, torch.Tensor], num_items_in_batch: float, context: ContextSplit | None
    ) -> torch.Tensor:
        """The sum of losses over num_items_in_batch, of a batch on the CPU or of this rank's part of its sequences."""
        batch = {k: v.to(self.world.device, non_blocking=True) for k, v in batch.items()}
        out = self.model(
            **batch,
            num_items_in_batch=num_items_in_batch,
            return_logits=False,
            return_dict=True,
            use_cache=False,
            context=context,
        )
        return out.loss

    def _forward_backward(self, micro_batches: list[dict[str, torch.Tensor]], counted: float) -> torch.Tensor:
        """Gradients of the global batch's mean loss; returns this rank's share of that loss, a scalar."""
        # The step's seed makes dropout the same after a resume; ranks differ.
        torch.manual_seed((self.config.seed * 1_000_003 + self.state.step) * 4096 + self.world.rank)
        total = torch.zeros((), device=self.world.device)
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            synchronise_gradients(self.model, last or self.config.fsdp_config.reduce_every_microbatch)
            with self.timer("forward"):
                loss = self._forward(batch, counted, self._context(batch))
            with self.timer("backward"):
                # FSDP averages gradients over ranks, and the loss is already divided by the global count.
                (loss * self.world.size).backward()
            total += loss.detach()
        return total

    def _update(self, loss: torch.Tensor) -> dict[str, float] | None:
        """Clip and step, unless loss or gradient is not finite. Returns the step's row, or None to stop the run."""
        config, state = self.config, self.state
        multiplier = lr_multiplier(
            config.scheduler,
            state.step,
            total_steps=self.resolved.decay_steps,
            warmup_steps=self.resolved.warmup_steps,
        )
        with self.timer("optimizer"):
            grad_norm = float(clip_grad_norm(self.parameters, config.gradient_clip_norm))
            (mean_loss,) = self.world.sum(float(loss))
            if math.isfinite(grad_norm) and math.isfinite(mean_loss):
                set_lr(self.optimizer, multiplier)
                self.optimizer.step()
            elif not self._may_skip(mean_loss, grad_norm):
                self.optimizer.zero_grad()
                return None
            self.optimizer.zero_grad()
        return {"loss": mean_loss, "lr": config.optimizer.lr * multiplier, "grad_norm": grad_norm}

    def _may_skip(self, loss: float, grad_norm: float) -> bool:
        """Count a refused step and say which batch it was; False when the run has to stop."""
        self.state.skipped += 1
        self.loggers.message(
            f"global batch {self.state.step}: loss {loss}, gradient norm {grad_norm} are not finite; "
            "the weights stay as they were"
        )
        if self.state.skipped <= self.resolved.skip_nonfinite:
            return True
        self.state.skipped -= 1
        self.save()
        kept = "is saved" if self._saved() else "could not be saved"
        self.loggers.message(
            f"stopped: on_nonfinite={self.config.on_nonfinite}; the state before this batch {kept}. "
            f"on_nonfinite=skip:{self.state.skipped + 10} would go on without such batches, "
            "a lower optimizer.lr may prevent them"
        )
        return False

    def _report(self, row: dict[str, float]) -> None:
        """Log every log_interval steps, the first and the last."""
        state, interval = self.state, self.config.log_interval
        if state.step % interval and state.step not in (self.first_step + 1, self.resolved.steps):
            return
        window = self.timer.window()
        tokens_per_s = (state.tokens - self.reported_tokens) / window.seconds
        self.reported_tokens = state.tokens
        per_device = tokens_per_s / self.world.size
        length = length_at(state.step - 1, self.resolved.stages, self.config.max_seq_len)
        lora, model_config = self.config.lora, self.resolved.model_config
        flops = flops_per_token(model_config, length, None if lora is None else count_adapters(lora, model_config))
        self.loggers.log(
            {
                "step": state.step,
                "tokens": state.tokens,
                "epoch": state.step * self.config.global_train_batch_size / self.train_data.sequences,
                **row,
                "tokens_per_s": tokens_per_s,
                "tokens_per_s_device": per_device,
                "mfu": per_device * flops / self.peak_flops if self.peak_flops else None,
                "memory_gib": memory_gib(self.world.device),
                **{f"time_{part}_s": seconds / window.steps for part, seconds in window.parts.items()},
            }
        )

    def _evaluate_if_due(self) -> None:
        every, step = self.resolved.eval_every, self.state.step
        if every and step % every == 0 and step < self.resolved.steps:
            self.evaluate()

    def evaluate(self) -> None:
        """Mean loss per token over the validation split, exact: every token once, whatever the number of ranks.

        With eval_subset_num_batches, over that many times the evaluation batch size's first sequences. A signal to stop
        ends it without a result. Of examples the labels are their responses', and their share of right tokens is told.
        """
        if self.eval_data is None:
            return
        self.model.eval()
        total, counted, accuracy = 0.0, 0, TokenAccuracy(self.model)
        of_examples = isinstance(self.eval_data, ExampleBatches)
        batch_size, subset = self.resolved.eval_batch_size, self.config.eval_subset_num_batches
        sequences = None if subset < 0 else subset * batch_size
        with torch.no_grad(), accuracy if of_examples else contextlib.nullcontext():
            part, parts = self.world.data_rank, self.world.data_size
            for array, valid in self.eval_data.eval_batches(part, parts, batch_size, sequences):
                batch = forward_arguments(self.eval_data, array, self.resolved.model_config, valid)
                counted += self._counted(batch)
                context = self._context(batch)
                accuracy.expect(batch["labels"], context)
                total += float(self._forward(batch, 1, context))
                if any(self.world.sum(self.signals.received)):
                    return
        loss_sum, tokens, correct = self.world.sum(total, counted, accuracy.correct)
        loss = loss_sum / max(tokens, 1.0)
        self.last_eval = {
            "eval_loss": loss,
            "eval_perplexity": math.exp(min(loss, 700.0)),
            "eval_token_accuracy": correct / max(tokens, 1.0) if of_examples else None,
        }
        self.state.evaluated = self.state.step
        self.loggers.evaluation({"step": self.state.step, "tokens": self.state.tokens, **self.last_eval})
        self.model.train()
        self.timer.skip()

    def save(self) -> None:
        with self.timer("save"):
            self.checkpointer.save(self.state.step, self.model, self.optimizer, asdict(self.state))

    def _saved(self) -> bool:
        """Wait for the last save; whether the present step is in a checkpoint (a full disk may have prevented it)."""
        self.checkpointer.wait()
        return self.checkpointer.holds(self.state.step)

    def _stop(self) -> int:
        """Save and leave; the exit code names the signal (this rank's, or SIGTERM if another rank received it)."""
        self.save()
        if not self._saved():
            raise InputError(
                f"stopped after step {self.state.step}, which could not be saved (see above); "
                "the same command goes on from the checkpoint before it"
            )
        self.loggers.message(f"stopped after step {self.state.step}; the same command goes on from there")
        return 128 + (self.signals.received or signal.SIGTERM)

    def summary(self) -> dict[str, Any]:
        """What the run's folder says of it at the end."""
        lora, model_config = self.config.lora, self.resolved.model_config
        return {
            "run_name": self.config.run_name,
            "step": self.state.step,
            "total_steps": self.resolved.steps,
            "tokens": self.state.tokens,
            "skipped_steps": self.state.skipped,
            **self.last_eval,
            "unigram_entropy": self.unigram_entropy,
            "parameters": count_parameters(model_config) + (0 if lora is None else count_adapters(lora, model_config)),
            "world_size": self.world.size,
            "device": torch.cuda.get_device_name() if self.world.device.type == "cuda" else "cpu",
            "wall_s": time.perf_counter() - self.started,
            "time_s": self.timer.totals(),
            "memory_gib": memory_gib(self.world.device),
        }


def _finish(loop: Loop) -> None:
    """What a finished run leaves for its user: how good it is, a sample of its text, an export for transformers."""
    config, resolved, folder = loop.config, loop.resolved, loop.resolved.run_folder
    if isinstance(loop.eval_data, TokenBatches):
        shards = loop.eval_data.sources[0].shards
        loop.unigram_entropy = unigram_entropy(shards.manifest.folder, shards.split)
        loop.loggers.message(
            f"validation loss {loop.last_eval['eval_loss']:.4f} nats per token; "
            f"unigram entropy of the validation split {loop.unigram_entropy:.4f} nats"
        )
    if config.lora is not None:
        _save_adapters(loop, config.lora)
    if config.export:
        tokenizer = resolved.tokenizer_path
        tokenizer_files = [tokenizer, *settings_files(tokenizer)] if tokenizer is not None else []
        model_config = build_model_config(config)
        if model_config.eos_token_id is None:
            model_config.eos_token_id = loop.eos_id
        tensors = None
        if config.lora is not None:
            assert config.load_path is not None
            tensors = merged(loop.model, config.lora, config.load_path, model_config, write=loop.world.rank == 0)
        export_hf(loop.model, model_config, folder / "export", tokenizer_files=tokenizer_files, tensors=tensors)
        loop.loggers.message(f"exported for transformers: {folder / 'export'}")
    if isinstance(loop.train_data, ExampleBatches):
        _write_answers(loop)
    elif resolved.tokenizer_path is not None:
        text = _sample(loop, resolved.tokenizer_path)
        loop.loggers.message(f"a sample:\n{text}")
        if loop.world.rank == 0:
            try:
                replace_file(folder / "sample.txt", (text + "\n").encode())
            except OSError as e:
                loop.loggers.message(f"warning: {folder / 'sample.txt'} could not be written ({e.strerror})")


def _save_adapters(loop: Loop, config: LoraConfig) -> None:
    """Write adapter/, in peft's format. Collective."""
    folder, load_path = loop.resolved.run_folder / "adapter", loop.config.load_path
    assert load_path is not None
    error: Exception | None = None
    try:
        save_adapters(loop.model, config, load_path, folder, write=loop.world.rank == 0)
    except (OSError, SafetensorError) as e:
        error = InputError(f"{folder} could not be written: {e}; make room and run the same command again")
    loop.world.agree(error)
    loop.loggers.message(f"adapters in peft's format: {folder}")


def _write_answers(loop: Loop) -> None:
    """The fine-tuned model's answers, into the log and samples.md. Collective."""
    config, path = loop.config, loop.resolved.tokenizer_path
    assert isinstance(loop.train_data, ExampleBatches) and path is not None
    held_out = loop.eval_data if isinstance(loop.eval_data, ExampleBatches) else loop.train_data
    encoder = Encoder(path)
    questions = samples.questions(config.train_loader.dataset, config.sample_prompts, encoder, held_out)
    answers = samples.answer(loop.model, questions, encoder, SAMPLE_TOKENS)
    loop.loggers.message("\n".join(samples.line(q, answer) for q, answer in zip(questions, answers)))
    if loop.world.rank == 0:
        try:
            text = samples.markdown(config.run_name, loop.state.step, questions, answers)
            replace_file(loop.resolved.run_folder / "samples.md", text.encode())
        except OSError as e:
            loop.loggers.message(f"warning: samples.md could not be written ({e.strerror})")


def _sample(loop: Loop, tokenizer_path: Path) -> str:
    """The model's own continuation of `sample_prompt`, or of an EOS. Collective: a sharded forward needs every rank."""
    tokenizer = open_tokenizer(tokenizer_path)
    ids = tokenizer.encode(loop.config.sample_prompt or "").ids or [loop.eos_id]
    model_config = loop.resolved.model_config
    room = model_config.max_seq_len - len(ids) + 1 if model_config.learned_positions else SAMPLE_TOKENS
    loop.model.eval()
    out = loop.model.generate(
        torch.tensor([ids], device=loop.world.device),
        max_new_tokens=min(SAMPLE_TOKENS, room),
        do_sample=True,
        top_k=50,
        eos_token_id=loop.eos_id,
        seed=loop.config.seed,
    )
    return str(tokenizer.decode(out[0].tolist()))
