"""Checkpoints as their makers write them, of tiny widths: MPT-7B's on the hub, Composer's, mosaic_gpt's."""

import collections
import datetime
import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mpt import MptConfig, MptForCausalLM

# config.json of MPT-7B on the hub, but for the sizes.
HUB_CONFIG: dict[str, Any] = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {
        "AutoConfig": "configuration_mpt.MPTConfig",
        "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
    },
    "d_model": 64,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {
        "emb_init_std": None,
        "emb_init_uniform_lim": None,
        "fan_mode": "fan_in",
        "init_div_is_residual": True,
        "init_gain": 0,
        "init_nonlinearity": "relu",
        "init_std": 0.02,
        "name": "kaiming_normal_",
        "verbose": 0,
    },
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 32,
    "model_type": "mpt",
    "n_heads": 4,
    "n_layers": 2,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.28.1",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 97,
}
# The same of mpt-1b-redpajama-200b.
MOSAIC_GPT_CONFIG: dict[str, Any] = {
    "alibi": True,
    "alibi_bias_max": 8,
    "architectures": ["MosaicGPT"],
    "attn_clip_qkv": None,
    "attn_impl": "torch",
    "attn_pdrop": 0,
    "attn_qk_ln": True,
    "attn_uses_sequence_id": False,
    "auto_map": {"AutoConfig": "configuration_mosaic_gpt.MosaicGPTConfig"},
    "d_model": 64,
    "emb_init_std": None,
    "emb_init_uniform_lim": None,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "fan_mode": "fan_in",
    "init_device": "cpu",
    "init_div_is_residual": True,
    "init_gain": 0,
    "init_nonlinearity": "relu",
    "init_std": 0.02,
    "logit_scale": None,
    "low_precision_layernorm": True,
    "max_seq_len": 32,
    "mlp_ratio": 4,
    "model_type": "mosaic_gpt",
    "n_heads": 4,
    "n_layers": 2,
    "no_bias": True,
    "param_init_fn": "kaiming_normal_",
    "prefix_lm": False,
    "resid_pdrop": 0,
    "softmax_scale": None,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.27.4",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 97,
}
FOREIGN_MODULES = ("torchmetrics", "torchmetrics.aggregation", "composer", "composer.core", "composer.core.time")
HUB_FORMS = ("safetensors", "safetensors shards", "bin", "bin shards")
TOKENIZER = {"version": "1.0", "model": {"type": "BPE", "vocab": {"é": 0}, "merges": []}}
IDS = torch.arange(34).view(2, 17)


def published(**changes: Any) -> MptForCausalLM:
    return MptForCausalLM(MptConfig.from_dict(HUB_CONFIG | changes)).bfloat16().eval()


def published_shapes(d: int, layers: int, vocab: int, qk_ln: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the hub's files have them, written down apart from the model's code."""
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, d)}
    for i in range(layers):
        block = f"transformer.blocks.{i}."
        shapes[block + "norm_1.weight"] = (d,)
        shapes[block + "attn.Wqkv.weight"] = (3 * d, d)
        if qk_ln:
            shapes |= {block + "attn.q_ln.weight": (d,), block + "attn.k_ln.weight": (d,)}
        shapes[block + "attn.out_proj.weight"] = (d, d)
        shapes[block + "norm_2.weight"] = (d,)
        shapes[block + "ffn.up_proj.weight"] = (4 * d, d)
        shapes[block + "ffn.down_proj.weight"] = (d, 4 * d)
    return shapes | {"transformer.norm_f.weight": (d,)}


def write_hub_folder(
    folder: Path, tensors: dict[str, torch.Tensor], form: str, config: dict[str, Any] = HUB_CONFIG
) -> None:
    """One of HUB_FORMS; shards as the hub has them, two of them, with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "modeling_mpt.py").write_text("raise SystemExit('code of a checkpoint was run')")
    stem, suffix = ("model", "safetensors") if form.startswith("safetensors") else ("pytorch_model", "bin")
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def write(part: dict[str, torch.Tensor], name: str) -> None:
        if suffix == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})

    if not form.endswith("shards"):
        write(tensors, f"{stem}.{suffix}")
        return
    names = list(tensors)
    files = {name: f"{stem}-0000{1 + 2 * i // len(names)}-of-00002.{suffix}" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        write({name: tensors[name] for name in names if files[name] == file}, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2))


def write_composer(
    folder: Path,
    trained: MptForCausalLM,
    config: dict[str, Any] = HUB_CONFIG,
    kind: str = "llmfoundry.models.mpt.modeling_mpt.MPTForCausalLM",
    **state: Any,
) -> Path:
    """A training's state in `folder`/ep0-ba4-rank0.pt, with a link latest-rank0.pt to it; returns the file.

    Beside the model there is what Composer keeps: the optimizer by parameter names, time stamps, metrics that are
    pickled objects of a package that is not installed, and the random generators' states.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": p.detach().clone() for name, p in trained.named_parameters()}
    moments = {name: {"exp_avg": torch.ones_like(w, dtype=torch.float32)} for name, w in weights.items()}
    group = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "initial_lr": 1e-4, "params": list(weights)}
    sys.modules.update({name: types.ModuleType(name) for name in FOREIGN_MODULES})
    metric, clock = _foreign("torchmetrics.aggregation", "MeanMetric"), _foreign("composer.core.time", "TimeUnit")
    metric.mean_value, metric.loss_fn, metric.reduce = torch.ones(()), torch.nn.CrossEntropyLoss(), torch.sum
    try:
        torch.save(
            {
                "state": {
                    "model": weights,
                    "optimizers": {"DecoupledLionW": {"state": moments, "param_groups": [group]}},
                    "schedulers": {"LambdaLR": {"last_epoch": 4, "_last_lr": [1e-4]}},
                    "timestamp": {"Timestamp": {"batch": 4, "total_wct": datetime.timedelta(seconds=9), "unit": clock}},
                    "train_metrics": {"LanguageCrossEntropy": metric},
                    "callbacks": {"SpeedMonitor": {"history": collections.deque([1.0, 2.0], maxlen=5)}},
                    "dataset_state": collections.defaultdict(dict, train={"epoch": 1}),
                    "run_name": "llm",
                    "integrations": {
                        "huggingface": {
                            "model": {"config": {"file_extension": ".json", "content": config, "class": kind}},
                            "tokenizer": {
                                "tokenizer": {"file_extension": ".json", "content": TOKENIZER},
                                "merges.txt": {"file_extension": ".txt", "content": ["a b", "c d"]},  # newer form
                                "chat_template.jinja": {"file_extension": ".jinja", "content": "{{ messages }}"},
                                "evil": {"file_extension": ".py", "content": ["raise SystemExit"]},
                                "../config": {"file_extension": ".json", "content": {}},
                                "config": {"file_extension": ".json", "content": {}},
                            },
                        }
                    },
                    **state,
                },
                "rng": [{"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}],
            },
            folder / "ep0-ba4-rank0.pt",
        )
    finally:
        for name in FOREIGN_MODULES:
            del sys.modules[name]
    (folder / "latest-rank0.pt").unlink(missing_ok=True)
    (folder / "latest-rank0.pt").symlink_to("ep0-ba4-rank0.pt")
    return folder / "ep0-ba4-rank0.pt"


def _foreign(module: str, name: str) -> Any:
    """An object of a class that can be pickled now and imported no longer when the file is read."""
    kind = type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, kind)
    return kind()


def mosaic_gpt_name(name: str) -> str:
    """The old name of an MPT's parameter, in one step for each kind."""
    for new, old in (
        (".norm_", ".ln_"),
        (".ffn.up_proj.", ".mlp.mlp_up."),
        (".ffn.down_proj.", ".mlp.mlp_down."),
    ):
        name = name.replace(new, old)
    return name


def mosaic_gpt() -> MptForCausalLM:
    """The MPT that MOSAIC_GPT_CONFIG means, written down apart from the translation."""
    attn = HUB_CONFIG["attn_config"] | {"qk_ln": True}
    return published(attn_config=attn)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = dict(b.named_parameters())
    return all(torch.equal(p, theirs[name]) for name, p in a.named_parameters())
