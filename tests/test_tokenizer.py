"""
tokenizer.py against tokenizers built here: sentencepiece with byte fallback, byte-level BPE, Llama 2's tokenizer.json.

    pytest tests/test_tokenizer.py

What is expected comes from sentencepiece itself and from transformers on the same files, not from tokenizer.py.
"""

import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tokenizer as module
from tokenizer import Tokenizer

WORDS = "the quick brown fox jumps over a lazy dog once upon time def return print café naïve Zürich 你好 世界".split()
TEXTS = [
    "once upon a time",
    "",
    "the\n\nquick\tbrown   fox \n",
    "def f(x):\n    return x + 1  # ünï\n",
    "emoji 😀👩‍👩‍👧 and 你好, 世界!",
    "Ω\u00a0\u200bé \r\n\x00",
    "the ▁ is spelled like a space",
]
LEADING = [" the fox", "   indented", "\tthe", "\n"]
TEMPLATE = (
    "{% for m in messages %}\n  {% if loop.first %}{{ bos_token }}{% endif %}\n"
    "<|im_start|>{{ m['role'] }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if tools %}no{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [{"role": "system", "content": "the <fox> & 'dog'"}, {"role": "user", "content": " Hi 😀\n"}]
CHATML = {"content": "<|im_start|>", "special": True}, {"content": "<|im_end|>", "special": True}


def write(folder, name, data):
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")


def corpus():
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=8)) for _ in range(300)]


@pytest.fixture(scope="session")
def spm_proto():
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # Llama's settings
        sentence_iterator=iter(corpus()), model_writer=out, model_type="bpe", vocab_size=400, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, control_symbols=["[INST]"], character_coverage=0.98, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


@pytest.fixture
def spm_dir(tmp_path, spm_proto):
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {str(400 + i): {**flags, **t} for i, t in enumerate(CHATML)}
    (tmp_path / "tokenizer.model").write_bytes(spm_proto)
    write(tmp_path, "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True, "add_eos_token": False, "legacy": False, "added_tokens_decoder": added,
        "chat_template": TEMPLATE})  # fmt: skip
    return tmp_path


@pytest.fixture(scope="session")
def bpe_json():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    tok.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return tok.to_str()


@pytest.fixture
def bpe_dir(tmp_path, bpe_json):
    write(tmp_path, "tokenizer.json", bpe_json)
    write(tmp_path, "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>",
        "eos_token": {"content": "<|end|>", "__type": "AddedToken"},
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}],
    })  # fmt: skip
    return tmp_path


@pytest.fixture
def llama2_dir(spm_dir):
    """The same vocabulary as tokenizer.json, as transformers converts it: Metaspace, ByteFallback, Fuse, Strip."""
    reference(spm_dir).save_pretrained(spm_dir)
    (spm_dir / "tokenizer.model").unlink()
    assert (spm_dir / "tokenizer.json").is_file()
    return spm_dir


@pytest.fixture(params=["spm_dir", "bpe_dir", "llama2_dir"])
def folder(request):
    return request.getfixturevalue(request.param)


def reference(folder):
    """transformers' tokenizer of the same files."""
    transformers = pytest.importorskip("transformers")
    if not (folder / "tokenizer.model").is_file():
        return transformers.AutoTokenizer.from_pretrained(folder)
    # AutoTokenizer reads a lone tokenizer.model through protobuf, which we do not require: hand it vocab and merges.
    from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

    vocab, scores, merges = SentencePieceExtractor(str(folder / "tokenizer.model")).extract()
    return transformers.LlamaTokenizer(
        vocab=vocab, merges=merges, add_bos_token=True, chat_template=TEMPLATE,
        extra_special_tokens=[t["content"] for t in CHATML],
    )  # fmt: skip


def streamed(tok, ids, prompt=()):
    stream = tok.stream(prompt)
    return [stream.feed(i) for i in ids] + [stream.flush()]


# -- ids and text


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_transformers(folder, text):
    tok, hf = Tokenizer(folder), reference(folder)
    ids = tok.encode(text)
    assert ids == hf(text).input_ids
    assert tok.encode(text, bos=False) == hf(text, add_special_tokens=False).input_ids
    assert tok.decode(ids) == hf.decode(ids, skip_special_tokens=True)
    assert tok.decode(ids) == text.replace("▁", " " if tok._strip else "▁")  # sentencepiece spells a space ▁


@pytest.mark.parametrize("text", LEADING)
def test_leading_space_survives(spm_dir, bpe_json, text, tmp_path_factory):
    import sentencepiece

    tok = Tokenizer(spm_dir)
    assert tok.kind == "sentencepiece"
    # not transformers 5, whose Metaspace gives " a" the ids of "a"
    sp = sentencepiece.SentencePieceProcessor(model_proto=(spm_dir / "tokenizer.model").read_bytes())
    assert tok.encode(text) == [1, *sp.encode(text)]
    assert tok.decode(tok.encode(text)) == text
    other = tmp_path_factory.mktemp("bpe")
    write(other, "tokenizer.json", bpe_json)
    assert Tokenizer(other).decode(Tokenizer(other).encode(text)) == text


def test_special_tokens_in_text_are_one_id_and_leave_no_text(folder):
    tok, hf = Tokenizer(folder), reference(folder)
    text = "<|im_start|>the fox<|im_end|>\n once<|im_end|>"
    ids = tok.encode(text, bos=False)
    assert ids == hf(text, add_special_tokens=False).input_ids
    assert ids.count(tok._token_id("<|im_end|>")) == 2
    assert tok.decode(ids) == hf.decode(ids, skip_special_tokens=True) == "the fox\n once"


def test_control_pieces_of_sentencepiece(spm_dir):
    import sentencepiece

    tok = Tokenizer(spm_dir)
    sp = sentencepiece.SentencePieceProcessor(model_proto=(spm_dir / "tokenizer.model").read_bytes())
    ids = tok.encode("<s>[INST] the fox", bos=False)
    assert ids == [1, sp.piece_to_id("[INST]"), *sp.encode("the fox")]  # " the": no second dummy prefix
    assert tok.decode(ids) == "the fox"
    write(spm_dir, "tokenizer_config.json", {"legacy": True})
    assert Tokenizer(spm_dir).encode("<s>the fox", bos=False) == [1, *sp.encode("the fox")]
    assert tok.encode("<s>the fox", bos=False) != [1, *sp.encode("the fox")]


def test_added_tokens_json(spm_dir):
    write(spm_dir, "tokenizer_config.json", {"additional_special_tokens": ["<|im_start|>"]})
    write(spm_dir, "added_tokens.json", {"<|im_start|>": 400, "<think>": 401})
    tok = Tokenizer(spm_dir)
    assert tok.vocab_size == 402
    assert tok.encode("<think><|im_start|>", bos=False) == [401, 400]
    assert tok.decode([401, 400]) == "<think>"  # one is special, the other is text


def test_added_tokens_strip(spm_dir):
    write(spm_dir, "tokenizer_config.json", {"added_tokens_decoder": {"400": {"content": "<x>", "rstrip": True}}})
    tok = Tokenizer(spm_dir)
    assert tok.encode("fox<x> \n fox", bos=False) == tok.encode("fox<x>fox", bos=False)
    assert tok.encode("fox <x>fox", bos=False) != tok.encode("fox<x>fox", bos=False)


def test_longest_added_token_wins_and_one_space_is_dropped(spm_dir):
    added = {"400": {"content": "<a"}, "401": {"content": "<a>"}, "402": {"content": "▁▁▁"}}
    write(spm_dir, "tokenizer_config.json", {"added_tokens_decoder": added})
    tok = Tokenizer(spm_dir)
    assert tok.encode("<a><a", bos=False) == [401, 400]
    assert tok.decode([402, 401]) == "  <a>"
    assert tok.decode([403, 401, 10**12]) == "<a>"  # the model's vocabulary may be padded beyond the tokenizer's


def test_sentencepiece_without_prefix_or_bos(spm_dir):
    write(spm_dir, "tokenizer_config.json", {"add_prefix_space": False, "bos_token": None})
    tok = Tokenizer(spm_dir)
    assert tok.bos_id is None
    assert tok.encode(" the") == tok.encode("fox the")[len(tok.encode("fox")) :]
    assert tok.decode(tok.encode(" the")) == " the" and tok.decode(tok.encode("the")) == "the"


def test_tokens_that_only_the_config_calls_special(bpe_dir):
    new = {"content": "<new>", "special": False, "lstrip": False, "rstrip": False, "normalized": False}
    eos = json.loads((bpe_dir / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]["v"]
    write(bpe_dir, "tokenizer_config.json", {"eos_token": "v", "added_tokens_decoder": {"340": new}})
    tok, hf = Tokenizer(bpe_dir), reference(bpe_dir)
    ids = tok.encode("fox<new>vfox")
    assert ids == hf("fox<new>vfox").input_ids and 340 in ids and tok.stop_ids == (eos,)
    assert tok.decode(ids) == hf.decode(ids, skip_special_tokens=True) == "fox<new>fox"


def test_bos_rules(folder):
    tok = Tokenizer(folder)
    plain = tok.encode("the fox", bos=False)
    assert tok.bos_id == reference(folder).bos_token_id and tok.bos_id not in plain
    assert tok.encode("the fox") == tok.encode("the fox", bos=True) == [tok.bos_id, *plain]


@pytest.mark.parametrize("config, ends", [({}, (1, 0)), ({"add_bos_token": False}, (0, 0)),
                                          ({"add_eos_token": True}, (1, 1))])  # fmt: skip
def test_sentencepiece_bos_and_eos_follow_the_config(spm_dir, config, ends):
    write(spm_dir, "tokenizer_config.json", config)
    tok = Tokenizer(spm_dir)
    plain = tok.encode("fox", bos=False)
    assert tok.encode("fox") == [1] * ends[0] + plain + [2] * ends[1]
    assert tok.encode("fox", bos=True)[0] == 1 and tok.stop_ids == (2,)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("processor", [True, False])
def test_tokenizer_json_post_processor_decides_bos(bpe_dir, bpe_json, processor, add_bos):
    data = json.loads(bpe_json)
    write(bpe_dir, "tokenizer.json", data if processor else {**data, "post_processor": None})
    write(bpe_dir, "tokenizer_config.json", {"bos_token": "<|begin|>", "add_bos_token": add_bos})
    assert Tokenizer(bpe_dir).encode("fox") == reference(bpe_dir)("fox").input_ids


def test_tokenizer_json_alone(tmp_path, bpe_json):
    write(tmp_path, "tokenizer.json", bpe_json)
    tok = Tokenizer(tmp_path)
    assert (tok.kind, tok.bos_id, tok.stop_ids, tok.has_chat_template, tok.vocab_size) == (
        "tokenizers", 0, (), False, 340)  # fmt: skip


def test_tokenizer_json_is_preferred_and_never_truncates(spm_dir, bpe_json):
    data = json.loads(bpe_json)
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
                       "pad_type_id": 0, "pad_token": "<|end|>"}  # fmt: skip
    write(spm_dir, "tokenizer.json", data)
    tok = Tokenizer(spm_dir)
    assert tok.kind == "tokenizers"
    assert tok.decode(tok.encode(WORDS[0] * 20)) == WORDS[0] * 20
    assert len(tok.encode("fox")) < 10


def test_no_decoder_joins_words(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    back = Backend(models.WordLevel({"the": 0, "fox": 1, "[UNK]": 2}, unk_token="[UNK]"))
    back.pre_tokenizer = pre_tokenizers.Whitespace()
    back.save(str(tmp_path / "tokenizer.json"))
    tok = Tokenizer(tmp_path)
    assert tok.decode(tok.encode("the fox dog")) == back.decode([0, 1, 2], skip_special_tokens=True) == "the fox [UNK]"


# -- streaming


def test_emoji_split_over_tokens(folder):
    tok = Tokenizer(folder)
    ids = tok.encode("fox 😀")
    parts = streamed(tok, ids)
    assert [p for p in parts[-5:]] == ["", "", "", "😀", ""]  # four byte tokens; shown with the last, not later
    assert "".join(parts) == "fox 😀"
    assert "".join(streamed(tok, ids[:-1])) == tok.decode(ids[:-1])
    assert streamed(tok, ids[:-1])[-1].strip("\ufffd") == "" != streamed(tok, ids[:-1])[-1]


@pytest.mark.parametrize("text", [t for t in TEXTS + LEADING if "▁" not in t])
def test_stream_continues_a_prompt_at_every_split(spm_dir, text):
    tok = Tokenizer(spm_dir)
    ids = tok.encode(text)
    for k in range(len(ids) + 1):
        whole = "".join(streamed(tok, ids[:k])[:-1]) + "".join(streamed(tok, ids[k:], prompt=ids[:k]))
        assert whole == text


def test_first_space_is_kept_only_after_a_prompt(spm_dir):
    tok = Tokenizer(spm_dir)
    the = tok.encode("the", bos=False)
    assert "".join(streamed(tok, the)) == "the"
    assert "".join(streamed(tok, the, prompt=[tok.bos_id])) == "the"
    assert "".join(streamed(tok, the, prompt=tok.encode("fox"))) == " the"
    spaces = tok.encode("    the", bos=False)
    assert "".join(streamed(tok, spaces)) == "    the"


def test_random_ids_equal_the_whole_decode_bpe(bpe_dir):
    tok, hf, rng = Tokenizer(bpe_dir), reference(bpe_dir), random.Random(1)
    for _ in range(300):
        ids = rng.choices(range(350), k=rng.randrange(1, 40))  # 340 and above have no text
        parts = streamed(tok, ids)
        known = [i for i in ids if i < 340]
        assert "".join(parts) == tok.decode(ids) == hf.decode(known, skip_special_tokens=True)


def test_random_ids_equal_the_whole_decode_sentencepiece(spm_dir, spm_proto):
    import sentencepiece

    tok, rng = Tokenizer(spm_dir), random.Random(2)
    sp = sentencepiece.SentencePieceProcessor(model_proto=spm_proto)
    ordinary = [i for i in range(400) if not sp.is_control(i) and not sp.is_unknown(i)]
    for _ in range(300):
        ids = rng.choices(ordinary, k=rng.randrange(1, 40))
        if sp.id_to_piece(ids[0]) != "<0x20>":  # a space that only sentencepiece keeps; no text is encoded so
            assert "".join(streamed(tok, ids)) == tok.decode(ids) == sp.decode(ids)


def test_random_text_equals_transformers_llama2(llama2_dir):
    tok, hf, rng = Tokenizer(llama2_dir), reference(llama2_dir), random.Random(3)
    assert tok.kind == "tokenizers"
    for _ in range(200):
        text = "".join(rng.choices("a fox\n\té你😀<s>", k=rng.randrange(1, 30)))
        ids = tok.encode(text)
        assert ids == hf(text).input_ids
        assert "".join(streamed(tok, ids)) == tok.decode(ids) == hf.decode(ids, skip_special_tokens=True)


def test_stream_does_not_decode_the_past_again(bpe_dir):
    tok = Tokenizer(bpe_dir)
    calls = []
    tok._token_bytes = lambda i: calls.append(i) or b"x"
    stream = tok.stream()
    text = "".join(stream.feed(i % 50) for i in range(5000))
    assert text == "x" * 5000 and len(calls) == 50  # once for each distinct id
    assert len(stream._decoder.getstate()[0]) == 0


def test_ids_may_be_a_tensor(bpe_dir):
    torch = pytest.importorskip("torch")
    tok = Tokenizer(bpe_dir)
    ids = torch.tensor(tok.encode("the fox"))
    assert tok.decode(ids) == "the fox" and "".join(streamed(tok, ids, prompt=ids)) == "the fox"


# -- stop ids


@pytest.mark.parametrize("files, expected", [
    ({}, (1,)),
    ({"hotloop.json": {"stop_ids": [7, 8]}, "config.json": {"eos_token_id": 5}}, (7, 8)),
    ({"hotloop.json": {"stop_ids": []}, "config.json": {"eos_token_id": 5}}, ()),
    ({"hotloop.json": {"dim": 8}, "config.json": {"eos_token_id": 5}}, (5, 1)),
    ({"generation_config.json": {"eos_token_id": [9, 1, 9]}, "config.json": {"eos_token_id": 5}}, (9, 1)),
    ({"generation_config.json": {"eos_token_id": 0}, "config.json": {"eos_token_id": 5}}, (0, 1)),
    ({"generation_config.json": {"top_p": 1.0}, "config.json": {"eos_token_id": [5, 6]}}, (5, 6, 1)),
    ({"config.json": {"eos_token_id": None}}, (1,)),
    ({"config.json": {"eos_token_id": 5}, "tokenizer_config.json": {"eos_token": "<nowhere>"}}, (5,)),
    ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "<|im_end|>"}}, (3,)),
])  # fmt: skip
def test_stop_ids(bpe_dir, files, expected):
    for name, data in files.items():
        write(bpe_dir, name, data)
    assert Tokenizer(bpe_dir).stop_ids == expected


# -- chat


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_equals_transformers(folder, add_generation_prompt):
    tok, hf = Tokenizer(folder), reference(folder)
    assert tok.has_chat_template
    ids = tok.chat(MESSAGES, add_generation_prompt=add_generation_prompt)
    assert ids == hf.apply_chat_template(MESSAGES, add_generation_prompt=add_generation_prompt, return_dict=False)
    assert ids.count(tok.bos_id) == 1


def test_chat_helpers_equal_transformers(bpe_dir):
    template = (
        "{{ messages | tojson(indent=1) }}{{ strftime_now('%Y') }}{% generation %}x{% endgeneration %}"
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{{ eos_token }}{{ tools is none }}"
    )
    write(bpe_dir, "chat_template.jinja", template)  # the file wins over tokenizer_config.json
    ids = Tokenizer(bpe_dir).chat(MESSAGES)
    assert ids == reference(bpe_dir).apply_chat_template(MESSAGES, return_dict=False)
    assert Tokenizer(bpe_dir).decode(ids).endswith("x01True")


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('roles must alternate') }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{% for %}",
    "{{ messages[0].content.x.y }}",
    "{{ 1 / 0 }}",
])  # fmt: skip
def test_template_is_sandboxed_and_its_failure_is_one_line(bpe_dir, template):
    write(bpe_dir, "chat_template.jinja", template)
    with pytest.raises(ValueError, match="chat template of .* failed") as e:
        Tokenizer(bpe_dir).chat(MESSAGES)
    assert "\n" not in str(e.value) and ("alternate" in str(e.value)) == ("alternate" in template)


# -- errors


def fails(path, *needles, act=lambda tok: None):
    with pytest.raises(ValueError) as e:
        act(Tokenizer(path))
    assert "\n" not in str(e.value) and all(n in str(e.value) for n in needles), str(e.value)


def test_missing_tokenizer(tmp_path):
    fails(tmp_path, str(tmp_path), "tokenizer.json", "tokenizer.model", "pass a checkpoint directory")
    fails(tmp_path / "nowhere", "nowhere", "tokenizer.json")


@pytest.mark.parametrize("data", [b"", b"{", b'{"model": 1}', b"\xff\xfe"])
def test_corrupt_tokenizer_files(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    fails(tmp_path, "tokenizer.model", "sentencepiece", "download it again")
    (tmp_path / "tokenizer.json").write_bytes(data)
    fails(tmp_path, "tokenizer.json", "download it again")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "hotloop.json", "generation_config.json"])
@pytest.mark.parametrize("data", ["{", "[1]", "{'a': 1}"])
def test_malformed_json(bpe_dir, name, data):
    write(bpe_dir, name, data)
    fails(bpe_dir, name, "JSON")


def test_unknown_decoder(bpe_dir, bpe_json):
    write(bpe_dir, "tokenizer.json", {**json.loads(bpe_json), "decoder": {"type": "CTC", "pad_token": "<pad>",
          "word_delimiter_token": "|", "cleanup": True}})  # fmt: skip
    fails(bpe_dir, "CTC", "ByteLevel")
    write(bpe_dir, "tokenizer.json", {**json.loads(bpe_json), "decoder": {"type": "Replace", "content": " ",
          "pattern": {"Regex": "_+"}}})  # fmt: skip
    fails(bpe_dir, "Regex", "ByteLevel")


def test_bad_added_token(spm_dir):
    write(spm_dir, "tokenizer_config.json", {"added_tokens_decoder": {"400": {"special": True}}})
    fails(spm_dir, "tokenizer_config.json", "content")


def test_bad_text_and_ids(folder):
    from_bytes = b"caf\xe9".decode("utf-8", "surrogateescape")  # what sys.argv holds for such an argument
    fails(folder, "udce9", "character 3", "UTF-8", act=lambda tok: tok.encode(from_bytes))
    fails(folder, "udce9", act=lambda tok: tok.chat([{"role": "user", "content": from_bytes}]))
    fails(folder, "-1", act=lambda tok: tok.decode([-1]))


def test_no_template_and_no_bos(bpe_dir, bpe_json):
    write(bpe_dir, "tokenizer.json", {**json.loads(bpe_json), "post_processor": None})
    write(bpe_dir, "tokenizer_config.json", {"chat_template": [{"name": "tool_use", "template": "no"}]})
    assert not Tokenizer(bpe_dir).has_chat_template and Tokenizer(bpe_dir).bos_id is None
    fails(bpe_dir, "chat_template.jinja", "plain prompt", act=lambda tok: tok.chat(MESSAGES))
    fails(bpe_dir, "bos_token", act=lambda tok: tok.encode("fox", bos=True))


# -- a leaf file


def test_imports_alone_and_loads_nothing(tmp_path):
    shutil.copy(Path(module.__file__), tmp_path / "tokenizer.py")
    code = (
        "import sys, tokenizer; "
        "print([m for m in ('tokenizers', 'sentencepiece', 'jinja2', 'torch') if m in sys.modules], tokenizer.__file__)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
                         env={"PATH": "", "PYTHONDONTWRITEBYTECODE": "1"})  # fmt: skip
    assert out.stdout.split() == ["[]", str(tmp_path / "tokenizer.py")] and out.stderr == ""
