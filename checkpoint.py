"""From a checkpoint on disk (or on the hub) to a `Transformer` in memory, and back: the only file that composes.

A checkpoint is one of
  - a converted directory: `hotloop.json` (all of ModelArgs, stop ids, tokenizer kind) + safetensors with our names,
  - a Hugging Face directory: `config.json` + safetensors or `pytorch_model*.bin`, single or sharded,
  - a hub id such as `org/name`: the files of it that are needed are downloaded once into huggingface_hub's cache.
Everything is decided by the checkpoint's own JSON, nothing by a file or folder name.

Weights stream: memory-mapped, one tensor at a time, straight to their device and dtype, so that loading never holds
more than the weights plus one tensor. Saving streams too, into a temporary directory that is renamed at the end.

Try it:  python -c "from checkpoint import load_model; print(load_model('demo'))"

Sources: the safetensors format (https://huggingface.co/docs/safetensors), Hugging Face's sharded index files.
"""

import copy
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import kernels
import kernels_cpu
import tp
from convert_hf_checkpoint import args_from_hf, convert_state_dict, export_state_dict, stop_ids_from_hf
from model import ModelArgs, Transformer
from quantize import QuantLinear, check_recipe, quantize_tensor, swap_linears

META = "hotloop.json"
FORMAT = 1
SHARD_BYTES = 2 << 30  # a shard is what saving holds in memory
MAPPED_BYTES = 64 << 20  # of a file that is read in parts; mapped pages count as a process's memory until unmapped
# What a tokenizer and a chat need; copied along when a checkpoint is converted.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


# ---------------------------------------------------------------------------------------------- finding and reading
def resolve(path: str | Path) -> Path:
    """The local directory of a checkpoint: `path` itself, or the download of the hub id it names.

    Raises ValueError with one line where there is neither.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise ValueError(f"{path} is a file; --checkpoint_path takes a directory or a hub id such as org/name")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path)):
        raise ValueError(f"{path}: no such directory (and not a hub id of the form org/name)")
    return _download(str(path))


def _download(repo: str) -> Path:
    """Fetch the weights, configuration and tokenizer of a hub repository, and nothing else of it."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    wanted = ["config.json", META, *TOKENIZER_FILES]
    try:
        files = hub.list_repo_files(repo)
        # Some repositories hold the same weights three times; take one, the safest.
        for weights in (r"model(-\d+-of-\d+|-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin"):
            chosen = [f for f in files if re.fullmatch(weights + r"|(model|pytorch_model)\S*\.index\.json", f)]
            if any(re.fullmatch(weights, f) for f in chosen):
                break
        else:
            raise ValueError(f"{repo}: the repository has no model*.safetensors and no pytorch_model*.bin")
        return Path(hub.snapshot_download(repo, allow_patterns=wanted + chosen))
    except errors.GatedRepoError:
        raise ValueError(
            f"{repo}: gated repository; accept its licence at https://huggingface.co/{repo} and run 'hf auth login'"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{repo}: no such directory here, no such repository on the hub (or a private one)") from None
    except ValueError:
        raise
    except Exception as error:  # of many kinds: huggingface_hub lets its HTTP library's own through
        try:
            return Path(hub.snapshot_download(repo, local_files_only=True))  # the hub is away; downloaded before?
        except errors.LocalEntryNotFoundError:
            reason = first_line(error)
            raise ValueError(f"{repo}: no such directory here, and the hub does not answer: {reason}") from None


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for a line of ours; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def read_json(path: Path) -> dict:
    """The JSON object in a file; ValueError where it is missing or is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a JSON object is expected, found {type(data).__name__}")
    return data


def read_config(path: str | Path) -> tuple[ModelArgs, dict]:
    """(ModelArgs, the JSON they come from) of a checkpoint directory; the weights are not touched."""
    directory = resolve(path)
    if (directory / META).exists():
        meta = read_json(directory / META)
        if meta.get("format") != FORMAT:
            raise ValueError(f"{directory / META}: format {meta.get('format')!r} is not known; known: {FORMAT}")
        try:
            return ModelArgs(**meta["model_args"]), meta
        except (KeyError, TypeError) as error:
            raise ValueError(f"{directory / META}: model_args do not fit this version: {error}") from None
    if not (directory / "config.json").exists():
        what = "is empty" if not any(directory.iterdir()) else f"has neither {META} nor config.json"
        raise ValueError(f"{directory}: not a checkpoint: the directory {what}")
    config = read_json(directory / "config.json")
    return args_from_hf(config), config


class Weights(Mapping):
    """The tensors of a directory by name, memory-mapped: an item is read from disk when it is asked for."""

    def __init__(self, directory: Path):
        self.directory, self.files, self.touched = directory, {}, {}
        for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
            index = directory / f"{stem}.{suffix}.index.json"
            single = directory / f"{stem}.{suffix}"
            if index.exists():
                self.where = dict(read_json(index).get("weight_map", {}))
            elif single.exists():
                self.where = dict.fromkeys(self._open(single.name).keys(), single.name)
            else:
                continue
            for name in sorted(set(self.where.values())):
                if not (directory / name).exists():
                    raise ValueError(f"{directory / name}: this shard is missing (named by {index.name})")
            return
        raise ValueError(f"{directory}: no weights: neither model*.safetensors nor pytorch_model*.bin")

    def _open(self, name: str):
        """A safetensors handle or a dict of tensors; opened once."""
        if name not in self.files:
            path = self.directory / name
            try:
                if name.endswith(".safetensors"):
                    self.files[name] = safe_open(path, framework="pt")
                else:
                    try:
                        self.files[name] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                    except RuntimeError as error:
                        if "mmap" not in str(error):
                            raise
                        # written before PyTorch 1.6: a format that cannot be mapped
                        self.files[name] = torch.load(path, map_location="cpu", weights_only=True)
            except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
                raise ValueError(f"{path}: truncated or corrupt: {first_line(error)}") from None
            except Exception as error:  # pickle.UnpicklingError: weights_only refuses anything but tensors
                raise ValueError(f"{path}: not a plain tensor file: {first_line(error)}") from None
            if name.endswith(".bin") and not isinstance(self.files[name], dict):
                raise ValueError(f"{path}: holds a {type(self.files[name]).__name__}, not tensors by name")
        return self.files[name]

    def __getitem__(self, name: str) -> Tensor:
        file = self.where[name]  # KeyError: no such tensor, as a Mapping should
        handle = self._open(file)
        try:
            return handle[name] if isinstance(handle, dict) else handle.get_tensor(name)
        except (KeyError, SafetensorError) as error:
            raise ValueError(f"{self.directory / file}: tensor {name} cannot be read: {error}") from None

    def _slice(self, name: str):
        """What can be sliced to read a part of a tensor, and its shape."""
        file = self.where[name]
        handle = self._open(file)
        try:
            if isinstance(handle, dict):
                return handle[name], tuple(handle[name].shape)
            view = handle.get_slice(name)
            return view, tuple(view.get_shape())
        except (KeyError, SafetensorError) as error:
            raise ValueError(f"{self.directory / file}: tensor {name} cannot be read: {error}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        return self._slice(name)[1]

    def read(self, name: str, part: tuple | None = None, copy: bool = True) -> Tensor:
        """A tensor, or a part (dimension counted from the end, [start, stop) ranges along it) of it: only that is read.

        Files are mapped anew after every MAPPED_BYTES, so that what memory holds of them stays small. That takes a
        `copy`; without it the tensor may lie in the file, for one who copies it at once.
        """
        view, shape = self._slice(name)
        dim, ranges = part or (-1, [(0, shape[-1])] if shape else [])
        before = (slice(None),) * (len(shape) + dim)
        start, stop = min((a for a, _ in ranges), default=0), max((b for _, b in ranges), default=0)
        if len(ranges) <= 3:
            pieces = [view[(*before, slice(a, b))] for a, b in ranges] or [view[...]]
        else:  # many and close together: an int4 linear's scales
            pieces = list(view[(*before, slice(start, stop))].split(1, dim))
            pieces = [pieces[i - start] for a, b in ranges for i in range(a, b)]
        tensor = torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]
        if copy and len(pieces) == 1:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        file = self.where[name]
        self.touched[file] = self.touched.get(file, 0) + tensor.nbytes
        if self.touched[file] > MAPPED_BYTES and file.endswith(".safetensors"):
            del self.files[file], self.touched[file]
        return tensor

    def fingerprint(self) -> dict[str, tuple[int, str]]:
        """File name -> (bytes, hash of 16 pages spread over it): enough to tell one checkpoint from another."""
        prints = {}
        for name in sorted(set(self.where.values())):
            size, digest = (self.directory / name).stat().st_size, hashlib.sha256()
            with open(self.directory / name, "rb") as file:
                for i in range(16):
                    file.seek(max(0, size - 4096) * i // 15)
                    digest.update(file.read(4096))
            prints[name] = size, digest.hexdigest()[:12]
        return prints

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)

    def nbytes(self) -> int:
        """Bytes of all weight files on disk."""
        return sum((self.directory / f).stat().st_size for f in set(self.where.values()))


# ------------------------------------------------------------------------------------------------------- the model
def build_model(
    args: ModelArgs,
    tensors: Iterable[tuple[str, Tensor]],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quant: dict | None = None,
    ranks: tp.Ranks | None = None,
    parts: dict | None = None,
    stored: bool = False,
) -> Transformer:
    """A Transformer on `device` from a stream of (our parameter name, tensor); eval mode, no gradients.

    dtype: what floating-point tensors become; None: as they come. quant: a recipe (quantize.make_recipe); weights
    that come as floats are quantized on the device one by one, those that are quantized already (`stored` says that
    they are) are taken as they are. ranks: build this rank's share of the model. The stream is of whole tensors, or,
    if it yields only the parts that it finds in the dict `parts`, which is filled before it starts, of those.
    Raises ValueError for a tensor that is unknown, missing or of another shape than `args` say.
    """
    with torch.device("meta"):
        model = Transformer(args)
    linears = swap_linears(model, quant) if quant else {}
    late = {}  # parts of tensors that have to be whole when they are quantized: a scale is of a row, cut or not
    if ranks is not None:
        mine = tp.apply_tp(model, ranks.rank, ranks.world)
        if not stored:
            by_columns = {m for m in linears if mine.get(f"{m}.weight", (None,))[0] == -1}
            late = {k: p for k, p in mine.items() if k.rpartition(".")[0] in by_columns and not k.endswith(".bias")}
        early = {k: p for k, p in mine.items() if k not in late}
        if parts is None:
            tensors = _cut(tensors, early)
        else:
            parts |= early
    expected = model.state_dict()
    if args.tie_embeddings and "output" not in linears:
        del expected["output.weight"]  # shares the embedding's memory
    state = {}
    for name, tensor in with_tied_head(tensors, args, "output" in linears):
        for key, value in quantize_tensor(name, tensor.to(device), linears):
            value = tp.take(value, late.get(key))
            if key not in expected:
                raise ValueError(f"tensor {key} is not part of this architecture")
            want = expected[key]
            if value.shape != want.shape:
                raise ValueError(f"tensor {key} is {list(value.shape)}, the configuration says {list(want.shape)}")
            module, _, leaf = key.rpartition(".")
            exact = module in linears and leaf != "bias"  # int8 and the like, and their scales: as they are
            if exact and value.dtype != want.dtype:
                raise ValueError(f"tensor {key} has dtype {value.dtype}, the quantization recipe says {want.dtype}")
            state[key] = value if exact else value.to(dtype)
    tensor = value = None  # the last one is still whole
    missing = expected.keys() - state.keys()
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, the first is {min(missing)}")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model = model.to(device).requires_grad_(False).eval()  # .to: the buffers, which no checkpoint holds
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.pack()
    (kernels_cpu if model.tok_embeddings.weight.is_cpu else kernels).fuse(model)
    weight = model.tok_embeddings.weight
    tp.choose_all_reduce(args.dim, weight.dtype, weight.device, kernels.exchange(weight.device))
    tp.agree_on_linear_sums(model, kernels.stored)
    return model


def _cut(tensors: Iterable[tuple[str, Tensor]], parts: dict) -> Iterator[tuple[str, Tensor]]:
    """This rank's parts of a stream of whole tensors."""
    for name, tensor in tensors:
        if name not in parts or parts[name][1]:
            yield name, tp.take(tensor, parts.get(name))


def with_tied_head(tensors, args: ModelArgs, quantized_head: bool) -> Iterator[tuple[str, Tensor]]:
    """A quantized head is a tensor of its own, also where the checkpoint ties it to the embedding."""
    seen = set()
    for name, tensor in tensors:
        seen.add(name)
        yield name, tensor
        if name == "tok_embeddings.weight" and args.tie_embeddings and quantized_head:
            embedding = tensor
    if args.tie_embeddings and quantized_head and not any(n.startswith("output.") for n in seen):
        yield "output.weight", embedding


def _with_progress(tensors: Iterable[tuple[str, Tensor]], total: int) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on; on a terminal, a load of more than a second shows how far it is."""
    start, seen, shown = time.perf_counter(), 0, 0.0
    for name, tensor in tensors:
        yield name, tensor
        seen += tensor.nbytes
        now = time.perf_counter()
        if sys.stderr.isatty() and now - start > 1 and now - shown > 0.2:
            shown = now
            print(f"\rloading {seen / 1e9:.1f} of {total / 1e9:.1f} GB", end="", file=sys.stderr, flush=True)
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def open_checkpoint(
    path: str | Path, parts: dict | None = None, ranks: tp.Ranks | None = None
) -> tuple[ModelArgs, dict | None, Iterable[tuple[str, Tensor]], int]:
    """(args, quantization recipe or None, stream of (our name, tensor) in the model's order, bytes on disk).

    parts: what to read of each tensor (see `Weights.read`), looked up when the stream gets there; {}: not known yet.
    ranks: ValueError on all of them where one sees another checkpoint.
    """
    directory = resolve(path)
    args, config = read_config(directory)
    weights = Weights(directory)
    if ranks is not None:
        ranks.check_same("checkpoint", (args, config.get("quantization"), weights.fingerprint()))
    if not (directory / META).exists():
        return args, None, convert_state_dict(config, weights, parts), weights.nbytes()
    recipe = config.get("quantization")
    with torch.device("meta"):
        model = Transformer(args)
    if recipe is not None:
        try:
            check_recipe(recipe)
        except ValueError as error:
            raise ValueError(f"{directory / META}: {error}") from None
        swap_linears(model, recipe)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    order = {name: i for i, name in enumerate(shapes)}
    names = sorted(weights, key=lambda n: order.get(n, len(order)))

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            if not parts:
                yield name, weights[name]
            elif name not in order or weights.shape(name) != shapes[name]:
                yield name, weights[name]  # which is an error, to be told by who builds the model
            elif name not in parts or parts[name][1]:
                yield name, weights.read(name, parts.get(name))

    return args, recipe, stream(), weights.nbytes()


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quant: dict | None = None,
) -> Transformer:
    """The model of a checkpoint directory or hub id, on `device`, in eval mode.

    dtype: of the floating-point weights; None: as stored. quant: a recipe (quantize.make_recipe) to quantize by while
    loading, for a checkpoint that is not quantized yet. After tp.init_dist, each rank reads and holds its share of the
    model, and all of them call this. Raises ValueError with one line for anything that is wrong.
    """
    directory = resolve(path)
    quant = copy.deepcopy(quant)  # swap_linears records this model's groupsizes in it
    ranks = tp.current()
    parts = None if ranks is None else {}
    try:
        args, recipe, tensors, nbytes = open_checkpoint(directory, parts, ranks)
        if recipe and quant:
            raise ValueError(f"is quantized already ({recipe['mode']}); load it without --quant")
        tensors = _with_progress(tensors, nbytes // (ranks.world if ranks else 1))
        return build_model(args, tensors, device, dtype, quant or recipe, ranks, parts, stored=recipe is not None)
    except ValueError as error:
        if str(directory) in str(error):
            raise
        raise ValueError(f"{directory}: {error}") from None


# ----------------------------------------------------------------------------------------------------------- saving
def check_out_dir(out_dir: str | Path, overwrite: bool) -> Path:
    """Where to write; ValueError where something is there already and `overwrite` is not given."""
    out = Path(out_dir)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; an output directory is expected")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out}: exists and is not empty; choose another directory or give --overwrite")
    return out


def write_checkpoint(
    out_dir: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    config_name: str,
    config: dict,
    tokenizer_dir: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Stream (name, tensor) into safetensors shards beside one JSON; nothing appears in `out_dir` until all is there.

    tokenizer_dir: its tokenizer files are copied along. Raises ValueError where `out_dir` is not empty and overwrite
    is False, or where the disk is full (nothing is left behind).
    """
    from safetensors.torch import save_file

    out = check_out_dir(out_dir, overwrite).absolute()
    tmp = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        tmp.mkdir(parents=True)
        weight_map, shard, size, n_shards = {}, {}, 0, 0

        def flush():
            nonlocal shard, size, n_shards
            n_shards += 1
            file = f"model-{n_shards:05d}.safetensors"
            save_file(shard, tmp / file, metadata={"format": "pt"})
            (tmp / file).chmod(0o644)  # safetensors creates files that only the owner may read
            weight_map.update(dict.fromkeys(shard, file))
            shard, size = {}, 0

        for name, tensor in tensors:
            if shard and size + tensor.nbytes > SHARD_BYTES:
                flush()
            shard[name] = tensor.detach().cpu().contiguous()
            size += tensor.nbytes
        flush()
        if n_shards == 1:
            (tmp / "model-00001.safetensors").rename(tmp / "model.safetensors")
        else:
            index = {"metadata": {"total_size": sum(f.stat().st_size for f in tmp.iterdir())}, "weight_map": weight_map}
            (tmp / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for name in TOKENIZER_FILES if tokenizer_dir else ():
            if (tokenizer_dir / name).exists():
                shutil.copyfile(tokenizer_dir / name, tmp / name)
        (tmp / config_name).write_text(json.dumps(config, indent=2) + "\n")
        _move_into_place(tmp, out)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{out}: cannot be written: {error}; nothing was left behind") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _move_into_place(tmp: Path, out: Path) -> None:
    if not out.exists() or not any(out.iterdir()):
        tmp.replace(out)  # one atomic rename
        return
    # Over an older checkpoint: file by file, each atomically; then whatever of the old one would be read instead.
    new = {f.name for f in tmp.iterdir()}
    tokenizer = TOKENIZER_FILES if new.intersection(TOKENIZER_FILES) else ()
    for file in tmp.iterdir():
        file.replace(out / file.name)
    for old in [*out.glob("model*.safetensors"), *out.glob("*.index.json"), *map(out.joinpath, (META, *tokenizer))]:
        if old.name not in new:
            old.unlink(missing_ok=True)


def _tokenizer_kind(directory: Path) -> str | None:
    if (directory / "tokenizer.json").exists():
        return "tokenizers"
    return "sentencepiece" if (directory / "tokenizer.model").exists() else None


def metadata(args: ModelArgs, directory: Path, recipe: dict | None = None) -> dict:
    """What `hotloop.json` holds for a checkpoint whose tokenizer and generation settings lie in `directory`."""
    if (directory / META).exists():
        stop_ids = read_json(directory / META).get("stop_ids", [])
    else:
        generation = directory / "generation_config.json"
        config = directory / "config.json"
        stop_ids = stop_ids_from_hf(
            read_json(generation) if generation.exists() else {}, read_json(config) if config.exists() else {}
        )
    return {
        "format": FORMAT,
        "model_args": dataclasses.asdict(args),
        "quantization": recipe,
        "stop_ids": stop_ids,
        "tokenizer": _tokenizer_kind(directory),
    }


def save_checkpoint(
    model: Transformer,
    out_dir: str | Path,
    source: str | Path,
    layout: str = "hotloop",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model in memory as a converted directory (layout="hotloop") or a Hugging Face one (layout="hf").

    source: the checkpoint directory that the model comes from, which gives the tokenizer, stop ids and, for "hf",
    config.json. dtype: of the floating-point weights on disk; None: as they are.
    """
    directory = resolve(source)
    if isinstance(model.logits, tp.ShardedLogits):
        raise ValueError(f"{out_dir}: the model is one rank's share; load it with one process to save it")
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ValueError(f"{out_dir}: the model is quantized; quantize.py writes such checkpoints, from the original")
    state = {k: v for k, v in model.state_dict().items() if not (model.args.tie_embeddings and k == "output.weight")}
    state = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in state.items()}
    if layout == "hf":
        config = read_json(directory / "config.json")
        config.pop("dtype", None)
        config["torch_dtype"] = str(model.tok_embeddings.weight.dtype if dtype is None else dtype).split(".")[-1]
        write_checkpoint(out_dir, export_state_dict(config, state), "config.json", config, directory, overwrite)
    else:
        write_checkpoint(out_dir, state.items(), META, metadata(model.args, directory), directory, overwrite)


def convert_checkpoint(hf_dir: str | Path, out_dir: str | Path, overwrite: bool = False) -> None:
    """Hugging Face directory or hub id -> converted directory, streaming: one shard in memory at a time."""
    out = check_out_dir(out_dir, overwrite)
    directory = resolve(hf_dir)
    if (directory / META).exists():
        raise ValueError(f"{directory}: is converted already (it holds {META})")
    args, config = read_config(directory)
    tensors = convert_state_dict(config, Weights(directory))
    write_checkpoint(out, tensors, META, metadata(args, directory), directory, overwrite)
