"""Build the demo models' training corpus: the Python sources of the standard library and of the packages in corpus.txt.

    python demo/corpus.py                  # -> corpus/train-*.txt.xz, valid.txt, heldout.txt, corpus.json
    python demo/corpus.py --demo           # and renew the files that ship in demo/: heldout.txt and the tokenizer

A package that is installed at the pinned version is read where it lies; the others are fetched with `pip download` as
wheels (nothing is built or run). A document is one source file; documents end in a newline and are separated by a form
feed, which is removed from the documents themselves. What is kept is deduplicated: exactly, by content, and nearly, by
the share of its lines (in runs of four) that stood in an earlier file.

Sources: Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better", https://arxiv.org/abs/2107.06499;
SentencePiece, https://github.com/google/sentencepiece.
"""
import argparse
import ast
import collections
import hashlib
import importlib.metadata
import json
import lzma
import multiprocessing
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
import zipfile

DEMO = pathlib.Path(__file__).resolve().parent
SEPARATOR = "\f"
PARTS = 4  # compressed side by side, one a process
VALID_SHARE = 0.005  # of the package files, chosen by the hash of their path; for watching a training run

# Standard-library files that no training file may repeat; demo/heldout.txt is exactly these.
HELD_OUT = """
    bisect.py cmd.py code.py codeop.py colorsys.py contextlib.py copy.py csv.py filecmp.py fnmatch.py fractions.py
    getopt.py glob.py graphlib.py heapq.py hmac.py json/decoder.py json/encoder.py linecache.py netrc.py pty.py queue.py
    quopri.py reprlib.py rlcompleter.py sched.py secrets.py shelve.py shlex.py string.py textwrap.py timeit.py zipapp.py
""".split()
# Not source worth imitating: machine-written tables, vendored trees of bytecode fixtures, deliberately broken files.
SKIP_DIRS = {"__pycache__", "lib2to3", "bad_coding", "encodings", "pydoc_data"}


def read_pins(path):
    """Return [(name, version, licence)] of a corpus.txt."""
    lines = [line.strip() for line in pathlib.Path(path).read_text().splitlines()]
    return [re.fullmatch(r"(\S+)==(\S+)\s+# (.+)", line).groups() for line in lines if line and line[0] != "#"]


def stdlib_files():
    """Yield (path inside the standard library, bytes), in sorted order."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    for path in sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts):
        yield path.relative_to(root).as_posix(), path.read_bytes()


def package_files(name, version, wheels):
    """Yield (path inside the package, bytes) from the installed package or its wheel, in sorted order."""
    try:
        dist = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        dist = None
    if dist is not None and dist.version.split("+")[0] == version:
        for path in sorted(str(f) for f in dist.files if f.suffix == ".py" and ".." not in f.parts):
            located = pathlib.Path(dist.locate_file(path))
            if located.is_file():
                yield path, located.read_bytes()
        return
    pattern = f"{re.sub('[-_.]+', '_', name).lower()}-{version}-*.whl"
    if not list(wheels.glob(pattern)):
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                        "--dest", str(wheels), f"{name}=={version}"], check=True)
    with zipfile.ZipFile(next(wheels.glob(pattern))) as wheel:
        for path in sorted(n for n in wheel.namelist() if n.endswith(".py")):
            yield path, wheel.read(path)


def clean(file):
    """file: (path, bytes) -> its text, or None for one not worth learning from: generated, data-like or broken."""
    path, data = file
    if not 200 <= len(data) <= 200_000 or SKIP_DIRS & set(pathlib.PurePosixPath(path).parts):
        return None
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").replace(SEPARATOR, "")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old code are no reason to drop it
            ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if re.search(r"generated (by|from|automatically)|auto-?generated|do not edit", text[:1500], re.I):
        return None
    lines, solid = text.splitlines(), re.sub(r"\s", "", text)
    if not solid or max(map(len, lines)) > 500 or len(text) / len(lines) > 100:
        return None
    letters = sum(map(str.isalpha, solid)) / len(solid)
    digits = sum(map(str.isdigit, solid)) / len(solid)
    if letters < 0.5 or digits > 0.15 or len(text.encode()) - len(text) > 0.01 * len(text):
        return None
    return text.strip("\n") + "\n"


def strip_licence(text):
    """Drop the comment block at the top if it is a licence notice: thousands of copies would teach only themselves."""
    head = re.match(r"(?:[ \t]*(?:#.*)?\n)*", text).group()
    return text[len(head):] if re.search(r"copyright|licen[cs]e", head, re.I) else text


def shingles(text):
    """Return the hashes of all runs of four lines, blank and comment lines left out, white space ignored."""
    lines = ["".join(line.split()) for line in text.splitlines()]
    lines = [line for line in lines if line and line[0] != "#"]
    return {hash(tuple(lines[i:i + 4])) for i in range(max(1, len(lines) - 3))}


def path_hash(path):
    """Return a fixed pseudo-random number in [0, 1) for a path."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:6], "big") / 2**48


def build(pins, wheels, pool):
    """Return (train, valid, held_out: lists of (path, text), stats: dict a source)."""
    train, valid, stats = [], [], collections.defaultdict(collections.Counter)
    library = dict(stdlib_files())
    held_out = [(name, clean((name, library.pop(name)))) for name in HELD_OUT]
    assert all(text for _, text in held_out), "a held-out file did not pass the filter"
    protected, seen, exact = set().union(*(shingles(text) for _, text in held_out)), set(), set()
    # The tests of a held-out module quote it: out as well.
    tests = {f"test_{pathlib.PurePosixPath(name).stem}" for name in HELD_OUT} | {"test_json"}
    sources = [("stdlib", library.items())] + [(name, package_files(name, version, wheels)) for name, version in pins]
    for source, files in sources:
        files = list(files)
        for (path, _), text in zip(files, pool.imap(clean, files, chunksize=16), strict=True):
            count, where = stats[source], f"{source}/{path}"
            count["files_seen"] += 1
            if text is None:
                count["filtered"] += 1
                continue
            text = strip_licence(text)
            marks, digest = shingles(text), hashlib.sha256(text.encode()).digest()
            quoted = source == "stdlib" and any(part.removesuffix(".py") in tests for part in path.split("/"))
            if quoted or len(marks & protected) > 0.2 * len(marks):
                count["too_near_held_out"] += 1
            elif len(text) < 200 or digest in exact or len(marks & seen) > 0.5 * len(marks):
                count["duplicate"] += 1
            else:
                exact.add(digest)
                seen |= marks
                chosen = source != "stdlib" and path_hash(where) < VALID_SHARE
                (valid if chosen else train).append((where, text))
                count["files"] += 1
                count["bytes"] += len(text.encode())
        print(f"{source:20}", dict(stats[source]), flush=True)
    return train, valid, held_out, stats


def calibration_text(size=400_000):
    """Return whole files of the standard library, drawn by the hash of their paths, none held out and no tests."""
    files = [(path, data) for path, data in stdlib_files() if path not in HELD_OUT and "test" not in path
             and "sysconfigdata" not in path]  # which names the paths of the machine that built Python
    texts, total = [], 0
    for item in sorted(files, key=lambda item: path_hash("calibration/" + item[0])):
        text = clean(item)
        if text and total < size:
            texts.append(strip_licence(text))
            total += len(text)
    return SEPARATOR.join(texts)


def compress(job):
    """Write text as .xz; return (name, sha256 of the text)."""
    path, text = job
    data = text.encode()
    # A dictionary as large as the part: copies far apart still count.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]
    path.write_bytes(lzma.compress(data, filters=filters))
    return path.name, hashlib.sha256(data).hexdigest()


def train_tokenizer(documents, megabytes):
    """Write tokenizer.model, and the two JSON files that Hugging Face reads, to demo/ and demo/draft/."""
    import sentencepiece
    share = megabytes * 1e6 / sum(len(text) for _, text in documents)
    sample = [text for path, text in documents if path_hash("tokenizer/" + path) < share]
    # The trainer skips long sentences: hand it a few lines at a time. A newline is a piece of its own and part of no
    # other, so that a prompt ending in "):" has the tokens that the model has seen before a new line.
    chunks = (chunk for text in sample for chunk in re.findall(r"(?:.*\n){1,40}", text) if len(chunk.encode()) < 8000)
    with tempfile.TemporaryDirectory() as tmp:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chunks, model_prefix=f"{tmp}/tokenizer", model_type="bpe", vocab_size=4096,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True, character_coverage=0.9995,
            split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
            normalization_rule_name="identity", add_dummy_prefix=False, user_defined_symbols=["\n"],
            max_sentence_length=8192, minloglevel=1)
        for folder in (DEMO, DEMO / "draft"):
            shutil.copyfile(f"{tmp}/tokenizer.model", folder / "tokenizer.model")
            (folder / "tokenizer_config.json").write_text(json.dumps({
                "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                "add_bos_token": True, "add_eos_token": False, "add_prefix_space": False, "legacy": False,
                "clean_up_tokenization_spaces": False, "model_max_length": 4096}, indent=2) + "\n")
            (folder / "generation_config.json").write_text(
                json.dumps({"bos_token_id": 1, "eos_token_id": 2, "do_sample": True, "temperature": 0.3}, indent=2)
                + "\n")


def main(out_dir, wheels, demo, tokenizer_mb):
    """Build everything; see the top of the file."""
    out_dir, wheels = pathlib.Path(out_dir), pathlib.Path(wheels)
    out_dir.mkdir(parents=True, exist_ok=True)
    wheels.mkdir(parents=True, exist_ok=True)
    pins = read_pins(DEMO / "corpus.txt")
    with multiprocessing.Pool() as pool:
        train, valid, held_out, stats = build([pin[:2] for pin in pins], wheels, pool)
    joined = {name: SEPARATOR.join(text for _, text in docs)
              for name, docs in (("train", train), ("valid", valid), ("heldout", held_out))}
    for name in ("valid", "heldout"):
        (out_dir / f"{name}.txt").write_text(joined[name], encoding="utf-8", newline="\n")
    if demo:
        shutil.copyfile(out_dir / "heldout.txt", DEMO / "heldout.txt")
        (DEMO / "calibration.txt").write_text(calibration_text(), encoding="utf-8", newline="\n")
        train_tokenizer(train, tokenizer_mb)
    step = -(-len(train) // PARTS)
    parts = [SEPARATOR.join(text for _, text in train[i:i + step]) for i in range(0, len(train), step)]
    jobs = [(out_dir / f"train-{i}.txt.xz", part) for i, part in enumerate(parts)]
    with multiprocessing.Pool() as pool:
        digests = dict(pool.imap(compress, jobs))
    report = {
        "python": platform.python_version(),
        "packages": [dict(zip(("name", "version", "licence"), pin, strict=True)) for pin in [
            ("stdlib", platform.python_version(), "PSF-2.0"), *pins]],
        "documents": {"train": len(train), "valid": len(valid), "heldout": len(held_out)},
        "bytes": {name: len(text.encode()) for name, text in joined.items()},
        "compressed_bytes": sum(path.stat().st_size for path, _ in jobs),
        "sha256": {**digests, **{f"{name}.txt": hashlib.sha256(joined[name].encode()).hexdigest()
                                 for name in ("valid", "heldout")}},
        "sources": stats,
    }
    (out_dir / "corpus.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: report[key] for key in ("documents", "bytes", "compressed_bytes")}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out_dir", default=str(DEMO.parent / "corpus"), help="where the corpus goes")
    parser.add_argument("--wheels", default=f"{tempfile.gettempdir()}/hotloop-wheels", help="folder for fetched wheels")
    parser.add_argument("--demo", action="store_true", help="also renew demo/heldout.txt and demo/'s tokenizer files")
    parser.add_argument("--tokenizer_mb", type=float, default=25, help="megabytes of text the tokenizer is trained on")
    main(**vars(parser.parse_args()))
