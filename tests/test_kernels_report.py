"""What the attention kernels use on sm_90, at the head dimensions of MPT models: compiled here, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DIMENSIONS = (64, 112, 128)

# Causal attention with ALiBi and skipping, no other mask, bf16, a head of keys for each of queries: each of the kernels
# with a loop over tiles, at these dimensions. The forward also without ALiBi, and so without skipping; of those with
# documents or padding the one that comes closest to spilling, dK/dV at 128.
COMPILE = """
import dataclasses, json, os, sys
from kernels.compile import compile_all, shipped

chosen = []
variants, missing = shipped("sm_90", ["kernels.flash_attention"])
assert not missing, missing
for v in variants:
    if v.scores is None or v.constants["DH"] not in map(int, sys.argv[1:]) or "bf16" not in v.signature["Q"]:
        continue
    device = sys.modules[v.kernel.fn.__module__]
    names = ("CAUSAL", "ALIBI", "SKIP", "IDS", "DOCS")
    causal, alibi, skip, ids, documents = (getattr(device, name).value for name in names)
    extra = v.constants["MODE"] & ~(causal | alibi | skip)
    tightest = v.constants["DH"] == 128 and "dkdv" in v.kernel.fn.__name__
    wanted = (0, ids, ids | documents) if tightest else (0,)
    if not v.constants["MODE"] & skip or extra not in wanted or v.constants["GROUP"] != 1:
        continue
    chosen.append((v.kernel.fn.__name__, "alibi", v))
    if v.kernel.fn.__name__.endswith("_fwd_kernel"):
        plain = dataclasses.replace(v, constants={**v.constants, "MODE": causal})
        chosen.append((v.kernel.fn.__name__, "plain", plain))
results = compile_all([("sm_90", v) for _, _, v in chosen], os.cpu_count())
rows = [
    {"kernel": kernel, "bias": bias, "d": v.constants["DH"], **r.as_dict()}
    for (kernel, bias, v), r in zip(chosen, results)
]
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILE, *map(str, DIMENSIONS)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [f"{row['label']}: {row['error']}" for row in found if row["error"]] == []
    return found


def test_all_of_them_are_there(rows):
    for d in DIMENSIONS:
        kernels = {row["kernel"].removeprefix("_flash_attention_") for row in rows if row["d"] == d}
        assert {"fwd_kernel", "bwd_dq_kernel"} <= kernels
        assert "bwd_dkdv_kernel" in kernels or {"bwd_dk_kernel", "bwd_dv_kernel"} <= kernels
    masked = [row["label"] for row in rows if any(name in row["label"] for name in ("documents", "padding"))]
    assert len(masked) == 2


def test_they_promise_not_to_spill(rows):
    """So that the report of everything fails where another mode of theirs does."""
    assert [row["label"] for row in rows if not row["no_spill"]] == []


def test_they_compile_within_the_limits(rows):
    assert [f"{row['label']}: {problem}" for row in rows for problem in row["problems"]] == []


def test_nothing_is_spilled_inside_the_inner_loop(rows):
    assert [row["label"] for row in rows if row["resources"]["local_in_loop"] != 0] == []


def test_they_multiply_with_wgmma(rows):
    assert [row["label"] for row in rows if set(row["resources"]["matrix"]) != {"HGMMA"}] == []
    assert [row["label"] for row in rows if any("wgmma" in said for said in row["resources"]["warnings"])] == []


def test_alibi_costs_little(rows):
    """At most 1.5 instructions per score more than attention without it."""
    forward = [row for row in rows if row["kernel"].endswith("_fwd_kernel")]
    plain = {row["label"]: row["resources"]["per_score"] for row in forward if row["bias"] == "plain"}
    assert plain
    for row in forward:
        if row["bias"] == "alibi":
            assert row["resources"]["per_score"] <= plain[row["label"]] + 1.5, row["label"]
