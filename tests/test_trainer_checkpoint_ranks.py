"""Checkpoints of several processes: bit for bit, at another world size, and one rank's trouble known to all.

The checks are plain functions `ranks_*`, run in one launch per world size and reported one by one.
"""

import json
import os
import resource
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from checkpoint_toys import FINGERPRINT, Messages, digests, flip_bit, make, opened, save_steps, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from mpt import MptConfig, MptForCausalLM
from mpt.initialize import init_weights
from mpt.manifest import list_steps, read_manifest
from trainer.checkpoint import Checkpointer, describe, export_hf, load_weights, verify
from trainer.errors import InputError
from trainer.optim import OptimizerConfig, build_optimizer
from trainer.parallel import FsdpConfig, materialize, shard_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def ranks_round_trip(folder):
    for name, lion in (("adamw", False), ("lion", True)):
        model, optimizer = make(lion=lion)
        saved = save_steps(folder / name, model, optimizer, [1, 2], asynchronous=True, keep=1)
        other, other_optimizer = make(seed=5, lion=lion)
        with opened(folder / name) as checkpointer:
            assert checkpointer.restore(other, other_optimizer)["step"] == 2
        assert digests(other, other_optimizer) == saved[2]
        local = {n: t.to_local() for n, t in other.state_dict().items() if isinstance(t, DTensor)}
        assert all(torch.equal(t, model.state_dict()[n].to_local()) for n, t in local.items())
        train(model, optimizer, 2)
        train(other, other_optimizer, 2)
        assert digests(other, other_optimizer) == digests(model, optimizer)
        if dist.get_rank() == 0:
            assert len(read_manifest(folder / name / "step-2").files) == dist.get_world_size() + 1
            assert [step for step, _ in list_steps(folder / name)] == [2]


def ranks_replicated_and_sharded(folder):
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    saved = save_steps(folder, *make(mesh=mesh), [1])
    model, optimizer = make(seed=5)
    with opened(folder) as checkpointer:
        checkpointer.restore(model, optimizer)
    assert digests(model, optimizer) == saved[1]


def ranks_read_another_world_size(folder):
    """`before` was saved by another number of processes, and so will what is written here be read."""
    before = folder.parent / "before"
    model, optimizer = make(seed=5)
    with opened(before) as checkpointer:
        checkpointer.restore(model, optimizer)
    assert digests(model, optimizer) == json.loads((before / "digests.json").read_text())
    load_weights(before, make(seed=6)[0])
    train(model, optimizer, 1)
    with opened(folder) as checkpointer:
        checkpointer.save(1, model, optimizer, {"step": 1})
    found = digests(model, optimizer)
    if dist.get_rank() == 0:
        (folder / "digests.json").write_text(json.dumps(found))


def ranks_file_size_limit_on_one_rank(folder):
    """A real failing write, on the last rank only: all ranks hear of it, and what it was."""
    model, optimizer = make()
    save_steps(folder, model, optimizer, [1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for on_error in ("continue", "stop"):
        said = Messages()
        checkpointer = Checkpointer(
            folder, keep=1, fingerprint=FINGERPRINT, asynchronous=True, on_error=on_error, say=said
        )
        if dist.get_rank() == dist.get_world_size() - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        failed = None
        try:
            checkpointer.save(2, model, optimizer, {})
            checkpointer.wait()
        except InputError as e:
            failed = str(e)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpointer.close()
        text = said[0] if said else failed
        if on_error == "stop" or dist.get_rank() == 0:
            assert f"File too large (process {dist.get_world_size() - 1})" in text, text
        assert (failed is not None) == (on_error == "stop")
        dist.barrier()
        assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-1"]
        assert verify(folder).step == 1
        dist.barrier()


def ranks_damage_seen_by_one_rank(folder):
    saved = save_steps(folder, *make(), [1, 2])
    if dist.get_rank() == 0:
        flip_bit(folder / "step-2" / "__1_0.distcp")
    dist.barrier()
    model, optimizer = make(seed=5)
    said = Messages()
    with opened(folder, say=said) as checkpointer:
        assert checkpointer.restore(model, optimizer)["step"] == 1
    assert digests(model, optimizer) == saved[1]
    assert ("__1_0.distcp is altered" in said) == (dist.get_rank() == 0)


def ranks_fingerprint(folder):
    save_steps(folder, *make(), [1])
    with opened(folder, fingerprint={"seed": 3}) as checkpointer:
        with pytest.raises(InputError, match="seed: 17 -> 3"):
            checkpointer.restore(*make())


def ranks_train_while_saving(folder):
    """Background collectives beside the training's own, save upon save."""
    model, optimizer = make()
    saved = {}
    with opened(folder, asynchronous=True, keep=3) as checkpointer:
        for step in range(1, 7):
            train(model, optimizer, 1)
            checkpointer.save(step, model, optimizer, {"step": step})
            saved[step] = digests(model, optimizer)
    for step in (4, 5, 6):
        other, _ = make(seed=5)
        load_weights(folder / f"step-{step}", other)
        found = digests(other, _)
        assert found == {n: saved[step][n] for n in found}


def mpt_parts(seed):
    config = MptConfig(d_model=24, n_heads=2, n_layers=2, vocab_size=37, max_seq_len=16, no_bias=False)
    with torch.device("meta"):
        model = MptForCausalLM(config)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    shard_model(model, mesh, FsdpConfig(), bf16=False)
    materialize(model, torch.device("cpu"), cpu_offload=False)
    init_weights(model, seed)
    return config, model, build_optimizer(OptimizerConfig(lr=1e-2), model)


def ranks_mpt(folder):
    """The real model and optimizer; its export, gathered parameter by parameter, read back by shards."""
    config, model, optimizer = mpt_parts(1)
    ids = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = digests(model, optimizer)
    with opened(folder / "checkpoints", asynchronous=True) as checkpointer:
        checkpointer.save(2, model, optimizer, {"step": 2})
    _, other, other_optimizer = mpt_parts(2)
    with opened(folder / "checkpoints") as checkpointer:
        checkpointer.restore(other, other_optimizer)
    assert digests(other, other_optimizer) == saved
    assert verify(folder).model == config.to_dict()

    export_hf(model, config, folder / "export")
    dist.barrier()
    weights = {name: digest for name, digest in saved.items() if "/" not in name}
    for path in (folder, folder / "export"):
        _, other, other_optimizer = mpt_parts(2)
        load_weights(path, other)
        assert {name: digest for name, digest in digests(other, other_optimizer).items() if "/" not in name} == weights
        assert describe(path) == {name: tuple(p.shape) for name, p in other.named_parameters()}
    with pytest.raises(InputError, match=r"does not fit the model"):
        load_weights(folder / "export", MptForCausalLM(MptConfig(d_model=24, n_heads=2, n_layers=1, vocab_size=37)))
    if dist.get_rank() == 0:
        (folder / "export" / "config.json").unlink()  # now it is no folder to replace: rank 0 fails, and all say so
    with pytest.raises(InputError, match=r"export could not be written: .*; the checkpoints are unharmed"):
        export_hf(model, config, folder / "export")


CHECKS = {name: check for name, check in globals().items() if name.startswith("ranks_")}


def rank_main(rank, world_size, port, folder, names):
    """One process of a launch: the checks in turn, up to the first that fails; the outcome goes to a file."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    outcome = {}
    for name in names:
        try:
            if rank == 0:
                (folder / name).mkdir()
            dist.barrier()
            CHECKS[name](folder / name)
            outcome[name] = ""
        except BaseException:
            outcome[name] = f"rank {rank}: {traceback.format_exc()}"
            break
    (folder / f"outcome-{rank}.json").write_text(json.dumps(outcome))
    os._exit(0)  # After a failure the other ranks may wait in a collective: they see this one leave.


def launch(folder, world_size, names):
    """Run checks on several ranks; each rank's outcome: check -> "" or what went wrong."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_main, args=(world_size, port, folder, names), nprocs=world_size)
    return [json.loads((folder / f"outcome-{rank}.json").read_text()) for rank in range(world_size)]


def save_alone(folder):
    saved = save_steps(folder, *make(), [1, 2])
    (folder / "digests.json").write_text(json.dumps(saved[2]))


def assert_readable_alone(folder):
    model, optimizer = make(seed=5)
    with opened(folder) as checkpointer:
        assert checkpointer.restore(model, optimizer) == {"step": 1}
    assert digests(model, optimizer) == json.loads((folder / "digests.json").read_text())


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def launched(request, tmp_path_factory):
    """Folder and outcomes, rank by rank, of all checks on 2 (or 4) ranks."""
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    save_alone(folder / "before")
    return folder, launch(folder, request.param, list(CHECKS))


@pytest.mark.parametrize("name", CHECKS)
def test_ranks(launched, name):
    for outcome in launched[1]:
        assert outcome.get(name, "not run: an earlier check failed") == ""


def test_one_rank_reads_what_several_wrote(launched):
    assert_readable_alone(launched[0] / "ranks_read_another_world_size")


@pytest.mark.slow
def test_four_ranks_read_what_two_wrote(tmp_path):
    name = "ranks_read_another_world_size"
    save_alone(tmp_path / "before")
    assert launch(tmp_path, 2, [name]) == [{name: ""}] * 2
    (tmp_path / "four").mkdir()
    (tmp_path / name).rename(tmp_path / "four" / "before")
    assert launch(tmp_path / "four", 4, [name]) == [{name: ""}] * 4
    assert_readable_alone(tmp_path / "four" / name)
