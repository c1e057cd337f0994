"""Perplexity of a checkpoint on a text file, and any lm-evaluation-harness task: what a quantization has cost.

    python eval.py                                          # the bundled model on its held-out text
    python eval.py --checkpoint_path org/name --text wiki.txt --quant int4 --groupsize 64
    python eval.py --checkpoint_path org/name --tasks hellaswag,gsm8k --limit 100      # needs: pip install lm-eval

A text file holds documents separated by form feeds; each is evaluated alone, after a BOS where the tokenizer has one.
Windows of `window` tokens advance by `stride`, and a window scores the tokens that no window before it has, so that
every token counts once and, after a document's first window, sees at least window - stride tokens of context.

Sources: the sliding window is that of https://huggingface.co/docs/transformers/perplexity (same windows, same figures);
words, bytes and the task adapter follow https://github.com/EleutherAI/lm-evaluation-harness (0.4).
"""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import lifeline
from checkpoint import load_model, read_config, resolve
from machine import DTYPES, pick_device
from model import pick_kv_dtype
from tokenizer import Tokenizer

DEMO = Path(__file__).parent / "demo"
SEPARATOR = "\f"
DEFAULT_WINDOW = 2048
LOGIT_BYTES = 128 << 20  # float32 logits held at once: 256 tokens of a vocabulary of 128k, not a window's 2 GB


# --------------------------------------------------------------------------------------------------------- scoring
@torch.no_grad()
def score(
    model,
    rows: Sequence[list[int]],
    counts: Sequence[int],
    features: Callable | None = None,
    shape: tuple[int, int] = (0, 0),
) -> list[tuple[Tensor, Tensor]]:
    """Score the last counts[b] tokens of each row of ids, each given all before it -> a pair of tensors for each row.

    The pair, on the CPU: nats float32 [n] (minus the log-probability) and greedy bool [n] (is it the likeliest token?).
    A row needs at least one token before the scored ones. Rows may differ in length: the model is causal, so padding
    on the right changes nothing. features: `model.features` or a compiled one; shape: pad at least to these [B, T].
    """
    assert all(0 <= n < len(row) for row, n in zip(rows, counts, strict=True))
    device, ends = model.tok_embeddings.weight.device, [len(row) - 1 for row in rows]  # the last is only predicted
    n_rows, width = max(len(rows), shape[0]), max([*ends, shape[1]])
    tokens = torch.zeros(n_rows, width, dtype=torch.int64)
    for b, row in enumerate(rows):
        tokens[b, : ends[b]] = torch.tensor(row[:-1])
    hidden = (features or model.features)(tokens.to(device))[: len(rows)]
    hidden = torch.cat([h[end - n : end] for h, end, n in zip(hidden, ends, counts, strict=True)])
    targets = torch.tensor([t for row, n in zip(rows, counts, strict=True) for t in row[len(row) - n :]], device=device)
    chunk = max(1, LOGIT_BYTES // (4 * model.args.vocab_size))
    nats, greedy = [], []
    counts = list(counts)
    for x, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = model.logits(x[None])[0].float()
        nats.append(F.cross_entropy(logits, y, reduction="none"))
        greedy.append(logits.argmax(-1) == y)
    return list(zip(torch.cat(nats).cpu().split(counts), torch.cat(greedy).cpu().split(counts), strict=True))


def through_cache(model, features: Callable) -> Callable:
    """`model.features` of [B, T] tokens by way of the KV cache: attention sees what that keeps of keys and values."""

    def cached(tokens: Tensor) -> Tensor:
        model.setup_caches(*tokens.shape)
        pos = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        return features(tokens, pos, 0)  # each row is a context's beginning

    return cached


def sliding_windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, scored) over a document of `length` tokens: window [begin, end) scores its last `scored` tokens."""
    done = 1  # nothing stands before a document's first token that could predict it
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        if end > done:
            yield begin, end, end - done
        if end == length:
            return
        done = end


def check_windows(window: int | None, stride: int | None, context: int) -> tuple[int, int]:
    """(window, stride), defaults filled in; ValueError where they do not fit the model's context or each other."""
    window = min(context, DEFAULT_WINDOW) if window is None else window
    if not 2 <= window <= context:
        raise ValueError(f"--window {window}: it must be from 2 to {context}, the model's context")
    stride = window // 2 if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"--stride {stride}: it must be from 1 to {window - 1}, below the window of {window}, "
                         "so that every scored token has one before it")  # fmt: skip
    return window, stride


def perplexity(
    model,
    documents: Sequence[list[int]],
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    words: int | None = None,
    n_bytes: int | None = None,
    features: Callable | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Perplexity of token ids, a list for each document, BOS included -> {"perplexity", "nats", "tokens"}.

    tokens: how many were scored, all but the first of each document; nats: their summed negative log-likelihood, from
    float32 log-softmaxes; perplexity: exp(nats / tokens). With the text's size in words or bytes given, also
    "word_perplexity" = exp(nats / words) and "byte_perplexity", which compare across tokenizers (a document without
    BOS leaves its first token's nats out of both). features: a compiled `model.features`; every batch then has the
    one shape [batch_size, window - 1]. progress(done, total) is called after each batch, in tokens.
    ValueError: window or stride out of range, nothing to score, ids beyond the vocabulary, or NaN from the model.
    """
    window, stride = check_windows(window, stride, model.args.max_seq_len)
    jobs = [(ids[a:b], n) for ids in documents for a, b, n in sliding_windows(len(ids), window, stride)]
    total = sum(n for _, n in jobs)
    if not total:
        raise ValueError("the text is too short: a document needs at least 2 tokens (BOS included) to score one")
    if (highest := max(max(ids) for ids, _ in jobs)) >= model.args.vocab_size:
        raise ValueError(f"token id {highest} is beyond the model's vocabulary of {model.args.vocab_size}; "
                         "use the tokenizer that belongs to the model")  # fmt: skip
    jobs.sort(key=lambda job: -len(job[0]))  # stable; like lengths together, and what needs most memory first
    shape = (batch_size, window - 1) if features else (0, 0)
    nats, done = 0.0, 0
    for i in range(0, len(jobs), batch_size):
        rows, counts = (list(x) for x in zip(*jobs[i : i + batch_size], strict=True))
        nats += sum(float(n.double().sum()) for n, _ in score(model, rows, counts, features, shape))
        done += sum(counts)
        if not math.isfinite(nats):
            raise ValueError(f"the model's log-likelihoods are not finite (dtype {model.tok_embeddings.weight.dtype}); "
                             "try --dtype bf16 or fp32, or check the weights")  # fmt: skip
        progress(done, total)
    result = {"perplexity": _exp(nats / total), "nats": nats, "tokens": total}
    if words is not None:
        result["word_perplexity"] = _exp(nats / words)
    if n_bytes is not None:
        result["byte_perplexity"] = _exp(nats / n_bytes)
    return result


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf  # a text without spaces is one long word


# -------------------------------------------------------------------------------------------- lm-evaluation-harness
@torch.no_grad()
def greedy_until(
    model, prompts: Sequence[list[int]], max_new_tokens: Sequence[int], stopped: Callable[[int, int], bool]
) -> None:
    """Decode greedily with the KV cache, all rows together, until each has stopped or has its max_new_tokens[b].

    stopped(b, token) is told each new token of row b and answers whether the row ends with it.
    """
    device, lengths = model.tok_embeddings.weight.device, torch.tensor([[len(p)] for p in prompts])
    longest = int(lengths.max())
    model.setup_caches(len(prompts), max(len(p) + n for p, n in zip(prompts, max_new_tokens, strict=True)))
    # Shorter rows repeat their last token at its own position: that rewrites the same keys and values.
    tokens = torch.tensor([p + p[-1:] * (longest - len(p)) for p in prompts]).to(device)
    pos = torch.minimum(torch.arange(longest), lengths - 1)
    running = torch.ones(len(prompts), 1, dtype=torch.int64)
    for step in range(max(max_new_tokens)):
        hidden = model.features(tokens, pos.to(device), model.slots[: int(pos.max()) + 1])
        tokens = model.logits(hidden[:, -1:]).argmax(-1)
        for b, token in enumerate(tokens[:, 0].tolist()):
            if running[b] and (stopped(b, token) or step + 1 == max_new_tokens[b]):
                running[b] = 0
        if not running.any():
            return
        pos = pos[:, -1:] + running  # a row that has ended stays where it is, within its part of the cache


def lm_eval_model(model, tokenizer: Tokenizer, batch_size: int = 8, features: Callable | None = None):
    """The model as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=...)`; needs lm_eval.

    Tokenization, truncation and conditioning are those of lm-eval's own Hugging Face model, so that figures compare.
    Generation is greedy. ValueError, at use, for a request that asks for sampling or for more than the context.
    """
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    max_length = model.args.max_seq_len
    end = tokenizer.stop_ids[0] if tokenizer.stop_ids else tokenizer.bos_id
    prefix = end if tokenizer.bos_id is None else tokenizer.bos_id
    if prefix is None:
        raise ValueError("--tasks: the tokenizer has neither a BOS nor an EOS token to condition the first token on")

    class HotloopLM(TemplateLM):
        eot_token_id, prefix_token_id = end, prefix

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            ids = tokenizer.encode(string, bos=False if add_special_tokens is False else None)
            return ids[1:] if ids[:2] == [tokenizer.bos_id] * 2 else ids  # the text begins with a BOS of its own

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
            """[((context, continuation), context ids, continuation ids)] -> [(log-probability, greedy?)]."""
            report = progress_line("loglikelihood", "requests", disable_tqdm)
            results = [None] * len(requests)
            order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
            for i in range(0, len(order), batch_size):
                batch = order[i : i + batch_size]
                rows = [(requests[j][1] + requests[j][2])[-(max_length + 1) :] for j in batch]  # cut from the left
                counts = [min(len(requests[j][2]), len(row) - 1) for j, row in zip(batch, rows, strict=True)]
                for j, (nats, greedy) in zip(batch, score(model, rows, counts, features), strict=True):
                    results[j] = -float(nats.double().sum()), bool(greedy.all())
                    if requests[j][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[j][0], results[j])
                report(i + len(batch), len(order))
            return results

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            """Log-probability of each text, in windows that do not overlap, the first after the prefix token."""
            windows = [
                [(None, *utils.make_disjoint_window(w)) for w in utils.get_rolling_token_windows(
                    self.tok_encode(r.args[0]), prefix, max_length, context_len=1)]
                for r in requests
            ]  # fmt: skip
            scores = iter(self._loglikelihood_tokens([w for ws in windows for w in ws], disable_tqdm))
            totals = [sum(next(scores)[0] for _ in ws) for ws in windows]
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

        def generate_until(self, requests, disable_tqdm=False):
            """Greedy continuations, each cut before the first of its stop strings."""
            jobs = []
            for context, kwargs in (r.args for r in requests):
                if kwargs.get("do_sample", bool(kwargs.get("temperature"))):
                    raise ValueError(f"--tasks: a task asks for sampling ({kwargs}); only greedy decoding is supported")
                until, room = kwargs.get("until") or [], kwargs.get("max_gen_toks", kwargs.get("max_new_tokens", 256))
                if not 0 < room < max_length:
                    raise ValueError(f"--tasks: max_gen_toks {room} does not fit the context of {max_length}")
                ids = (self.tok_encode(context) or [prefix])[-(max_length - room) :]
                jobs.append((ids, room, [s for s in ([until] if isinstance(until, str) else until) if s]))
            report = progress_line("generate_until", "requests", disable_tqdm)
            texts = [""] * len(jobs)
            order = sorted(range(len(jobs)), key=lambda i: -len(jobs[i][0]))
            for i in range(0, len(order), batch_size):
                batch = order[i : i + batch_size]
                # Decoded without the prompt, as lm-eval does: sentencepiece then drops a first space.
                streams = [tokenizer.stream() for _ in batch]

                def stopped(b, token, batch=batch, streams=streams):
                    if token in tokenizer.stop_ids:
                        return True
                    piece, stops = streams[b].feed(token), jobs[batch[b]][2]
                    texts[batch[b]] += piece
                    tail = texts[batch[b]][-len(piece) - max(map(len, stops), default=0) :]
                    return any(s in tail for s in stops)

                greedy_until(model, [jobs[j][0] for j in batch], [jobs[j][1] for j in batch], stopped)
                for j, stream in zip(batch, streams, strict=True):
                    texts[j] += stream.flush()
                    texts[j] = texts[j][: min((k for k in map(texts[j].find, jobs[j][2]) if k >= 0), default=None)]
                    self.cache_hook.add_partial("generate_until", requests[j].args, texts[j])
                report(i + len(batch), len(order))
            return texts

    return HotloopLM()


def load_tasks(names: Sequence[str]):
    """lm-eval's task manager; ValueError where lm-eval is not installed or does not know a name (or YAML file)."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"--tasks needs the lm-evaluation-harness: pip install lm-eval ({error})") from None
    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks and not (name.endswith(".yaml") and Path(name).is_file()):
            raise ValueError(f"--tasks {name}: lm-eval knows no task, group or YAML file of that name; "
                             "'lm_eval ls tasks' lists what it knows")  # fmt: skip
    return manager


# -------------------------------------------------------------------------------------------------------- the steps
def progress_line(name: str, unit: str, quiet: bool = False) -> Callable[[int, int], None]:
    """A progress(done, total) that rewrites one line on stderr, where that is a terminal."""
    begin = time.perf_counter()

    def report(done: int, total: int) -> None:
        if sys.stderr.isatty() and not quiet:
            speed = done / (time.perf_counter() - begin)
            line = f"\r\033[K{name} {done / total:4.0%}  {done:,} of {total:,} {unit}, {speed:,.0f} a second"
            print("\r\033[K" if done == total else line, end="", file=sys.stderr, flush=True)

    return report


def read_documents(path: str | Path, tokenizer: Tokenizer, limit: int | None) -> tuple[list[list[int]], int, int]:
    """(ids of each document, words, bytes) of a text file, up to `limit` tokens. ValueError where it cannot be read.

    Words are counted as lm-eval does: the pieces between white space, of which one at either end may be empty.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"--text {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    documents, words, n_bytes = [], 0, 0
    for document in text.split(SEPARATOR):
        ids = tokenizer.encode(document, bos=False)
        if limit is not None and len(ids) > limit:
            ids = ids[:limit]
            document = tokenizer.decode(ids)  # the words and bytes of what is scored
        if ids:
            documents.append(([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + ids)
            words, n_bytes = words + len(re.split(r"\s+", document)), n_bytes + len(document.encode())
        if limit is not None and (limit := limit - len(ids)) == 0:
            break
    return documents, words, n_bytes


def weights_mb(model) -> float:
    """Size of all parameters and scales, tied ones once, in MB of 10^6 bytes."""
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values()) / 1e6


def jsonable(x):
    """What JSON can hold: infinite and NaN figures become null."""
    if isinstance(x, dict):
        return {k: jsonable(v) for k, v in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x


def main(
    checkpoint_path: str | Path,
    text: str | Path,
    window: int | None,
    stride: int | None,
    limit_tokens: int | None,
    device: str | None,
    dtype: str | None,
    kv_dtype: str | None,
    quant: str | None,
    groupsize: int | None,
    tasks: str | None,
    limit: int | None,
    batch_size: int,
    compile: bool,
    json_line: bool,
) -> None:
    for name, value in (("limit_tokens", limit_tokens), ("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: it must be at least 1")
    if groupsize is not None and quant != "int4":
        raise ValueError(f"--groupsize {groupsize}: only --quant int4 has groups")
    ranks = lifeline.join()
    device = pick_device(device)
    device = ranks.device(device) if ranks else device
    pick_kv_dtype(kv_dtype, device)
    directory = resolve(checkpoint_path)
    args, config = read_config(directory)
    tokenizer = Tokenizer(directory)
    # All that can be refused is refused before the weights load.
    task_names = [t for t in tasks.split(",") if t] if tasks is not None else []
    if tasks is not None:
        manager = load_tasks(task_names)
    else:
        window, stride = check_windows(window, stride, args.max_seq_len)
        documents, words, n_bytes = read_documents(text, tokenizer, limit_tokens)

    begin = time.perf_counter()
    recipe = {"mode": quant} | ({"groupsize": groupsize or 64, "method": "rtn"} if quant == "int4" else {})
    model = load_model(directory, device, DTYPES.get(dtype), **({"quant": recipe} if quant else {}))
    load_s, compile_s, features = time.perf_counter() - begin, None, None
    if compile and args.n_experts:
        print("--compile: a mixture of experts is evaluated without, since its routing has no static shape",
              file=sys.stderr)  # fmt: skip
    elif compile:
        features = torch.compile(model.features)
    if kv_dtype is not None:
        model.setup_caches(1, 1, kv_dtype)  # larger ones will be of the same kind
        features = through_cache(model, features or model.features)
    if compile and not args.n_experts:
        begin = time.perf_counter()
        if tasks is None:
            score(model, [[0] * window], [1], features, (batch_size, window - 1))
            compile_s = time.perf_counter() - begin

    begin = time.perf_counter()
    if tasks is not None:
        import lm_eval.utils

        lm = lm_eval_model(model, tokenizer, batch_size, features)
        try:
            outcome = lm_eval.simple_evaluate(
                lm, tasks=task_names, limit=limit, task_manager=manager, log_samples=False
            )
        except OSError as error:  # a data set that is neither cached nor within reach
            raise ValueError(f"--tasks {tasks}: {error}") from None
        result = {"results": outcome["results"]}
        print(lm_eval.utils.make_table(outcome))
    else:
        bar = progress_line("perplexity", "tokens")
        result = perplexity(model, documents, window, stride, batch_size, words, n_bytes, features, bar)
        result |= {"words": words, "bytes": n_bytes, "documents": len(documents), "window": window, "stride": stride}
    seconds = time.perf_counter() - begin
    result |= {
        "checkpoint": str(checkpoint_path),
        "quant": recipe if quant else config.get("quantization"),
        "dtype": str(model.tok_embeddings.weight.dtype).removeprefix("torch."),
        "kv_dtype": kv_dtype,
        "weights_mb": weights_mb(model),
        "device": str(device),
        "load_s": load_s,
        "compile_s": compile_s,
        "seconds": seconds,
    }
    if tasks is None:
        print(f"{checkpoint_path}, {result['dtype']}, {result['weights_mb']:,.1f} MB of weights, on {device}")
        print(f"{text}: {len(documents):,} documents, window {window}, stride {stride}, {seconds:.1f} s")
        print(f"  {'':<8}{'perplexity':>14}{'count':>14}")
        for unit, key, count in (("token", "", result["tokens"]), ("word", "word_", words), ("byte", "byte_", n_bytes)):
            print(f"  {unit:<8}{result[key + 'perplexity']:>14,.4f}{count:>14,}")
    if json_line:
        print(json.dumps(jsonable(result), default=float))


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, but for those that the help tells in words, whose value is None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Perplexity of a Llama-family checkpoint on a text file, or its lm-evaluation-harness scores.",
        formatter_class=lambda prog: Help(prog, width=110, max_help_position=32),
    )
    p.error = lambda message: p.exit(2, f"{p.prog}: {message}\n")  # one line, as for every other error
    a = p.add_argument
    a("--checkpoint_path", default=DEMO, metavar="DIR_OR_HUB_ID",
      help="converted directory, Hugging Face directory, or hub id such as org/name")  # fmt: skip
    a("--text", default=DEMO / "heldout.txt", metavar="FILE", help="UTF-8 text, form feeds between documents")
    a("--window", type=int, metavar="N",
      help=f"tokens the model sees at once; default: its context, up to {DEFAULT_WINDOW}")  # fmt: skip
    a("--stride", type=int, metavar="N", help="tokens from one window to the next; default: half a window")
    a("--limit_tokens", type=int, metavar="N", help="evaluate the first N tokens of the text; default: all")
    a("--device", metavar="D", help="cuda, cuda:N, mps or cpu; default: the best there is")
    a("--dtype", choices=DTYPES, help="default: as the checkpoint has it")
    a("--kv_dtype", metavar="D", help="fp8: with keys and values as that KV cache keeps them; default: as they are")
    a("--quant", choices=("int8", "int4", "fp8"), help="quantize the weights while loading; default: as they are")
    a("--groupsize", type=int, metavar="G", help="of --quant int4; default: 64")
    a("--tasks", metavar="A,B", help="run these lm-eval tasks (names or YAML files) instead; pip install lm-eval")
    a("--limit", type=int, metavar="N", help="examples of each task; default: all")
    a("--batch_size", type=int, default=8, metavar="B", help="windows or requests evaluated together")
    a("--compile", action="store_true", help="torch.compile the model: slower start, faster on a GPU")
    a("--json", action="store_true", dest="json_line", help="last line of stdout: one JSON object with all figures")
    return p


if __name__ == "__main__":
    try:
        with lifeline.one_voice("eval.py"):
            main(**vars(parser().parse_args()))
    except (ValueError, torch.OutOfMemoryError) as error:
        print(f"eval.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
