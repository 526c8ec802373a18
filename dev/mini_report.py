"""What runs/mini_slam.sh found: Markdown tables on the standard output, and a picture with the fits (docs/mini.md).

    python dev/mini_report.py out/mini                # the picture becomes docs/mini.png
    python dev/mini_report.py out/mini other.png
    python dev/mini_report.py best RUN RUN ...        # for the script: the run with the lowest validation loss
    python dev/mini_report.py listen out/mini/listen  # transcripts of sample.py's page, as a table
    python dev/mini_report.py paired RUN RUN          # GenPPL before and after, prompt by prompt
"""
import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from model import from_config
from slam.metrics import mean_and_error, standard_error
from slam.units import UnitReader

SETS = {"tstorycloze": "tSC-style, %", "sstorycloze": "sSC-style, %", "sblimp": "sBLIMP-style, %"}
ROWS = {r"twist_\d+": "TWIST", r"scratch_\d+": "from scratch", r"whole_\d+": "TWIST, all 30 layers",
        r"wholescratch_\d+": "from scratch, 30 layers", r"slam_\d+": "TWIST, slam.py's settings",
        r"lr([\d.e-]+)_\d+": r"TWIST, learning rate \1", r"pieces(\d+)_\d+": r"TWIST, \1 pieces",
        r"layers(\d+)_hours": r"TWIST, \1 layers, fixed time",
        r"width(\d+)_hours": r"from scratch, \1 wide, fixed time",
        r"sentences_\d+": "best TWIST, then sentences",
        r"average_(\d+)": r"\1 % of these weights, the rest of best TWIST's",
        r"average_(\d+)_\d_dpo": r"\1 % of these weights, after DPO",
        r"twist_\d+_\d_dpo": "after DPO",
        r"whole_\d+_\d_dpo": "30 layers, after DPO"}  # pattern of a run's folder, less its seed: label


# ---------------------------------------------------------------- fits
def logit(percent: np.ndarray | float) -> np.ndarray | float:
    """ln(p / (1 - p)) of a share in %; at 0 and 100, which are infinitely far, that of 0.1 and 99.9."""
    percent = np.clip(percent, 0.1, 99.9)
    return np.log(percent / (100 - percent))


@dataclass
class Fit:
    """A curve over N tokens that was fitted by least squares. `kind` says which; u = ln(N / centre).

    "saturating": loss = E + exp(a - alpha u), parameters E, a, alpha (that is L = E + A N^-alpha)
    "power":      loss = exp(a - alpha u), parameters a, alpha
    "logistic":   accuracy in % = 100 / (1 + exp(-(a + b u))), parameters a, b: its logit is linear in log tokens
    """
    kind: str
    centre: float
    parameters: np.ndarray  # (k,)
    covariance: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))  # (k, k); nan where nothing tells it

    def curve(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values (n,) at `tokens` (n,), and their derivatives (n, k) by the parameters."""
        u, (*first, a, slope) = np.log(np.asarray(tokens, float) / self.centre), self.parameters
        if self.kind == "logistic":
            p = (1 + np.tanh((a + slope * u) / 2)) / 2  # 1 / (1 + exp(-x)) that does not overflow
            return 100 * p, (100 * p * (1 - p))[:, None] * np.stack([np.ones_like(u), u], 1)
        falling = np.exp(a - slope * u)
        derivatives = np.stack([falling, -u * falling], 1)
        return sum(first) + falling, np.hstack([np.ones((len(u), len(first))), derivatives])

    def at(self, tokens: float) -> tuple[float, float]:
        """Prediction at a number of tokens and its standard error (delta method)."""
        value, gradient = self.curve(np.array([tokens]))
        return float(value[0]), float(np.sqrt(gradient[0] @ self.covariance @ gradient[0]))

    def interval(self, tokens: float) -> tuple[float, float, float]:
        """Prediction, and one standard error below and above; of accuracies on the logit scale, so within 0 to 100."""
        if self.kind != "logistic":
            value, se = self.at(tokens)
            return value, value - se, value + se
        gradient = np.array([1, math.log(tokens / self.centre)])
        z, se = gradient @ self.parameters, math.sqrt(gradient @ self.covariance @ gradient)
        return tuple(50 * (1 + math.tanh(x / 2)) for x in (z, z - se, z + se))


def least_squares(fit: Fit, tokens: np.ndarray, y: np.ndarray, errors: np.ndarray | None) -> Fit:
    """Fit with the parameters that minimise sum(((y - curve) / errors)^2), from `fit`'s on (Levenberg-Marquardt).

    errors: standard errors (n,) of y. Residuals larger than these enlarge the covariance, smaller ones do not reduce
    it. None: all alike, and estimated from the residuals.
    """
    scale, damping = np.ones_like(y) if errors is None else errors, 1e-3
    value, gradient = fit.curve(tokens)
    for _ in range(500):
        r, j = (y - value) / scale, gradient / scale[:, None]
        step = np.linalg.solve(j.T @ j + damping * np.diag((j * j).sum(0) + 1e-12), j.T @ r)
        trial = Fit(fit.kind, fit.centre, fit.parameters + step)
        trial_value, trial_gradient = trial.curve(tokens)
        if ((y - trial_value) ** 2 / scale ** 2).sum() <= (r * r).sum():
            fit, value, gradient, damping = trial, trial_value, trial_gradient, damping / 3
            if np.abs(step).max() < 1e-12:
                break
        else:
            damping *= 4
    r, j = (y - value) / scale, gradient / scale[:, None]
    free = len(y) - len(fit.parameters)
    variance = (r * r).sum() / free if free else math.nan
    if errors is not None:
        variance = max(1.0, variance) if free else 1.0
    try:
        covariance = variance * np.linalg.inv(j.T @ j)
    except np.linalg.LinAlgError:  # accuracies of 100 % throughout, say
        covariance = np.full((len(fit.parameters),) * 2, math.nan)
    return Fit(fit.kind, fit.centre, fit.parameters, covariance)


def fit_loss(tokens: np.ndarray, losses: np.ndarray) -> Fit | None:
    """L = E + A N^-alpha through losses (n,) at n budgets, or L = A N^-alpha; None for fewer than two budgets.

    The law without E is taken for fewer than four budgets, and where the losses do not tell an E > 0 (the best alpha is
    at the search's border, or E is not positive). One loss a budget: seeds share the curve's misfit.
    """
    tokens, losses = np.asarray(tokens, float), np.asarray(losses, float)
    if len(set(tokens)) < 2:
        return None
    centre = float(np.exp(np.log(tokens).mean()))
    u = np.log(tokens / centre)
    if len(tokens) >= 4:  # for each alpha, E and A are a linear problem; from the best one on, all three together
        alphas, best = np.geomspace(0.02, 3, 300), None
        for alpha in alphas:
            x = np.stack([np.ones_like(u), np.exp(-alpha * u)], 1)
            (e, a), *_ = np.linalg.lstsq(x, losses, rcond=None)
            error = ((losses - x @ (e, a)) ** 2).sum()
            if e > 0 and a > 0 and (best is None or error < best[0]):
                best = error, alpha, np.array([e, math.log(a), alpha])
        if best and alphas[0] < best[1] < alphas[-1]:
            fit = least_squares(Fit("saturating", centre, best[2]), tokens, losses, None)
            if fit.parameters[0] > 0:
                return fit
    slope, a = np.polyfit(u, np.log(losses), 1)
    return least_squares(Fit("power", centre, np.array([a, -slope])), tokens, losses, None)


def fit_accuracy(tokens: np.ndarray, accuracies: np.ndarray, errors: np.ndarray) -> Fit | None:
    """Accuracies (n,) in % with standard errors (n,), their logit linear in log tokens; None for under three budgets.

    Fitted on the accuracies themselves, so that 0 and 100 % may be among them; an error of 0 or nan, as there, is taken
    to be as large as the largest.
    """
    tokens, accuracies, errors = (np.asarray(x, float) for x in (tokens, accuracies, errors))
    if len(set(tokens)) < 3:
        return None
    errors = np.where(errors > 0, errors, max([*errors[errors > 0], 1.0]))
    start = Fit("logistic", float(np.exp(np.log(tokens).mean())), np.zeros(2))
    return least_squares(start, tokens, accuracies, errors)


def crossing(fit: Fit, level: float) -> tuple[float, float, float] | None:
    """Tokens at which a logistic fit crosses `level` %, and those one standard error below and above (delta method).

    None if the slope is not positive by two standard errors: then the crossing may be anywhere.
    """
    (a, b), covariance = fit.parameters, fit.covariance
    if not b > 2 * math.sqrt(covariance[1, 1]):
        return None
    u = (logit(level) - a) / b
    gradient = np.array([-1 / b, -u / b])
    se = math.sqrt(gradient @ covariance @ gradient)
    return tuple(fit.centre * math.exp(min(x, 500)) for x in (u, u - se, u + se))


# ---------------------------------------------------------------- what is there
def overlap(held_out: Iterable[str], training: Iterable[str], n: int = 8) -> float:
    """Share of the n-grams of words in the held-out texts that stand in a training text; without case and marks.

    overlap(["a b c d"], ["B c, d!"], n=2) -> 2/3
    """
    def grams(text: str) -> list[tuple[str, ...]]:
        words = re.findall(r"[\w']+", text.lower())
        return [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]

    wanted = [gram for text in held_out for gram in grams(text)]
    unseen = set(wanted)
    for text in training:  # one after the other: all n-grams of a large corpus need gigabytes
        unseen.difference_update(grams(text))
    return sum(gram not in unseen for gram in wanted) / max(1, len(wanted))


def read_run(folder: Path) -> dict | None:
    """What is known of a finished run: row and seed by its folder's name, and results; None if it is not finished."""
    slam, name = folder / "checkpoint" / "slam.json", re.fullmatch(r"(.+)_(\d+)", folder.name)
    if not (name and slam.is_file() and (folder / "results.json").is_file()):
        return None
    slam = json.loads(slam.read_text())
    if not slam["finished"]:
        return None
    with torch.device("meta"):
        lm = from_config(json.loads((folder / "checkpoint" / "config.json").read_text()))
    return {"row": name[1], "seed": int(name[2]), "stage": slam["stage"], "tokens": slam["tokens"],
            "hours": slam["seconds"] / 3600, "train": slam["config"].get("train"),
            "n_params": sum(p.numel() for p in lm.parameters()),
            "results": json.loads((folder / "results.json").read_text())}


def best(folders: list[Path]) -> Path:
    """Of the finished runs of train.py among `folders`, the one with the lowest validation loss."""
    losses = {}
    for folder in folders:
        run = read_run(folder)
        if run and run["stage"] == "train" and "val_loss" in run["results"]:
            losses[folder] = run["results"]["val_loss"]["value"]
    if not losses:
        raise SystemExit(f"no finished run with a validation loss among {', '.join(map(str, folders)) or 'no folders'}")
    return min(losses, key=losses.get)


def read_runs(out: Path) -> dict[str, list[dict]]:
    """{row: runs of its seeds}, in the order of ROWS and then of the numbers in their names."""
    rows = {}
    for run in filter(None, map(read_run, sorted(out.iterdir()))):
        rows.setdefault(run["row"], []).append(run)

    def place(row: str) -> tuple:
        known = [i for i, pattern in enumerate(ROWS) if re.fullmatch(pattern, row)]
        return known[:1] or [len(ROWS)], [float(number) for number in re.findall(r"\d+(?:\.\d+)?", row)]

    return {row: rows[row] for row in sorted(rows, key=place)}


def result(run: dict, metric: str) -> dict | None:
    """A metric of a run's results.json. A validation loss counts only if it is eval.py's, of the whole set."""
    found = run["results"].get(metric, {})
    return found if found.get("value") is not None and (metric != "val_loss" or "settings" in found) else None


def over_seeds(runs: list[dict], metric: str, key: str = "value",
               error: str = "se") -> tuple[float, float | None] | None:
    """Mean over seeds and its standard error; with one seed, the error that is recorded (over pairs or prompts)."""
    found = [r for run in runs if (r := result(run, metric)) and r.get(key) is not None]
    if len(found) < 2:
        return (found[0][key], found[0].get(error)) if found else None
    return mean_and_error(np.array([r[key] for r in found]))


def points(rows: dict[str, list[dict]], kind: str, metric: str) -> np.ndarray:
    """(n, 4) of a kind's budgets, in order: tokens, mean over seeds, standard error over seeds and over pairs (or nan).

    The seeds' accuracies are of the same pairs, so the error over pairs does not fall with the number of seeds.
    """
    found = []
    for row, runs in rows.items():
        runs = [run for run in runs if result(run, metric)]
        if re.fullmatch(rf"{kind}_\d+", row) and runs:
            mean, se = mean_and_error(np.array([run["results"][metric]["value"] for run in runs]))
            pairs = np.mean([run["results"][metric].get("se") or math.nan for run in runs])
            found.append((np.mean([run["tokens"] for run in runs]), mean, math.nan if se is None else se, pairs))
    return np.array(sorted(found)).reshape(-1, 4)


def reference(rows: dict[str, list[dict]], metric: str) -> dict | None:
    """A floor or a ceiling, from whichever run's results have it; the n-grams of pieces are no floor of units."""
    return next((r for row, runs in rows.items() if not row.startswith("pieces") for run in runs
                 if (r := result(run, metric))), None)


# ---------------------------------------------------------------- tables
def cell(found: tuple[float, float | None] | None, digits: int = 1) -> str:
    if found is None:
        return ""
    value, se = found
    return f"{value:.{digits}f}" + ("" if se is None or math.isnan(se) else f" ± {se:.{max(1, digits)}f}")


def short(n: float) -> str:
    """short(1_200_000) -> "1.2M"; short(150_000) -> "150k" """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def table(head: list[str], lines: list[list[str]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print()


def label(row: str) -> str:
    for pattern, name in ROWS.items():
        if match := re.fullmatch(pattern, row):
            return match.expand(name)
    return row


def corpus(out: Path) -> None:
    """The corpus: stories, hours and tokens, and how many of the held-out 8-grams of words training has seen."""
    lines, held_out, training = [], [], []
    configs = [json.loads(path.read_text()) for path in out.glob("twist_*/config.json")]
    trained_on = {Path(units).parent.parent.name for cfg in configs for units in cfg.get("train", ())}  # not after DPO
    for part in sorted(out.glob("part[0-9]*"), key=lambda p: int(p.name[4:])):
        for split in ("train", "val"):
            if part.name in ({"part0"} if split == "val" else trained_on) and (part / "units" / split).is_dir():
                reader = UnitReader(part / "units" / split)
                lines.append((split, len(reader), reader.hours, reader.n_tokens))
                texts = [record.get("text", "") for record in reader.records()]
                (training if split == "train" else held_out).extend(texts)
    if not lines:
        return
    sums = [[split, *(sum(x) for x in list(zip(*(line for line in lines if line[0] == split)))[1:])]
            for split in ("train", "val") if any(line[0] == split for line in lines)]
    table(["stories", "number", "hours", "tokens"],
          [[{"train": "training", "val": "validation"}[split], f"{n:,}", f"{hours:.1f}", f"{tokens:,}"]
           for split, n, hours, tokens in sums])
    if held_out and training:
        print(f"{100 * overlap(held_out, training):.1f} % of the validation stories' 8-grams of words stand in the "
              f"training stories.\n")


def all_rows(rows: dict[str, list[dict]]) -> None:
    sizes, lines = {}, []
    for row, runs in rows.items():
        train = runs[0]["train"]
        if train and all(Path(path).exists() for path in train):
            sizes.setdefault(tuple(train), UnitReader(*train).n_tokens)
        tokens = float(np.mean([run["tokens"] for run in runs]))
        epochs = f"{tokens / sizes[tuple(train)]:.2f}" if train and tuple(train) in sizes else ""
        lines.append([label(row), f"{runs[0]['n_params'] / 1e6:.1f}M", short(tokens) if train else "", epochs,
                      f"{np.mean([run['hours'] for run in runs]):.2f}", str(len(runs)),
                      cell(over_seeds(runs, "val_loss"), 3), cell(over_seeds(runs, "val_bits_per_second")),
                      *(cell(over_seeds(runs, name)) for name in SETS)])
    for name, key in (("unigrams of the units", "unigram"), ("bigrams of the units", "bigram"),
                      ("text LM on the transcripts", "text_lm")):
        loss = reference(rows, f"{key}_loss")
        pairs = [(r["value"], r.get("se")) if (r := reference(rows, f"{x}_{key}")) else None for x in SETS]
        if loss or any(pairs):
            lines.append([f"*{name}*", *[""] * 5, f"{loss['value']:.3f}" if loss else "", "", *map(cell, pairs)])
    table(["", "parameters", "tokens", "epochs", "hours", "seeds", "val. loss", "bits/s", *SETS.values()], lines)


def generated(rows: dict[str, list[dict]]) -> None:
    lines = []
    for row, runs in rows.items():
        runs = [run for run in runs if result(run, "gen_ppl")]
        if runs and not row.startswith("lr"):  # one of these is a link to a run of the curve
            samplings = len(runs[0]["results"]["gen_ppl"].get("seeds", [0]))
            by = f"{len(runs)} of DPO" if len(runs) > 1 else f"{samplings} of sampling"
            lines.append([f"{label(row)}, {short(runs[0]['tokens'])} tokens" if runs[0]["train"] else label(row), by,
                          cell(over_seeds(runs, "val_loss"), 3), cell(over_seeds(runs, "gen_ppl")),
                          cell(over_seeds(runs, "gen_ppl", "continuation_only", "continuation_se")),
                          cell(over_seeds(runs, "auto_bleu"), 2)])
    if lines:
        table(["", "seeds", "val. loss", "GenPPL", "GenPPL, continuation alone", "auto-BLEU × 100"], lines)


def fits(rows: dict[str, list[dict]], kind: str = "twist") -> dict[str, tuple[np.ndarray, Fit]]:
    """{metric: (points (n, 4), fit)} of the loss and of the accuracies of a kind of runs, where there is a fit."""
    found = {}
    for metric in ("val_loss", *SETS):
        known = points(rows, kind, metric)
        fit = fit_loss(*known.T[:2]) if metric == "val_loss" else fit_accuracy(*known.T[[0, 1, 3]])
        if fit and len(known) > 2:
            found[metric] = known, fit
    return found


def describe(metric: str, known: np.ndarray, fit: Fit) -> list[str]:
    """A line of the table of fits."""
    largest, far = known[-1, 0], 10 * known[-1, 0]
    errors = np.sqrt(np.diag(fit.covariance))
    if metric == "val_loss":
        law = f"{cell((fit.parameters[0], errors[0]), 3)} + A N^-α" if fit.kind == "saturating" else "A N^-α, without E"
        return ["validation loss", law, f"α = {cell((fit.parameters[-1], errors[-1]), 3)}", short(largest),
                cell(fit.at(far), 3), ""]
    tenfold = math.log(10) * np.array([fit.parameters[1], errors[1]])
    across = crossing(fit, 65)
    where = "not told: the slope is not clear of 0" if across is None else "{} ({} to {})".format(*map(short, across))
    return [SETS[metric].removesuffix(", %"), "logit linear in ln N", f"{cell(tenfold, 2)} a tenfold", short(largest),
            "{:.1f} % ({:.1f} to {:.1f})".format(*fit.interval(far)), where]


# ---------------------------------------------------------------- the picture
def picture(rows: dict[str, list[dict]], path: Path) -> None:
    """Loss and accuracies over tokens: points with errors, fits with a band of one standard error, floors, ceilings."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator
    except ImportError:
        print("for the picture: pip install matplotlib", file=sys.stderr)
        return
    fitted = {kind: fits(rows, kind) for kind in ("twist", "whole")}
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, metric in zip(figure.subplots(2, 2).flat, ("val_loss", *SETS)):
        is_loss, shown = metric == "val_loss", []  # what the axis must show: all but the band
        for kind, name, style in (("twist", "TWIST", dict(color="black", marker="o")),
                                  ("whole", "TWIST, 30 layers", dict(color="C2", marker="^")),
                                  ("scratch", "from scratch", dict(color="C0", marker="s")),
                                  ("slam", "slam.py's settings", dict(color="C1", marker="D"))):
            x, y, seeds, pairs = points(rows, kind, metric).T
            error = np.nan_to_num(seeds if is_loss else pairs)
            if len(x):
                axes.errorbar(x, y, error, ls="", ms=4, lw=1, capsize=2, label=name, **style)
                shown += [*(y - error), *(y + error)]
        for kind, shade in (("twist", "0.4"), ("whole", "C2")):
            if metric not in fitted[kind]:
                continue
            known, fit = fitted[kind][metric]
            x = np.geomspace(known[0, 0], 10 * known[-1, 0], 100)
            y, low, high = np.array([fit.interval(tokens) for tokens in x]).T
            name = {"saturating": "$E + A N^{-α}$", "power": "$A N^{-α}$", "logistic": "fit, 10 times on"}[fit.kind]
            axes.plot(x, y, color=shade, lw=1, label=name)
            shown += [*y]
            if np.isfinite(low).all():
                axes.fill_between(x, low, high, color=shade, alpha=0.2, lw=0, zorder=0)
        for key, name, line in (("bigram", "bigram", ":"), ("text_lm", "text LM", "--")):
            if found := reference(rows, "bigram_loss" if is_loss and key == "bigram" else f"{metric}_{key}"):
                axes.axhline(found["value"], color="C3", lw=1, ls=line, label=name)
                shown.append(found["value"])
        axes.set(xscale="log", xlabel="tokens", title="validation loss, nats per unit" if is_loss else SETS[metric])
        if not is_loss:
            axes.axhline(50, color="0.6", lw=0.8, label="chance")
            axes.set_yscale("function", functions=(logit, lambda z: 100 / (1 + np.exp(-z))))  # the fit is straight
            low, high = max(1, min([45, *shown]) - 1), min(99, max([70, *shown]) + 1)
            axes.set_ylim(low, high)
            axes.yaxis.set_major_locator(FixedLocator([2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98]
                                                      + [45, 55, 65, 75, 85] * int(low > 35)))
        elif shown:
            axes.set_ylim(min(shown) - 0.1, max(shown) + 0.1)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    print(f"{path}: written", file=sys.stderr)


def transcripts(folder: Path) -> None:
    """What Whisper hears in the samples of a folder: a line a prompt, a column a checkpoint."""
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    names = list(dict.fromkeys(sample["checkpoint"] for sample in samples))
    heard = {}
    for sample in samples:
        file = Path(sample["prompt_file"])
        row = heard.setdefault(file, [f"{file.parent.name}/{file.stem}", sample["prompt_text"], *[""] * len(names)])
        row[2 + names.index(sample["checkpoint"])] = sample.get("continuation_text", "")
    table(["prompt", "heard", *(Path(name).name for name in names)], list(heard.values()))


def paired(before: Path, after: Path, judge: str = "embedded:smollm2-135m") -> dict[str, tuple[float, float]]:
    """GenPPL of a run over that of another, less 1, in %, and its standard error over prompts (delta method).

    Both have continued the same prompts with the same sampling seeds (generated.jsonl), and how hard a prompt is drops
    out of their difference. {"text": of prompt and continuation, "continuation_text": of the continuation}.
    """
    from slam.speech import text_losses
    runs = [[json.loads(x) for x in (run / "generated.jsonl").read_text().splitlines()] for run in (before, after)]
    how = [json.loads((run / "results.json").read_text())["gen_ppl"]["settings"] for run in (before, after)]
    if how[0] != how[1] or len({tuple((x["prompt"], x["seed"]) for x in run) for run in runs}) > 1:
        raise SystemExit(f"{before} and {after}: their prompts, seeds or settings of GenPPL differ")
    found = {}
    for key in ("text", "continuation_text"):
        a, b = (np.array(text_losses([x[key] for x in run], judge), float) for run in runs)  # None becomes nan
        ratio = math.exp(np.nanmean(b - a))
        found[key] = 100 * (ratio - 1), 100 * ratio * standard_error(b - a, len({x["seed"] for x in runs[0]}))
    return found


def main(out: Path, path: Path) -> None:
    rows = read_runs(out)
    if not rows:
        raise SystemExit(f"{out}: no finished run; runs/mini_slam.sh makes them")
    corpus(out)
    all_rows(rows)
    for kind, name, shown in (("twist", "TWIST over tokens", ("val_loss", *SETS)),
                              ("whole", "TWIST, all 30 layers, over tokens", ("val_loss", *SETS)),
                              ("sentences", "best TWIST, then sentences, over their tokens", SETS)):
        if lines := [describe(metric, *found) for metric, found in fits(rows, kind).items() if metric in shown]:
            table([name, "fit", "slope", "largest budget N", "predicted at 10 N", "crosses 65 % at"], lines)
    generated(rows)
    picture(rows, path)


if __name__ == "__main__":
    if len(sys.argv) < 2 or "--help" in sys.argv:
        raise SystemExit(__doc__)
    if sys.argv[1:2] == ["best"]:
        print(best(list(map(Path, sys.argv[2:]))))
    elif sys.argv[1:2] == ["listen"]:
        transcripts(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["paired"]:
        for name, (change, error) in paired(*map(Path, sys.argv[2:4])).items():
            print(f"GenPPL of {name}: {change:+.1f} ± {error:.1f} %")
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs" / "mini.png")
