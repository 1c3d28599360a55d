"""metrics.jsonl and its neighbours: rewritten whole, and never through a link."""

import json

import pytest

from trainer.history import History, drop_rows, replace_file


def rewrite_text(path):
    replace_file(path, b"new")


def rewrite_rows(path):
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(3)))
    assert drop_rows(path, 1) == 1


def draw(path):
    History([(1, 2.0), (2, 1.0)], [], [], 8.0).plot(path, "a run", None)


@pytest.mark.parametrize("write", [rewrite_text, rewrite_rows, draw])
def test_a_link_in_the_way_is_not_followed(tmp_path, write):
    precious, path = tmp_path / "precious", tmp_path / "file"
    precious.write_text("years of work")
    (tmp_path / "file.tmp").symlink_to(precious)
    write(path)
    assert precious.read_text() == "years of work"
    assert path.stat().st_size and not path.is_symlink() and not (tmp_path / "file.tmp").exists()
