"""A tokenizer is found by path, folder or hub name, and its end-of-document token by settings, name or argument."""

import json

import pytest
from data_files import EOS, write_tokenizer

from trainer.data.tokenizer import file_sha256, find_eos, find_tokenizer, settings_files
from trainer.errors import InputError


@pytest.fixture
def tokenizer(tmp_path):
    return write_tokenizer(tmp_path / "t")


def add_token(path, name, number):
    data = json.loads(path.read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "content": name, "id": number})
    path.write_text(json.dumps(data))


def test_by_path_and_by_folder(tokenizer):
    assert find_tokenizer(tokenizer) == find_tokenizer(str(tokenizer.parent)) == tokenizer


def test_by_hub_name(tokenizer, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(name, file):
        assert name == "owner/name"
        if file != "tokenizer.json":
            raise LocalEntryNotFoundError("none")
        return tokenizer

    monkeypatch.setattr("trainer.data.tokenizer.download_file", download)
    assert find_tokenizer("owner/name") == tokenizer

    def offline(name, file):
        raise LocalEntryNotFoundError("no connection\nlong story")

    monkeypatch.setattr("trainer.data.tokenizer.download_file", offline)
    with pytest.raises(InputError, match=r"owner/name: .*\(no connection\); give a local folder"):
        find_tokenizer("owner/name")


def test_a_name_in_a_folder_that_is_here_is_no_hub_name(tokenizer, monkeypatch):
    monkeypatch.setattr("trainer.data.tokenizer.download_file", lambda *_: pytest.fail("went to the hub"))
    monkeypatch.chdir(tokenizer.parent.parent)
    with pytest.raises(InputError, match="no such file or folder"):
        find_tokenizer(f"{tokenizer.parent.name}/tokeniser")


def test_what_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer\.json in this folder"):
        find_tokenizer(tmp_path)
    for name in (tmp_path / "none.json", "none.json", "../a/b/c"):
        with pytest.raises(InputError, match="no such file"):
            find_tokenizer(name)


def test_eos(tokenizer):
    assert find_eos(tokenizer) == (EOS, 0)
    add_token(tokenizer, "</s>", 299)
    assert find_eos(tokenizer) == (EOS, 0)
    assert find_eos(tokenizer, "</s>") == ("</s>", 299)
    settings = tokenizer.parent / "special_tokens_map.json"
    settings.write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}}))
    assert find_eos(tokenizer) == ("</s>", 299)
    (tokenizer.parent / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    assert find_eos(tokenizer) == (EOS, 0)
    assert [path.name for path in settings_files(tokenizer)] == ["tokenizer_config.json", "special_tokens_map.json"]


def test_eos_errors(tokenizer):
    with pytest.raises(InputError, match=r"--eos <none>: .*it has <\|endoftext\|>"):
        find_eos(tokenizer, "<none>")
    tokenizer.write_text(tokenizer.read_text().replace(EOS, "<bos>"))
    with pytest.raises(InputError, match=r"name the token that ends a document with --eos; added tokens are <bos>"):
        find_eos(tokenizer)
    (tokenizer.parent / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: not a JSON mapping"):
        find_eos(tokenizer)
    for content in ("{", "{}", "[]"):
        tokenizer.write_text(content)
        with pytest.raises(InputError, match=r"not a tokenizer\.json"):
            find_eos(tokenizer, EOS)


def test_a_json_of_something_else(tmp_path):
    path = tmp_path / "config.json"
    for text, told in (('{"d_model": 4}', "JSON, but not a tokenizer.json"), ("{", "not a tokenizer.json that can be")):
        path.write_text(text)
        with pytest.raises(InputError, match=told) as error:
            find_eos(path)
        assert "KeyError" not in str(error.value)


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
