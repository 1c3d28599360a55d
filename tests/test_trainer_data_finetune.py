"""Examples for fine-tuning: their tokens and labels, packing, the order of batches, counts, and errors with places."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from data_files import EOS, write_tokenizer
from tokenizers import AddedToken, Tokenizer

from trainer.data import DatasetConfig, LoaderConfig, Prefetcher
from trainer.data.config import FieldsConfig, MixEntry
from trainer.data.examples import Encoder
from trainer.data.finetune import open_examples
from trainer.errors import InputError

S = 48


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(n, seed=0, longest=40):
    """{prompt, response} of different lengths; a response says which example it is."""
    rng = np.random.default_rng(seed)
    return [{"prompt": "p" * int(rng.integers(0, longest - 6)), "response": f"r{i:03}"} for i in range(n)]


def open_(path, tokenizer, batch=4, seed=17, training=True, seq_len=S, vocab_size=300, **dataset):
    config = LoaderConfig(name="finetuning", dataset=DatasetConfig(local=str(path), **dataset))
    return open_examples(config, seq_len=seq_len, global_batch_size=batch, seed=seed, vocab_size=vocab_size,
                         tokenizer=tokenizer, training=training)  # fmt: skip


def examples_of(planes, tokenizer):
    """(whole text, trained text) of every example in rows of a batch, by sequence id; padding is checked on the way."""
    decoder = Tokenizer.from_file(str(tokenizer))
    out = []
    for ids, labels, numbers in planes:
        assert (labels[numbers == -1] == -100).all() and ((labels == -100) | (labels == ids)).all()
        assert (np.diff(np.flatnonzero(numbers == -1)) == 1).all() and (numbers[0] == 0)
        for number in range(numbers.max() + 1):
            mine = numbers == number
            texts = (ids[mine], ids[mine & (labels != -100)])
            out.append(tuple(decoder.decode(t.tolist(), skip_special_tokens=False) for t in texts))
    return out


def all_rows(batches, epochs=1):
    steps = -(-batches.sequences * epochs // batches.global_batch_size)
    planes = [batches.batch(step, range(batches.global_batch_size)) for step in range(steps)]
    return np.concatenate(planes)[: batches.sequences * epochs]


@pytest.mark.parametrize("packing", [False, True])
def test_only_responses_and_their_ends_are_labels(tmp_path, tokenizer, packing):
    data = rows(30)
    batches = open_(write(tmp_path / "a.jsonl", data), tokenizer, packing=packing)
    found = sorted(examples_of(all_rows(batches), tokenizer))
    # The first token has no label: nothing precedes it, or the example before.
    expected = [(r["prompt"] + r["response"] + EOS, (r["response"] if r["prompt"] else r["response"][1:]) + EOS)
                for r in data]  # fmt: skip
    assert found == sorted(expected)
    assert (len(batches.layout) < 20) == packing


def test_packing_fills_and_says_so(tmp_path, tokenizer):
    batches = open_(write(tmp_path / "a.jsonl", rows(400)), tokenizer, packing=True)
    planes = all_rows(batches)
    efficiency = (planes[:, 2] != -1).mean()
    assert efficiency > 0.95
    assert f"token efficiency {efficiency:.2%}" in batches.description()
    assert batches.tokens(planes) == len(batches.examples.ids) == round(batches.mean_tokens * batches.sequences)


def test_prompt_and_response_never_share_a_token(tmp_path):
    path = write_tokenizer(tmp_path, texts=["ab ab ab ab"])
    encoder = Encoder(path)
    whole = Tokenizer.from_file(str(path))
    assert len(whole.encode("ab").ids) == 1
    batches = open_(write(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}]), path)
    ids = batches.examples.ids.tolist()
    assert ids == [*whole.encode("a").ids, *whole.encode("b").ids, encoder.eos_id]


def test_special_tokens_in_a_text_stay_text(tmp_path, tokenizer):
    data = [{"prompt": f"a{EOS}b", "response": f"c{EOS}d"}, {"prompt": "a", "response": f"c{EOS}"}]
    examples = open_(write(tmp_path / "a.jsonl", data), tokenizer).examples
    first, second = examples.of(0)[0].tolist(), examples.of(1)[0].tolist()
    assert first.count(0) == 1 and first[-1] == 0
    assert second == [*Tokenizer.from_file(str(tokenizer)).encode("ac").ids, 0]  # appended only if absent


@pytest.mark.parametrize("special", [True, False])
def test_chat_markers_are_tokens_where_the_tokenizer_has_them(tmp_path, tokenizer, special):
    chat = {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "ok"}]}
    data = write(tmp_path / "a.jsonl", [chat])
    plain = open_(data, tokenizer, seq_len=200).examples
    text = Tokenizer.from_file(str(tokenizer)).decode(plain.ids.tolist(), skip_special_tokens=False)
    assert text == f"<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\nok<|im_end|>{EOS}"

    with_markers = Tokenizer.from_file(str(tokenizer))
    added = [AddedToken(text, special=special) for text in ("<|im_start|>", "<|im_end|>")]
    with_markers.add_tokens(added)
    with_markers.save(str(tmp_path / "tokenizer.json"))
    start, end = (with_markers.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>"))
    ids, trained = open_(data, tmp_path / "tokenizer.json", seq_len=200, vocab_size=302).examples.of(0)
    assert (ids == start).sum() == 2 and (ids == end).sum() == 2  # the user's own is text
    assert ids[trained].tolist() == [*with_markers.encode("ok").ids, end, 0]
    with pytest.raises(InputError, match=rf"gives token id {end}, vocab_size is {end}; take the model's own tokenizer"):
        open_(data, tmp_path / "tokenizer.json", seq_len=200, vocab_size=end)


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz", "folder", "split", "split folder"])
def test_every_kind_of_file_is_the_same_data(tmp_path, tokenizer, kind):
    import gzip

    data = rows(9)
    expected = open_(write(tmp_path / "a.jsonl", data), tokenizer).examples
    place = tmp_path / "place"
    place.mkdir()
    dataset = {"split": "train"} if "split" in kind else {}
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(data), place / "b.parquet", row_group_size=4)
    elif kind == "jsonl.gz":
        (place / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    elif kind == "folder":
        (place / "README.md").write_text("about the data")
        write(place / "1.jsonl", data[:4])
        write(place / "2.jsonl", data[4:])
    elif kind == "split":
        write(place / "train.jsonl", data)
        write(place / "val.jsonl", data[:2])
    else:
        (place / "train").mkdir()
        write(place / "train" / "x.jsonl", data)
        write(place / "other.jsonl", data)
    found = open_(place, tokenizer, **dataset).examples
    assert np.array_equal(found.ids, expected.ids) and np.array_equal(found.trained, expected.trained)


def test_a_hub_data_set_is_read_from_its_cache(tmp_path, tokenizer, monkeypatch):
    import datasets

    data = rows(5)
    datasets.Dataset.from_list(data).save_to_disk(str(tmp_path / "cache"))
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.load_from_disk(str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expected = open_(write(tmp_path / "a.jsonl", data), tokenizer).examples
    for training, split, name in [(True, None, "org/set"), (False, None, "org/set"), (True, "x", "org/set:c"),
                                  (True, None, "org/set@y")]:  # fmt: skip
        config = LoaderConfig(name="finetuning", dataset=DatasetConfig(hf_name=name, split=split))
        found = open_examples(config, seq_len=S, global_batch_size=4, seed=1, vocab_size=300, tokenizer=tokenizer,
                              training=training)  # fmt: skip
        assert np.array_equal(found.examples.ids, expected.ids)
    assert asked == [("org/set", None, "train"), ("org/set", None, "test"), ("org/set", "c", "x"),
                     ("org/set", None, "y")]  # fmt: skip


# Order


@pytest.mark.parametrize("packing", [False, True])
def test_epochs_read_every_sequence_once_and_runs_are_dealt_to_any_number_of_ranks(tmp_path, tokenizer, packing):
    path = write(tmp_path / "a.jsonl", rows(101))
    batches = open_(path, tokenizer, batch=8, packing=packing)
    n = batches.sequences
    planes = all_rows(batches, epochs=3)
    assert n % 8
    epochs = [sorted(map(bytes, planes[e * n : (e + 1) * n])) for e in range(3)]
    assert epochs[0] == epochs[1] == epochs[2] and len(set(epochs[0])) == n
    assert not np.array_equal(planes[:n], planes[n : 2 * n])
    for step in (0, 5, 10**6):
        whole = batches.batch(step, range(8))
        parts = [open_(path, tokenizer, batch=8, packing=packing).batch(step, range(r, r + 2)) for r in range(0, 8, 2)]
        assert np.array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(open_(path, tokenizer, batch=8, packing=packing, seed=18).batch(0, range(8)), planes[:8])
    in_order = open_(path, tokenizer, batch=8, packing=packing, shuffle=False)
    assert np.array_equal(all_rows(in_order), in_order._planes(range(n)))


def test_without_packing_batches_hold_similar_lengths(tmp_path, tokenizer):
    batches = open_(write(tmp_path / "a.jsonl", rows(512)), tokenizer, batch=8)
    planes = all_rows(batches, epochs=2)
    lengths = (planes[:, 2] != -1).sum(1).reshape(-1, 8)
    assert (lengths.max(1) - lengths.min(1)).mean() < 2
    efficiency = lengths[:64].sum() / (lengths[:64].max(1) * 8).sum()
    assert efficiency > 0.95 and f"token efficiency {efficiency:.2%}, in batches by length" in batches.description()
    means = lengths.mean(1)
    assert 0.2 < (np.diff(means) > 0).mean() < 0.8  # and do not go from short to long


def test_an_epoch_that_ends_inside_a_batch_keeps_batches_of_similar_lengths(tmp_path, tokenizer):
    batches = open_(write(tmp_path / "a.jsonl", rows(132)), tokenizer, batch=8)  # 16.5 batches
    lengths = (all_rows(batches, epochs=2)[:, 2] != -1).sum(1).reshape(-1, 8)
    mixed = lengths.max(1) - lengths.min(1) > 12
    assert np.flatnonzero(mixed).tolist() in ([16], [])


def test_evaluation_reads_everything_once_on_any_number_of_ranks(tmp_path, tokenizer):
    batches = open_(write(tmp_path / "a.jsonl", rows(11)), tokenizer, training=False)
    whole = batches._planes(range(11))
    for world in (1, 2, 4):
        dealt = [list(batches.eval_batches(rank, world, 2)) for rank in range(world)]
        assert len({len(part) for part in dealt}) == 1
        read = [planes[:valid] for step in zip(*dealt) for planes, valid in step]
        assert np.array_equal(np.concatenate(read), whole)
    (planes, valid), *rest = batches.eval_batches(0, 1, 8, sequences=5)
    assert (valid, len(planes), rest) == (5, 8, []) and np.array_equal(planes[:5], whole[:5])


def test_the_prefetcher_reads_examples(tmp_path, tokenizer):
    batches = open_(write(tmp_path / "a.jsonl", rows(20)), tokenizer)
    with Prefetcher(batches, lambda step: [range(2), range(2, 4)], 3, 2) as ready:
        for step in (3, 4):
            assert np.array_equal(np.concatenate(ready.get(step)), batches.batch(step, range(4)))


def test_the_fingerprint_is_what_a_resumed_run_must_keep(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", rows(20))
    first = open_(path, tokenizer).fingerprint()
    assert first == open_(path, tokenizer).fingerprint() == json.loads(json.dumps(first))
    others = [open_(path, tokenizer, packing=True), open_(path, tokenizer, seed=1), open_(path, tokenizer, seq_len=64),
              open_(path, tokenizer, template="instruct", seq_len=400),
              open_(write(tmp_path / "b.jsonl", rows(20, seed=1)), tokenizer)]  # fmt: skip
    assert all(other.fingerprint() != first for other in others)


def test_arguments_are_cut_to_the_longest_row(tmp_path, tokenizer):
    batches = open_(write(tmp_path / "a.jsonl", [{"prompt": "ab", "response": "c"}] * 4), tokenizer, seq_len=500)
    planes = batches.batch(0, range(4))
    arguments = batches.arguments(planes, sequence_id=False, prefix_mask=False)
    assert {name: value.shape for name, value in arguments.items()} == {"input_ids": (4, 64), "labels": (4, 64)}
    arguments = batches.arguments(planes, sequence_id=True, prefix_mask=True)
    assert arguments["sequence_id"][0].tolist() == [0] * 4 + [-1] * 60
    assert arguments["prefix_mask"][0].tolist() == [True] * 2 + [False] * 62


# What is too long


def too_long(tmp_path):
    data = [("p" * 10, "r" * 10), ("p" * 60, "r" * 5), ("p" * 40, "r" * 40), ("p" * 47, "r" * 9)]
    return write(tmp_path / "a.jsonl", [{"prompt": p, "response": r} for p, r in data])


def test_examples_that_are_too_long_are_dropped_and_counted(tmp_path):
    path = write_tokenizer(tmp_path, texts=["x"])  # no merges: a token a character
    batches = open_(too_long(tmp_path), path)
    assert len(batches.examples) == 1
    described = batches.description()
    assert "1 of 4 examples" in described
    assert "too long: 3 dropped, longer than max_seq_len (line 2, line 3, line 4)" in described
    with pytest.raises(InputError, match=r"a.jsonl: no example left of 4 \(4 dropped.*line 1.*; raise max_seq_len=20"):
        open_(too_long(tmp_path), path, seq_len=20)


def test_or_cut_and_left_out_if_no_response_is_left(tmp_path):
    path = write_tokenizer(tmp_path, texts=["x"])
    batches = open_(too_long(tmp_path), path, too_long="cut")
    assert batches.examples.lengths.tolist() == [21, 48, 48]
    assert [int(batches.examples.of(i)[1].sum()) for i in range(3)] == [11, 8, 1]
    assert "3 cut to max_seq_len (line 2, line 3, line 4); 1 of these left out, no response left (line 2)" in (
        batches.description()
    )


# Rows of tokens


def test_rows_of_tokens_are_taken_as_they_are(tmp_path, tokenizer):
    data = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {
            "input_ids": [5, 6, 8, 9, 0, 0],
            "labels": [-100, 6, -100, 9, -100, -100],
            "sequence_id": [0, 0, 1, 1, -1, -1],
        },
    ]
    examples = open_(write(tmp_path / "a.jsonl", data), tokenizer).examples
    found = [[part.tolist() for part in examples.of(i)] for i in range(3)]
    assert found == [[[5, 6, 7], [False, True, True]], [[5, 6], [False, True]], [[8, 9], [False, True]]]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([0, 0, 2, 2], r"sequence_id\[2\] is 2 after 0: sequence ids are 0, 1, 2, ... without a gap"),
        ([1, 1, 2, 2], r"sequence_id\[0\] is 1: sequence ids are 0"),
        ([0, 1, 0, 0], r"sequence_id\[2\] is 0 after 1"),
        ([0, -1, 0, 0], r"sequence_id\[1\] is -1 after 0"),
        ([0, 0, 1], "4 input_ids, 4 labels and 3 sequence ids"),
        ([0, 0, 0, 1], "no label counts in its example 1"),
        ([-1, -1, -1, -1], "it holds padding only"),
        ([0, 0.5, 1, 1], "'sequence_id' is no list of integers"),
    ],
)
def test_sequence_ids_with_gaps_are_refused(tmp_path, tokenizer, numbers, message):
    row = {"input_ids": [5, 6, 8, 9], "labels": [-100, 6, 8, -100], "sequence_id": numbers}
    data = write(tmp_path / "a.jsonl", [{"input_ids": [5, 6], "labels": [5, 6]}, row])
    with pytest.raises(InputError, match=rf"a\.jsonl, line 2: .*{message}"):
        open_(data, tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, 6]}, "field 'labels' is no list of integers; it has input_ids"),
        ({"input_ids": [], "labels": []}, "0 input_ids"),
        ({"input_ids": [5, 6], "labels": [5, 7]}, "token 1 has id 6 and label 7"),
        ({"input_ids": [-5], "labels": [-5]}, "token 0 has id -5"),
        ({"input_ids": [5, 6], "labels": [5, -100]}, "no label counts in it"),  # nothing precedes the first
    ],
)
def test_tokens_that_cannot_be_used(tmp_path, tokenizer, row, message):
    with pytest.raises(InputError, match=rf"a\.jsonl, line 1: {message}"):
        open_(write(tmp_path / "a.jsonl", [row]), tokenizer)


# Errors


def test_errors_name_file_and_line(tmp_path, tokenizer):
    data = tmp_path / "a.jsonl"
    for bad, message in [
        ('{"prompt": "a"}', "no response"),
        ('{"prompt": "a", "response": " <|endoftext|>"}', r"the response is <\|endoftext\|> alone"),
        ('{"prompt": "a", "response": "\\ud800"}', "the text holds half of a surrogate pair"),
        ('["a"]', "a JSON list, expected an object"),
        ("{", "not JSON"),
    ]:
        data.write_text(f'{{"prompt": "a", "response": "b"}}\n\n{bad}\n')
        with pytest.raises(InputError, match=rf"a\.jsonl, line 3: {message}"):
            open_(data, tokenizer)
    pa.parquet.write_table(pa.Table.from_pylist([*rows(3), {"prompt": "a", "response": None}]), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet, row 3: no response"):
        open_(tmp_path / "b.parquet", tokenizer)
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(InputError, match=r"c\.txt: holds no examples; give JSON lines"):
        open_(tmp_path / "c.txt", tokenizer)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "c.txt").write_text("text")
    with pytest.raises(InputError, match=r"texts: no JSON lines, Parquet or Arrow file in it$"):
        open_(tmp_path / "texts", tokenizer)
    data.write_text("\n")
    with pytest.raises(InputError, match=r"a\.jsonl: no example in it; give other data"):
        open_(data, tokenizer)


def test_a_context_that_no_example_has_is_a_mistake(tmp_path, tokenizer):
    data = [{"instruction": "a", "response": "b"}, {"instruction": "a", "passage": "c", "response": "b"}]
    path = write(tmp_path / "a.jsonl", data)
    assert len(open_(path, tokenizer, seq_len=200, fields=FieldsConfig(context="passage")).examples) == 2
    with pytest.raises(InputError, match=r"dataset.fields.context=pasage: no example has it"):
        open_(path, tokenizer, seq_len=200, fields=FieldsConfig(context="pasage"))


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, tokenizer):
    edited = json.loads(tokenizer.read_text())
    edited["added_tokens"][0]["content"] = "<x>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(edited))
    with pytest.raises(
        InputError, match=r"no eos_token .* no <\|endoftext\|>.*; write it as eos_token into a tokenizer"
    ):
        open_(write(tmp_path / "a.jsonl", rows(2)), tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({}, "train_loader.dataset: give exactly one of local"),
        ({"local": "a", "hf_name": "b"}, "train_loader.dataset: give exactly one of local"),
        ({"hf_name": "./a"}, r"train_loader.dataset.hf_name=./a is no hub data set"),
        ({"local": "nowhere"}, "train_loader.dataset.local=nowhere: no such file or folder; a hub data set"),
        ({"local": "FOLDER", "split": "test"}, r"no JSON lines, .* in it named test.jsonl, .* and no folder test"),
        ({"local": "FOLDER/train.jsonl", "split": "test"}, r"is one file, .*dataset.split=test; to take all of it set"),
        ({"local": "FOLDER", "template": "{"}, "train_loader.dataset.template='{' is no format string"),
        ({"local": "FOLDER", "fields": FieldsConfig(roles={"a": "b"})}, r"train_loader.dataset.fields.roles.a='b'"),
    ],
)
def test_datasets_that_cannot_be_opened(tmp_path, tokenizer, dataset, message):
    write(tmp_path / "train.jsonl", rows(2))
    dataset = {k: v.replace("FOLDER", str(tmp_path)) if isinstance(v, str) else v for k, v in dataset.items()}
    config = LoaderConfig(name="finetuning", dataset=DatasetConfig(**dataset))
    with pytest.raises(InputError, match=message):
        open_examples(
            config, seq_len=S, global_batch_size=4, seed=1, vocab_size=300, tokenizer=tokenizer, training=True
        )


def test_keys_of_the_other_kind_of_loader_are_refused():
    with pytest.raises(
        InputError, match=r"train_loader.dataset.packing is for a loader of name: finetuning, this one is"
    ):
        LoaderConfig(dataset=DatasetConfig(local="a", packing=True)).check("train_loader")
    with pytest.raises(
        InputError, match=r"eval_loader.dataset.mix is for a loader of name: text, this one is finetuning"
    ):
        LoaderConfig(name="finetuning", dataset=DatasetConfig(mix=[MixEntry("a")])).check("eval_loader")
