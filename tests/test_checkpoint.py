"""checkpoint.py: save and load exactly, refuse what is broken in one line, leave nothing half written, load lazily.

Try it:  python -m pytest tests/test_checkpoint.py
"""

import errno
import json
import os
import pickle
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub import errors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import (
    META,
    Weights,
    build_model,
    convert_checkpoint,
    load_model,
    read_config,
    resolve,
    save_checkpoint,
    write_checkpoint,
)
from convert_hf_checkpoint import convert_state_dict
from model import ModelArgs, Transformer

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "vocab_size": 97,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float32",
    "eos_token_id": [2, 7],
}  # fmt: skip
MOE = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def write_hf(path: Path, model: Transformer, **changes) -> Path:
    """A Hugging Face directory of a tiny model."""
    from convert_hf_checkpoint import export_state_dict

    path.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"tie_word_embeddings": model.args.tie_embeddings} | changes
    state = dict(model.state_dict())
    if model.args.tie_embeddings:
        del state["output.weight"]
    tensors = {k: v.contiguous() for k, v in export_state_dict(config, state)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    (path / "tokenizer.model").write_bytes(b"stands for a tokenizer")
    return path


@pytest.fixture(scope="module")
def hf(tiny, tmp_path_factory):
    """A Hugging Face directory; copied by whoever changes it."""
    return write_hf(tmp_path_factory.mktemp("hf") / "model", tiny())


@pytest.fixture
def broken(hf, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(hf, tmp_path / "copy"))


def same_weights(a: Transformer, b: Transformer) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def one_line(call, *args, **kwargs) -> str:
    """The message of the ValueError that a call must raise."""
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and 10 < len(message) < 500
    return message


def edit_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


# --------------------------------------------------------------------------------------------------- there and back
@pytest.mark.parametrize("layout", ["hotloop", "hf"])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"n_experts": 4, "n_experts_per_token": 2}], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_round_trip_is_exact(tiny, tmp_path, layout, changes, dtype):
    source = write_hf(tmp_path / "source", tiny(**changes), **(MOE if "n_experts" in changes else {}))
    model = load_model(source)
    save_checkpoint(model, tmp_path / "out", source, layout=layout, dtype=dtype)
    again = load_model(tmp_path / "out")
    assert same_weights(again, model.to(dtype) if dtype else model)
    assert again.args == model.args
    assert (tmp_path / "out" / META).exists() == (layout == "hotloop")
    assert (tmp_path / "out" / "config.json").exists() == (layout == "hf")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"stands for a tokenizer"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    if layout == "hf":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["torch_dtype"] == str(dtype or torch.float32).removeprefix("torch.")


def test_converted_equals_direct(hf, tmp_path):
    convert_checkpoint(hf, tmp_path / "out")
    direct, converted = load_model(hf), load_model(tmp_path / "out")
    assert same_weights(direct, converted) and direct.args == converted.args
    meta = json.loads((tmp_path / "out" / META).read_text())
    assert meta["format"] == 1 and meta["stop_ids"] == [2, 7] and meta["tokenizer"] == "sentencepiece"
    assert ModelArgs(**meta["model_args"]) == direct.args
    x = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(direct(x), converted(x))
    # a converted checkpoint keeps its stop ids when it is saved again, in its own directory's name or another's
    save_checkpoint(converted, tmp_path / "again", tmp_path / "out")
    assert json.loads((tmp_path / "again" / META).read_text()) == meta
    assert "converted already" in one_line(convert_checkpoint, tmp_path / "out", tmp_path / "third")


def test_loaded_equals_what_was_written(tiny, hf):
    model = load_model(hf)
    assert same_weights(model, tiny()) and model.args == tiny().args
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(hf, tiny, dtype):
    model = load_model(hf, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert same_weights(model, tiny().to(dtype))
    assert model.rope.inv_freq.dtype == torch.float32
    assert torch.equal(model.rope.inv_freq, tiny().rope.inv_freq)
    model.setup_caches(1, 8)
    assert model.layers[0].attention.cache.k.dtype == dtype


def test_dtype_as_stored(tiny, tmp_path):
    source = write_hf(tmp_path / "half", tiny().to(torch.float16))
    assert {p.dtype for p in load_model(source).parameters()} == {torch.float16}


def test_tied_embeddings_share_memory(tiny, tmp_path):
    source = write_hf(tmp_path / "tied", tiny(tie_embeddings=True))
    convert_checkpoint(source, tmp_path / "out")
    for path in (source, tmp_path / "out"):
        for dtype in (None, torch.bfloat16):
            model = load_model(path, dtype=dtype)
            assert model.output.weight is model.tok_embeddings.weight
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert "output.weight" not in file.keys()
    untied = load_model(write_hf(tmp_path / "untied", tiny()))
    assert untied.output.weight.data_ptr() != untied.tok_embeddings.weight.data_ptr()


@pytest.mark.parametrize("layout", ["hotloop", "hf"])
def test_shards(hf, tmp_path, monkeypatch, layout):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 40_000)
    model = load_model(hf)
    save_checkpoint(model, tmp_path / "out", hf, layout=layout)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors*"))
    assert files[-1] == "model.safetensors.index.json" and len(files) > 3
    assert all((tmp_path / "out" / f).stat().st_size < 60_000 for f in files)
    assert same_weights(load_model(tmp_path / "out"), model)


def test_transformers_reads_what_is_saved(hf, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = load_model(hf)
    save_checkpoint(model, tmp_path / "out", hf, layout="hf")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    x = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x).logits, rtol=0, atol=2e-4)


# --------------------------------------------------------------------------------- nothing appears when writing fails
def failing_tensors(n: int, error: Exception):
    for i in range(n):
        yield f"t{i}", torch.ones(100)
    raise error


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), ValueError("bad tensor")], ids=repr)
@pytest.mark.parametrize("existing", [False, True])
def test_nothing_appears_when_the_source_fails(tmp_path, monkeypatch, error, existing):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1000)  # some shards were written by then
    if existing:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model.safetensors").write_bytes(b"old")
    with pytest.raises(type(error)):
        write_checkpoint(tmp_path / "out", failing_tensors(9, error), META, {}, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if existing else [])
    if existing:
        assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {"model.safetensors": b"old"}


@pytest.mark.parametrize("on_shard", [1, 3])
def test_disk_full(hf, tmp_path, monkeypatch, on_shard):
    calls = []

    def full(tensors, path, *args, **kwargs):
        calls.append(path)
        Path(path).write_bytes(b"half")
        if len(calls) == on_shard:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    model = load_model(hf)
    message = one_line(save_checkpoint, model, tmp_path / "out", hf)
    assert "No space left on device" in message and str(tmp_path / "out") in message
    assert len(calls) == on_shard and not list(tmp_path.iterdir())


def test_disk_full_while_the_tokenizer_is_copied(hf, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    assert "No space left" in one_line(convert_checkpoint, hf, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made(hf, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = one_line(convert_checkpoint, hf, tmp_path / "file" / "out")
    assert "cannot be written" in message or "is a file" in message


# --------------------------------------------------------------------------------------------------------- overwriting
def test_overwrite_rules(hf, tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert_checkpoint(hf, out)  # an empty directory is as good as none
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert "--overwrite" in one_line(convert_checkpoint, hf, out)
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    other = write_hf(tmp_path / "other", tiny(seed=1))
    convert_checkpoint(other, out, overwrite=True)
    assert same_weights(load_model(out), tiny(seed=1))
    (tmp_path / "file").write_text("x")
    for overwrite in (False, True):
        assert "is a file" in one_line(convert_checkpoint, hf, tmp_path / "file", overwrite)
    assert (tmp_path / "file").read_text() == "x"


def test_overwriting_leaves_nothing_of_the_old_that_would_be_read(hf, tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_BYTES", 40_000)
        save_checkpoint(load_model(hf), out, hf)  # many shards and an index
    other = write_hf(tmp_path / "other", tiny(seed=1))
    (out / "notes.txt").write_text("the user's own")
    save_checkpoint(load_model(other), out, other, overwrite=True)  # one file
    assert [p.name for p in out.glob("model*")] == ["model.safetensors"]
    assert same_weights(load_model(out), tiny(seed=1))
    assert (out / "notes.txt").read_text() == "the user's own"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_BYTES", 40_000)
        save_checkpoint(load_model(hf), out, hf, overwrite=True)  # and back: an index is read before a single file
    assert same_weights(load_model(out), tiny())


@pytest.mark.parametrize("first, second", [("hotloop", "hf"), ("hf", "hotloop")])
def test_overwriting_one_layout_by_the_other(hf, tiny, tmp_path, first, second):
    other = write_hf(tmp_path / "other", tiny(seed=1))
    save_checkpoint(load_model(hf), tmp_path / "out", hf, layout=first)
    save_checkpoint(load_model(other), tmp_path / "out", other, layout=second, overwrite=True)
    assert same_weights(load_model(tmp_path / "out"), tiny(seed=1))


def test_overwriting_takes_the_old_tokenizer_away(hf, broken, tmp_path):
    """tokenizer.json is preferred to tokenizer.model, so an old one would be read instead of the new."""
    (broken / "tokenizer.json").write_text("old")
    convert_checkpoint(broken, tmp_path / "out")
    convert_checkpoint(hf, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "tokenizer.json").exists() and (tmp_path / "out" / "tokenizer.model").exists()


def test_overwriting_its_own_source(hf, tiny, broken):
    """Weights are memory-mapped: writing over the file that is being read must not corrupt either."""
    model = load_model(broken)
    save_checkpoint(model, broken, broken, layout="hf", overwrite=True)
    assert same_weights(load_model(broken), tiny())
    assert same_weights(model, tiny())


# --------------------------------------------------------------------------------------------------- what is refused
def test_missing_directory(tmp_path):
    for path in (tmp_path / "nowhere", "nowhere", "./no/where/at/all", "~/surely/not/here"):
        message = one_line(load_model, path)
        assert str(path) in message and "no such directory" in message
    assert "is a file" in one_line(load_model, __file__)


def test_empty_directory(tmp_path):
    assert "is empty" in one_line(load_model, tmp_path)
    (tmp_path / "readme.txt").write_text("x")
    message = one_line(load_model, tmp_path)
    assert "config.json" in message and META in message


def test_directory_without_weights(broken):
    (broken / "model.safetensors").unlink()
    message = one_line(load_model, broken)
    assert "no weights" in message and str(broken) in message


@pytest.mark.parametrize("keep", [0, 4, 500, 0.5, -1])
def test_truncated_safetensors(broken, keep):
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    message = one_line(load_model, broken)
    assert "truncated or corrupt" in message and str(broken / "model.safetensors") in message


def test_garbage_safetensors(broken):
    (broken / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214\n")
    assert "truncated or corrupt" in one_line(load_model, broken)


@pytest.fixture
def sharded(hf, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_BYTES", 40_000)
        save_checkpoint(load_model(hf), tmp_path / "sharded", hf, layout="hf")
    return tmp_path / "sharded"


def test_missing_shard(sharded):
    (sharded / "model-00002.safetensors").unlink()
    message = one_line(load_model, sharded)
    assert "model-00002.safetensors" in message and "missing" in message


def test_truncated_shard(sharded):
    file = sharded / "model-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert str(file) in one_line(load_model, sharded)


def test_index_that_lies(sharded):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name = next(k for k, v in index["weight_map"].items() if v.endswith("00002.safetensors"))
    index["weight_map"][name] = "model-00001.safetensors"
    file.write_text(json.dumps(index))
    assert name in one_line(load_model, sharded)
    for garbage in ('{"weight_map": ', "[]", "{}"):
        file.write_text(garbage)
        one_line(load_model, sharded)
    file.write_text('{"weight_map": ["a"]}')
    one_line(load_model, sharded)


def edit_tensors(directory: Path, edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("converted", [False, True])
def test_wrong_tensors(hf, tmp_path, converted):
    norm = "layers.1.qkv.norm.weight" if converted else "model.layers.1.input_layernorm.weight"

    def fresh() -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        if converted:
            convert_checkpoint(hf, tmp_path / "copy")
        else:
            shutil.copytree(hf, tmp_path / "copy")
        return tmp_path / "copy"

    for edit, words in (
        (lambda t: t.update({norm: torch.ones(63)}), ["63", "64"]),
        (lambda t: t.update({norm: torch.ones(64, 1)}), ["[64, 1]"]),
        (lambda t: t.pop(norm), []),
        (lambda t: t.update({norm.replace("1", "7"): torch.ones(64)}), [norm.replace("1", "7")]),
        (lambda t: t.clear(), []),
    ):
        directory = fresh()
        edit_tensors(directory, edit)
        message = one_line(load_model, directory)
        assert str(directory) in message
        assert all(w in message for w in words), message
    directory = fresh()
    edit_tensors(directory, lambda t: t.pop(norm))
    assert "layernorm" in one_line(load_model, directory) or norm in one_line(load_model, directory)


def test_unknown_model_type(broken):
    edit_config(broken, model_type="mamba")
    message = one_line(load_model, broken)
    assert "mamba" in message and "llama" in message and "qwen3" in message
    config = json.loads((broken / "config.json").read_text())
    del config["model_type"]
    (broken / "config.json").write_text(json.dumps(config))
    assert "model_type" in one_line(load_model, broken)


@pytest.mark.parametrize(
    "field",
    [{"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, {"position_embedding_type": "alibi"},
     {"hidden_act": "relu6"}, {"partial_rotary_factor": 0.5}, {"a_field_from_the_future": 3},
     {"quantization_config": {"quant_method": "awq"}}],
    ids=str,
)  # fmt: skip
def test_unsupported_field(broken, field):
    edit_config(broken, **field)
    (name, value), *_ = field.items()
    message = one_line(load_model, broken)
    assert name in message or (name == "rope_scaling" and "longrope" in message)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"llama"', "\x00\x01"])
def test_corrupted_config(broken, text):
    (broken / "config.json").write_text(text)
    assert str(broken / "config.json") in one_line(load_model, broken)
    (broken / "config.json").write_bytes(b'{"model_type": "ll\xffma"}')
    assert "not valid JSON" in one_line(load_model, broken)


@pytest.mark.parametrize("size", [0, -1, "64", 64.5, None, True])
def test_corrupted_sizes(broken, size):
    edit_config(broken, hidden_size=size)
    assert "hidden_size" in one_line(load_model, broken)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1}',
                                  '{"format": 1, "model_args": {"dim": 64}}', '{"format": 1, "model_args": []}',
                                  '{"format": 1, "model_args": {"new_field": 1}}'])  # fmt: skip
def test_corrupted_hotloop_json(hf, tmp_path, text):
    convert_checkpoint(hf, tmp_path / "out")
    (tmp_path / "out" / META).write_text(text)
    message = one_line(load_model, tmp_path / "out")
    assert str(tmp_path / "out" / META) in message
    if "99" in text:
        assert "99" in message and "known: 1" in message


# ------------------------------------------------------------------------------------------------------ pytorch_model
def as_bin(directory: Path, **kwargs) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin", **kwargs)


@pytest.mark.parametrize("zipped", [True, False])  # False: as PyTorch before 1.6 wrote it
def test_bin(broken, tiny, zipped):
    as_bin(broken, _use_new_zipfile_serialization=zipped)
    assert same_weights(load_model(broken), tiny())


def test_safetensors_is_preferred(broken, tiny):
    torch.save({}, broken / "pytorch_model.bin")
    assert same_weights(load_model(broken), tiny())


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_bin_is_refused(broken, tmp_path, zipped):
    (broken / "model.safetensors").unlink()
    mark = tmp_path / "executed"
    torch.save(Malicious(mark), broken / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    message = one_line(load_model, broken)
    assert str(broken / "pytorch_model.bin") in message and not mark.exists()
    (broken / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(mark)))
    one_line(load_model, broken)
    assert not mark.exists()


def test_broken_bin(broken):
    as_bin(broken)
    file = broken / "pytorch_model.bin"
    data = file.read_bytes()
    for content in (b"", data[: len(data) // 2], b"garbage" * 100):
        file.write_bytes(content)
        assert str(file) in one_line(load_model, broken)
    torch.save([torch.ones(3)], file)  # plain, and no state dict
    assert str(broken) in one_line(load_model, broken)
    torch.save({"model": {"a": torch.ones(3)}, "epoch": 3}, file)
    assert str(broken) in one_line(load_model, broken)


# ------------------------------------------------------------------------------------------------------- lazy loading
class Counting(Mapping):
    """Weights whose tensors are made on access; at any time we know which are alive."""

    def __init__(self, tensors):
        self.tensors, self.alive, self.peak = tensors, {}, 0

    def __getitem__(self, name):
        tensor = self.tensors[name].clone()
        self.alive[name] = weakref.ref(tensor)
        self.peak = max(self.peak, sum(ref() is not None for ref in self.alive.values()))
        return tensor

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


@pytest.mark.parametrize("experts", [0, 4])
def test_loading_holds_one_group_at_a_time(tiny, tmp_path, experts):
    changes = dict(n_experts=experts, n_experts_per_token=2) if experts else {}
    source = write_hf(tmp_path / "hf", tiny(n_layers=4, **changes), **(MOE if experts else {}), num_hidden_layers=4)
    args, config = read_config(source)
    weights = Counting(load_file(source / "model.safetensors"))
    model = build_model(args, convert_state_dict(config, weights), dtype=torch.bfloat16)
    assert weights.alive.keys() == set(weights)  # each was read
    # q, k, v are read for one fused tensor, or gate and up of an expert; the one before may still be in hand
    assert weights.peak <= 4
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in weights.tensors.values())


def test_saving_holds_one_shard_at_a_time(hf, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 40_000)
    weights = Counting(load_file(hf / "model.safetensors"))
    config = json.loads((hf / "config.json").read_text())
    written = []

    def stream():
        for name, tensor in convert_state_dict(config, weights):
            written.append(weakref.ref(tensor))
            alive = sum(t.nbytes for t in (ref() for ref in written) if t is not None)
            assert alive <= 40_000 + 2 * 49_152  # a shard, this tensor and the one before; the largest has 49,152 bytes
            yield name, tensor

    write_checkpoint(tmp_path / "out", stream(), META, {})
    assert len(written) == 15


def test_weights_are_mapped_not_read(hf):
    weights = Weights(hf)
    assert set(weights) == set(load_file(hf / "model.safetensors")) and len(weights) == len(set(weights))
    assert weights.nbytes() == (hf / "model.safetensors").stat().st_size
    with pytest.raises(KeyError):
        weights["no such tensor"]


def test_config_is_read_without_the_weights(broken):
    (broken / "model.safetensors").unlink()
    assert read_config(broken)[0].dim == 64


# ------------------------------------------------------------------------------------------------------------- the hub
@pytest.fixture
def hub(hf, monkeypatch):
    """A pretended hub; `files` and `error` are for the test to set."""
    state = SimpleNamespace(files=[], error=None, cached=None, asked=[])

    def list_repo_files(repo, **kwargs):
        if state.error:
            raise state.error
        return state.files

    def snapshot_download(repo, allow_patterns=None, local_files_only=False, **kwargs):
        state.asked.append((repo, allow_patterns, local_files_only))
        if local_files_only and state.cached is None:
            raise errors.LocalEntryNotFoundError("not in the cache")
        if state.error and not local_files_only:
            raise state.error
        return str(state.cached or hf)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def http_error(kind, message="401 Client Error"):
    """An error of huggingface_hub's HTTP layer, whichever library that is built on."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


OTHER_FILES = ["README.md", ".gitattributes", "LICENSE", "model.onnx", "tf_model.h5", "flax_model.msgpack",
               "figure.png", "original/consolidated.00.pth", "consolidated.safetensors", "model-q4.gguf",
               "training_args.bin", "optimizer.bin", "onnx/model.safetensors", "modeling_custom.py",
               "adapter_model.safetensors"]  # fmt: skip
SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
         "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]  # fmt: skip
SHARDS = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BINS = ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]


@pytest.mark.parametrize(
    "weights, expected",
    [(["model.safetensors"], ["model.safetensors"]), (["model.safetensors", *BINS], ["model.safetensors"]),
     (SHARDS + BINS, SHARDS), (BINS, BINS), (["pytorch_model.bin"], ["pytorch_model.bin"]),
     (["hotloop.json", "model.safetensors"], ["hotloop.json", "model.safetensors"])],
    ids=lambda v: v[0],
)  # fmt: skip
def test_only_the_needed_files_are_asked_for(hub, hf, weights, expected):
    from huggingface_hub.utils import filter_repo_objects

    hub.files = [*OTHER_FILES, *SMALL, *weights]
    assert resolve("org/name") == hf
    (repo, patterns, _), *more = hub.asked
    assert repo == "org/name" and not more
    taken = set(filter_repo_objects(hub.files, allow_patterns=patterns))
    assert set(expected) | set(SMALL) <= taken
    assert not taken & set(OTHER_FILES)
    assert not [f for f in taken if f.endswith((".bin", ".safetensors")) and f not in expected]


def test_hub_id_loads(hub, tiny):
    hub.files = ["config.json", "model.safetensors"]
    assert same_weights(load_model("org/name"), tiny())


def test_repository_without_weights(hub):
    hub.files = ["README.md", "config.json", "model.gguf"]
    assert "no model*.safetensors" in one_line(resolve, "org/name") and not hub.asked


def test_gated_repository(hub):
    hub.error = http_error(errors.GatedRepoError)
    message = one_line(resolve, "meta-llama/Llama-3.1-8B")
    assert "gated" in message and "https://huggingface.co/meta-llama/Llama-3.1-8B" in message and "login" in message


def test_repository_not_found(hub):
    hub.error = http_error(errors.RepositoryNotFoundError)
    message = one_line(resolve, "org/name")
    assert "org/name" in message and "no such directory" in message and "no such repository" in message


@pytest.mark.parametrize("error", [ConnectionError("Name or service not known\nsecond line"), TimeoutError(),
                                   OSError("x" * 1000), errors.OfflineModeIsEnabled("offline mode is enabled")],
                         ids=lambda e: type(e).__name__)  # fmt: skip
def test_offline(hub, hf, error):
    hub.error = error
    message = one_line(resolve, "org/name")
    assert "org/name" in message and "does not answer" in message
    hub.cached = hf  # downloaded before
    assert resolve("org/name") == hf


def test_offline_for_real(tmp_path, monkeypatch):
    """The tests set HF_HUB_OFFLINE, so the real library refuses to connect."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "does not answer" in one_line(resolve, "some-org/some-name")


@pytest.mark.parametrize("path", ["a/b/c", "/a/b", "-a/b", "org/na me", "name", "", "org/", "../x/y", "./a/b"])
def test_what_is_no_hub_id_never_goes_to_the_hub(hub, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if path == "":
        assert resolve(path) == Path(".")
        return
    assert "no such directory" in one_line(resolve, path) and not hub.asked
