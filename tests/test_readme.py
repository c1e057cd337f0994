"""The README tells the truth: tables come from recorded rows, commands and flags exist, links lead somewhere.

Try it:  python -m pytest tests/test_readme.py
"""

import argparse
import json
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

import benchmark
import tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = [p.name for p in sorted(ROOT.glob("*.py")) if "ArgumentParser(" in p.read_text()]
OTHERS_FLAGS = {"--nproc_per_node", "--nnodes"}  # of programs that are not ours


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Every command in the README's shell blocks, as a list of words."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [w for w in words if w]


class ParsedError(BaseException):
    """Stops a program once its command line is parsed; no handler of the program catches it."""


def parse(program: str, words: list[str], monkeypatch) -> argparse.ArgumentParser:
    """The parser of a program after it has accepted `words`; SystemExit where it does not."""
    plain = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        raise ParsedError(self)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [program, *words])
        with pytest.raises(ParsedError) as stopped:
            runpy.run_path(str(ROOT / program), run_name="__main__")
    return stopped.value.args[0]


@cache
def flags(program: str) -> set[str]:
    """Every flag of a program; read from its parser, which gets a command line that the README shows."""
    words = next((w[2:] for w in commands() if w[:2] == ["python", program]), None)
    assert words is not None, f"the README shows no use of {program}"
    with pytest.MonkeyPatch.context() as patch:
        parser = parse(program, words, patch)
    return {flag for flag in parser._option_string_actions if flag.startswith("--")}


def test_tables_are_made_from_the_recorded_rows():
    made = tables.fill_tables(README, tables.read_rows(benchmark.RESULTS))
    assert README == made, "run: python benchmark.py --readme"
    assert set(re.findall("<!-- table:(.*?) -->", README)) == set(tables.TABLES)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_accepted(words, monkeypatch, capsys):
    if words[0] == "pip":
        assert words[1:3] == ["install", "-r"] and (ROOT / words[3]).is_file()
    elif words[:3] == ["python", "-m", "pytest"]:
        assert len(words) == 3
    elif words[0] == "torchrun":
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert words[1].startswith("--nproc_per_node=") and words[script] in PROGRAMS
        parse(words[script], words[script + 1 :], monkeypatch)
    else:
        assert words[0] == "python" and words[1] in PROGRAMS
        parse(words[1], words[2:], monkeypatch)
    assert not capsys.readouterr().err


def test_a_wrong_command_is_noticed(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse("generate.py", ["--no_such_flag"], monkeypatch)
    assert "--no_such_flag" in capsys.readouterr().err


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].isfinite().all() and names["logits"].shape[1] == names["ids"].shape[1]


def test_flags_exist():
    text = re.sub(r"<!-- table:.*?<!-- end -->|<!--|-->", "", README, flags=re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z]\w*(?:-\w+)*", text))
    known = set().union(OTHERS_FLAGS, *map(flags, PROGRAMS))
    assert len(named) > 20 and not named - known


def test_links_and_file_names_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if not link.startswith(("http://", "https://"))]
    assert len(links) > 10
    titles = re.findall(r"^#+ (.*)", README, re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    for link in links:
        file, _, anchor = link.partition("#")
        assert not file or (ROOT / file).exists(), link
        assert not anchor or (file or anchor in headings), link
    for name in set(re.findall(r"(?<![\w/])[a-z_]+\.(?:py|cpp)\b", README)):
        assert (ROOT / name).is_file(), name


def test_every_file_has_its_row():
    rows = " ".join(line.split(" | ")[0] for line in README.splitlines() if line.startswith("| ["))
    files = {file.name for pattern in ("*.py", "*.cpp", "*.cu") for file in ROOT.glob(pattern)}
    assert files == {name for name, _ in re.findall(r"\[([a-z_]+\.\w+)\]\((\1)\)", rows)}


def test_continuous_integration_runs_the_command_of_the_readme():
    command = next(c for c in "\n".join(blocks("bash")).splitlines() if "pytest" in c)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


# ----------------------------------------------------------------------------------------- the generator of tables
SPEED = {"model": "m", "mode": "int8", "batch": 1, "prompt_tokens": 5, "new_tokens": 200, "weights_gb": 6.6142,
         "tok_s": 1234.56, "decode_step_ms": 0.8001, "percent_of_peak_bandwidth": 66.4, "ttft_s": 0.0123,
         "compile_s": 20.4, "commit": "abc1234", "torch": "2.13.0", "date": "2026-01-01", "device": "GPU",
         "peak_memory_gb": 8.216}  # fmt: skip
PERPLEXITY = {"kind": "perplexity", "model": "m", "mode": "bf16", "size_mb": 13.9, "perplexity": 8.0,
              "date": "2026-01-01"}  # fmt: skip
EMPTY = "# T\n<!-- table:decode -->\nold\n<!-- end -->\nkept\n<!-- table:perplexity -->\n<!-- end -->\n"


def body(rows: list[dict], name: str) -> str:
    made = tables.fill_tables(EMPTY, rows)
    assert made.startswith("# T\n") and "\nkept\n" in made and "old" not in made
    assert tables.fill_tables(made, rows) == made
    return re.search(rf"<!-- table:{name} -->\n(.*?)\n<!-- end -->", made, re.DOTALL)[1]


def test_no_rows_make_no_table(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for file in ("empty.jsonl", "missing.jsonl"):
        rows = tables.read_rows(tmp_path / file)
        assert body(rows, "decode") == body(rows, "perplexity") == "No measurements recorded yet."
    assert body([SPEED], "perplexity") == body([PERPLEXITY], "decode") == "No measurements recorded yet."


def test_decode_table_shows_the_latest_row_of_each_kind():
    rows = [{**SPEED, "tok_s": 1.0}, {**SPEED, "mode": "bfloat16"}, SPEED, *({**SPEED, "batch": b} for b in (16, 2)),
            {**SPEED, "device": "CPU", "compile_s": None, "percent_of_peak_bandwidth": None, "peak_memory_gb": None},
            {**SPEED, "prompt_tokens": 8192}]  # fmt: skip
    cpu, gpu = body(rows, "decode").split("\n\n**GPU**\n\n")
    assert cpu.startswith("**CPU**\n\n| model | mode | batch |") and cpu.endswith(
        "\n| m | int8 | 1 | 5 + 200 | 6.61 |  | 1,234.6 | 0.800 |  | 12.3 | eager | abc1234 | 2.13.0 | 2026-01-01 |"
    )
    header, rule, *lines = gpu.splitlines()
    assert header.count("|") == rule.count("|") == lines[0].count("|")
    assert [line.split(" | ")[1:4] for line in lines] == [
        ["bfloat16", "1", "5 + 200"], ["int8", "1", "5 + 200"], ["int8", "1", "8192 + 200"], ["int8", "2", "5 + 200"],
        ["int8", "16", "5 + 200"],
    ]  # fmt: skip
    assert "| 1,234.6 |" in lines[1] and "| 66 | 12.3 | 20 |" in lines[1]


def test_start_table_shows_the_latest():
    row = {"kind": "start", "model": "m", "mode": "int8", "cold_s": 30.04, "warm_s": 9.0, "device": "GPU",
           "commit": "abc1234", "torch": "2.13.0", "date": "2026-01-01"}  # fmt: skip
    made = tables.fill_tables("<!-- table:start -->\n<!-- end -->", [{**row, "warm_s": 99.0}, SPEED, row])
    assert made.splitlines()[3:-1] == ["| m | int8 | 30.0 | 9.0 | GPU | abc1234 | 2.13.0 | 2026-01-01 |"]


def test_roofline_shows_every_mode_and_the_limit(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{**SPEED, "mode": mode, "weights_gb": gb, "read_bandwidth_gbs": 4500.0}
            for mode, gb in (("bf16", 13.2), ("int8", 6.6))]  # fmt: skip
    others = [{**rows[0], "model": "other", **change} for change in (
        {"batch": 8}, {"ranks": 2}, {"prompt_tokens": 30}, {"new_tokens": 50}, {"device": "cpu"})]  # fmt: skip
    rows.insert(0, {**rows[0], "model": "other", "device": "NVIDIA Older"})
    others.append(PERPLEXITY)
    tables.roofline(rows + others, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert all(text in drawn for text in (" bf16<", " int8<", "4,500 GB/s")) and "other" not in drawn
    tables.roofline(rows + others, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() == drawn, "the same rows, the same file"
    tables.roofline([PERPLEXITY], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_scaling_table_compares_with_one_gpu():
    many = {**SPEED, "ranks": 2, "tok_s": 2000.0, "all_reduce": "nccl", "all_reduce_us": 18.04,
            "percent_communication": 9.9}  # fmt: skip
    made = tables.fill_tables("<!-- table:scaling -->\n<!-- end -->", [SPEED, many, {**many, "mode": "bf16"}])
    rows = [line.split(" | ") for line in made.splitlines() if line.startswith("| m ")]
    assert [(row[1], row[3], row[5], row[7:11]) for row in rows] == [
        ("bf16", "2", "2,000.0", ["", "nccl", "18.0", "10"]),
        ("int8", "2", "2,000.0", ["1.62", "nccl", "18.0", "10"]),
    ]
    assert body([many], "decode") == "No measurements recorded yet."


def test_perplexity_table_shows_the_change_against_bf16():
    int4 = {**PERPLEXITY, "mode": "int4", "method": "gptq", "groupsize": 64, "size_mb": 4.2}
    rows = [PERPLEXITY, {**int4, "perplexity": 99.0}, {**int4, "perplexity": 8.1}, {**int4, "model": "n"}]
    lines = body(rows, "perplexity").splitlines()[2:]
    assert lines == [
        "| m | bf16 |  |  | 13.9 | 8.0000 | +0.00% | 2026-01-01 |",
        "| m | int4 | gptq | 64 | 4.2 | 8.1000 | +1.25% | 2026-01-01 |",
        "| n | int4 | gptq | 64 | 4.2 | 8.0000 |  | 2026-01-01 |",
    ]


def test_an_unknown_table_is_an_error():
    with pytest.raises(ValueError, match="table:speed.*known: decode, start, scaling, perplexity"):
        tables.fill_tables("<!-- table:speed -->\n<!-- end -->", [])


def test_readme_flag_writes_the_file(tmp_path, monkeypatch):
    rows = tmp_path / "results.jsonl"
    rows.write_text(json.dumps(SPEED) + "\n")
    (tmp_path / "README.md").write_text(EMPTY)
    monkeypatch.setattr(benchmark, "README", tmp_path / "README.md")
    monkeypatch.setattr(benchmark, "RESULTS", rows)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--readme"])
    benchmark.main(**vars(benchmark.parser().parse_args()))
    assert (tmp_path / "README.md").read_text() == tables.fill_tables(EMPTY, [SPEED])
