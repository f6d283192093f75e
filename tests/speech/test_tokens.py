import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gq_triton.speech.datasets import an4
from gq_triton.speech.tokens import BLANK, UNKNOWN, tokenizer_from_dict, train_tokenizer

TEXTS = ["turn on the light", "turn off the fan", "open the window", "call nine one one", "it's  a\ttest"]
KINDS = ["word", "char", "subword"]


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: train_tokenizer(kind, TEXTS, 48) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_training_texts_survive_and_use_neither_blank_nor_unknown(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(UNKNOWN < token < tokenizer.vocab_size for token in ids)
        assert tokenizer.decode(ids) == " ".join(text.split())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(sorted({word for text in TEXTS for word in text.split()}))), st.sampled_from(KINDS))
def test_any_sentence_of_known_words_survives(words, kind):
    tokenizer = train_tokenizer(kind, TEXTS, 48) if kind != "subword" else SUBWORDS
    assert tokenizer.decode(tokenizer.encode(" ".join(words))) == " ".join(words)


SUBWORDS = train_tokenizer("subword", TEXTS, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_survives_json(tokenizers, kind):
    tokenizer = tokenizers[kind]
    restored = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert restored.vocab_size == tokenizer.vocab_size
    for text in TEXTS:
        assert restored.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic(tokenizers, kind):
    assert train_tokenizer(kind, TEXTS, 48).to_dict() == tokenizers[kind].to_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_text_is_marked(tokenizers, kind):
    ids = tokenizers[kind].encode("turn Ω the")
    assert UNKNOWN in ids
    assert "<unk>" in tokenizers[kind].decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_blanks_and_empty_texts(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    ids = tokenizer.encode("turn on")
    assert tokenizer.decode([BLANK, *ids, BLANK]) == "turn on"


def test_vocabulary_sizes(tokenizers):
    assert tokenizers["word"].vocab_size == 2 + len({word for text in TEXTS for word in text.split()})
    assert tokenizers["char"].vocab_size == 2 + len(set("".join(TEXTS)) - {"\t"})
    assert tokenizers["subword"].vocab_size <= 48


def test_few_subwords_give_more_tokens_than_words():
    texts = TEXTS * 3
    few = train_tokenizer("subword", texts, 26)
    assert few.vocab_size <= 26
    assert len(few.encode(texts[0])) > len(texts[0].split())


@pytest.mark.parametrize("kind", KINDS)
def test_ids_out_of_range_are_refused(tokenizers, kind):
    for token in (-1, tokenizers[kind].vocab_size):
        with pytest.raises(ValueError, match="ids"):
            tokenizers[kind].decode([token])


def test_bad_training():
    with pytest.raises(ValueError, match="kind"):
        train_tokenizer("phoneme", TEXTS)
    with pytest.raises(ValueError, match="texts"):
        train_tokenizer("word", ["", "  "])
    with pytest.raises(ValueError, match=r"vocab_size must be at least \d+"):
        train_tokenizer("subword", TEXTS, 5)


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"kind": "phoneme"},
        {"kind": "word"},
        {"kind": "word", "symbols": "abc"},
        {"kind": "word", "symbols": ["a", "a"]},
        {"kind": "char", "symbols": [1, 2]},
        {"kind": "subword"},
        {"kind": "subword", "model": "not base64!"},
        {"kind": "subword", "model": base64.b64encode(b"no model").decode()},
    ],
)
def test_bad_descriptions(description):
    with pytest.raises(ValueError):
        tokenizer_from_dict(description)


def test_an4_transcripts_survive(an4_root):
    texts = [utterance.text for utterance in an4(an4_root, "train")]
    for kind in KINDS:
        tokenizer = train_tokenizer(kind, texts, 128)
        assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts
