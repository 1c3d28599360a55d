"""The distribution: a wheel that holds every module, and the names that it shares with others' packages."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

IMPORT_ALL = """
import importlib, pathlib, sys, yaml
assert hasattr(yaml, "safe_load"), "import yaml is not PyYAML"
for package in ("kernels", "mpt", "trainer"):
    top = pathlib.Path(importlib.import_module(package).__file__).parent
    assert top.is_relative_to(sys.prefix), f"{package} comes from {top}, not from the wheel"
    assert (top / "py.typed").is_file()
    for file in sorted(top.rglob("*.py")):
        name = ".".join((package, *file.relative_to(top).with_suffix("").parts)).removesuffix(".__init__")
        importlib.import_module(name)
        print(name)
"""


@pytest.mark.slow
def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    """Built and installed away from the clone; dependencies come from this environment, the packages must not."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("mpt_train-*.whl")
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    python = env / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    # A folder named in a .pth file is searched, but its own .pth files, such as an editable install's, are not read.
    (site,) = (env / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    out = subprocess.run([python, "-I", "-c", IMPORT_ALL], cwd=tmp_path, check=True, capture_output=True, text=True)
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in sorted((ROOT / "trainer").rglob("*.py"))]
    assert {m.removesuffix(".__init__") for m in modules} <= set(out.stdout.split())


def test_transformers_takes_our_kernels_package_for_no_one_elses() -> None:
    """Hugging Face has a distribution `kernels` too; transformers must not take ours for it, nor fail to import."""
    import transformers
    from transformers.utils import is_kernels_available

    import kernels

    assert Path(kernels.__file__).is_relative_to(ROOT)
    assert transformers.MptConfig().model_type == "mpt"
    assert not is_kernels_available()
