"""The command line of generate.py: every user error is one line and exit code 2, output goes where it should, chat.

Most tests run the real `__main__` block of the script within this process (runpy), since importing torch anew for each
would take a second; a handful run a real process, some in a pseudo-terminal.

Try it:  python -m pytest tests/test_cli.py
"""

import io
import json
import os
import pty
import re
import runpy
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"
SHORT = ("--max_new_tokens", "4")
# Marks which turn it renders, so that a test can see the history.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '# ' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '# assistant: ' }}{% endif %}"
)


pytestmark = pytest.mark.usefixtures("one_thread")


class Stdin(io.TextIOWrapper):
    """Piped standard input."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="utf-8")


@pytest.fixture
def cli(monkeypatch, capfd):
    """Run a script of the repository as __main__ in this process -> code, out, err."""

    def run(*argv, stdin: bytes = b"", script: str = "generate.py"):
        monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
        monkeypatch.setattr(sys, "stdin", Stdin(stdin))
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit:
            code = exit.code or 0
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


def process(*argv, stdin: bytes = b"", script: str = "generate.py", cwd=None, **environment):
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *argv], input=stdin, capture_output=True, timeout=120, cwd=cwd,
        env=os.environ | environment,
    )  # fmt: skip
    return SimpleNamespace(code=done.returncode, out=done.stdout.decode(), err=done.stderr.decode())


def is_one_line_error(done, *words: str, script: str = "generate.py") -> None:
    assert done.code == 2, done
    assert done.out == ""
    assert done.err.startswith(f"{script}: ") and done.err.endswith("\n") and done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err and "Error:" not in done.err
    for word in words:
        assert word in done.err, (word, done.err)


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.fixture
def broken(tmp_path):
    """A copy of the bundled checkpoint to break."""
    return Path(shutil.copytree(DEMO, tmp_path / "copy", ignore=shutil.ignore_patterns("draft", "*.txt", "*.py")))


def edit_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--max_new_tokens", "0"], ["--max_new_tokens 0", "at least 1"]),
        (["--max_new_tokens", "-5"], ["--max_new_tokens -5"]),
        (["--max_new_tokens", "many"], ["--max_new_tokens", "many"]),
        (["--max_new_tokens", "4096"], ["context of 4096", "fewer"]),
        (["--max_new_tokens", "30", "--max_seq_len", "32"], ["context of 32"]),
        (["--max_seq_len", "-1"], ["context"]),
        (["--max_seq_len", "0"], ["context of 0"]),
        (["--prompt", "x = 1\n" * 2000], ["context of 4096", "shorten the prompt"]),
        (["--temperature", "-0.1"], ["--temperature -0.1"]),
        (["--temperature", "nan"], ["--temperature nan"]),
        (["--top_p", "0"], ["--top_p 0"]),
        (["--top_p", "1.5"], ["--top_p 1.5"]),
        (["--top_p", "-1"], ["--top_p -1"]),
        (["--top_k", "0"], ["--top_k 0"]),
        (["--min_p", "1"], ["--min_p 1"]),
        (["--repetition_penalty", "0"], ["--repetition_penalty 0"]),
        (["--num_samples", "0"], ["--num_samples 0"]),
        (["--seed", str(2**70), *SHORT], []),
        (["--device", "tpu"], ["--device tpu", "known: cpu, cuda, mps"]),
        (["--device", "cuda:99"], ["--device cuda:99", "not available", "cpu"]),
        (["--device", "cuda:x"], ["--device cuda:x"]),
        (["--device", "cpu:1"], ["--device cpu:1", "not available"]),
        (["--kv_dtype", "int3"], ["--kv_dtype int3", "known: fp8"]),
        (["--dtype", "fp8"], ["--dtype fp8", "bf16, fp16, fp32"]),
        (["--checkpoint_path", "no/such/dir"], ["no/such/dir", "no such directory"]),
        (["--checkpoint_path", "nowhere"], ["nowhere", "no such directory"]),
        (["--checkpoint_path", "some-org/some-model"], ["some-org/some-model", "hub"]),
        (["--checkpoint_path", __file__], ["is a file"]),
        (["--profile", "no/such/dir/trace.json", *SHORT], ["--profile", "no/such/dir"]),
        (["--draft", "lookup", "--speculate_k", "0"], ["--speculate_k 0", "from 1 to 15"]),
        (["--speculate_k", "4"], ["--speculate_k 4", "nothing proposes"]),
        (["--draft", "guess"], ["--draft", "guess"]),
        (["--draft_checkpoint_path", "no/such/dir"], ["no/such/dir", "no such directory"]),
        (["--no_such_flag"], ["--no_such_flag"]),
        (["--temperature"], ["--temperature"]),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else v,
)
def test_bad_argument(cli, arguments, words):
    is_one_line_error(cli(*arguments), *words)


def test_compile_without_a_compiler(cli, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    is_one_line_error(cli("--compile", "--device", "cpu"), "--compile", "no-such-compiler", "CXX")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(cli):
    is_one_line_error(cli("--device", "cuda"), "--device cuda", "not available", "available: cpu")


def break_truncate(d: Path):
    (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:100_000])


def break_shards(d: Path):
    from checkpoint import Weights

    names = list(Weights(d))
    (d / "model.safetensors").rename(d / "model-00001-of-00002.safetensors")
    where = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


BREAKS = {
    "empty": (lambda d: [p.unlink() for p in d.iterdir()], ["is empty"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["no weights"]),
    "truncated": (break_truncate, ["model.safetensors", "truncated"]),
    "missing shard": (break_shards, ["model-00002-of-00002.safetensors", "missing"]),
    "model type": (lambda d: edit_config(d, model_type="rwkv"), ["rwkv", "llama"]),
    "field": (lambda d: edit_config(d, rope_scaling={"type": "dynamic", "factor": 2.0}), ["dynamic"]),
    "shape": (lambda d: edit_config(d, intermediate_size=512), ["gate_up", "implies"]),
    "config JSON": (lambda d: (d / "config.json").write_text("{"), ["config.json", "JSON"]),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), ["no tokenizer"]),
    "tokenizer": (lambda d: (d / "tokenizer.model").write_bytes(b"garbage"), ["tokenizer.model"]),
    "tokenizer JSON": (lambda d: (d / "tokenizer_config.json").write_text("{"), ["tokenizer_config.json"]),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_checkpoint(cli, broken, name):
    damage, words = BREAKS[name]
    damage(broken)
    is_one_line_error(cli("--checkpoint_path", broken, *SHORT), *words)


def test_empty_prompt(cli, broken):
    assert cli("--prompt", "", *SHORT).code == 0  # the bundled model has a BOS
    config = json.loads((broken / "tokenizer_config.json").read_text())
    (broken / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    is_one_line_error(cli("--checkpoint_path", broken, "--prompt", "", *SHORT), "empty prompt")
    assert cli("--checkpoint_path", broken, "--prompt", "x", *SHORT).code == 0
    # among several, before anything is generated
    is_one_line_error(cli("--checkpoint_path", broken, "--prompt", "x", "--prompt", "", *SHORT), "empty prompt")


def test_errors_of_a_real_process(tmp_path):
    with ThreadPoolExecutor() as pool:
        empty = pool.submit(process, "--checkpoint_path", str(tmp_path))
        top_p = pool.submit(process, "--top_p", "2")
        latin1 = pool.submit(process, "--prompt", os.fsdecode(b"caf\xe9"))
        typed = pool.submit(process, "--interactive", *SHORT, stdin=b"caf\xe9\n")
    is_one_line_error(empty.result(), "is empty")
    is_one_line_error(top_p.result(), "--top_p 2.0")
    is_one_line_error(latin1.result(), "not valid Unicode")
    bad = typed.result()
    assert bad.code == 2 and bad.out == "" and "Traceback" not in bad.err
    assert bad.err.splitlines()[-1].startswith("generate.py: stdin is not UTF-8")


# ---------------------------------------------------------------------------------------------------- what is output
def test_text_on_stdout_and_report_on_stderr(cli):
    done = cli("--prompt", "def f(x):", "--temperature", "0", *SHORT)
    assert done.code == 0 and done.out.startswith("def f(x):") and len(done.out) > len("def f(x):\n")
    for word in ("load", "first token", "prefill", "decode", "GB/s", "peak memory"):
        assert word in done.err and word not in done.out


PROMISED = ("tokens text finish_reason load_s compile_s ttft_s prefill_tok_s decode_tok_s bandwidth_gbs "
            "percent_of_peak_bandwidth peak_memory_gb").split()  # fmt: skip


def test_json(cli):
    done = cli("--prompt", "import os\n", "--json", "--temperature", "0", "--max_new_tokens", "7", "--ignore_eos")
    *text, last = done.out.splitlines()
    result = json.loads(last)
    assert set(PROMISED) <= result.keys()
    assert len(result["tokens"]) == 7 and result["finish_reason"] == "length" and result["compile_s"] is None
    assert all(type(t) is int for t in result["tokens"])
    assert "\n".join(text) + "\n" == "import os\n" + result["text"] + "\n"
    for key in ("load_s", "ttft_s", "prefill_tok_s", "decode_tok_s", "bandwidth_gbs", "peak_memory_gb"):
        assert result[key] > 0, key
    assert len(result["samples"]) == 1
    one = json.loads(cli("--json", "--max_new_tokens", "1").out.splitlines()[-1])
    assert len(one["tokens"]) == 1 and one["decode_tok_s"] is None


def test_several_prompts_and_samples(cli):
    done = cli("--prompt", "class A", "--prompt", "x = ", "--num_samples", "3", "--json", "--seed", "1", *SHORT)
    samples = json.loads(done.out.splitlines()[-1])["samples"]
    assert len(samples) == 6
    text = "".join(p + s["text"] + "\n" for p, s in zip(["class A"] * 3 + ["x = "] * 3, samples, strict=True))
    assert done.out.startswith(text)
    assert len({tuple(s["tokens"]) for s in samples[:3]}) > 1  # samples differ


def test_seed(cli):
    runs = [cli("--seed", seed, "--temperature", "1", "--max_new_tokens", "12").out for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_stop_strings(cli):
    free = json.loads(cli("--temperature", "0", "--json", "--max_new_tokens", "40").out.splitlines()[-1])["text"]
    stop = free[len(free) // 2 :][:3]
    done = cli("--temperature", "0", "--json", "--max_new_tokens", "40", "--stop", "no such text", stop)
    result = json.loads(done.out.splitlines()[-1])
    assert result["text"] == free[: free.index(stop)] and result["finish_reason"] == "stop"
    assert done.out.startswith("def fibonacci(n):" + result["text"] + "\n")


def test_eos_ends_and_ignore_eos_goes_on(cli, broken):
    arguments = ("--checkpoint_path", broken, "--temperature", "0", "--json", "--max_new_tokens", "20")
    free = json.loads(cli(*arguments).out.splitlines()[-1])["tokens"]
    (broken / "generation_config.json").write_text(json.dumps({"eos_token_id": [4095, free[5]]}))
    end = free.index(free[5])
    stopped = json.loads(cli(*arguments).out.splitlines()[-1])
    assert stopped["tokens"] == free[: end + 1] and stopped["finish_reason"] == "stop"
    assert json.loads(cli(*arguments, "--ignore_eos").out.splitlines()[-1])["tokens"] == free


def test_profile(cli, tmp_path):
    assert cli("--profile", tmp_path / "trace.json", *SHORT).code == 0
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_kv_dtype(cli):
    command = (*SHORT, "--temperature", "0", "--json", "--kv_dtype", "fp8")
    tokens = [json.loads(cli(*command, *more).out.splitlines()[-1])["tokens"] for more in ((), ("--draft", "int8"))]
    assert len(tokens[0]) == 4 and tokens[0] == tokens[1]
    command = ("--limit_tokens", "1000", "--window", "256", "--json", "--device", "cpu")
    runs = [cli(*command, *more, script="eval.py") for more in ((), ("--kv_dtype", "fp8"))]
    plain, result = (json.loads(done.out.splitlines()[-1]) for done in runs)
    assert (result["kv_dtype"], plain["kv_dtype"]) == ("fp8", None)
    assert 1.0001 < result["perplexity"] / plain["perplexity"] < 1.03


def test_dtype(cli):
    tokens = [
        json.loads(cli("--dtype", dtype, "--json", "--temperature", "0", *SHORT).out.splitlines()[-1])
        for dtype in ("fp32", "bf16")
    ]
    assert tokens[0]["bandwidth_gbs"] > 0 and tokens[1]["bandwidth_gbs"] > 0


def test_from_any_directory_compiled(tmp_path):
    """A real process, elsewhere: the bundled model is found beside the script. Compiled equals eager."""
    runs = [
        process("--temperature", "0", "--dtype", "fp32", "--json", "--max_new_tokens", "24", *more, cwd=tmp_path)
        for more in ([], ["--compile"])
    ]
    eager, compiled = (json.loads(run.out.splitlines()[-1]) for run in runs)
    assert eager["tokens"] == compiled["tokens"]
    assert eager["compile_s"] is None and compiled["compile_s"] > 0
    assert "compile" in runs[1].err and not list(tmp_path.iterdir())


def test_a_closed_pipe_ends_quietly():
    read, write = os.pipe()
    child = subprocess.Popen([sys.executable, str(ROOT / "generate.py")], stdout=write, stderr=subprocess.PIPE)
    os.close(read), os.close(write)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 141 and err == b""


SCRIPTS = sorted(p.name for p in ROOT.glob("*.py") if "ArgumentParser(" in p.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag(cli, script):
    source = (ROOT / script).read_text()
    done = cli("--help", script=script)
    assert done.code == 0 and done.err == ""
    flags = set(re.findall(r"""(?:a|add|add_argument)\(\s*"(--[a-zA-Z_0-9]+)\"""", source))
    assert len(flags) >= 3 and "--no_such" not in flags
    entries = re.split(r"\n  (?=-)", done.out)
    for flag in flags:
        (entry,) = [e for e in entries[1:] if re.search(rf"(^|\s){flag}\b", e.split("  ")[0])]
        assert len(entry.split()) > 2, f"{flag} has no help"
    if script == "generate.py":
        assert "hotloop (Inductor's moves with TORCHINDUCTOR_CACHE_DIR)" in " ".join(done.out.split())  # compiled code


# ---------------------------------------------------------------------------------------------------------------- chat
CHAT = ("--interactive", "--temperature", "0", "--max_new_tokens", "6", "--json")


def chat_of(done) -> list[dict]:
    assert done.code == 0, done
    return json.loads(done.out.splitlines()[-1])["samples"]


def test_chat_with_piped_turns(cli):
    done = cli(*CHAT, stdin=b"import os\n\nx = 1\nprint(x)")
    turns = chat_of(done)
    assert len(turns) == 3  # an empty line is no turn, the last needs no newline
    assert done.out.startswith(turns[0]["text"] + "\n" + turns[1]["text"] + "\n" + turns[2]["text"] + "\n")
    assert "no chat template" in done.err
    assert turns[0]["prompt_tokens"] + 6 < turns[1]["prompt_tokens"] < turns[2]["prompt_tokens"]  # history is kept
    assert "> " not in done.out


def test_chat_that_ends_at_once(cli):
    done = cli("--interactive")
    assert done.code == 0 and done.out == ""
    assert json.loads(cli("--interactive", "--json").out)["samples"] == []


@pytest.fixture
def template(broken):
    (broken / "chat_template.jinja").write_text(TEMPLATE)
    return broken


def test_chat_with_a_template(cli, template):
    from tokenizer import Tokenizer

    turns = chat_of(cli("--checkpoint_path", template, *CHAT, stdin="héllo\nagain\nmore\n".encode()))
    tokenizer = Tokenizer(template)
    history = []
    for line, turn in zip(("héllo", "again", "more"), turns, strict=True):
        history.append({"role": "user", "content": line})
        ids = tokenizer.chat(history)
        assert turn["prompt_tokens"] == len(ids)
        history.append({"role": "assistant", "content": turn["text"]})


def test_chat_reuses_the_cache_without_changing_the_answers(cli, template, monkeypatch):
    """Each answer equals that of a fresh model given the whole conversation; only the new part is prefilled."""
    import generate
    from checkpoint import load_model
    from tokenizer import Tokenizer

    tokenizer, model, fresh = Tokenizer(template), load_model(template), load_model(template)
    model.setup_caches(1, 500)
    asked = []

    def run(ids, start=0):
        asked.append((len(ids), start))
        answers = [[int(c) for c in generate.generate(m, [ids], 8, start=s)] for m, s in ((model, start), (fresh, 0))]
        assert answers[0] == answers[1]
        return {"tokens": answers[0], "text": tokenizer.decode(answers[0])}

    for has_template in (True, False):
        monkeypatch.setattr(tokenizer, "has_chat_template", has_template)
        monkeypatch.setattr(sys, "stdin", Stdin(b"import os\nx = 1\nprint(x)\n"))
        asked.clear()
        assert len(generate.chat(run, tokenizer, 8, 500)) == 3
        assert all(start >= previous for (_, start), (previous, _) in zip(asked[1:], asked, strict=False))


def test_chat_forgets_the_oldest_turns(cli, template):
    lines = "".join(f"turn number {i} {'x ' * 20}\n" for i in range(8)).encode()
    turns = chat_of(cli("--checkpoint_path", template, *CHAT, "--max_seq_len", "160", stdin=lines))
    assert len(turns) == 8
    assert max(t["prompt_tokens"] for t in turns) <= 154 and turns[-1]["prompt_tokens"] > 60


def test_chat_without_a_template_forgets_too(cli):
    turns = chat_of(cli(*CHAT, "--max_seq_len", "64", stdin=b"x = [1, 2, 3, 4, 5, 6, 7, 8]\n" * 8))
    assert len(turns) == 8 and turns[-1]["prompt_tokens"] == 58


def test_chat_message_longer_than_the_context(cli, template):
    done = cli("--checkpoint_path", template, *CHAT, "--max_seq_len", "64", stdin=b"x = 1 " * 200 + b"\n")
    is_one_line_error(done, "context of 64")


def test_non_utf8_after_a_good_turn(cli):
    done = cli(*CHAT, stdin=b"import os\n\xff\xfe\n")
    assert done.code == 2 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("generate.py: stdin is not UTF-8")


def test_broken_template(cli, template):
    (template / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}")
    is_one_line_error(cli("--checkpoint_path", template, *CHAT, stdin=b"hi\n"), "chat template")


# ----------------------------------------------------------------------------------------------------------- terminals
class Terminal:
    """generate.py in a pseudo-terminal that it controls."""

    def __init__(self, *argv):
        import fcntl

        self.master, self.slave = pty.openpty()
        self.before, self.shown = termios.tcgetattr(self.slave), ""
        self.child = subprocess.Popen(
            [sys.executable, str(ROOT / "generate.py"), *argv],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def read(self, wait: float = 0.1) -> str:
        """What was shown so far; waits a moment for more, and takes one piece, since a generation may be running."""
        if select.select([self.master], [], [], wait)[0]:
            self.shown += os.read(self.master, 65536).decode(errors="replace")
        return self.shown

    def wait_for(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.read():
            assert time.monotonic() < end and self.child.poll() is None, self.shown

    def finish(self) -> int:
        end = time.monotonic() + 60
        while self.child.poll() is None:  # reading all the while, or a full terminal would block the child
            self.read()
            assert time.monotonic() < end
        while len(self.shown) < len(self.read()):
            pass
        assert termios.tcgetattr(self.slave) == self.before  # left as it was found
        return self.child.returncode

    def was_quiet(self) -> None:
        """No traceback was shown, and no error of ours. The model writes Python: "Error" alone may be its own word."""
        assert "Traceback (most recent" not in self.shown and "generate.py" not in self.shown, self.shown

    def close(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        os.close(self.master), os.close(self.slave)


@pytest.fixture
def terminal():
    opened = []

    def start(*argv):
        opened.append(Terminal(*argv))
        return opened[-1]

    yield start
    for t in opened:
        t.close()


CTRL_C, CTRL_D = "\x03", "\x04"


def test_terminal_chat(terminal):
    """Four sessions side by side: Ctrl-C at the prompt, in mid-answer and while torch is imported; Ctrl-D."""
    long = ("--max_new_tokens", "3000", "--ignore_eos")
    at_prompt, answering, leaving = (terminal("--interactive", *long) for _ in range(3))
    starting = terminal("--interactive")
    time.sleep(0.3)
    starting.type(CTRL_C)
    assert starting.finish() in (130, -signal.SIGINT)  # the latter: before Python had read the first line of ours

    at_prompt.wait_for("> ")
    time.sleep(0.5)  # a signal between the prompt and readline's wait would be noticed with the next key only
    at_prompt.type(CTRL_C)
    assert at_prompt.finish() == 130

    answering.wait_for("> ")
    answering.type("import os\n")
    length = len(answering.shown)
    while len(answering.read(0.05)) < length + 60:  # it streams
        assert answering.child.poll() is None
    answering.type(CTRL_C)
    assert answering.finish() == 130

    leaving.wait_for("> ")
    leaving.type(CTRL_D)
    assert leaving.finish() == 0

    for session in (at_prompt, answering, leaving, starting):
        session.was_quiet()


def test_interrupted_generation(terminal):
    t = terminal("--max_new_tokens", "4000", "--ignore_eos", "--prompt", "import os")
    t.wait_for("import os")
    t.type(CTRL_C)
    assert t.finish() == 130
    t.was_quiet()


def test_sampling_defaults_are_the_checkpoints_own(tmp_path):
    from generate import own_sampling

    assert own_sampling(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text('{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}')
    assert own_sampling(tmp_path) == {"temperature": 0.6, "top_p": 0.9}
    file.write_text('{"do_sample": false, "temperature": 0.6}')
    assert own_sampling(tmp_path) == {}


def test_memory_that_does_not_suffice_is_told_as_on_a_gpu():
    from lifeline import one_voice

    with pytest.raises(torch.OutOfMemoryError, match=r"^not enough memory: 1125899\.9 GB more were wanted; give a "):
        with one_voice("generate.py"):
            torch.empty(1 << 50, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shape"), one_voice("generate.py"):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_free_memory_within_limits():
    code = (
        "import resource, torch, machine; cpu = torch.device('cpu'); free = machine.free_memory(cpu);"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30));"
        "print(0 < machine.free_memory(cpu) < 4 << 30, free > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True True\n", done.stderr
