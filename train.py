"""Train a model from scratch, or fine-tune one, on packed text files, with the same model.py that decodes.

    python train.py --text my.txt --config demo/draft --tokenizer demo --out_dir runs/mine --steps 200

A text file (.txt or .txt.xz) holds documents separated by form feeds. Each becomes BOS, its tokens, EOS; all of them
lie in one long tensor on the device, out of which every step cuts random crops. Written to --out_dir: an ordinary
Hugging Face directory (what generate.py reads), and train_state.pt, from which --resume goes on as if never stopped.

Sources: AdamW, arXiv 1711.05101; cosine schedule, 1608.03983; the initialization of GPT-2 (residual branches scaled by
1 / sqrt(2 layers)); nanoGPT (https://github.com/karpathy/nanoGPT) for how little a training script needs.
"""

import argparse
import hashlib
import json
import lzma
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import load_model, read_config, resolve, save_checkpoint
from machine import DTYPES, pick_device
from model import Transformer
from tokenizer import Tokenizer

SEPARATOR = "\f"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "generation_config.json")  # fmt: skip
SYNC_EVERY = 10  # steps between looks at the device: the host never runs further ahead, nor waits at each step

# ---------------------------------------------------------------------------------------------------------- data


def _encode(job) -> bytes:
    """(tokenizer directory, documents) -> their ids, BOS and EOS around each, as little-endian uint32."""
    tokenizer_dir, documents = job
    tokenizer = Tokenizer(tokenizer_dir)
    bos, eos = [] if tokenizer.bos_id is None else [tokenizer.bos_id], list(tokenizer.stop_ids[:1])
    ids = [id for text in documents for id in bos + tokenizer.encode(text, bos=False) + eos]
    return np.array(ids, dtype="<u4").tobytes()


def read_tokens(text_file: str, tokenizer_dir: str) -> np.ndarray:
    """Tokens of a packed text file, uint32 [N]; kept beside it as .bin, under the hash of text and tokenizer."""
    path = Path(text_file)
    if not path.is_file():
        raise ValueError(f"no text file {path}; pass a .txt or .txt.xz file")
    data = path.read_bytes()
    files = [f for name in TOKENIZER_FILES if (f := Path(tokenizer_dir, name)).is_file()]
    key = hashlib.sha256(b"\0".join([data, *(f.read_bytes() for f in files)])).hexdigest()[:12]
    cache = path.with_name(f"{path.name}.{key}.bin")
    if not cache.is_file():
        try:
            text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
        except (lzma.LZMAError, UnicodeDecodeError) as e:
            raise ValueError(f"{path} is not UTF-8 text, plain or xz ({e})") from None
        documents = [d for d in text.split(SEPARATOR) if d]
        jobs = [(tokenizer_dir, documents[i : i + 64]) for i in range(0, len(documents), 64)]
        if len(text) < 2_000_000:
            ids = b"".join(map(_encode, jobs))
        else:
            with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count())) as pool:
                ids = b"".join(pool.imap(_encode, jobs))
        cache.with_suffix(".tmp").write_bytes(ids)
        cache.with_suffix(".tmp").replace(cache)
    return np.fromfile(cache, dtype="<u4")


def load_tokens(text_files: list[str], tokenizer_dir: str, vocab_size: int, device: torch.device) -> Tensor:
    """All files' tokens as one tensor on the device, int16 (a vocabulary up to 65536, as bit patterns) or int32."""
    tokens = np.concatenate([read_tokens(f, tokenizer_dir) for f in text_files])
    if len(tokens) and tokens.max() >= vocab_size:
        raise ValueError(f"token id {tokens.max()} of {tokenizer_dir} does not fit vocab_size {vocab_size}; "
                         "pass the tokenizer that belongs to the model")  # fmt: skip
    narrow = tokens.astype(np.uint16).view(np.int16) if vocab_size <= 1 << 16 else tokens.view(np.int32)
    return torch.from_numpy(narrow).to(device)


def crop(tokens: Tensor, starts: Tensor, seq_len: int) -> Tensor:
    """tokens [N], starts [B] -> int64 [B, seq_len + 1], without a look from the host."""
    index = starts[:, None] + torch.arange(seq_len + 1, device=tokens.device)
    batch = tokens[index].long()
    return batch & 0xFFFF if tokens.dtype == torch.int16 else batch


# ------------------------------------------------------------------------------------------------------ training


def initialize(model: Transformer, seed: int) -> None:
    """Normal(0, 0.02) matrices; each layer's two that write to the residual stream scaled by 1 / sqrt(2 layers)."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            writes = name.endswith(("out.linear.weight", "down.linear.weight"))
            std = 0.02 / math.sqrt(2 * model.args.n_layers) if writes else 0.02
            p.data.copy_(torch.randn(p.shape, generator=generator) * std)  # on the CPU: the same on every device


def schedule(step: int, progress: float, lr: float, min_lr_ratio: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then a cosine from lr to min_lr_ratio * lr at progress 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return lr * min((step + 1) / max(warmup, 1), 1.0) * (min_lr_ratio + (1 - min_lr_ratio) * cosine)


@torch.no_grad()
def evaluate(loss_fn, tokens: Tensor, seq_len: int, rows: int) -> float:
    """Mean loss (nats a token) over consecutive windows of `tokens`, the incomplete last batch left out."""
    starts = torch.arange(0, len(tokens) - seq_len, seq_len, device=tokens.device)
    rows = min(rows, len(starts))  # whole batches only, so that a compiled loss meets one shape
    batches = starts[: len(starts) // rows * rows].split(rows)
    return torch.stack([loss_fn(crop(tokens, batch, seq_len)) for batch in batches]).mean().item()


def save(model: Transformer, optimizer, state: dict, out_dir: Path, source: str, tokenizer: str, dtype: str) -> None:
    """Write the checkpoint, in the layout of `source`, and train_state.pt; each file appears whole or not at all."""
    layout = "hf" if (resolve(source) / "config.json").exists() else "hotloop"
    save_checkpoint(model, out_dir, source, layout=layout, dtype=DTYPES[dtype], overwrite=True)
    for file in (Path(tokenizer, name) for name in TOKENIZER_FILES):
        if file.is_file() and not (out_dir / file.name).exists():  # the source has no tokenizer of its own
            shutil.copyfile(file, out_dir / file.name)
    state = {**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, out_dir / "train_state.pt.tmp")
    (out_dir / "train_state.pt.tmp").replace(out_dir / "train_state.pt")


def train(model: Transformer, tokens: Tensor, valid_tokens: Tensor | None = None, *, out_dir: str, source: str,
          tokenizer: str, steps: int | None = None, minutes: float | None = None, batch_tokens: int = 16384,
          seq_len: int = 512, lr: float = 1e-3, min_lr_ratio: float = 0.1, warmup: int = 100, weight_decay: float = 0.1,
          beta2: float = 0.95, grad_clip: float = 1.0, dtype: str = "bf16", compile: bool = False, seed: int = 0,
          save_every: int = 0, eval_every: int = 0, resume: bool = False,
          should_stop=lambda: False) -> dict:  # fmt: skip
    """Train `model` (float32, on the device of `tokens`) and write it to out_dir; returns the figures of the run.

    tokens, valid_tokens: [N], as load_tokens makes them. source, tokenizer: the directories of the configuration and
    of the tokenizer; what decoding needs of them is copied to out_dir. steps or minutes ends the run; with minutes, the
    schedule follows the elapsed share of the time, compilation included. batch_tokens / seq_len crops make a step.
    dtype is of the arithmetic (autocast) and of the exported weights; master weights and AdamW's moments stay float32.
    should_stop is asked after each step: True saves and returns with "stopped": True. ValueError for impossible
    settings, a loss that is not finite, or files that cannot be written.
    """
    if (steps is None) == (minutes is None):
        raise ValueError("the length of the run is given by either steps or minutes: pass one of the two")
    if not 2 <= seq_len <= model.args.max_seq_len:
        raise ValueError(f"seq_len {seq_len} is not within 2 ... {model.args.max_seq_len}, the model's max_seq_len")
    rows = batch_tokens // seq_len
    if rows < 1:
        raise ValueError(f"batch_tokens {batch_tokens} is less than seq_len {seq_len}; raise it")
    for name, t in (("text", tokens), ("valid_text", valid_tokens)):
        if t is not None and len(t) < seq_len + 2:
            raise ValueError(f"--{name} has {len(t)} tokens, too few for seq_len {seq_len}; lower it or add text")
    out_dir, device = Path(out_dir), tokens.device
    if not resume and (any(out_dir.glob("*.safetensors")) or (out_dir / "train_state.pt").exists()):
        raise ValueError(f"{out_dir} holds a checkpoint already; choose another directory, or continue with --resume")
    out_dir.mkdir(parents=True, exist_ok=True)

    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]  # norms and biases have nothing to gain from decay
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), eps=1e-8, fused=device.type == "cuda")

    def loss_fn(batch: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            logits = model(batch[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    step, elapsed_before = 0, 0.0
    if resume:
        if not (out_dir / "train_state.pt").is_file():
            raise ValueError(f"nothing to resume: no train_state.pt in {out_dir}; start without --resume")
        state = torch.load(out_dir / "train_state.pt", map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed_before = state["step"], state["elapsed_s"]
    eager_loss, loss_fn = loss_fn, torch.compile(loss_fn) if compile else loss_fn

    generator = torch.Generator(device)
    figures = {"parameters": sum(p.numel() for p in model.parameters()), "valid_loss": None, "valid_perplexity": None,
               "stopped": False}  # fmt: skip
    loss, start, report = None, time.perf_counter(), Report(batch_tokens=rows * seq_len, steps=steps)

    def elapsed() -> float:
        return elapsed_before + time.perf_counter() - start

    def progress() -> float:
        return step / steps if minutes is None else elapsed() / (60 * minutes)

    def validate() -> None:
        # Eager: the compiled loss would be compiled once more for the mode without gradients.
        figures["valid_loss"] = evaluate(eager_loss, valid_tokens, seq_len, rows)
        figures["valid_perplexity"] = math.exp(min(figures["valid_loss"], 700.0))
        report.line(f"step {step}  valid loss {figures['valid_loss']:.4f}  "
                    f"perplexity {figures['valid_perplexity']:.3f}")  # fmt: skip

    model.train()
    while progress() < 1 and not figures["stopped"]:
        now = schedule(step, progress(), lr, min_lr_ratio, warmup)
        for group in optimizer.param_groups:
            group["lr"] = now
        # Seeded by the step: a resumed run draws the crops of the uninterrupted one, with no generator state to keep.
        generator.manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(tokens) - seq_len, (rows,), device=device, generator=generator)
        loss = loss_fn(crop(tokens, starts, seq_len))
        loss.backward()
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % SYNC_EVERY == 0 or step == steps:
            report.progress(step, loss.item(), now, progress(), elapsed())
            if not math.isfinite(loss.item()):
                raise ValueError(f"the loss became {loss.item()} at step {step}; lower --lr or raise --warmup")
        figures["stopped"] = should_stop()
        if eval_every and step % eval_every == 0 and valid_tokens is not None and progress() < 1:
            validate()
        if save_every and step % save_every == 0:
            save(model, optimizer, {"step": step, "elapsed_s": elapsed()}, out_dir, source, tokenizer, dtype)
    model.eval()
    if valid_tokens is not None:
        validate()
    save(model, optimizer, {"step": step, "elapsed_s": elapsed()}, out_dir, source, tokenizer, dtype)
    figures |= {"steps": step, "tokens": step * rows * seq_len, "train_loss": None if loss is None else loss.item(),
                "train_s": elapsed(),
                "tok_s": report.tok_s}  # fmt: skip
    return figures


class Report:
    """The progress line on stderr: rewritten in a terminal, one every ten seconds elsewhere."""

    def __init__(self, batch_tokens: int, steps: int | None):
        self.batch_tokens, self.steps, self.tok_s = batch_tokens, steps, None
        self.mark, self.shown, self.live, self.open = None, -math.inf, sys.stderr.isatty(), False

    def progress(self, step: int, loss: float, lr: float, progress: float, elapsed: float) -> None:
        """A look at the run; tok/s counts from the first look, so that compilation stays out of it."""
        self.mark = self.mark or (step, elapsed)
        if step > self.mark[0]:
            self.tok_s = (step - self.mark[0]) * self.batch_tokens / (elapsed - self.mark[1])
        if not self.live and elapsed - self.shown < 10:
            return
        eta = elapsed / progress - elapsed if progress else 0.0
        of = f"/{self.steps}" if self.steps else ""
        text = f"step {step}{of}  loss {loss:.4f}  {self.tok_s or 0:,.0f} tok/s  lr {lr:.2e}  ETA {max(eta, 0):.0f} s"
        print("\r\x1b[K" + text if self.live else text, end="" if self.live else "\n", file=sys.stderr, flush=True)
        self.shown, self.open = elapsed, self.live

    def line(self, text: str) -> None:
        """A line that stays."""
        print("\r\x1b[K" + text if self.open else text, file=sys.stderr, flush=True)
        self.open = False


# ------------------------------------------------------------------------------------------------------------ CLI


def main(text, valid_text, config, checkpoint_path, tokenizer, out_dir, device, seed, json_line, **settings) -> int:
    """Parse -> model -> tokens -> train -> report. Returns the exit code."""
    device = pick_device(device, ("cuda", "cpu"))
    source = checkpoint_path or (config.removesuffix("config.json") or "." if config.endswith(".json") else config)
    tokenizer = tokenizer or str(resolve(source))
    args, _ = read_config(source)
    tokens = load_tokens(text, tokenizer, args.vocab_size, device)
    valid_tokens = load_tokens([valid_text], tokenizer, args.vocab_size, device) if valid_text else None
    if checkpoint_path:
        model = load_model(source, device=device, dtype=torch.float32).requires_grad_(True)
    else:
        model = Transformer(args)
        initialize(model, seed)
        model = model.to(device)
    stop = []
    previous = signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # finish the step, save, then exit 130
    try:
        figures = train(model, tokens, valid_tokens, out_dir=out_dir, source=source, tokenizer=tokenizer,
                        seed=seed, should_stop=lambda: bool(stop), **settings)  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, previous)
    for name, value in figures.items():
        print(f"{name:18}{value}")
    if json_line:
        print(json.dumps(figures))
    return 130 if figures["stopped"] else 0


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, but for those that the help tells in words, whose value is None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parse_args(argv=None) -> argparse.Namespace:
    """The command line; `python train.py --help` is its reference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=Help)  # fmt: skip
    add = parser.add_argument
    add("--text", nargs="+", required=True, metavar="FILE", help="training text, .txt or .txt.xz")
    add("--valid_text", metavar="FILE", help="held-out text")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="DIR", help="train from scratch: a directory with config.json, or that file")
    what.add_argument("--checkpoint_path", metavar="DIR", help="fine-tune this checkpoint")
    add("--tokenizer", metavar="DIR", help="directory of the tokenizer (default: that of the config or checkpoint)")
    add("--out_dir", required=True, metavar="DIR", help="where the model and train_state.pt go")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="length of the run in steps")
    length.add_argument("--minutes", type=float, help="length of the run in minutes, compilation included")
    add("--batch_tokens", type=int, default=16384, help="tokens a step")
    add("--seq_len", type=int, default=512, help="tokens a crop")
    add("--lr", type=float, default=1e-3, help="learning rate after the warm-up")
    add("--min_lr_ratio", type=float, default=0.1, help="the last learning rate, as a share of --lr")
    add("--warmup", type=int, default=100, help="steps of warm-up")
    add("--weight_decay", type=float, default=0.1, help="AdamW's weight decay, on matrices only")
    add("--beta2", type=float, default=0.95, help="AdamW's second beta")
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient; 0: no clipping")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the arithmetic and of the exported weights")
    add("--device", help="cuda or cpu (default: cuda where there is one)")
    add("--compile", action="store_true", help="compile the loss with torch.compile")
    add("--seed", type=int, default=0, help="of the initialization and of the crops")
    add("--save_every", type=int, default=0, help="steps between checkpoints; 0: only at the end")
    add("--eval_every", type=int, default=0, help="steps between looks at --valid_text; 0: only at the end")
    add("--resume", action="store_true", help="go on from train_state.pt in --out_dir")
    add("--json", dest="json_line", action="store_true", help="end with one line of JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        sys.exit(main(**vars(parse_args())))
    except ValueError as e:
        print(f"train.py: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
