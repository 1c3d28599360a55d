"""Optimizers, schedules and clipping against SPEC's formulas, written out in float64."""

import math
import os
import socket
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import MissingMandatoryValue, OmegaConf
from omegaconf.errors import ValidationError
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from trainer import optim
from trainer.errors import InputError
from trainer.optim import (
    LionW,
    OptimizerConfig,
    SchedulerConfig,
    build_optimizer,
    clip_grad_norm,
    decay_groups,
    lr_multiplier,
    set_lr,
)
from trainer.parallel import leave


class Small(nn.Module):
    """One of each kind: embedding, matrix with bias, norm, a head of its own; and a tied head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 9)
        self.norm = nn.LayerNorm(9)
        self.down = nn.Linear(9, 6, bias=False)
        self.lm_head = nn.Linear(6, 11, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


MULTIPLIERS = (0.0, 0.5, 1.0, 0.7, 0.1)


def adamw_by_hand(params, grads_by_step, *, lr, betas, eps, decay, decayed):
    """DecoupledAdamW, one scalar formula after the other, in float64."""
    (b1, b2), out = betas, {}
    for name, value in params.items():
        p, m, v = value.double().clone(), 0.0, 0.0
        for t, (multiplier, grads) in enumerate(zip(MULTIPLIERS, grads_by_step, strict=True), start=1):
            g = grads[name].double()
            rate = lr * multiplier
            if name in decayed:
                p = p * (1 - rate / lr * decay)
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g * g
            p = p - rate / (1 - b1**t) * m / (v.sqrt() / math.sqrt(1 - b2**t) + eps)
        out[name] = p
    return out


def lion_by_hand(params, grads_by_step, *, lr, betas, decay, decayed):
    """DecoupledLionW in float64."""
    (b1, b2), out = betas, {}
    for name, value in params.items():
        p, m = value.double().clone(), torch.zeros_like(value, dtype=torch.float64)
        for multiplier, grads in zip(MULTIPLIERS, grads_by_step, strict=True):
            g = grads[name].double()
            if name in decayed:
                p = p * (1 - multiplier * decay)
            p = p - lr * multiplier * torch.sign(b1 * m + (1 - b1) * g)
            m = b2 * m + (1 - b2) * g
        out[name] = p
    return out


def some_gradients(model, generator):
    return [
        {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()} for _ in MULTIPLIERS
    ]


def take_steps(model, optimizer, grads_by_step, steps=(0, 1, 2, 3, 4)):
    for i in steps:
        for name, p in model.named_parameters():
            p.grad = grads_by_step[i][name].clone()
        set_lr(optimizer, MULTIPLIERS[i])
        optimizer.step()


def configured(name, **values):
    betas = (0.9, 0.95) if name == "decoupled_adamw" else (0.9, 0.99)
    config = OptimizerConfig(name=name, lr=2e-3, betas=betas, weight_decay=9e-4, **values)
    if name == "decoupled_adamw":
        return config, lambda *a, **k: adamw_by_hand(*a, lr=2e-3, betas=betas, eps=1e-8, decay=9e-4, **k)
    return config, lambda *a, **k: lion_by_hand(*a, lr=2e-3, betas=betas, decay=9e-4, **k)


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("name", ["decoupled_adamw", "decoupled_lionw"])
def test_steps_follow_the_formula(name, decay_all, generator):
    model = Small()
    config, by_hand = configured(name, decay_all=decay_all)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    grads = some_gradients(model, generator)
    take_steps(model, build_optimizer(config, model), grads)
    decayed = set(before) if decay_all else {"up.weight", "down.weight", "lm_head.weight"}
    expected = by_hand(before, grads, decayed=decayed)
    for n, p in model.named_parameters():
        close = {"rtol": 5 * torch.finfo(p.dtype).eps, "atol": 1e-8}  # a step rounds the weight twice, by half of eps
        torch.testing.assert_close(p.detach().double(), expected[n], **close, msg=lambda m, n=n: f"{n}: {m}")


def test_decay_is_the_decoupled_factor_whatever_the_gradient():
    """Zero gradients leave the decay alone: p times the product of 1 - multiplier * weight_decay."""
    for name in ("decoupled_adamw", "decoupled_lionw"):
        model = Small().double()
        before = model.up.weight.detach().clone()
        optimizer = build_optimizer(OptimizerConfig(name=name, lr=3e-4, weight_decay=7e-4), model)
        zeros = [{n: torch.zeros_like(p) for n, p in model.named_parameters()}] * len(MULTIPLIERS)
        take_steps(model, optimizer, zeros)
        factor = math.prod(1 - multiplier * 7e-4 for multiplier in MULTIPLIERS)
        torch.testing.assert_close(model.up.weight.detach(), before * factor, rtol=1e-14, atol=0)


def test_first_step_of_a_warm_up_changes_no_weight(generator):
    for name in ("decoupled_adamw", "decoupled_lionw"):
        model = Small()
        config, _ = configured(name)
        before = [p.detach().clone() for p in model.parameters()]
        take_steps(model, build_optimizer(config, model), some_gradients(model, generator), steps=[0])
        for old, new in zip(before, model.parameters(), strict=True):
            assert torch.equal(old, new)


@pytest.mark.parametrize("name", ["decoupled_adamw", "decoupled_lionw"])
def test_state_dict_continues_bit_for_bit(name, generator):
    torch.manual_seed(3)
    model, copy = Small(), Small()
    copy.load_state_dict(model.state_dict())
    config, _ = configured(name)
    grads = some_gradients(model, generator)
    whole = build_optimizer(config, model)
    take_steps(model, whole, grads)
    first = build_optimizer(config, copy)
    take_steps(copy, first, grads, steps=[0, 1])
    second = build_optimizer(config, copy)
    second.load_state_dict(first.state_dict())
    take_steps(copy, second, grads, steps=[2, 3, 4])
    for a, b in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in whole.state[a].items():
            assert torch.equal(value, second.state[b][key])


@pytest.mark.parametrize("state_dtype", ["adamw", "fp32", "bf16"])
def test_an_offloaded_state_changes_no_bit(state_dtype, generator, monkeypatch):
    """It stays where it is, and visits the parameters' device in pieces."""
    monkeypatch.setattr(optim, "OFFLOAD_PIECE", 200)
    lion = {"name": "decoupled_lionw", "state_dtype": state_dtype} if state_dtype != "adamw" else {}
    torch.manual_seed(0)
    models = [Small(), Small()]
    models[1].load_state_dict(models[0].state_dict())
    plain, offloaded = (
        build_optimizer(OptimizerConfig(lr=1e-2, weight_decay=1e-4, offload=offload, **lion), model)
        for model, offload in zip(models, (False, True))
    )
    groups, steps = offloaded.param_groups, []
    homes = {(p, slot): x for p, state in offloaded.state.items() for slot, x in state.items() if x.dim()}
    kind = type(offloaded).__mro__[2]  # the optimizer itself
    step = kind.step
    monkeypatch.setattr(kind, "step", lambda self: (steps.append(len(self.param_groups[0]["params"])), step(self))[1])
    for multiplier in MULTIPLIERS:
        for ours, theirs in zip(models[0].parameters(), models[1].parameters()):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad.clone()
        set_lr(plain, multiplier)
        set_lr(offloaded, multiplier)
        steps.clear()
        offloaded.step()
        assert sum(steps) == 7 and len(steps) > 2  # there are two groups
        plain.step()
    assert offloaded.param_groups is groups
    for ours, theirs in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(ours, theirs)
        for slot, x in plain.state[ours].items():
            assert torch.equal(x, offloaded.state[theirs][slot])
            assert not x.dim() or homes[theirs, slot] is offloaded.state[theirs][slot]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["decoupled_adamw", "decoupled_lionw"])
def test_an_offloaded_state_is_on_the_host(name):
    models = [Small().cuda(), Small().cuda()]
    models[1].load_state_dict(models[0].state_dict())
    for model, offload in zip(models, (False, True)):
        optimizer = build_optimizer(OptimizerConfig(name=name, lr=1e-2, offload=offload), model)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
    for state in optimizer.state.values():
        assert state["exp_avg"].is_pinned() and not state["exp_avg"].is_cuda
    for ours, theirs in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(ours, theirs)


def test_state_exists_before_the_first_step_and_counts_none():
    model = Small()
    adamw = build_optimizer(OptimizerConfig(lr=1e-3), model)
    lion = build_optimizer(OptimizerConfig(name="decoupled_lionw", lr=1e-4), model)
    for p in model.parameters():
        assert set(adamw.state[p]) == {"step", "exp_avg", "exp_avg_sq"} and adamw.state[p]["step"] == 0
        assert set(lion.state[p]) == {"exp_avg"} and lion.state[p]["exp_avg"].shape == p.shape


def test_decay_groups():
    model = Small()
    decayed, others = decay_groups(model)
    assert {id(p) for p in decayed} == {id(model.up.weight), id(model.down.weight), id(model.lm_head.weight)}
    assert len(decayed) + len(others) == len(list(model.parameters()))
    tied = Small(tied=True)
    assert {id(p) for p in decay_groups(tied)[0]} == {id(tied.up.weight), id(tied.down.weight)}
    tied.up.weight.requires_grad_(False)
    assert {id(p) for p in decay_groups(tied)[0]} == {id(tied.down.weight)}


def test_frozen_parameters_stay_out_and_all_frozen_is_an_error():
    model = Small().requires_grad_(False)
    with pytest.raises(InputError, match="no trainable parameter"):
        build_optimizer(OptimizerConfig(lr=1e-3), model)
    model.norm.requires_grad_(True)
    optimizer = build_optimizer(OptimizerConfig(lr=1e-3), model)
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [(9,), (9,)]


def test_defaults_of_each_optimizer():
    model = Small()
    adamw = build_optimizer(OptimizerConfig(lr=1e-3), model)
    assert isinstance(adamw, torch.optim.AdamW) and adamw.defaults["fused"]
    assert adamw.param_groups[0]["betas"] == (0.9, 0.95) and adamw.param_groups[0]["eps"] == 1e-8
    assert [g["weight_decay"] * 1e-3 for g in adamw.param_groups] == [pytest.approx(1e-5), 0.0]
    lion = build_optimizer(OptimizerConfig(name="decoupled_lionw", lr=1e-4), model)
    assert isinstance(lion, LionW) and lion.param_groups[0]["betas"] == (0.9, 0.99)
    assert [g["weight_decay"] for g in lion.param_groups] == [0.0, 0.0]


def test_a_copied_coupled_weight_decay_is_warned_of(monkeypatch, recwarn):
    with pytest.warns(UserWarning, match=r"weight_decay=0\.1 takes 10\.00% .* is 6e-05 here"):
        build_optimizer(OptimizerConfig(lr=6e-4, weight_decay=0.1), Small())
    monkeypatch.setenv("RANK", "1")
    build_optimizer(OptimizerConfig(lr=6e-4, weight_decay=0.1), Small())
    assert not [w for w in recwarn if "weight_decay" in str(w.message)]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"lr": 0.0}, "optimizer.lr=0.0"),
        ({"lr": -1e-4}, "optimizer.lr=-0.0001"),
        ({"lr": math.nan}, "optimizer.lr=nan"),
        ({"lr": math.inf}, "optimizer.lr=inf"),
        ({"lr": 1e-3, "betas": (0.9, 1.0)}, r"optimizer.betas=\[0.9, 1.0\]"),
        ({"lr": 1e-3, "betas": (-0.1, 0.9)}, "optimizer.betas"),
        ({"lr": 1e-3, "eps": 0.0}, "optimizer.eps=0.0"),
        ({"lr": 1e-3, "eps": 1e-8, "name": "decoupled_lionw"}, "decoupled_lionw has none"),
        ({"lr": 1e-3, "weight_decay": -1.0}, "optimizer.weight_decay=-1.0"),
        ({"lr": 1e-3, "weight_decay": 1.0}, "share of a weight lost per step"),
    ],
)
def test_bad_optimizer_values(values, words):
    with pytest.raises(InputError, match=words):
        OptimizerConfig(**values)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"alpha_f": 1.5}, "scheduler.alpha_f=1.5"),
        ({"alpha_f": -0.1}, "scheduler.alpha_f=-0.1"),
        ({"name": "constant_with_warmup", "alpha_f": 0.1}, "never decays"),
        ({"name": "inv_sqrt_with_warmup", "t_max": "10ba"}, "no end of its own"),
    ],
)
def test_bad_scheduler_values(values, words):
    with pytest.raises(InputError, match=words):
        SchedulerConfig(**values)


@dataclass(frozen=True)
class Both:
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)


def test_sections_work_as_structured_configurations():
    schema = OmegaConf.structured(Both)
    values = {
        "optimizer": {"name": "decoupled_lionw", "lr": "1e-4", "betas": [0.9, 0.99], "weight_decay": 0},
        "scheduler": {"t_warmup": 100, "alpha_f": 0},
    }
    both = OmegaConf.to_object(OmegaConf.merge(schema, values))
    assert both.optimizer == OptimizerConfig(name="decoupled_lionw", lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0)
    assert both.scheduler == SchedulerConfig(t_warmup=100, alpha_f=0.0)
    with pytest.raises(MissingMandatoryValue, match="lr"):
        OmegaConf.to_object(schema)
    for bad in ({"name": "sgd"}, {"betas": [0.9]}, {"lr": "fast"}):
        with pytest.raises(ValidationError):
            OmegaConf.merge(schema, {"optimizer": bad})
    with pytest.raises(InputError, match=r"optimizer\.lr=-1"):
        OmegaConf.to_object(OmegaConf.merge(schema, {"optimizer": {"lr": -1}}))


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, {0: 0.0, 5: 0.5, 10: 1.0, 35: 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 60: 0.55, 110: 0.1, 500: 0.1}),
        ({"alpha_f": 0.0}, {60: 0.5, 110: 0.0}),
        ({"name": "linear_decay_with_warmup"}, {0: 0.0, 9: 0.9, 10: 1.0, 35: 0.75, 60: 0.5, 110: 0.0, 111: 0.0}),
        ({"name": "linear_decay_with_warmup", "alpha_f": 0.2}, {60: 0.6, 110: 0.2}),
        ({"name": "constant_with_warmup"}, {0: 0.0, 1: 0.1, 10: 1.0, 1000: 1.0}),
        ({"name": "inv_sqrt_with_warmup"}, {0: 0.0, 10: 1.0, 40: 0.5, 90: 1 / 3, 1000: 0.1}),
        ({"name": "inv_sqrt_with_warmup", "alpha_f": 0.1}, {10: 1.0, 40: 0.55}),
    ],
)
def test_schedule_values(values, expected):
    config = SchedulerConfig(**values)
    for step, multiplier in expected.items():
        got = lr_multiplier(config, step, total_steps=110, warmup_steps=10)
        assert got == pytest.approx(multiplier, rel=1e-12, abs=1e-15), step


def test_schedule_without_warm_up_and_with_nothing_else():
    cosine = SchedulerConfig()
    assert lr_multiplier(cosine, 0, total_steps=10, warmup_steps=0) == 1.0
    assert lr_multiplier(SchedulerConfig(name="inv_sqrt_with_warmup"), 3, total_steps=10, warmup_steps=0) == 0.5
    short = [lr_multiplier(cosine, t, total_steps=3, warmup_steps=10) for t in range(3)]
    assert short == [0.0, 0.1, 0.2]


def test_set_lr_returns_the_rate_and_starts_from_the_initial_one():
    optimizer = build_optimizer(OptimizerConfig(lr=4e-4), Small())
    assert set_lr(optimizer, 0.25) == 1e-4
    assert set_lr(optimizer, 0.5) == 2e-4
    assert {group["lr"] for group in optimizer.param_groups} == {2e-4}


def test_clip_scales_to_the_norm_and_leaves_small_gradients_alone(generator):
    model = Small()
    grads = some_gradients(model, generator)[0]
    for name, p in model.named_parameters():
        p.grad = grads[name].clone()
    true = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
    assert float(clip_grad_norm(model.parameters(), None)) == pytest.approx(true, rel=1e-6)
    assert float(clip_grad_norm(model.parameters(), 2 * true)) == pytest.approx(true, rel=1e-6)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, grads[name])
    norm = clip_grad_norm(model.parameters(), true / 4)
    assert norm.dtype == torch.float32 and norm.ndim == 0
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name] / 4, rtol=1e-5, atol=0)


def test_norm_of_a_large_gradient_is_exact(generator):
    """torch's own fp32 norm on the CPU is 1e-4 off here, and differently for every way to divide it among ranks."""
    p = nn.Parameter(torch.empty(3, 700_001))
    p.grad = torch.rand(3, 700_001, generator=generator)
    assert float(clip_grad_norm([p], None)) == pytest.approx(float(p.grad.double().norm()), rel=3e-7)


def test_clip_keeps_non_finite_norms_visible_and_survives_huge_and_empty_ones():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0, 4))
    p.grad, q.grad = torch.tensor([1.0, math.nan, 2.0]), torch.ones(0, 4)
    assert math.isnan(float(clip_grad_norm([p, q], 1.0)))
    p.grad = torch.tensor([1.0, -math.inf, 2.0])
    assert math.isinf(float(clip_grad_norm([p, q], 1.0)))
    many = [nn.Parameter(torch.ones(1)) for _ in range(9)]
    for p in many:
        p.grad = torch.full((1,), 1e19)
    assert float(clip_grad_norm(many, None)) == pytest.approx(3e19, rel=1e-6)
    assert float(clip_grad_norm([nn.Parameter(torch.ones(2))], 1.0)) == 0.0
    with pytest.raises(ValueError, match="max_norm=0"):
        clip_grad_norm(many, 0.0)


def test_clip_of_low_precision_gradients_is_computed_in_fp32(generator):
    p = nn.Parameter(torch.zeros(40_000, dtype=torch.bfloat16))
    p.grad = torch.randn(40_000, generator=generator).bfloat16()
    assert float(clip_grad_norm([p], 1.0)) == pytest.approx(200, rel=0.02)
    assert p.grad.dtype == torch.bfloat16 and float(p.grad.double().norm()) == pytest.approx(1.0, rel=1e-2)


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _two_ranks(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
        _check_sharded_steps(mesh)
        _check_mixed_meshes(init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")), mesh)
    finally:
        dist.destroy_process_group()
    leave(0)


def _check_sharded_steps(mesh):
    """FSDP2 parameters (one split unevenly, one with nothing on rank 1) take the steps that whole ones take."""
    for name in ("decoupled_adamw", "decoupled_lionw"):
        torch.manual_seed(5)
        whole = Small()
        whole.single = nn.Parameter(torch.randn(1, 5))
        sharded = Small()
        sharded.single = nn.Parameter(torch.randn(1, 5))
        sharded.load_state_dict(whole.state_dict())
        fully_shard(sharded, mesh=mesh)
        config, _ = configured(name)
        optimizers = build_optimizer(config, whole), build_optimizer(config, sharded)
        for multiplier in MULTIPLIERS:
            norms = []
            for model, optimizer in zip((whole, sharded), optimizers, strict=True):
                torch.manual_seed(int(multiplier * 100))
                for p in model.parameters():
                    grad = torch.randn(p.shape)
                    p.grad = distribute_tensor(grad, mesh, p.placements) if isinstance(p, DTensor) else grad
                norms.append(float(clip_grad_norm(model.parameters(), 1.0)))
                set_lr(optimizer, multiplier)
                optimizer.step()
            assert abs(norms[0] - norms[1]) <= 1e-6 * norms[0]
        for a, b in zip(whole.parameters(), sharded.parameters(), strict=True):
            assert isinstance(b, DTensor)
            state = optimizers[1].state[b]["exp_avg"]
            assert isinstance(state, DTensor) and state.placements == b.placements
            torch.testing.assert_close(b.full_tensor(), a.detach(), rtol=0, atol=1e-6)


def _check_mixed_meshes(replicated, mesh):
    """One norm over a sharded, a replicated, a two-dimensional and a plain gradient; a partial one is refused."""
    torch.manual_seed(7)
    grads = [torch.randn(5, 3) for _ in range(4)]
    placed = [
        distribute_tensor(grads[0], mesh, [Shard(0)]),
        distribute_tensor(grads[1], mesh, [Replicate()]),
        distribute_tensor(grads[2], replicated, [Replicate(), Shard(0)]),
        grads[3],
    ]
    params = [nn.Parameter(g.clone()) for g in placed]
    for p, g in zip(params, placed, strict=True):
        p.grad = g.clone()
    true = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    assert float(clip_grad_norm(params, 1.0)) == pytest.approx(true, rel=1e-6)
    for p, g in zip(params, grads, strict=True):
        whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(whole, g / true, rtol=1e-5, atol=1e-8)
    params[0] = nn.Parameter(DTensor.from_local(grads[0], mesh, [Partial()]))
    params[0].grad = DTensor.from_local(grads[0], mesh, [Partial()])
    with pytest.raises(ValueError, match="partial sum"):
        clip_grad_norm(params, 1.0)


def test_two_ranks():
    mp.spawn(_two_ranks, args=(_free_port(),), nprocs=2)
