"""train.py on the CPU: it learns, resumes as if never stopped, exports what transformers reads, refuses in one line.

    pytest tests/test_train.py
"""

import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from checkpoint import read_config
from model import Transformer
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
DEMO = str(ROOT / "demo")
pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "def add(a, b):\n    return a + b\n\f" + "".join(f"def f{i}(x):\n    return x * {i}\n" for i in range(40))
RUN = dict(batch_tokens=256, seq_len=32, lr=3e-3, warmup=5, dtype="fp32", tokenizer=DEMO)


@pytest.fixture
def tiny(tmp_path):
    """A configuration directory of a tiny Llama with the demo tokenizer's vocabulary."""
    config = json.loads((ROOT / "demo" / "config.json").read_text())
    config.update(hidden_size=32, num_hidden_layers=2, head_dim=16, num_attention_heads=2, num_key_value_heads=1,
                  intermediate_size=64, max_position_embeddings=64)  # fmt: skip
    source = tmp_path / "tiny"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    return str(source)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def new_model(source):
    model = Transformer(read_config(source)[0])
    train.initialize(model, seed=0)
    return model


def cli(*args, **kwargs):
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **kwargs)


def test_tokens_are_bos_document_eos_and_cached(text, tmp_path):
    tokenizer = Tokenizer(DEMO)
    expected = [i for doc in TEXT.split("\f") for i in (1, *tokenizer.encode(doc, bos=False), 2)]
    assert train.read_tokens(text, DEMO).tolist() == expected
    (cache,) = tmp_path.glob("text.txt.*.bin")
    before = cache.stat().st_mtime_ns
    assert train.read_tokens(text, DEMO).tolist() == expected and cache.stat().st_mtime_ns == before
    packed = tmp_path / "text.txt.xz"
    packed.write_bytes(lzma.compress(TEXT.encode()))
    assert train.read_tokens(str(packed), DEMO).tolist() == expected


def test_crops_are_the_tokens_even_beyond_int16():
    ids = torch.arange(65000, 65010)
    narrow = ids.to(torch.uint16).view(torch.int16)
    rows = train.crop(narrow, torch.tensor([0, 3]), 4).tolist()
    assert rows == [list(range(65000, 65005)), list(range(65003, 65008))]


def test_schedule_warms_up_and_falls_to_the_floor():
    lrs = [train.schedule(step, step / 100, lr=1.0, min_lr_ratio=0.1, warmup=10) for step in range(101)]
    assert lrs[0] < 0.11 and max(lrs) == pytest.approx(1, abs=0.03) and lrs[-1] == pytest.approx(0.1)
    assert lrs[10:] == sorted(lrs[10:], reverse=True)


def test_overfits_a_small_text(tiny, text, tmp_path):
    tokens = train.load_tokens([text], DEMO, 4096, "cpu")
    figures = train.train(new_model(tiny), tokens, tokens, out_dir=tmp_path / "out", source=tiny, steps=150, **RUN)
    assert figures["steps"] == 150 and figures["tokens"] == 150 * 256
    assert figures["train_loss"] < 1.0 and figures["valid_loss"] < 1.0  # log(4096) = 8.3 at the start


def test_resume_equals_an_uninterrupted_run(tiny, text, tmp_path):
    tokens = train.load_tokens([text], DEMO, 4096, "cpu")
    whole = train.train(new_model(tiny), tokens, tokens, out_dir=tmp_path / "whole", source=tiny, steps=20, **RUN)
    asked = iter(range(20))
    cut = train.train(new_model(tiny), tokens, tokens, out_dir=tmp_path / "cut", source=tiny, steps=20,
                      should_stop=lambda: next(asked) == 6, **RUN)  # fmt: skip
    assert cut["stopped"] and cut["steps"] == 7
    rest = train.train(new_model(tiny), tokens, tokens, out_dir=tmp_path / "cut", source=tiny, steps=20, resume=True,
                       **RUN)  # fmt: skip
    assert rest["steps"] == 20
    assert rest["train_loss"] == whole["train_loss"] and rest["valid_loss"] == whole["valid_loss"]


def test_exported_directory_gives_the_same_logits_in_transformers(tiny, text, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokens = train.load_tokens([text], DEMO, 4096, "cpu")
    model = new_model(tiny)
    train.train(model, tokens, out_dir=tmp_path / "out", source=tiny, steps=3, **RUN)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    x = tokens[:40].long()[None]
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x).logits, rtol=1e-4, atol=1e-5)
    assert Tokenizer(tmp_path / "out").stop_ids == (2,)
    # It fine-tunes too, in bf16, from the exported directory.
    done = cli("--text", text, "--checkpoint_path", tmp_path / "out", "--out_dir", tmp_path / "tuned", "--steps", 2,
               "--seq_len", 32, "--batch_tokens", 64, "--device", "cpu", "--valid_text", text, "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["steps"] == 2 and figures["valid_perplexity"] > 1
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"]


def test_compiled_loss_equals_eager(tiny, text, tmp_path):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile on the CPU needs a C++ compiler")
    config = json.loads(Path(tiny, "config.json").read_text())
    Path(tiny, "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))  # quicker to compile
    tokens = train.load_tokens([text], DEMO, 4096, "cpu")
    losses = [train.train(new_model(tiny), tokens, out_dir=tmp_path / str(compile), source=tiny, steps=5,
                          compile=compile, **RUN)["train_loss"] for compile in (False, True)]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_interrupt_saves_and_exits_130(tiny, text, tmp_path):
    command = [sys.executable, "train.py", "--text", text, "--config", tiny, "--tokenizer", DEMO, "--out_dir",
               str(tmp_path / "out"), "--minutes", "5", "--seq_len", "32", "--batch_tokens", "256", "--save_every", "5",
               "--device", "cpu"]  # fmt: skip
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    state = tmp_path / "out" / "train_state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in err
    assert torch.load(state, weights_only=True)["step"] >= 5 and (tmp_path / "out" / "model.safetensors").exists()


def test_bad_input_is_one_line_and_exit_2(tiny, text, tmp_path, capsys):
    """The first by a process, as all of them leave it; the others up to the message."""
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    good = ["--text", text, "--config", tiny, "--tokenizer", DEMO, "--out_dir", tmp_path / "out", "--device", "cpu"]
    wrong = {
        "no text file": ["--steps", 1, "--text", tmp_path / "none.txt"],
        "not UTF-8": ["--steps", 1, "--text", tmp_path / "bad.txt"],
        "no such directory": ["--steps", 1, "--config", tmp_path / "none"],
        "no tokenizer": ["--steps", 1, "--tokenizer", tmp_path],
        "max_seq_len": ["--steps", 1, "--seq_len", 4096],
        "less than seq_len": ["--steps", 1, "--seq_len", 32, "--batch_tokens", 16],
        "nothing to resume": ["--steps", 1, "--seq_len", 32, "--resume"],
        "required": [],  # neither --steps nor --minutes
    }
    (message, extra), *others = wrong.items()
    done = cli(*good, *extra)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("train.py: ")
    for message, extra in others:
        with pytest.raises((ValueError, SystemExit)) as stopped:
            train.main(**vars(train.parse_args([*map(str, good), *map(str, extra)])))
        told = str(stopped.value) if stopped.type is ValueError else capsys.readouterr().err
        assert message in told and (stopped.type is ValueError or stopped.value.code == 2), told
