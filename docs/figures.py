"""The figures of docs/, from the JSON beside them.

    pip install -r requirements-docs.txt
    python docs/figures.py

reads:  docs/results.json (of reproduce.py), docs/bench.json (of kernels/bench.py, on an H100)
writes: docs/results.png, docs/compression.png, docs/bench.png
"""
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
COLOURS = {"caption-only": "0.55", "patch-aligned": "tab:red"}
PEERS = {                       # provider: (name, colour)
    "ours: triton": ("ours", "tab:red"), "naive": ("naive", "tab:gray"),
    "naive, compiled": ("naive, compiled", "tab:olive"),
    "chunked, compiled": ("chunks, compiled", "tab:green"),
    "liger-kernel": ("Liger-Kernel", "tab:blue"),
    "cut-cross-entropy": ("Cut Cross-Entropy", "tab:purple"),
    "torch.mm": ("two bare torch.mm", "black")}
plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})


def changes(axis, results: dict) -> None:
    """Changes from caption-only in per cent, with their intervals; diamonds: the paper's."""
    shown = [row for row in results["rows"] if not row["kind"] and (
        row["key"] in ("test_refer/Acc@0.5", "hard_refer/Acc@0.5", "distract_refer/Acc@0.5",
                       "test_vqa/accuracy", "test_instruct/exact", "test/CIDEr")
        and not row["step"])]
    shown.sort(key=lambda row: row["part"] == "after pretraining")
    names = {"grounding, Acc@0.5": "grounding", "captions, CIDEr": "captions"}
    for y, row in enumerate(shown):
        change = row["changes"]["patch-aligned"]
        scale = change["percent"] / change["difference"] if change["difference"] else 0
        axis.errorbar(change["percent"], y, xerr=abs(scale * (change["half"] or 0)), fmt="o",
                      capsize=4, color=COLOURS["patch-aligned"])
        if row["paper"]:
            axis.plot(row["paper"], y, "D", markersize=9, markerfacecolor="white", color="black")
    labels = []
    for row in shown:
        name, *split = row["label"].rsplit(", ", 1)
        hard = {"hard_refer": ", new pairs", "distract_refer": ", overlapping"}.get(split[0], "")
        before = ", before tuning" * (row["part"] == "after pretraining")
        labels.append(names.get(name, name) + hard + before)
    axis.set_yticks(range(len(shown)), labels)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=1)
    axis.set_xlabel("change from caption-only, %")
    axis.grid(axis="x", alpha=0.3)


def curve(axis, results: dict, part: str, key: str, style: str = "o-") -> None:
    """A score of both variants against steps of a training."""
    points = [row for row in results["rows"] if (row["part"], row["key"]) == (part, key)]
    for variant in results["variants"]:
        own = [(row["step"], row["scores"][variant]) for row in points]
        steps, means = [step for step, _ in own], [score["mean"] for _, score in own]
        halves = [score["half"] or 0 for _, score in own]
        axis.errorbar(steps, means, halves, fmt=style, capsize=4, color=COLOURS[variant],
                      label=variant)
    axis.grid(alpha=0.3)


def draw_results() -> None:
    """docs/results.png."""
    results = json.loads((HERE / "results.json").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=[1.2, 1])
    changes(left, results)
    curve(right, results, "along the fine-tuning", "test_refer/Acc@0.5")
    right.plot([], [], "D", markersize=9, markerfacecolor="white", color="black",
               label="the paper's change")
    right.set_xlabel("fine-tuning steps")
    right.set_title("grounding, Acc@0.5", fontsize=13)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(HERE / "results.png", dpi=110)


def draw_compression() -> None:
    """docs/compression.png: entropy of H along the pretraining, and of Z; where its energy lies."""
    results = json.loads((HERE / "results.json").read_text())
    figure, axes = plt.subplots(1, 4, figsize=(15, 4))
    for axis, title, end in zip(axes, ("entropy per image", "pooled over images",
                                       "pooled, mean removed"), ("", "_pooled", "_centred")):
        curve(axis, results, "along the pretraining", f"entropy/projected{end}")
        whole = next(row for row in results["rows"] if row["key"] == f"entropy/encoder{end}")
        axis.axhline(whole["scores"]["caption-only"]["mean"], color="black", linestyle=":",
                     label="Z, before the projector")
        axis.set_title(title, fontsize=13)
        axis.set_xlabel("pretraining steps")
    axes[0].set_ylabel("entropy of H, nats")
    for name, style in (("shared", "o-"), ("between", "s--")):
        curve(axes[3], results, "along the pretraining", f"energy/projected/{name}", style)
    axes[3].plot([], [], "ko-", label="in the mean of all patches")
    axes[3].plot([], [], "ks--", label="between images")
    axes[3].legend(handles=axes[3].lines[-2:], frameon=False, fontsize=11)
    axes[3].set(ylim=(0, 0.7), xlabel="pretraining steps", ylabel="share of the energy of H")
    axes[3].set_title("its energy", fontsize=13)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(HERE / "compression.png", dpi=110)


def draw_bench() -> None:
    """docs/bench.png: time over two bare products, and memory, at three problems."""
    bench = json.loads((HERE / "bench.json").read_text())
    cases = [(4608, 32000), (18432, 32000), (4608, 128256)]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6))
    for i, (name, (label, colour)) in enumerate(PEERS.items()):
        rows = [next(r for r in bench["rows"] if r["provider"] == name and (r["n"], r["v"]) == case)
                for case in cases]
        places = [j + (i - 3) * 0.12 for j in range(len(cases))]
        axes[0].bar(places, [row["ms"] for row in rows], 0.11, color=colour, label=label)
        axes[1].bar(places, [row["mib"] for row in rows], 0.11, color=colour)
    ticks = [3, 5, 10, 20, 50], [100, 300, 1000, 3000, 10000]
    for axis, title, own in zip(axes, ("milliseconds", "MiB above the inputs"), ticks):
        axis.set_xticks(range(len(cases)), [f"n = {n}\nV = {v}" for n, v in cases])
        axis.set_title(title, fontsize=13)
        axis.set_yscale("log")
        axis.set_yticks(own, map(str, own))
        axis.minorticks_off()
        axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(HERE / "bench.png", dpi=110)


if __name__ == "__main__":
    draw_results()
    draw_compression()
    draw_bench()
