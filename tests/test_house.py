"""The house rules: who may import whom, leaf files stand alone, nothing happens on import, everything is documented.

Try it:  python -m pytest tests/test_house.py
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {p.stem: p for p in sorted(ROOT.glob("*.py"))}
ALL = set(FILES)
# What each file may import from the repository: at the top level, and in addition inside functions (its `main`).
ALLOWED = {
    "model": (set(), set()),
    "kernels_overlap": (set(), set()),
    "kernels_one_pass": (set(), set()),
    "kernels_linear": ({"kernels_one_pass", "kernels_overlap"}, set()),
    "kernels_attend": ({"kernels_one_pass", "kernels_overlap"}, set()),
    "kernels_top_k": ({"kernels_overlap"}, set()),
    "kernels_experts": ({"kernels_linear", "kernels_one_pass", "kernels_overlap"}, set()),
    "kernels": (
        {"kernels_attend", "kernels_experts", "kernels_linear", "kernels_one_pass", "kernels_top_k"},
        {"kernels_cuda"},
    ),
    "kernels_cuda": (set(), set()),
    "kernels_cpu": (set(), set()),
    "tokenizer": (set(), set()),
    "gptq": (set(), set()),
    "tp": (set(), set()),
    "lifeline": ({"tp"}, set()),
    "speculative": (set(), set()),
    "quantize": ({"kernels", "kernels_cpu"}, {"calibrate", "checkpoint", "gptq", "machine", "model"}),
    "calibrate": ({"gptq", "model", "tokenizer"}, set()),
    "convert_hf_checkpoint": ({"model"}, {"checkpoint"}),
    "checkpoint": ({"model", "quantize", "tp", "convert_hf_checkpoint", "kernels", "kernels_cpu"}, set()),
    "tables": (set(), set()),
    "machine": (set(), set()),
    "graphs": (set(), set()),
    "draft": ({"checkpoint", "machine", "model", "quantize", "speculative", "tokenizer", "tp"}, set()),
    "sampling": ({"kernels", "speculative", "tp"}, set()),
    "generate": (
        {"checkpoint", "draft", "graphs", "lifeline", "machine", "model", "quantize", "sampling", "speculative"}
        | {"tokenizer", "tp"},
        set(),
    ),
    "eval": ({"checkpoint", "tokenizer", "lifeline", "machine", "model"}, set()),
    "train": ({"model", "machine", "checkpoint", "tokenizer"}, set()),
    "benchmark_check": ({"graphs", "model"}, set()),
    "benchmark_speculation": (
        {"checkpoint", "generate", "graphs", "machine", "model", "quantize", "sampling", "speculative", "tokenizer"},
        set(),
    ),
    "benchmark": (ALL - {"benchmark"}, set()),
}
LEAVES = [name for name, (top, _) in ALLOWED.items() if not top and name in FILES]


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def imports(node: ast.AST, inside: bool = False):
    """(module, is it inside a function?) of every import below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name.split(".")[0], inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import in a flat set of scripts"
            yield child.module.split(".")[0], inside
        else:
            yield from imports(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downwards(name):
    assert name in ALLOWED, f"{name}.py has no place in the table of imports"
    top, within = ALLOWED[name]
    for module, inside in imports(tree(name)):
        if module in FILES:
            assert module in (top | within if inside else top), f"{name}.py imports {module}"


def test_imports_form_a_dag():
    order = []

    def visit(name: str, path: tuple[str, ...] = ()):
        assert name not in path, " -> ".join([*path, name])
        if name not in order:
            for module, inside in imports(tree(name)):
                if module in FILES and not inside:
                    visit(module, (*path, name))
            order.append(name)

    for name in FILES:
        visit(name)
    assert order.index("model") < order.index("checkpoint") < order.index("generate")


# One process imports torch, then forks for each module: [[folder, module], ...] -> {module: [what changed, imported]}.
WATCH = """
import importlib, json, locale, logging, os, random, signal, sys, threading, warnings
import torch
HEAVY = ["torch._dynamo", "torch._inductor", "triton", "transformers", "huggingface_hub", "datasets", "sentencepiece",
         "tokenizers", "jinja2", "matplotlib", "lm_eval", "pandas"]
def state():
    log = logging.getLogger()
    return {
        "default dtype": torch.get_default_dtype(), "threads of torch": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(), "grad": torch.is_grad_enabled(),
        "tf32": torch.backends.cuda.matmul.allow_tf32, "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default device": str(torch.get_default_device()), "rng": torch.random.initial_seed(),
        "rng state": torch.get_rng_state().sum().item(), "cuda": torch.cuda.is_initialized(),
        "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "log": (len(log.handlers), log.level), "threads": threading.active_count(),
        "environment": dict(os.environ), "cwd": os.getcwd(), "path": list(sys.path), "random": random.getstate(),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
        "excepthook": sys.excepthook, "warnings": len(warnings.filters), "streams": (sys.stdout, sys.stderr),
        "sdpa": torch.nn.functional.scaled_dot_product_attention, "linear": torch.nn.Linear.forward,
        "load": torch.load, "locale": locale.setlocale(locale.LC_ALL),
    }
def watch(folder, name):
    os.chdir(folder)
    before = state()
    try:
        file = importlib.import_module(name).__file__
    except Exception as error:
        return [repr(error)], None
    after = state()
    changed = [key for key in before if before[key] != after[key]]
    if os.path.realpath(file) != os.path.realpath(name + ".py"):
        changed.append("imported " + file)
    return changed, [m for m in HEAVY if m in sys.modules]
answers = {}
for folder, name in json.loads(sys.argv[1]):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, json.dumps(watch(folder, name)).encode())
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        answers[name] = json.loads(pipe.read())
    os.waitpid(pid, 0)
print(json.dumps(answers))
"""


def watch(pairs: list, cwd: Path) -> dict:
    """Module -> (what importing it changed, heavy packages that it imported)."""
    pairs = [[str(folder), name] for folder, name in pairs]
    done = subprocess.run(
        [sys.executable, "-c", WATCH, json.dumps(pairs)], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # that it is JSON tells that no import printed anything


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    return watch([(ROOT, name) for name in FILES], tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.parametrize("name", FILES)
def test_nothing_happens_on_import(name, imported):
    changed, heavy = imported[name]
    assert not changed
    assert not heavy, "to be imported where it is used: every start pays for it"


def test_leaves_import_alone(tmp_path):
    for name in LEAVES:
        (tmp_path / name).mkdir()
        shutil.copy(FILES[name], tmp_path / name)
    assert len(LEAVES) >= 3
    for name, (changed, _) in watch([(tmp_path / name, name) for name in LEAVES], tmp_path).items():
        assert not changed, f"{name}.py alone: {changed}"


def test_the_watch_is_awake(tmp_path):
    (tmp_path / "bad.py").write_text("import torch, sentencepiece\ntorch.set_default_dtype(torch.float64)\n")
    (tmp_path / "needy.py").write_text("import model\n")
    answers = watch([(tmp_path, "bad"), (tmp_path, "needy")], tmp_path)
    assert answers["bad"] == [["default dtype"], ["sentencepiece"]]
    assert "No module named 'model'" in answers["needy"][0][0]


def public(node: ast.AST, prefix: str = ""):
    """(dotted name, node) of the public functions, classes and methods that a module defines."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{prefix}{child.name}.")


# Their job is that of every function of this name: forward is told by its class, the rest by the argument parser.
TOLD_ELSEWHERE = {"forward", "extra_repr", "main", "parser", "parse_args"}


@pytest.mark.parametrize("name", FILES)
def test_everything_public_is_documented(name):
    module = tree(name)
    doc = ast.get_docstring(module) or ""
    assert len(doc.splitlines()) >= 4, "a file opens with what it does, a command to try and its sources"
    assert "python" in doc or "torchrun" in doc or "pytest" in doc, "no command to try"
    names = {node: n.rsplit(".")[-1] for n, node in public(module)}
    # a method is told where a class of the file first has it
    told = TOLD_ELSEWHERE | {name for node, name in names.items() if ast.get_docstring(node)}
    bare = [n for n, node in public(module) if names[node] not in told]
    assert not bare, f"without a docstring: {', '.join(bare)}"


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [p for p in map(ROOT.joinpath, done.stdout.split("\0")) if p.is_file()]


# A path of one machine; pieces, so that this line does not name one.
MACHINE_PATH = re.compile(
    r"(?<![\w.~/-])/(?:" + "|".join(["wo" + "rk", "ho" + "me", "ro" + "ot", "Us" + "ers"]) + r")/[\w.-]"
)


def test_no_file_names_a_path_of_one_machine():
    found, read = [], 0
    for file in tracked():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights, tokenizers
        read += 1
        if file.parts[-2:] == ("demo", "heldout.txt"):
            continue  # other people's source code
        found += [f"{file.relative_to(ROOT)}:{i}: {line.strip()[:80]}"
                  for i, line in enumerate(text.splitlines(), 1) if MACHINE_PATH.search(line)]  # fmt: skip
    assert read > 10 and not found, "\n".join(found)
    assert MACHINE_PATH.search("see /ho" + "me/me/x") and not MACHINE_PATH.search("https://a.b/ho" + "me/x")


def test_no_junk_drawer():
    assert not {"utils", "helpers", "common", "misc"} & ALL
