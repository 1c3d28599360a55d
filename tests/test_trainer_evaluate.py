"""The mean loss over a split against logits in float64, what bytes tokens stand for, and what is refused."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import EOS, edit_manifest, write_shards, write_tokenizer
from tokenizers import AddedToken, Tokenizer, models

from mpt import MptConfig, MptForCausalLM
from mpt.checkpoint import open_checkpoint
from trainer.data import file_sha256
from trainer.errors import InputError
from trainer.evaluate import load_model, mean_loss, open_shards, token_bytes, tokenizer_files
from trainer.parallel import FsdpConfig, World, join_world

SHAPE = {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 320, "max_seq_len": 16, "initializer_range": 0.3}
VARIANTS = {
    "plain": {},
    "documents apart": {"attn_config": {"attn_uses_sequence_id": True}},
    "prefix": {"attn_config": {"prefix_lm": True}},
    "logit scale": {"logit_scale": 0.5, "tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def world():
    with join_world("cpu", FsdpConfig(), 60.0) as joined:
        yield joined


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of validation, neither a whole number of sequences, and the tokenizer that made them."""
    folder = tmp_path_factory.mktemp("shards")
    ids = np.random.default_rng(5).integers(1, 300, 150)
    ids[::11] = 0
    write_tokenizer(folder)
    sha = file_sha256(folder / "tokenizer.json")
    return write_shards(folder, {"val": [ids[:90], ids[90:]]}, vocab_size=300, tokenizer_sha256=sha)


def expected(model: MptForCausalLM, data: Path, length: int, sequences: int | None = None) -> tuple[float, list[int]]:
    """The mean loss by log_softmax of float64 logits, a sequence at a time, and the ids that were predicted."""
    rows = []
    for shard in sorted(data.glob("val/*.bin")):
        ids = np.fromfile(shard, "<u2").astype(np.int64)
        rows += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    attn, losses, predicted = model.config.attn_config, [], []
    wide = MptForCausalLM(model.config).double().eval()
    wide.load_state_dict(model.state_dict())
    for row in rows[:sequences]:
        given = {}
        if attn.attn_uses_sequence_id:
            given["sequence_id"] = torch.tensor([[int((row[:i] == 0).sum()) for i in range(length)]])
        if attn.prefix_lm:
            given["prefix_mask"] = torch.zeros(1, length, dtype=torch.bool)
        logp = wide(torch.tensor(row[None]), **given).logits[0].log_softmax(-1)
        losses += [-logp[i, row[i + 1]].item() for i in range(length - 1)]
        predicted += row[1:].tolist()
    return sum(losses) / len(losses), predicted


@pytest.mark.parametrize("variant", VARIANTS)
def test_mean_loss(variant: str, data: Path, world: World) -> None:
    """Whatever the batch: the last one is not full, and its repeated rows do not count."""
    torch.manual_seed(1)
    model = MptForCausalLM(MptConfig(**(SHAPE | VARIANTS[variant]))).eval()
    for length, sequences in ((16, None), (7, 5)):
        loss, predicted = expected(model, data, length, sequences)
        shards = open_shards(data, model.config, None, seq_len=length)
        sizes = token_bytes(shards, 320)
        found = [
            mean_loss(model, shards, world, batch_size=batch, sequences=sequences, token_bytes=sizes)
            for batch in (1, 4, 7)
        ]
        for one in found:
            assert one.tokens == len(predicted)
            assert one.loss == pytest.approx(loss, rel=1e-6) and one.perplexity == pytest.approx(math.exp(loss), 1e-5)
            assert one.text_bytes == sizes[predicted].sum()
            bits = loss * len(predicted) / math.log(2)
            assert one.bits_per_byte == pytest.approx(bits / sizes[predicted].sum(), rel=1e-6)


def test_advance(data: Path, world: World) -> None:
    """Told of what counts only."""
    model = MptForCausalLM(MptConfig(**SHAPE)).eval()
    told: list[tuple[int, int]] = []
    mean_loss(model, open_shards(data, model.config, None), world, batch_size=5, advance=lambda *n: told.append(n))
    assert told == [(5, 75), (3, 45)]


def with_tokenizer(folder: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    return write_shards(folder, {"val": [[1] * 8]}, tokenizer_sha256=file_sha256(folder / "tokenizer.json"))


def test_bytes_are_those_of_the_text(tmp_path: Path) -> None:
    """Parts of characters, tokens added as text and special ones."""
    text = "a small text to learn, añadido 🙂 €    \n\n\t and <more>\x00\x7f\xad"
    tokenizer = Tokenizer.from_file(str(write_tokenizer(tmp_path)))
    tokenizer.add_tokens([AddedToken("    ", normalized=False), AddedToken("ñad", normalized=False)])
    config = MptConfig(**SHAPE)
    sizes = token_bytes(open_shards(with_tokenizer(tmp_path, tokenizer), config, None, seq_len=4), 320)
    ids = tokenizer.encode(text + EOS).ids
    assert {tokenizer.token_to_id("    "), tokenizer.token_to_id("ñad"), 0} <= set(ids)
    assert sizes[ids].sum() == len(text.encode())
    assert sizes[0] == 0 and sizes.shape == (320,)


def test_bytes_that_cannot_be_told(tmp_path: Path) -> None:
    config = MptConfig(**SHAPE)
    words = with_tokenizer(tmp_path, Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")))
    assert token_bytes(open_shards(words, config, None, seq_len=4), 320) is None
    write_tokenizer(tmp_path)  # another one than the manifest's
    assert token_bytes(open_shards(words, config, None, seq_len=4), 320) is None
    (tmp_path / "tokenizer.json").unlink()
    assert token_bytes(open_shards(words, config, None, seq_len=4), 320) is None


def test_refused_shards(data: Path, tmp_path: Path) -> None:
    config = MptConfig(**SHAPE)
    mine = (data / "tokenizer.json").read_bytes()
    assert open_shards(data, config, mine).seq_len == 16
    assert open_shards(data, config, json.dumps(json.loads(mine), indent=3).encode()).seq_len == 16
    for other in (mine.replace(b"ByteLevel", b"Metaspace"), b"{"):
        with pytest.raises(InputError, match=rf"tokenizer of SHA-256 .*the checkpoint's has.*--tokenizer {data}"):
            open_shards(data, config, other)
    with pytest.raises(InputError, match=r"holds token id 299, vocab_size is 299"):
        open_shards(data, MptConfig(**SHAPE | {"vocab_size": 299}), mine)
    with pytest.raises(InputError, match=r"--seq-len 1: a sequence has 2 tokens at least"):
        open_shards(data, config, mine, seq_len=1)
    with pytest.raises(InputError, match=r"no shard .*as long as one sequence.*--seq-len"):
        open_shards(data, config, mine, seq_len=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learned = MptConfig(**SHAPE | {"attn_config": {"alibi": False}})
    with pytest.raises(InputError, match=r"--seq-len 17: the model's learned positions end at max_seq_len 16"):
        open_shards(data, learned, mine, seq_len=17)
    with pytest.raises(InputError, match=r"no split 'test'"):
        open_shards(data, config, mine, split="test")


def test_an_id_that_the_manifest_does_not_tell_of(data: Path, tmp_path: Path, world: World) -> None:
    folder = write_shards(tmp_path, {"val": [[5] * 20 + [319] + [5] * 20]}, vocab_size=400)
    edit_manifest(folder, lambda m: m["splits"]["val"][0].update(max_id=5))
    model = MptForCausalLM(MptConfig(**SHAPE | {"vocab_size": 319})).eval()
    with pytest.raises(InputError, match=r"token 20 of .*is id 319, vocab_size is 319"):
        mean_loss(model, open_shards(folder, model.config, None), world, batch_size=2)


def test_load_model(data: Path, tmp_path: Path, world: World) -> None:
    model = MptForCausalLM(MptConfig(**SHAPE))
    model.save_pretrained(tmp_path / "hf")
    source = open_checkpoint(tmp_path / "hf")
    loaded = load_model(source, world)
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert load_model(source, world, torch.bfloat16).transformer.wte.weight.dtype == torch.bfloat16
    assert tokenizer_files(source) == {}
    assert tokenizer_files(source, str(data))["tokenizer.json"] == (data / "tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"d_model": 64}))
    with pytest.raises(InputError, match="does not fit the model"):
        load_model(open_checkpoint(tmp_path / "hf"), world)
