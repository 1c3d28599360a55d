"""The plan's numbers against independent counts: saved tensors, parameters, the arithmetic of sharding."""

import dataclasses
import gc
import importlib
import itertools
from pathlib import Path

import pytest
import torch

from mpt import MptConfig, MptForCausalLM
from trainer import InputError
from trainer.config import load_config, validate
from trainer.plan import GIB, LOSS_CHUNK, choose_micro_batch, divisors, memory, plan, saved_per_block

plan_module = importlib.import_module("trainer.plan")

MODEL = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 512, "max_seq_len": 32}


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch):
    """The same numbers on every machine, from any folder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(Path(__file__).parent.parent)


def make(*overrides, recipe="yaml/mpt-7b.yaml"):
    return load_config(recipe, overrides)


def of(config, world, micro_batch=1):
    return memory(config, validate(config, world, open_data=False).model_config, world, micro_batch)


def saved_bytes(model_config, mode, batch, prepare=lambda model: None):
    """Bytes of distinct activations alive between forward and backward, parameters left out.

    Autograd's own are seen by its hooks, those that selective checkpointing keeps by the garbage collector.
    """
    model = MptForCausalLM(model_config).train()
    prepare(model)
    model.transformer.set_activation_checkpointing(mode)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    ids = torch.randint(0, model_config.vocab_size, (batch, model_config.max_seq_len))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, return_logits=False).loss
    gc.collect()  # what other tests left must not be here now and gone at the next call
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.device.type == "cpu":
            pack(thing)
    loss.backward()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("change", [{}, {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2}},
                                    {"attn_config": {"clip_qkv": 6.0}}, {"expansion_ratio": 2}])  # fmt: skip
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_a_blocks_activations_are_what_autograd_keeps(mode, change):
    """One more block keeps the formula's bytes."""
    few = MptConfig.from_dict(MODEL | change)
    many = MptConfig.from_dict(MODEL | change | {"n_layers": 5})

    def blocks(batch):
        return saved_bytes(many, mode, batch) - saved_bytes(few, mode, batch)

    measured = (blocks(6) - blocks(2)) / 3  # the difference leaves out what does not grow, such as random states
    expected = saved_per_block(few, tokens=4 * 32, width=4)[mode]
    assert measured == pytest.approx(expected, rel=0.02)


def test_the_losss_chunk_is_the_kernels():
    module = importlib.import_module("kernels.linear_cross_entropy")
    for (device, limit), dtype in itertools.product(LOSS_CHUNK.items(), (torch.float32, torch.bfloat16)):
        ((start, end), *_) = module._chunks(10**7, 50432, None, torch.device(device), dtype)
        assert 0 <= limit // (50432 * dtype.itemsize) - (end - start) < 10


def test_states_are_sharded_and_everything_else_is_not():
    one, eight = of(make("global_train_batch_size=1"), 1), of(make("global_train_batch_size=8"), 8)
    n = 6_649_286_656
    assert one["weights"] == one["gradients"] == 4 * n and one["optimizer state"] == 8 * n
    for kind in ("weights", "gradients", "optimizer state"):
        assert eight[kind] == pytest.approx(one[kind] / 8, abs=8)
    for kind in ("block inputs", "gathered weights", "one block's work"):
        assert eight[kind] == one[kind]


def test_replicas_hold_whole_copies():
    assert of(make("fsdp_config.replicate=2"), 8)["weights"] == of(make(), 4)["weights"]


def test_lion_keeps_one_state():
    lion = of(make("optimizer.name=decoupled_lionw", "optimizer.eps=null"), 8)
    assert lion["optimizer state"] == lion["weights"]


def test_accumulation_keeps_the_whole_models_gradients():
    """FSDP2 sums over ranks after the last micro-batch only; until then every rank holds them all."""
    config = make()
    assert of(config, 8)["unreduced gradients"] == 4 * 6_649_286_656
    assert of(make("fsdp_config.reduce_dtype=bf16"), 8)["unreduced gradients"] == 2 * 6_649_286_656
    assert of(config, 8, micro_batch=128)["unreduced gradients"] < 3 * GIB


def test_what_settings_do():
    base = of(make(), 8)
    assert of(make("activation_checkpointing=none"), 8)["activations"] > 8 * base["block inputs"]
    selective = of(make("activation_checkpointing=selective"), 8)["block inputs"]
    assert base["block inputs"] < selective < 3 * base["block inputs"]
    assert of(make("fsdp_config.reshard_after_forward=false"), 8)["gathered weights"] > 6 * base["gathered weights"]
    assert of(make("precision=fp32"), 8)["gathered weights"] == 2 * base["gathered weights"]
    assert of(make(), 8, micro_batch=2)["block inputs"] == 2 * base["block inputs"]
    lion = ("optimizer.name=decoupled_lionw", "optimizer.eps=null")
    halved = of(make(*lion, "optimizer.state_dtype=bf16"), 8)["optimizer state"]
    assert 2 * halved == of(make(*lion), 8)["optimizer state"]


@pytest.mark.parametrize("gib", [24, 40, 80, 141])
def test_auto_is_the_largest_that_fits(gib):
    config = make()
    model = validate(config, 64, open_data=False).model_config
    chosen = choose_micro_batch(config, model, 64, gib * GIB)
    assert 16 % chosen == 0
    fits = [n for n in (1, 2, 4, 8, 16) if sum(memory(config, model, 64, n).values()) <= 0.92 * gib * GIB]
    assert chosen == (max(fits) if fits else 1)


@pytest.mark.parametrize("number", [1, 2, 12, 36, 97, 360])
def test_divisors(number):
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_a_huge_batch_is_planned_at_once():
    config = make("global_train_batch_size=2147483647", "device_train_microbatch_size=auto")
    assert validate(config, 1, open_data=False).micro_batch == 1


def test_auto_without_room_is_one_and_the_plan_says_so(monkeypatch):
    config = make()
    resolved = dataclasses.replace(validate(config, 8, open_data=False), device_bytes=8 * GIB)
    assert choose_micro_batch(config, resolved.model_config, 8, 8 * GIB) == 1
    assert "above the device's 8.00 GiB" in str(plan(config, resolved, 8))


def test_a_run_of_nothing_but_warm_up_is_noted():
    config = make("max_duration=50ba")
    assert "covers the whole run" in str(plan(config, validate(config, 8, open_data=False), 8))


def test_the_text(monkeypatch):
    config = make("device_train_microbatch_size=8", "fsdp_config.replicate=2")
    numbers = plan(config, validate(config, 16, open_data=False), 16)
    text = str(numbers)
    for expected in ("mpt-7b -> runs/mpt-7b", "6,649,286,656", "63,900 steps", "134,008,012,800 tokens",
                     "2 x 8 processes x micro-batch 8 x 8 accumulated", "FLOPs per token", "optimizer state",
                     f"{numbers.total_memory / GIB:,.2f} GiB  in all"):  # fmt: skip
        assert expected in text, expected
    assert numbers.total_memory == sum(numbers.memory.values())


def test_offloaded_states_are_the_hosts(monkeypatch):
    config = make("global_train_batch_size=8")
    config = dataclasses.replace(config, fsdp_config=dataclasses.replace(config.fsdp_config, cpu_offload=True))
    numbers = plan(config, validate(make("global_train_batch_size=8"), 8, open_data=False), 8)
    assert set(numbers.host_memory) == {"weights", "gradients", "optimizer state"}
    assert "optimizer state (host)" in str(numbers) and "weights" not in numbers.memory


def long(*overrides):
    """The 7b on books, of one sequence per process."""
    model = {"clip_qkv": "6", "alibi_bias_max": "16"}
    settings = [f"model.attn_config.{key}={value}" for key, value in model.items()]
    lion = ["optimizer.name=decoupled_lionw", "optimizer.eps=null", "global_train_batch_size=8"]
    return make("max_seq_len=65536", "device_train_microbatch_size=1", *lion, *settings, *overrides)


def test_what_long_sequences_take_less_with():
    """Each proposed setting takes what is said when it is set; what is offloaded is the host's."""
    config = long()
    resolved = validate(config, 8, open_data=False)
    plain = plan(config, resolved, 8)
    assert plain.total_memory == sum(of(config, 8).values())
    everything = "all of these but optimizer.offload"
    assert set(plain.less) > {"activation_offload=true", "mlp_chunk_size=8192", "optimizer.offload=true", everything}
    for setting in ("activation_offload=true", "mlp_chunk_size=8192", "optimizer.offload=true"):
        other = long(setting)
        assert plan(other, validate(other, 8, open_data=False), 8).total_memory == plain.less[setting]
        assert plain.less[setting] < plain.total_memory and setting in str(plain)
    offloaded = long("activation_offload=true")
    host = plan(offloaded, validate(offloaded, 8, open_data=False), 8).host_memory
    assert host == {"block inputs": 32 * 65536 * 4096 * 2}
    assert plain.less[everything] < min(size for name, size in plain.less.items() if name != everything)


def test_an_offloaded_state_is_the_hosts_but_for_a_piece():
    lion = ["optimizer.name=decoupled_lionw", "optimizer.eps=null"]
    for settings, width in ((["optimizer.offload=true"], 8), ([*lion, "optimizer.offload=true"], 4)):
        config = make("global_train_batch_size=8", *settings)
        numbers = plan(config, validate(config, 8, open_data=False), 8)
        assert numbers.host_memory == {"optimizer state": -(-6_649_286_656 // 8) * width}
        assert "optimizer state" not in numbers.memory and "optimizer.offload=true" not in numbers.less
    # In the step itself a piece is on the device, here of one parameter, which is larger than the usual.
    step = plan_module._moments(config, validate(config, 1, open_data=False).model_config, 1, 1)[-1]
    assert step["optimizer step"] == pytest.approx(50432 * 4096 * 4, rel=1e-6)
    assert step["optimizer step"] > plan_module.OFFLOAD_PIECE
    with pytest.raises(InputError, match=r"optimizer.offload=true has no effect with fsdp_config.cpu_offload=true"):
        make("optimizer.offload=true", "fsdp_config.cpu_offload=true")


def test_offloading_the_states_leaves_the_gradients_that_wait():
    """With accumulation they are the whole model's, on the device, whatever is in host memory."""
    settings = ["global_train_batch_size=64", "activation_offload=true", "mlp_chunk_size=8192"]
    config = dataclasses.replace(long(*settings), fsdp_config=dataclasses.replace(long().fsdp_config, cpu_offload=True))
    numbers = plan(config, validate(long(*settings), 8, open_data=False), 8)
    assert numbers.total_memory > numbers.memory["unreduced gradients"] == 4 * 6_649_286_656
    assert set(numbers.host_memory) == {"weights", "gradients", "optimizer state", "block inputs"}


def test_a_chunked_mlp_keeps_no_hidden_layer():
    model = validate(long(), 8, open_data=False).model_config
    whole, chunked = (saved_per_block(model, 100, 2, chunked=on)["none"] for on in (False, True))
    assert whole - chunked == 100 * 2 * 4 * 4096
