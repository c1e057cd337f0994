"""Tables in Markdown, and a plot, from the rows that `benchmark.py --record` has written: what the README shows.

    python benchmark.py --readme

Each table takes all rows, picks its own kind, and shows the latest of those that differ only in when they were made.
"""

import json
import re
from pathlib import Path


def read_rows(file: Path) -> list[dict]:
    """The rows of a file of JSON lines, the oldest first; none where it is not there yet."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()] if file.exists() else []


def table(header: str, rows: list[str]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    return "\n".join([f"| {header} |", "|---" + "|--:" * header.count("|") + "|", *rows])


def cells(*values) -> str:
    """A row of a table from values, or (value, format) pairs; None and what a row does not hold are left empty."""
    pairs = [v if isinstance(v, tuple) else (v, "") for v in values]
    return "| " + " | ".join("" if v is None else format(v, spec) for v, spec in pairs) + " |"


def decode_table(rows: list[dict]) -> str:
    """A table for each device of the latest row of each model, mode, batch, length and compiled or eager."""
    same = ("device", "model", "mode", "batch", "prompt_tokens", "new_tokens")
    rows = [r for r in rows if not r.get("kind") and r.get("ranks", 1) == 1]
    latest = {(*(r[k] for k in same), r["compile_s"] is None): r for r in rows}
    header = ("model | mode | batch | tokens in + out | GB of weights | peak GB | tok/s | step ms | "
              "% of read bandwidth | first token ms | compile s | commit | torch | date")  # fmt: skip
    parts = []
    for device in sorted({key[0] for key in latest}):
        lines = [
            cells(r["model"], r["mode"], r["batch"], f"{r['prompt_tokens']} + {r['new_tokens']}",
                  (r["weights_gb"], ".2f"), (r.get("peak_memory_gb"), ".2f"), (r["tok_s"], ",.1f"),
                  (r["decode_step_ms"], ".3f"), (r["percent_of_peak_bandwidth"], ".0f"), (1e3 * r["ttft_s"], ",.1f"),
                  "eager" if r["compile_s"] is None else (r["compile_s"], ".0f"), r["commit"], r["torch"], r["date"])
            for key, r in sorted(latest.items(), key=lambda pair: pair[0]) if key[0] == device
        ]  # fmt: skip
        parts.append(f"**{device}**\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def perplexity_table(rows: list[dict]) -> str:
    """The latest perplexity of each model and recipe, and its change against the same model in bf16."""
    rows = [r for r in rows if r.get("kind") == "perplexity"]
    latest = {tuple(r.get(k) for k in ("model", "mode", "method", "groupsize")): r for r in rows}
    plain = {r["model"]: r["perplexity"] for r in latest.values() if r["mode"] in ("bf16", "bfloat16")}
    header = "model | mode | method | group size | MB | perplexity | against bf16 | date"
    lines = []
    for r in latest.values():
        change = r["perplexity"] / plain[r["model"]] - 1 if r["model"] in plain else None
        lines.append(cells(r["model"], r["mode"], r.get("method"), r.get("groupsize"), (r["size_mb"], ".1f"),
                           (r["perplexity"], ".4f"), (change, "+.2%"), r["date"]))  # fmt: skip
    return table(header, lines) if lines else ""


def start_table(rows: list[dict]) -> str:
    """The latest first and second start of each model and mode."""
    same = ("device", "model", "mode")
    latest = {tuple(r[k] for k in same): r for r in rows if r.get("kind") == "start"}
    header = "model | mode | first start s | second start s | device | commit | torch | date"
    lines = [cells(r["model"], r["mode"], (r["cold_s"], ".1f"), (r["warm_s"], ".1f"), r["device"], r["commit"],
                   r["torch"], r["date"]) for _, r in sorted(latest.items())]  # fmt: skip
    return table(header, lines) if lines else ""


def one_gpu(row: dict, rows: list[dict]) -> dict | None:
    """The latest row that differs from a row of several ranks only in being of one."""
    same = ("device", "model", "mode", "batch", "prompt_tokens", "new_tokens")
    found = [r for r in rows if not r.get("kind") and r.get("ranks", 1) == 1 and all(r[k] == row[k] for k in same)
             and (r["compile_s"] is None) == (row["compile_s"] is None)]  # fmt: skip
    return found[-1] if found else None


def scaling_table(rows: list[dict]) -> str:
    """The latest row of several ranks of each model, mode, batch and number of ranks, against one GPU."""
    keys = ("device", "model", "mode", "batch", "prompt_tokens", "new_tokens", "ranks")
    latest = {tuple(r[k] for k in keys): r for r in rows if r.get("ranks", 1) > 1}
    header = ("model | mode | batch | ranks | GB a rank | tok/s | step ms | against one | all-reduce | µs each | "
              "% of the step | % of read bandwidth | commit | torch | date")  # fmt: skip
    parts = []
    for device in sorted({key[0] for key in latest}):
        lines = []
        for key, r in sorted(latest.items(), key=lambda pair: pair[0]):
            if key[0] == device:
                alone = one_gpu(r, rows)
                gain = r["tok_s"] / alone["tok_s"] if alone else None
                lines.append(cells(
                    r["model"], r["mode"], r["batch"], r["ranks"], (r["weights_gb"], ".2f"), (r["tok_s"], ",.1f"),
                    (r["decode_step_ms"], ".3f"), (gain, ".2f"), r["all_reduce"], (r["all_reduce_us"], ".1f"),
                    (r["percent_communication"], ".0f"), (r["percent_of_peak_bandwidth"], ".0f"), r["commit"],
                    r["torch"], r["date"]))  # fmt: skip
        parts.append(f"**{device}**\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def speculation_table(rows: list[dict]) -> str:
    """The latest row of each pair of target and draft, k and acceptance; one that was forced is called so."""
    rows = [r for r in rows if r.get("kind") == "speculation"]
    same = ("device", "model", "mode", "draft", "k", "simulated_acceptance", "batch")
    latest = {tuple(r[key] for key in same): r for r in rows}
    header = ("model | mode | draft | k | acceptance | tokens a step | plain tok/s | tok/s | speed-up | verify 5 | "
              "verify 8 | other ms | device | commit | torch | date")  # fmt: skip
    lines = []
    for r in latest.values():
        forced = r["simulated_acceptance"] is not None
        share = f"{r['simulated_acceptance']:.0%}, simulated" if forced else (r["acceptance"], ".0%")
        lines.append(cells(r["model"], r["mode"], r["draft"], r["k"], share, (r["tokens_per_step"], ".2f"),
                           (r["plain_tok_s"], ",.1f"), (r["tok_s"], ",.1f"), (r["speedup"], ".2f"),
                           *((r.get(key), ".2f") for key in ("verify_cost_5", "verify_cost_8", "other_ms")),
                           r["device"], r["commit"], r["torch"], r["date"]))  # fmt: skip
    return table(header, lines) if lines else ""


def roofline(rows: list[dict], file: Path) -> None:
    """Draw into an SVG: speed over the bytes of weights that a token reads, and what the read bandwidth would allow.

    The latest rows of batch 1 on the latest kind of GPU, one of it, compiled, of 5 + 200 tokens; the line is the best
    bandwidth measured in these runs. Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if not r.get("kind") and r.get("ranks", 1) == 1 and r["compile_s"]]
    rows = [r for r in rows if (r["batch"], r["prompt_tokens"], r["new_tokens"]) == (1, 5, 200)]
    rows = [r for r in rows if r.get("read_bandwidth_gbs") and not r["device"].startswith("cpu")]
    if not rows:
        return
    rows = list({(r["model"], r["mode"]): r for r in rows if r["device"] == rows[-1]["device"]}.values())
    peak = max(r["read_bandwidth_gbs"] for r in rows)
    # Text stays text and ids stay the same, so that a new drawing of the same rows is the same file.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": file.name, "font.size": 9}):
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        ends = [min(r["weights_gb"] for r in rows) / 1.5, max(r["weights_gb"] for r in rows) * 1.5]
        axes.plot(ends, [peak / gb for gb in ends], color="0.6", label=f"{peak:,.0f} GB/s, measured by reading only")
        for model, marker in zip(sorted({r["model"] for r in rows}), "osD^vP*X", strict=False):
            mine = [r for r in rows if r["model"] == model]
            axes.plot([r["weights_gb"] for r in mine], [r["tok_s"] for r in mine], marker, label=model)
            for r in mine:
                axes.annotate(f" {r['mode']}", (r["weights_gb"], r["tok_s"]), va="top", fontsize=7)
        axes.set(xscale="log", yscale="log", xlabel="GB of weights read for a token", ylabel="tok/s",
                 title=f"{rows[-1]['device']}, batch 1, 5 + 200 tokens")  # fmt: skip
        axes.grid(which="both", alpha=0.2)
        axes.legend()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)


TABLES = {
    "decode": decode_table,
    "start": start_table,
    "scaling": scaling_table,
    "perplexity": perplexity_table,
    "speculation": speculation_table,
}


def fill_tables(text: str, rows: list[dict]) -> str:
    """`text` with what stands between each `<!-- table:NAME -->` and `<!-- end -->` made anew from the rows."""

    def fill(match: re.Match) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"{match[0].splitlines()[0]}: no such table; known: {', '.join(TABLES)}")
        body = TABLES[match[1]](rows) or "No measurements recorded yet."
        return f"<!-- table:{match[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table:(.*?) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)
