"""
Text to token ids and back for one checkpoint: encode, decode, stream token by token, render a chat.

Reads what the checkpoint itself ships, in the Hugging Face layout: tokenizer.json (the `tokenizers` package) if there
is one, else tokenizer.model (sentencepiece). BOS, stop ids and the chat template come from its JSON files, never from
a name. This file imports nothing from the repository and loads only the package that the checkpoint needs.

    python -c "from tokenizer import Tokenizer; t = Tokenizer('demo'); print(t.decode(t.encode('Once upon a time')))"

Sources: https://github.com/google/sentencepiece (byte fallback, dummy prefix);
https://github.com/huggingface/tokenizers (decoders); transformers' chat_template_utils.py (the template's environment);
GPT-2's bytes_to_unicode (byte-level BPE).
"""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

KNOWN_DECODERS = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip")


def _read_json(path: Path) -> dict:
    """The object in a JSON file, {} where there is no file. ValueError if it is malformed."""
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as e:  # both bad JSON and bad UTF-8
        raise ValueError(f"{path} is not valid JSON ({e}); download or convert the checkpoint again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}, not an object; download the checkpoint again")
    return data


def _content(token) -> str | None:
    """A special token is written as a string or as {"content": ...}; anything else is not one."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


class Tokenizer:
    """The tokenizer of a checkpoint directory (Hugging Face layout, or converted: the same files plus hotloop.json).

    kind: "tokenizers" | "sentencepiece"      vocab_size: ids below this have text (the model may pad beyond it)
    bos_id: int | None                        stop_ids: tuple of ints, may be empty
    has_chat_template: bool

    Raises ValueError, in one line, if there is no tokenizer, or a file is corrupt or its JSON malformed.
    """

    def __init__(self, path: str | Path):
        self._path = path = Path(path)
        self._config = {**_read_json(path / "special_tokens_map.json"), **_read_json(path / "tokenizer_config.json")}
        # bos_token, eos_token, unk_token, ...: name -> text. `add_bos_token` is a bool, so _content drops it.
        self._named = {k: c for k, v in self._config.items() if k.endswith("_token") and (c := _content(v)) is not None}
        self._cache: dict[int, bytes] = {}
        self._render = None  # the chat template, compiled at first use
        if (path / "tokenizer.json").is_file():
            self.kind = "tokenizers"
            self._load_tokenizers(path / "tokenizer.json")
        elif (path / "tokenizer.model").is_file():
            self.kind = "sentencepiece"
            self._load_sentencepiece(path / "tokenizer.model")
        else:
            raise ValueError(f"no tokenizer in {path}: looked for tokenizer.json and tokenizer.model; "
                             "pass a checkpoint directory that holds one of them")  # fmt: skip
        self.stop_ids = self._read_stop_ids()
        self._template = self._read_template()
        self.has_chat_template = self._template is not None

    # -- text to ids

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Ids of `text`. Special tokens written out in the text become their one id, as in transformers.

        bos: None adds BOS (and EOS) as the checkpoint says, True makes sure of one BOS, False adds nothing.
        ValueError if the text is not valid Unicode, or bos=True and there is no BOS token.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:  # lone surrogates: what Python makes of command-line bytes that are not UTF-8
            raise ValueError(f"the text is not valid Unicode: {text[e.start]!a} at character {e.start}; "
                             "give it as UTF-8") from None  # fmt: skip
        if bos and self.bos_id is None:
            raise ValueError(f"bos=True, but {self._path} defines no bos_token; leave bos=None")
        ids = self._encode(text, bos is not False)
        return [self.bos_id, *ids] if bos and ids[:1] != [self.bos_id] else ids

    def chat(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation [{"role": ..., "content": ...}, ...] rendered by the checkpoint's chat template.

        The template writes its own BOS, so none is added. It is a stranger's program: it runs in jinja2's sandbox.
        ValueError if there is no template, or if it refuses the messages.
        """
        if self._template is None:
            raise ValueError(f"no chat template in {self._path}: looked for chat_template.jinja and for chat_template "
                             "in tokenizer_config.json; use a plain prompt")  # fmt: skip
        try:
            self._render = self._render or _compile_template(self._template)
            text = self._render(messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
                                documents=None, **self._named)  # fmt: skip
        except Exception as e:  # a template can fail in any way that Python can
            raise ValueError(f"the chat template of {self._path} failed: {' '.join(str(e).split())}") from None
        return self.encode(text, bos=False)

    # -- ids to text

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` (ints, or a 1-D tensor) without special tokens; ids that the tokenizer lacks have no text.

        Bytes that are not UTF-8 become U+FFFD as in Rust's from_utf8_lossy for byte-level BPE, and one U+FFFD a byte
        for byte fallback, as in sentencepiece (transformers also drops the well-formed neighbours of such a byte).
        """
        stream = self.stream()
        return "".join(map(stream.feed, ids)) + stream.flush()

    def stream(self, prompt_ids: Sequence[int] = ()) -> "_Stream":
        """Incremental decoder of what follows `prompt_ids`: decode(prompt) + every feed() + flush() == decode(all).

        Without a prompt the text starts here, and the space that sentencepiece puts before a text is dropped. After
        one, the first token keeps its space. A character that the prompt's last tokens began is completed.
        """
        return _Stream(self, prompt_ids)

    def _bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes, perhaps of half a character, that one token adds to the text; none if it is special."""
        token_id = int(token_id)
        if token_id not in self._cache:
            if token_id < 0:
                raise ValueError(f"token id {token_id} is negative; ids run from 0 to {self.vocab_size - 1}")
            self._cache[token_id] = self._token_bytes(token_id)
        return self._cache[token_id]

    def difference(self, other: "Tokenizer") -> str | None:
        """What the two disagree about, in a few words, of the ids that both have; None where they mean the same text.

        One may have more ids than the other, and special tokens of its own.
        """
        for i in range(min(self.vocab_size, other.vocab_size)):
            mine, theirs = self._bytes(i), other._bytes(i)
            if mine != theirs and mine and theirs:  # special tokens have no bytes
                a, b = (piece.decode(errors="replace") for piece in (mine, theirs))
                return f"id {i} is {a!r} in one, {b!r} in the other"
        for text in {*self._named.values()} & {*other._named.values()}:
            mine, theirs = self._token_id(text), other._token_id(text)
            if mine != theirs:
                return f"{text!r} is id {mine} in one, {theirs} in the other"
        return None

    # -- the two back ends. Each sets vocab_size, bos_id, _encode(text, special), _token_bytes(id), _token_id(text),
    #    _strip (does a text lose its first space?) and _errors (the codec's rule for bytes that are not UTF-8).

    def _load_tokenizers(self, file: Path) -> None:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        try:
            tok = Backend.from_file(str(file))
        except Exception as e:  # the package raises bare Exception
            raise ValueError(f"{file} is not a tokenizer ({' '.join(str(e).split())}); download it again") from None
        tok.no_truncation()
        tok.no_padding()
        # What tokenizer_config.json calls special is special, as in transformers, even if tokenizer.json forgot it.
        known = {t.content for t in tok.get_added_tokens_decoder().values()}
        tok.add_tokens([AddedToken(**t) for _, t in sorted(self._added().items()) if t["content"] not in known])
        named = [c for c in self._named.values() if c not in known and tok.token_to_id(c) is not None]
        tok.add_special_tokens([AddedToken(c, special=True, normalized=False) for c in named])
        special = {i for i, t in tok.get_added_tokens_decoder().items() if t.special}

        state = json.loads(tok.decoder.__getstate__()) if tok.decoder else {"type": "Join"}
        steps = state["decoders"] if state["type"] == "Sequence" else [state]
        for s in steps:
            literal = s["type"] != "Replace" or "String" in s["pattern"]
            one_space = s["type"] != "Strip" or (s["content"], s["start"], s["stop"]) == (" ", 1, 0)
            if s["type"] not in (*KNOWN_DECODERS, "Join") or not literal or not one_space:
                raise ValueError(f"{file}: cannot stream through decoder {json.dumps(s)}; known are {KNOWN_DECODERS}")
        kinds = [s["type"] for s in steps]
        # Byte-level BPE spells each byte as a printable character: itself, or the next free one from U+0100 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [b for b in range(256) if b not in printable]
        byte_of = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(hidden)}

        def token_bytes(i: int) -> bytes:
            token = tok.id_to_token(i) if i < 2**32 and i not in special else None
            for s in steps if token else ():
                if s["type"] == "ByteLevel" and all(c in byte_of for c in token):
                    return bytes(byte_of[c] for c in token)
                elif s["type"] == "ByteFallback" and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
                    return bytes.fromhex(token[3:5])
                elif s["type"] == "Replace":
                    token = token.replace(s["pattern"]["String"], s["content"])
                elif s["type"] == "Metaspace":
                    token = token.replace(s["replacement"], " ")
                elif s["type"] == "Join":  # no decoder at all: words with spaces between
                    token = " " + token
            return (token or "").encode()

        self.vocab_size = tok.get_vocab_size()
        self._encode = lambda text, special: tok.encode(text, add_special_tokens=special).ids
        self._token_bytes, self._token_id = token_bytes, tok.token_to_id
        self._strip = any(
            k in ("Strip", "Join") or k == "Metaspace" and s["prepend_scheme"] != "never"
            for k, s in zip(kinds, steps, strict=True)
        )
        self._errors = "replace" if "ByteLevel" in kinds else _one_mark_a_byte()
        # transformers ignores add_bos_token where there is a tokenizer.json: its post-processor alone decides.
        self.bos_id = tok.token_to_id(self._named.get("bos_token", ""))
        probe = tok.encode("a")
        if self.bos_id is None and probe.special_tokens_mask[:1] == [1]:
            self.bos_id = probe.ids[0]

    def _load_sentencepiece(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        proto = file.read_bytes()
        try:
            sp = SentencePieceProcessor(model_proto=proto)
            n = sp.vocab_size()
            prefixed = sp.encode("a", out_type=str)[0].startswith("▁")
        except Exception as e:
            raise ValueError(f"{file} is not a sentencepiece model ({' '.join(str(e).split())}); download it again, or "
                             "if it is Llama 3's own format, get tokenizer.json beside it") from None  # fmt: skip
        bare = None

        def segment(text: str, first: bool) -> list[int]:
            """Ids of text between special tokens. Only the start of a text gets the dummy prefix, unless "legacy"."""
            nonlocal bare
            if not text:
                return []
            if not prefixed or (prefix and (first or self._config.get("legacy"))):
                return sp.encode(text)
            # Concatenated protobuf messages merge: this appends normalizer_spec { add_dummy_prefix: false }.
            bare = bare or SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
            return bare.encode(text)

        prefix = self._config.get("add_prefix_space") is not False
        for name, i in (("bos_token", sp.bos_id()), ("eos_token", sp.eos_id()), ("unk_token", sp.unk_id())):
            if i >= 0 and name not in self._config:
                self._named[name] = sp.id_to_piece(i)
        # sentencepiece splits control pieces written in a text, such as <s>, so they are cut out before it sees them.
        atoms = {i: {"content": sp.id_to_piece(i), "special": True} for i in range(n)
                 if sp.is_control(i) or sp.is_unknown(i)} | self._added()  # fmt: skip
        special = {i for i, t in atoms.items() if t.get("special") or t["content"] in self._named.values()}
        order = sorted(atoms, key=lambda i: -len(atoms[i]["content"]))  # the longest wins
        cut = re.compile("|".join(
            (r"\s*" if t.get("lstrip") else "") + f"({re.escape(t['content'])})" + (r"\s*" if t.get("rstrip") else "")
            for t in (atoms[i] for i in order)))  # fmt: skip

        def encode(text: str, special: bool) -> list[int]:
            ids, end = [self.bos_id] if special and add_bos else [], 0
            for m in cut.finditer(text):
                ids += [*segment(text[end : m.start()], end == 0), order[m.lastindex - 1]]
                end = m.end()
            return ids + segment(text[end:], end == 0) + ([eos] if special and add_eos else [])

        def token_bytes(i: int) -> bytes:
            if i in special or i not in atoms and i >= n:
                return b""
            piece = atoms[i]["content"] if i in atoms else sp.id_to_piece(i)
            return bytes.fromhex(piece[3:5]) if i < n and sp.is_byte(i) else piece.replace("▁", " ").encode()

        self.vocab_size = max([n, *(i + 1 for i in atoms)])
        self._encode, self._token_bytes = encode, token_bytes
        self._token_id = {t["content"]: i for i, t in atoms.items()}.get
        self._strip = prefixed and prefix
        self._errors = _one_mark_a_byte()
        self.bos_id, eos = (self._token_id(self._named.get(k, "")) for k in ("bos_token", "eos_token"))
        add_bos = self._config.get("add_bos_token", True) and self.bos_id is not None
        add_eos = self._config.get("add_eos_token", False) and eos is not None

    # -- what the checkpoint's JSON says

    def _added(self) -> dict[int, dict]:
        """Tokens added after training: id -> {"content", "special", "lstrip", ...}."""
        if added := self._config.get("added_tokens_decoder"):
            if not all(_content(t) for t in added.values()):
                raise ValueError(f"{self._path}/tokenizer_config.json: added token without content; download it again")
            return {int(i): t for i, t in added.items()}
        extra = [_content(t) for t in self._config.get("additional_special_tokens") or []] + [*self._named.values()]
        added = _read_json(self._path / "added_tokens.json")
        return {i: {"content": c, "special": c in extra} for c, i in added.items()}

    def _read_stop_ids(self) -> tuple[int, ...]:
        """hotloop.json decides if it has stop_ids, even none; else the model's EOS ids and the tokenizer's EOS."""
        ids = _read_json(self._path / "hotloop.json").get("stop_ids")
        if ids is None:
            ids = _read_json(self._path / "generation_config.json").get("eos_token_id")
            if ids is None:
                ids = _read_json(self._path / "config.json").get("eos_token_id")
            ids = [*(ids if isinstance(ids, list) else [ids]), self._token_id(self._named.get("eos_token", ""))]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def _read_template(self) -> str | None:
        """chat_template.jinja, else tokenizer_config.json's, which is a string or a list of {"name", "template"}."""
        if (file := self._path / "chat_template.jinja").is_file():
            return file.read_text(encoding="utf-8")
        template = self._config.get("chat_template")
        if isinstance(template, list):
            template = {t["name"]: t["template"] for t in template}.get("default")
        return template


class _Stream:
    """What Tokenizer.stream() returns. A token is O(1): the state is at most three bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self._bytes = tokenizer._bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(tokenizer._errors)
        self._strip = tokenizer._strip and not any(map(self._bytes, prompt_ids))
        for i in prompt_ids[-4:]:  # no character is longer than 4 bytes
            self._decoder.decode(self._bytes(i))

    def feed(self, token_id: int) -> str:
        """The text that this token completes: "" while a character is unfinished."""
        data = self._bytes(token_id)
        if self._strip and data:
            data, self._strip = data.removeprefix(b" "), False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else ""."""
        return self._decoder.decode(b"", final=True)


def _one_mark_a_byte() -> str:
    """The name of a codec error rule that writes one U+FFFD for each bad byte, registered at first use."""
    codecs.register_error("hotloop.fffd", lambda e: ("\ufffd" * (e.end - e.start), e.end))
    return "hotloop.fffd"


def _compile_template(source: str):
    """The render function of a chat template, in the same sandbox and with the same helpers as transformers'."""
    from datetime import datetime

    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks the assistant's text for training; here it is only text."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # jinja2's own escapes HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    env.filters["tojson"] = tojson
    env.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    return env.from_string(source).render
