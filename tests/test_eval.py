"""Perplexity against transformers and against a brute force; the task adapter against lm-eval's own Hugging Face model.

Try it:  python -m pytest tests/test_eval.py            # the lm-eval half needs: pip install 'lm-eval[hf]'
"""

import copy
import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
from checkpoint import load_model
from eval import perplexity, read_documents, score, sliding_windows, through_cache
from tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
pytestmark = pytest.mark.usefixtures("one_thread")
needs_lm_eval = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("lm_eval", "accelerate"))),
    reason="lm-eval's Hugging Face model is not installed: pip install 'lm-eval[hf]'",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(our model, transformers' model) on the same random weights: a Llama of context 64, float32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("tiny")
    theirs.save_pretrained(path)
    return load_model(path, dtype=torch.float32), theirs


@pytest.fixture(scope="module")
def documents():
    """Of lengths below, at and above windows and strides; one with nothing to score."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(96, (n,), generator=generator).tolist() for n in (150, 1, 2, 16, 17, 64, 65, 33)]


@torch.no_grad()
def hugging_face_guide(model, documents, window, stride):
    """(nats, tokens) by the loop of huggingface.co/docs/transformers/perplexity, one document after another."""
    nats, tokens = 0.0, 0
    for ids in documents:
        ids = torch.tensor([ids])
        seq_len, prev_end_loc = ids.size(1), 0
        for begin_loc in range(0, seq_len, stride):
            end_loc = min(begin_loc + window, seq_len)
            trg_len = end_loc - prev_end_loc
            input_ids = ids[:, begin_loc:end_loc]
            target_ids = input_ids.clone()
            target_ids[:, :-trg_len] = -100
            n = int((target_ids[:, 1:] != -100).sum())  # the model shifts the labels itself
            if n:
                nats += float(model(input_ids, labels=target_ids).loss) * n
                tokens += n
            prev_end_loc = end_loc
            if end_loc == seq_len:
                break
    return nats, tokens


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (64, 63), (64, 1), (17, 5), (2, 1), (33, 16)])
def test_equals_transformers_on_the_same_windows(tiny, documents, window, stride):
    ours, theirs = tiny
    nats, tokens = hugging_face_guide(theirs, documents, window, stride)
    result = perplexity(ours, documents, window, stride, batch_size=3)
    assert result["tokens"] == tokens == sum(len(d) - 1 for d in documents)
    assert result["nats"] == pytest.approx(nats, rel=1e-5)
    assert f"{result['perplexity']:.4g}" == f"{math.exp(nats / tokens):.4g}"


def test_the_bundled_model_equals_transformers_to_four_digits():
    tokenizer = Tokenizer(DEMO)
    documents, _, _ = read_documents(DEMO / "heldout.txt", tokenizer, limit=6000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    nats, tokens = hugging_face_guide(theirs, documents, 1024, 512)
    result = perplexity(load_model(DEMO, dtype=torch.float32), documents, 1024, 512)
    assert result["tokens"] == tokens == 6000
    assert f"{result['perplexity']:.4g}" == f"{math.exp(nats / tokens):.4g}"


@pytest.mark.parametrize(("window", "stride"), [(16, 4), (16, 15), (64, 32), (5, 1)])
def test_each_token_is_scored_once_with_the_context_it_is_due(tiny, documents, window, stride):
    """Brute force: the context of each token written down from the definition, one forward a token."""
    ours, _ = tiny
    nats, tokens = 0.0, 0
    for ids in documents:
        for t in range(1, len(ids)):
            # The first window covers tokens 0 ... window - 1; later ones start at multiples of the stride, and the
            # first of them that reaches token t is the one that scores it.
            begin = 0 if t < window else -(-(t + 1 - window) // stride) * stride
            assert t < window or window - stride <= t - begin < window
            logits = ours(torch.tensor([ids[begin:t]]))[0, -1].float()
            nats += float(F.cross_entropy(logits, torch.tensor(ids[t])))
            tokens += 1
    result = perplexity(ours, documents, window, stride)
    assert result["tokens"] == tokens
    assert result["nats"] == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 100])
def test_windows_cover_every_token_once(length):
    scored = [t for _, end, n in sliding_windows(length, 8, 3) for t in range(end - n, end)]
    assert scored == list(range(1, length))


def test_batches_chunks_and_shapes_do_not_change_the_result(tiny, documents, monkeypatch):
    ours, _ = tiny
    shapes = []

    def features(tokens):
        shapes.append(tuple(tokens.shape))
        return ours.features(tokens)

    expected = perplexity(ours, documents, 32, 16, batch_size=1)["nats"]
    assert perplexity(ours, documents, 32, 16, batch_size=100)["nats"] == pytest.approx(expected, rel=1e-6)
    assert perplexity(ours, documents, 32, 16, batch_size=5, features=features)["nats"] == pytest.approx(expected)
    assert set(shapes) == {(5, 31)}  # what is compiled meets one shape
    held, logits = [], ours.logits
    monkeypatch.setattr(evaluation, "LOGIT_BYTES", 7 * 96 * 4)
    monkeypatch.setattr(ours, "logits", lambda x: held.append(x.shape[1]) or logits(x))
    assert perplexity(ours, documents, 32, 16)["nats"] == pytest.approx(expected, rel=1e-6)
    assert max(held) == 7


def test_log_softmax_is_float32_where_the_model_is_not(tiny):
    model = copy.deepcopy(tiny[0]).to(torch.bfloat16)
    row = list(range(40))
    ((nats, greedy),) = score(model, [row], [39])
    assert nats.dtype == torch.float32 and greedy.dtype == torch.bool
    logits = model(torch.tensor([row[:-1]]))[0]
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(nats, -logits.float().log_softmax(-1)[range(39), row[1:]])


def test_compiled_equals_eager(tiny, documents):
    ours, _ = tiny
    compiled = perplexity(ours, documents, 32, 16, batch_size=4, features=torch.compile(ours.features))
    assert compiled["nats"] == pytest.approx(perplexity(ours, documents, 32, 16)["nats"], rel=1e-5)


def test_through_the_cache(tiny, documents):
    """Plain caches change nothing; fp8 ones give what decoding with them, token by token, would."""
    model = copy.deepcopy(tiny[0])
    expected = perplexity(model, documents, 32, 16, batch_size=4)["nats"]
    cached = perplexity(model, documents, 32, 16, batch_size=4, features=through_cache(model, model.features))["nats"]
    assert cached == pytest.approx(expected, rel=1e-6)
    model = copy.deepcopy(tiny[0])
    model.setup_caches(1, 1, "fp8")
    row = documents[0][:50]
    model.setup_caches(1, 64)
    with torch.no_grad():
        steps = [model(torch.tensor([[t]]), torch.tensor([[i]]))[0, 0] for i, t in enumerate(row[:-1])]
    nats = F.cross_entropy(torch.stack(steps), torch.tensor(row[1:]), reduction="sum").item()
    cached = perplexity(model, [row], 64, 32, features=through_cache(model, model.features))["nats"]
    assert cached == pytest.approx(nats, rel=1e-5)
    assert cached != pytest.approx(perplexity(model, [row], 64, 32)["nats"], rel=1e-4)


def test_words_and_bytes(tiny, tmp_path):
    text = "one two\nthree \f\fvier fünf\n"
    (tmp_path / "t.txt").write_bytes(text.encode())
    tokenizer = Tokenizer(DEMO)
    documents, words, n_bytes = read_documents(tmp_path / "t.txt", tokenizer, None)
    assert [tokenizer.decode(d) for d in documents] == ["one two\nthree ", "vier fünf\n"]
    assert all(d[0] == tokenizer.bos_id and d.count(tokenizer.bos_id) == 1 for d in documents)
    assert words == 4 + 3  # lm-eval's re.split counts the empty piece at the end too
    assert n_bytes == len(text.encode()) - 2
    short, words, n_bytes = read_documents(tmp_path / "t.txt", tokenizer, limit=len(documents[0]) + 1)
    assert short == [documents[0], documents[1][:3]] and words > 4 and n_bytes > 14
    ours, _ = tiny
    result = perplexity(ours, [[1, 2, 3]], words=2, n_bytes=5)
    assert result["word_perplexity"] == pytest.approx(math.exp(result["nats"] / 2))
    assert result["byte_perplexity"] == pytest.approx(math.exp(result["nats"] / 5))


def test_refusals(tiny):
    ours, _ = tiny
    for documents, window, stride, message in (
        ([[1, 2, 3]], 65, None, "--window 65: it must be from 2 to 64"),
        ([[1, 2, 3]], 1, None, "--window 1:"),
        ([[1, 2, 3]], 16, 16, "--stride 16: it must be from 1 to 15"),
        ([[1, 2, 3]], 16, 0, "--stride 0:"),
        ([[1], []], 16, 8, "too short"),
        ([], 16, 8, "too short"),
        ([[1, 96]], 16, 8, "token id 96 is beyond"),
    ):
        with pytest.raises(ValueError, match=message):
            perplexity(ours, documents, window, stride)


def test_a_model_that_gives_nan_is_an_error(tiny, monkeypatch):
    ours, _ = tiny
    monkeypatch.setattr(ours, "logits", lambda x: torch.full((*x.shape[:2], 96), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        perplexity(ours, [[1, 2, 3]])


# ------------------------------------------------------------------------------------------------- the command line
def cli(*args, env=None):
    command = [sys.executable, str(ROOT / "eval.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}))


def test_json_line():
    run = cli("--limit_tokens", 1500, "--window", 256, "--json", "--device", "cpu", "--dtype", "fp32")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""  # no bar where there is no terminal
    table, line = run.stdout.rstrip("\n").rsplit("\n", 1)
    result = json.loads(line)
    assert "perplexity" in table
    assert (result["tokens"], result["window"], result["stride"], result["quant"]) == (1500, 256, 128, None)
    assert result["perplexity"] == pytest.approx(math.exp(result["nats"] / result["tokens"]))
    assert result["word_perplexity"] == pytest.approx(math.exp(result["nats"] / result["words"]))
    assert result["byte_perplexity"] == pytest.approx(math.exp(result["nats"] / result["bytes"]))
    assert result["seconds"] > 0 and result["dtype"] == "float32" and result["weights_mb"] > 1


@pytest.mark.parametrize(
    ("args", "recipe"),
    [
        (["--quant", "int8"], {"mode": "int8"}),
        (["--quant", "int4"], {"mode": "int4", "groupsize": 64, "method": "rtn"}),
        (["--quant", "int4", "--groupsize", "32"], {"mode": "int4", "groupsize": 32, "method": "rtn"}),
        ([], None),
    ],
)
def test_quantization_is_passed_on(args, recipe, monkeypatch, capsys):
    seen, load = [], load_model

    def spy(*a, **kwargs):
        seen.append(dict(kwargs.get("quant") or {}) or None)
        return load(*a, **kwargs)

    monkeypatch.setattr(evaluation, "load_model", spy)
    options = evaluation.parser().parse_args([*args, "--limit_tokens", "300", "--device", "cpu", "--json"])
    evaluation.main(**vars(options))
    assert seen == [recipe]
    result = json.loads(capsys.readouterr().out.rstrip().splitlines()[-1])
    assert (result["quant"] or {}).get("mode") == (recipe or {}).get("mode")


def test_infinite_figures_are_null_in_json(tmp_path):
    (tmp_path / "t.txt").write_text("z" * 3000)  # one word
    run = cli("--text", tmp_path / "t.txt", "--json", "--device", "cpu")
    result = json.loads(run.stdout.splitlines()[-1], parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert run.returncode == 0 and (result["word_perplexity"] is None or result["word_perplexity"] > 1)


def test_errors_are_one_line_and_exit_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    for args, message in (
        (["--text", tmp_path / "none.txt"], "No such file"),
        (["--text", tmp_path], "Is a directory"),
        (["--text", tmp_path / "latin1.txt"], "not UTF-8"),
        (["--text", tmp_path / "empty.txt"], "too short"),
        (["--window", "4097"], "--window 4097"),
        (["--stride", "2048"], "--stride 2048"),
        (["--limit_tokens", "0"], "--limit_tokens 0"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "cuda:99"], "not available"),
        (["--quant", "int3"], "int3"),
        (["--groupsize", "64"], "--groupsize 64"),
        (["--quant", "int4", "--groupsize", "65"], "65"),
        (["--checkpoint_path", tmp_path / "nowhere"], "no such directory"),
    ):
        # In this process, as a program: starting Python for each would take the time of all other tests.
        monkeypatch.setattr(sys, "argv", ["eval.py", "--device", "cpu", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
        out, err = capsys.readouterr()
        assert exit.value.code == 2 and message in err, (args, err)
        assert len(err.splitlines()) == 1 and out == "", (args, err)


def test_tasks_without_lm_eval_is_one_clear_line(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError('not here')")
    run = cli("--tasks", "hellaswag", env={"PYTHONPATH": str(tmp_path)})
    assert run.returncode == 2 and "pip install lm-eval" in run.stderr and len(run.stderr.splitlines()) == 1


# ----------------------------------------------------------------------------------------------------- with lm-eval
CHOICE = """
task: hotloop_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATE = """
task: hotloop_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n\\n", "return"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: hotloop_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""
QUESTIONS = [
    ("def add(a, b):\n    return a", [" + b", " - banana", "\n\n\nimport os"], 0),
    ("import numpy as", [" np", " pandas", " 17"], 0),
    ("for i in", [" range(10):\n", " def"], 0),
    ("class Point:\n    def __init__(self, x, y):\n        self.x = ", ["x", "None and some more to score", "y"], 0),
    ("try:\n    import json\nexcept ", ["ImportError:", "json"], 0),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Paths of three tasks that read a local file: multiple choice, generation, perplexity."""
    path = tmp_path_factory.mktemp("tasks")
    os.environ["HF_DATASETS_CACHE"] = str(path / "cache")
    rows = [json.dumps({"question": q, "choices": c, "label": label}) for q, c, label in QUESTIONS]
    (path / "data.jsonl").write_text("\n".join(rows))
    for name, yaml in (("choice", CHOICE), ("generate", GENERATE), ("rolling", ROLLING)):
        (path / f"{name}.yaml").write_text(yaml.replace("DATA", str(path / "data.jsonl")))
    return [str(path / f"{name}.yaml") for name in ("choice", "generate", "rolling")]


@pytest.fixture(scope="module")
def both():
    """(our adapter, lm-eval's HFLM) on the bundled model, float32."""
    from lm_eval.models.huggingface import HFLM

    model = load_model(DEMO, dtype=torch.float32)
    theirs = HFLM(pretrained=str(DEMO), dtype="float32", device="cpu", batch_size=2)
    return evaluation.lm_eval_model(model, Tokenizer(DEMO), batch_size=3), theirs


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


@needs_lm_eval
def test_loglikelihoods_equal_lm_evals_own(both):
    ours, theirs = both
    long = (DEMO / "heldout.txt").read_text()[:16000]  # longer than the context: cut from the left
    pairs = [(q, c) for q, choices, _ in QUESTIONS for c in choices]
    pairs += [("", "import os\n"), ("<s>def f(", "x):"), ("x = 1 ", "  # one"), (long, "def")]
    for (a, a_greedy), (b, b_greedy) in zip(
        ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True),
        theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True),
        strict=True,
    ):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-5) and a_greedy == b_greedy


@needs_lm_eval
def test_rolling_loglikelihoods_equal_lm_evals_own(both):
    ours, theirs = both
    texts = [("import os\n",), ((DEMO / "heldout.txt").read_text()[:16000],), ("x",)]
    a = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    b = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert a == pytest.approx(b, abs=1e-4, rel=1e-5)


@needs_lm_eval
def test_generations_equal_lm_evals_own(both):
    ours, theirs = both
    long = (DEMO / "heldout.txt").read_text()[:16000]
    arguments = [(q, {"until": ["\n\n", "return"], "max_gen_toks": 24, "do_sample": False}) for q, *_ in QUESTIONS]
    arguments += [("def f", {"until": "(", "max_gen_toks": 40}), (long, {"until": [], "max_gen_toks": 8})]
    arguments += [("x", {"until": [], "max_gen_toks": 3, "temperature": 0.0})]
    a = ours.generate_until(requests("generate_until", *arguments), disable_tqdm=True)
    theirs.model.generation_config.max_length = None
    b = theirs.generate_until(requests("generate_until", *arguments), disable_tqdm=True)
    assert a == b and any(a)
    with pytest.raises(ValueError, match="sampling"):
        ours.generate_until(requests("generate_until", ("x", {"do_sample": True})))
    with pytest.raises(ValueError, match="does not fit"):
        ours.generate_until(requests("generate_until", ("x", {"max_gen_toks": 4096})))


@needs_lm_eval
def test_tasks_equal_lm_evals_own_run(both, tasks):
    import lm_eval

    a, b = (lm_eval.simple_evaluate(m, tasks=tasks, bootstrap_iters=0, log_samples=True) for m in both)
    assert set(a["results"]) == {"hotloop_choice", "hotloop_generate", "hotloop_rolling"}
    for name, figures in b["results"].items():
        for key, value in figures.items():
            assert a["results"][name][key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
    for x, y in zip(a["samples"]["hotloop_generate"], b["samples"]["hotloop_generate"], strict=True):
        assert x["resps"] == y["resps"]


@needs_lm_eval
def test_word_perplexity_is_lm_evals(tasks, both):
    """Our own definition of words and bytes, on lm-eval's log-likelihoods."""
    import lm_eval

    result = lm_eval.simple_evaluate(both[0], tasks=tasks[2:], bootstrap_iters=0)["results"]["hotloop_rolling"]
    path = Path(tasks[2]).parent / "text.txt"
    path.write_text("\f".join(q for q, *_ in QUESTIONS))
    _, words, n_bytes = read_documents(path, Tokenizer(DEMO), None)
    nats = -sum(both[0].loglikelihood_rolling(requests("loglikelihood_rolling", *[(q,) for q, *_ in QUESTIONS]), True))
    assert result["word_perplexity,none"] == pytest.approx(math.exp(nats / words))
    assert result["byte_perplexity,none"] == pytest.approx(math.exp(nats / n_bytes))


@needs_lm_eval
def test_tasks_from_the_command_line(tasks):
    run = cli("--tasks", ",".join(tasks[:2]), "--limit", 2, "--json", "--device", "cpu")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.rstrip().splitlines()[-1])
    assert set(result["results"]) == {"hotloop_choice", "hotloop_generate"}
    assert 0 <= result["results"]["hotloop_choice"]["acc,none"] <= 1
    run = cli("--tasks", "no_such_task", "--device", "cpu")
    assert run.returncode == 2 and "--tasks no_such_task" in run.stderr.splitlines()[-1]
