"""The guides against the code: every YAML key with its default, every option, every metric, and commands that parse."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest

import train
from mpt.config import MptAttentionConfig, MptConfig, MptInitConfig
from scripts import convert_checkpoint, prepare_data
from trainer import pretrained
from trainer.config import TrainConfig, load_config
from trainer.loggers import EVAL_COLUMNS, TRAIN_COLUMNS

ROOT = Path(__file__).parent.parent

TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
CHECKPOINTS = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
FINETUNING = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
LONG = (ROOT / "docs" / "long-context.md").read_text(encoding="utf-8")
METRICS = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
DOCUMENTED_ONCE = "eval_loader"  # its section is train_loader's


def section_of(hint):
    """The dataclass of a section, and what follows its key's name; (None, "") for a plain value."""
    if dataclasses.is_dataclass(hint):
        return hint, "."
    section, dots = next(filter(any, map(section_of, get_args(hint))), (None, ""))
    return section, "[]." if section and get_origin(hint) is list else dots


def keys(schema, prefix=""):
    """Dotted key -> the default as the guide writes it; a section that may be left out is named by its keys only."""
    out = {}
    for field in dataclasses.fields(schema):
        key = prefix + field.name
        section, dots = section_of(get_type_hints(schema)[field.name])
        if not section or field.default_factory is dataclasses.MISSING:
            out[key] = default_of(field)
        if section and key != DOCUMENTED_ONCE:
            out |= keys(section, key + dots)
    return out


def default_of(field):
    missing = dataclasses.MISSING
    if field.default == "???" or (field.default is missing and field.default_factory is missing):
        return "required"
    value = field.default_factory() if field.default is missing else field.default
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def documented():
    """Dotted key -> its default, from the rows `| key | type | default | meaning |` of the guide."""
    tables = TRAINING.split("\n## Configuration\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w.\[\]]+)` \| [^|]* \| ([^|]*) \|[^|]*\|$", tables, re.M)
    assert len(rows) == len(dict(rows)), "a key has two rows"
    return {key: default.strip() for key, default in rows}


def test_every_key_has_a_row_with_its_default():
    assert documented() == keys(TrainConfig)


@pytest.mark.parametrize("schema", [MptConfig, MptAttentionConfig, MptInitConfig])
def test_every_field_of_the_model_is_named(schema):
    section = TRAINING.split("### The model section")[1].split("\n## ")[0].replace("attn_config.", "")
    assert [field.name for field in dataclasses.fields(schema) if f"`{field.name}`" not in section] == []


def test_every_metric_column_is_explained():
    assert [column for column in (*TRAIN_COLUMNS, *EVAL_COLUMNS) if f"`{column}`" not in METRICS] == []


@pytest.mark.parametrize(
    ("program", "page"), [(train, TRAINING), (prepare_data, TRAINING), (convert_checkpoint, CHECKPOINTS)]
)
def test_every_option_is_mentioned(program, page, capsys):
    with pytest.raises(SystemExit):
        (program.parse_arguments if program is train else program.parse)(["--help"])
    options = set(re.findall(r"^ +(--[a-z][\w-]*)", capsys.readouterr().out, re.M)) - {"--help"}
    assert [option for option in sorted(options) if f"`{option}" not in page] == []


def commands():
    """(program, arguments) of every train.py, prepare_data.py and convert_checkpoint.py in the pages' code blocks."""
    for page in (TRAINING, FINETUNING, LONG, CHECKPOINTS, (ROOT / "README.md").read_text(encoding="utf-8")):
        for block in re.findall(r"^```\n(.*?)^```", page, re.M | re.S):
            for line in block.splitlines():
                words = shlex.split(line) if line.startswith(("python ", "torchrun ")) else []
                for program in ("train.py", "scripts/prepare_data.py", "scripts/convert_checkpoint.py"):
                    if program in words:
                        yield pytest.param(program, words[words.index(program) + 1 :], id=line.strip()[:60])


@pytest.mark.parametrize(("program", "arguments"), commands())
def test_every_command_in_the_guides_is_understood(program, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pretrained, "configuration", lambda name: MptConfig())
    if program == "train.py":
        parsed = train.parse_arguments(arguments)
        load_config(parsed.recipe, parsed.overrides)
    elif "prepare_data" in program:
        prepare_data.parse(arguments)
    else:
        convert_checkpoint.parse(arguments)


def test_links_between_pages_lead_somewhere():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#([\w-]+))?\)", page.read_text(encoding="utf-8")):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name} links to {target}"
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M) if file.is_file() else []
            slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert not anchor or anchor.strip("#") in slugs, f"{page.name} links to {target}{anchor}"
