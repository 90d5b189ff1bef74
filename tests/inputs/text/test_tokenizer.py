import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from glm4v_jax.errors import CheckpointError, Glm4vError, MessageError
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer
from tests.helpers_tokenizer import GOLDEN, write_small_tokenizer
from tools.tiny_assets import PLAIN_ADDED_TOKENS, SPECIAL_TOKENS

# Byte pairs of " the", "ing" and of the two first bytes of many Chinese characters; Ġ is the space.
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("in", "g"), ("Ġ", "a"), ("ä", "½")]

TEXTS = [
    "Hi",
    "",
    "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>What is this thing?<|assistant|>\n",
    "<|begin_of_video|><|video|><|end_of_video|>12 123456 7890",
    "the thing, the other thing!  Two  spaces\n\n\ttab and the end ",
    "你好，世界。这张图片里有什么？ 🐱👩‍👩‍👧 é e\u0301",
    "<think>Got it</think><answer>a cat</answer><|endoftext|>",
    "<|image|><|image|> <|image|>\n<| image|> <|IMAGE|>",
    "I'm sure you've seen it, don't you ? yes .",
    "\x00\x7f\u200b\ufeff",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_small_tokenizer(tmp_path_factory.mktemp("tokenizer"), MERGES)


@pytest.fixture(scope="module")
def ours(directory):
    return Glm4vTokenizer.from_pretrained(directory)


def reference(directory, **kwargs):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(directory), **kwargs)


@pytest.fixture(scope="module")
def theirs(directory):
    return reference(directory)


def edit(directory, name, **changes):
    """Change entries of a JSON file; None takes an entry out."""
    path = directory / name
    data = json.loads(path.read_text()) if path.exists() else {}
    data |= changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def test_added_tokens_that_tokenizer_json_lacks_get_the_ids_of_the_configuration(tmp_path):
    tokenizer = Glm4vTokenizer.from_pretrained(write_small_tokenizer(tmp_path))
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert raw.token_to_id("<|end_of_video|>") == 269
    assert raw.token_to_id("<|image|>") is None
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(256, 272))
    assert tokenizer.convert_tokens_to_ids(list(PLAIN_ADDED_TOKENS)) == [272, 273, 274, 275]
    assert (len(tokenizer), tokenizer.vocab_size) == (276, 256)
    assert tokenizer.encode("a<|image|>b") == [64, 270, 65]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_the_reference(ours, theirs, text):
    ids = theirs(text)["input_ids"]
    assert ours(text) == dict(theirs(text))
    assert ours.encode(text) == theirs.encode(text)
    assert ours.tokenize(text) == theirs.tokenize(text)
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    for skip in (False, True):
        assert ours.convert_ids_to_tokens(ids, skip_special_tokens=skip) == theirs.convert_ids_to_tokens(
            ids, skip_special_tokens=skip
        )
        for clean in (None, False, True):
            kwargs = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean}
            assert ours.decode(ids, **kwargs) == theirs.decode(ids, **kwargs)
    assert ours.decode(ids) == text


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"padding": True},
        {"padding": "longest", "padding_side": "right"},
        {"padding": "max_length", "max_length": 90},
        {"padding": "max_length", "max_length": 12},
        {"padding": "max_length", "max_length": 12, "truncation": True},
        {"padding": True, "pad_to_multiple_of": 8},
        {"padding": True, "pad_to_multiple_of": 8, "truncation": True, "max_length": 16, "padding_side": "right"},
        {"truncation": True, "max_length": 5},
        {"truncation": "longest_first", "max_length": 5},
        {"max_length": 5},
        {"max_length": 5, "truncation": False},
        {"padding": "do_not_pad", "truncation": "do_not_truncate"},
        {"return_attention_mask": False},
        {"return_token_type_ids": True},
        {"return_special_tokens_mask": True, "return_offsets_mapping": True, "return_length": True},
        {"add_special_tokens": False},
        {"split_special_tokens": True},
        {"padding": True, "return_tensors": "np"},
        {"padding": True, "return_tensors": "np", "return_length": True},
    ],
    ids=str,
)
def test_batches_equal_the_reference(ours, theirs, kwargs):
    expected = theirs(TEXTS, **kwargs)
    found = ours(TEXTS, **kwargs)
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
        np.testing.assert_equal(found[name], value, err_msg=name)
    single = ours(TEXTS[2], **kwargs)
    for name, value in theirs(TEXTS[2], **kwargs).items():
        np.testing.assert_equal(single[name], value, err_msg=name)


@pytest.mark.parametrize("batched", [False, True])
def test_words_equal_the_reference(ours, theirs, batched):
    words = ["the", "<|image|>", " thing"]
    text = [words, ["one"]] if batched else words
    assert ours(text, is_split_into_words=True) == dict(theirs(text, is_split_into_words=True))


def test_padding_does_not_outlive_its_call(ours, theirs):
    ours(TEXTS, padding="max_length", max_length=40, truncation=True, split_special_tokens=True)
    assert ours(TEXTS[2]) == dict(theirs(TEXTS[2]))


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "pad_token",
        "pad_token_id",
        "eos_token",
        "eos_token_id",
        "bos_token",
        "bos_token_id",
        "unk_token",
        "unk_token_id",
        "padding_side",
        "truncation_side",
        "model_max_length",
        "model_input_names",
        "clean_up_tokenization_spaces",
        "all_special_tokens",
        "all_special_ids",
        "additional_special_tokens",
        "special_tokens_map",
        "added_tokens_decoder",
        "chat_template",
    ],
)
def test_attributes_equal_the_reference(ours, theirs, name):
    assert getattr(ours, name) == getattr(theirs, name)


def test_vocabulary_equals_the_reference(ours, theirs):
    assert len(ours) == len(theirs) == 256 + len(MERGES) + 20
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert ours.convert_tokens_to_ids("no such token") is theirs.convert_tokens_to_ids("no such token") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"padding_side": "right", "truncation_side": "left"},
        {"clean_up_tokenization_spaces": True},
        {"model_input_names": None},
        {"model_max_length": 7},
        {"model_max_length": None},
        {"pad_token": "[MASK]"},
        {"pad_token": {"__type": "AddedToken", "content": "[MASK]", "special": True, "normalized": False}},
        {"additional_special_tokens": ["<|user|>"]},
        {"additional_special_tokens": ["<|user|>", "<new>"]},
        {"bos_token": "[gMASK]", "unk_token": "?"},
        {"extra_special_tokens": {"image_token": "<|image|>", "video_token": "<|video|>"}},
        {"split_special_tokens": True},
        {"eos_token": "<|assistant|>", "chat_template": "{{ messages }}"},
        {"chat_template": [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}]},
    ],
    ids=str,
)
def test_every_entry_of_the_configuration_counts(tmp_path, changes):
    edit(write_small_tokenizer(tmp_path, MERGES), "tokenizer_config.json", **changes)
    ours, theirs = Glm4vTokenizer.from_pretrained(tmp_path), reference(tmp_path)
    for text in [*TEXTS, "a<new>b?"]:
        assert ours(text) == dict(theirs(text))
        ids = theirs(text, split_special_tokens=False)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    for kwargs in ({"padding": True}, {"truncation": True, "max_length": 6, "padding": "max_length"}):
        assert ours(TEXTS, **kwargs) == dict(theirs(TEXTS, **kwargs))
    if changes.get("model_max_length", 1) is not None:
        for kwargs in ({"padding": True}, {"padding": "max_length"}, {}):
            assert ours(TEXTS, truncation=True, **kwargs) == dict(theirs(TEXTS, truncation=True, **kwargs))
    for name in ("special_tokens_map", "all_special_ids", "model_max_length", "chat_template", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.convert_tokens_to_ids("no such token") == theirs.convert_tokens_to_ids("no such token")


def test_without_any_limit_max_length_warns(tmp_path):
    edit(write_small_tokenizer(tmp_path), "tokenizer_config.json", model_max_length=None)
    ours, theirs = Glm4vTokenizer.from_pretrained(tmp_path), reference(tmp_path)
    for kwargs in ({"truncation": True}, {"padding": "max_length"}):
        with pytest.warns(UserWarning, match="no max_length was given"):
            assert ours(TEXTS, **kwargs) == dict(theirs(TEXTS, **kwargs))


def test_flags_of_the_configuration_win(tmp_path):
    write_small_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    decoder = config["added_tokens_decoder"]
    decoder["263"] |= {"lstrip": True, "rstrip": True}
    decoder["274"]["special"] = True
    decoder["266"] |= {"special": False}
    # What is named as a special token is one, whatever its flag.
    decoder["275"] |= {"special": False}
    edit(tmp_path, "tokenizer_config.json", added_tokens_decoder=decoder, additional_special_tokens=["</answer>"])
    ours, theirs = Glm4vTokenizer.from_pretrained(tmp_path), reference(tmp_path)
    assert ours.added_tokens_decoder == theirs.added_tokens_decoder
    text = "a  <|user|>  b<answer>c</answer><|begin_of_image|>d"
    assert ours(text) == dict(theirs(text))
    assert ours.decode(ours.encode(text), skip_special_tokens=True) == theirs.decode(
        theirs.encode(text), skip_special_tokens=True
    )


def test_special_tokens_map_counts_where_the_configuration_is_old(tmp_path):
    write_small_tokenizer(tmp_path)
    edit(
        tmp_path,
        "tokenizer_config.json",
        added_tokens_decoder=None,
        additional_special_tokens=["<|user|>"],
        eos_token=None,
        pad_token=None,
    )
    edit(
        tmp_path,
        "special_tokens_map.json",
        eos_token={"content": "<|endoftext|>", "lstrip": False, "normalized": False},
        pad_token="[MASK]",
        additional_special_tokens=["<|user|>", "<|assistant|>", {"content": "<extra>", "normalized": False}],
    )
    ours, theirs = Glm4vTokenizer.from_pretrained(tmp_path), reference(tmp_path)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours(TEXTS, padding=True) == dict(theirs(TEXTS, padding=True))
    assert ours("a<extra>b") == dict(theirs("a<extra>b"))


def test_padding_stored_in_tokenizer_json_gives_defaults(tmp_path):
    write_small_tokenizer(tmp_path)
    edit(tmp_path, "tokenizer_config.json", pad_token=None, padding_side=None)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_padding(direction="left", pad_id=257, pad_token="[MASK]")
    backend.enable_truncation(max_length=9, direction="left")
    backend.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = Glm4vTokenizer.from_pretrained(tmp_path), reference(tmp_path)
    for kwargs in ({}, {"padding": True}, {"padding": True, "truncation": True, "max_length": 4}):
        assert ours(TEXTS, **kwargs) == dict(theirs(TEXTS, **kwargs))


def test_tokens_around_every_text_are_honoured(tmp_path):
    write_small_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", 258), ("<sop>", 260)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = Glm4vTokenizer.from_pretrained(tmp_path), reference(tmp_path)
    for kwargs in ({}, {"add_special_tokens": False}, {"truncation": True, "max_length": 4, "padding": True}):
        kwargs["return_special_tokens_mask"] = True
        assert ours(TEXTS, **kwargs) == dict(theirs(TEXTS, **kwargs))
    assert ours.encode("a") == [258, 260, 64]


def test_tokenizer_of_version_5_keeps_its_special_tokens(tmp_path):
    """5.x writes a list `extra_special_tokens` and every added token into tokenizer.json."""
    write_small_tokenizer(tmp_path)
    Glm4vTokenizer.from_pretrained(tmp_path).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    edit(
        tmp_path,
        "tokenizer_config.json",
        added_tokens_decoder=None,
        additional_special_tokens=None,
        extra_special_tokens=list(SPECIAL_TOKENS),
    )
    tokenizer = Glm4vTokenizer.from_pretrained(tmp_path)
    assert tokenizer.all_special_ids == list(range(256, 272))
    assert tokenizer.convert_tokens_to_ids("</answer>") == 275


def test_batch_decode_equals_the_reference(ours, theirs):
    batch = theirs(TEXTS, padding=True, return_tensors="np")["input_ids"]
    for sequences in (batch, batch.tolist(), list(batch), theirs(TEXTS)["input_ids"], batch[2], batch[2].tolist()):
        for skip in (False, True):
            expected = theirs.batch_decode(sequences, skip_special_tokens=skip)
            assert ours.batch_decode(sequences, skip_special_tokens=skip) == expected


def test_decode_takes_jax_arrays_and_batches(ours):
    ids = ours(["the thing", "a <|image|>"], padding=True, return_tensors="np")["input_ids"]
    expected = ours.batch_decode(ids)
    assert [text.removeprefix("<|endoftext|>") for text in expected] == ["the thing", "a <|image|>"]
    for batch in (ids, jnp.asarray(ids), ids.tolist(), [jnp.asarray(row) for row in ids]):
        assert ours.decode(batch) == expected
        assert ours.batch_decode(batch) == expected
    assert ours.decode(jnp.asarray(ids)[1]) == expected[1]
    assert ours.decode(int(ids[1, -1])) == ours.decode(ids[1, -1]) == "<|image|>"
    assert ours.decode([]) == ""


def test_think_and_answer_survive_skip_special_tokens(ours):
    ids = ours.encode("<|assistant|>\n<think>x</think><answer>y</answer><|endoftext|>")
    assert ours.decode(ids, skip_special_tokens=True) == "\n<think>x</think><answer>y</answer>"


def test_overrides_of_from_pretrained(directory):
    ours = Glm4vTokenizer.from_pretrained(directory, padding_side="right", pad_token="[MASK]")
    theirs = reference(directory, padding_side="right", pad_token="[MASK]")
    assert ours(TEXTS, padding=True) == dict(theirs(TEXTS, padding=True))


def test_pad_token_can_be_set(directory):
    tokenizer = Glm4vTokenizer.from_pretrained(directory)
    tokenizer.pad_token = "[MASK]"
    tokenizer.padding_side = "right"
    mask = tokenizer.convert_tokens_to_ids("[MASK]")
    assert tokenizer(["a", "ab"], padding=True)["input_ids"] == [[64, mask], [64, 65]]
    with pytest.raises(Glm4vError, match="'<pad>'; expected a token of the vocabulary"):
        tokenizer.pad_token = "<pad>"


def test_real_prompts_have_our_special_tokens_in_the_same_places(tmp_path):
    """Ids of the official tokenizer: every special id is ours plus 151329 - 256, and newlines are 198 in both."""
    tokenizer = Glm4vTokenizer.from_pretrained(write_small_tokenizer(tmp_path))
    for prompt in json.loads((GOLDEN / "facts" / "real_tokenizer_ids.json").read_text()):
        text = f"[gMASK]<sop><|system|>\n{prompt['system']}<|user|>\n{prompt['user']}<|assistant|>\n"
        ids = np.array(tokenizer.encode(text))
        real = np.array(prompt["ids"])
        special, real_special = np.flatnonzero(ids >= 256), np.flatnonzero(real >= 151329)
        np.testing.assert_array_equal(ids[special] - 256, real[real_special] - 151329)
        np.testing.assert_array_equal(ids[special[2:] + 1], real[real_special[2:] + 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t(None), r"text\[0\]: found NoneType; expected str"),
        (lambda t: t(["a", 3]), r"text\[1\]: found int"),
        (lambda t: t([]), "empty list"),
        (lambda t: t("a", padding="yes"), "padding: found 'yes'; expected"),
        (lambda t: t("a", truncation="yes"), "truncation: found 'yes'; expected"),
        (lambda t: t("a", truncation=True, padding=True, max_length=9, pad_to_multiple_of=4), "multiple of"),
        (lambda t: t(["a", "abc"], return_tensors="np"), "rows of 1 to 3 tokens .* pass padding=True"),
    ],
)
def test_wrong_calls_are_named(ours, call, message):
    with pytest.raises(MessageError, match=message):
        call(ours)


def test_torch_tensors_are_refused(ours):
    with pytest.raises(ValueError, match="return_tensors='pt' is not supported"):
        ours("a", return_tensors="pt")


def test_labels_are_not_ids(ours):
    with pytest.raises(Glm4vError, match="token_ids: found -100"):
        ours.decode([64, -100])
    with pytest.raises(Glm4vError, match=r"token_ids: found 1\.5"):
        ours.decode(np.array([1.5]))


def test_padding_without_a_pad_token_is_refused(tmp_path):
    edit(write_small_tokenizer(tmp_path), "tokenizer_config.json", pad_token=None)
    with pytest.raises(MessageError, match="no pad_token"):
        Glm4vTokenizer.from_pretrained(tmp_path)(["a", "ab"], padding=True)


def test_a_gap_in_the_added_ids_is_refused(tmp_path):
    write_small_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]["270"]
    edit(
        tmp_path,
        "tokenizer_config.json",
        added_tokens_decoder=config["added_tokens_decoder"],
        additional_special_tokens=[],
    )
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json.*'<\|video\|>' has id 270, .*; and \d+ more$"):
        Glm4vTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no such file"),
        ("tokenizer.json", "{", "not a tokenizer"),
        ("tokenizer_config.json", "[", "found invalid JSON"),
        ("tokenizer_config.json", "[]", "found a JSON list; expected an object"),
        ("tokenizer_config.json", '{"eos_token": 3}', "found the token 3"),
        ("tokenizer_config.json", '{"padding_side": "up"}', "padding_side: found 'up'"),
    ],
)
def test_corrupt_files_are_named(tmp_path, name, content, message):
    path = write_small_tokenizer(tmp_path) / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Glm4vTokenizer.from_pretrained(tmp_path)
    assert name in str(caught.value)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: found no such directory"):
        Glm4vTokenizer.from_pretrained(tmp_path / "nowhere")


def test_tokenizer_json_alone_is_enough(tmp_path):
    write_small_tokenizer(tmp_path / "full")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "full" / "tokenizer.json", tmp_path / "alone")
    ours, theirs = Glm4vTokenizer.from_pretrained(tmp_path / "alone"), reference(tmp_path / "alone")
    assert ours(TEXTS) == dict(theirs(TEXTS))


@pytest.mark.parametrize(("text", "where"), [("a\ud800", "text[0]"), (["fine", "a\ud800"], "text[1]")])
def test_lone_surrogates_are_refused(ours, text, where):
    with pytest.raises(MessageError) as caught:
        ours(text)
    assert str(caught.value).startswith(f"{where} is not valid Unicode (UTF-8): found the lone surrogate '\\ud800'")
