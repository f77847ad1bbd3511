"""Tables of denoising runs, replays, comparisons of runs, and mediations."""

from itertools import islice

from jaxtyping import Float
from rich.table import Table
from rich.text import Text
from torch import Tensor

from transformer_lens_bd3lm.denoising.compare_runs import RunComparison, each_run
from transformer_lens_bd3lm.denoising.mediate import Mediation
from transformer_lens_bd3lm.denoising.replay import Replay
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.runs import Runs
from transformer_lens_bd3lm.show.tables import Tables, new_table


def run_table(run: Run) -> Table:
    """Return a table of a run: each row's text, how many tokens were written, and how surely."""
    columns = ("row", "text", "written", "steps", "mean log p (nats)", "smallest lead (nats)")
    table = new_table(repr(run), columns, ("row", "text"), "")
    for row in range(len(run.ends)):
        table.add_row(str(row), *_cells(run, row))
    return table


def runs_table(runs: Runs, n: int = 10) -> Table:
    """Return a table of the first ``n`` runs of many prompts; see :func:`run_table`."""
    columns = ("prompt", "text", "written", "steps", "mean log p (nats)", "smallest lead (nats)")
    more = f"the first {n} of {len(runs)} prompts" if len(runs) > n else ""
    table = new_table(repr(runs), columns, ("prompt", "text"), more)
    for i in range(min(n, len(runs))):
        table.add_row(str(i), *_cells(runs[i], 0))
    return table


def replay_table(replay: Replay, n: int = 10) -> Tables:
    """Return both texts of the first ``n`` rows, what differs marked, and where they part.

    Of a pinned replay, whose texts are the same, also the ``n`` steps that changed most.
    """
    kept = {"pinned": "the same tokens", "coupled": "the same noise"}
    title = f"what the hook changed, under {kept.get(replay.mode, 'new noise')}"
    steps = {step for step in replay.first_divergence.tolist() if step >= 0}
    first = f"they part at step {min(steps)}" if steps else "no token changed"
    texts = _beside(replay.compared, title, ("base", "replay"), f"; {first}", n)
    if replay.kl is None:
        return Tables(texts)
    texts.caption = Text("Tokens are pinned: those of the base.", "table.caption")
    return Tables(_kl_table(replay, replay.kl.flatten(1), n), texts)


def comparison_table(result: RunComparison, n: int = 10) -> Table:
    """Return both texts of the first ``n`` rows of two runs, with what differs marked."""
    return _beside(result, "two runs side by side", ("base", "other"), "", n)


def _beside(
    compared: RunComparison, title: str, names: tuple[str, str], after: str, n: int
) -> Table:
    """Lay out two lines a row: the texts of both runs, with the written tokens that differ."""
    rows = len(compared.counted)
    more = f" The first {n} of {rows} rows." if rows > n else ""
    unit = " [95% over rows]" if compared.rows > 1 else ""
    caption = f"{compared.sentence}{unit}{after}."
    columns = ("row", "run", "text", "agree")
    table = new_table(title, columns, columns[:3], caption + more)
    table.show_lines = True
    texts = zip(each_run(compared.base), each_run(compared.other), strict=True)
    for row, pair in enumerate(islice(texts, n)):
        marked = compared.differs[row].tolist()
        agree = f"{int(compared.agreeing[row])} of {int(compared.written[row])}"
        for name, (run, i), style in zip(names, pair, ("bold green", "bold red"), strict=True):
            text = _text(run, i, marked, style)
            table.add_row(str(row), name, text, "" if name == "base" else agree)
    return table


def _kl_table(replay: Replay, kl: Float[Tensor, "step place"], n: int) -> Table:
    """Return a table of the steps of a pinned replay whose distributions changed most."""
    columns = ("step", "block", "mean KL (nats)", "largest KL (nats)")
    table = new_table("KL(base || replay) at masked positions, by step", columns, ("step",), "")
    largest = kl.nan_to_num().amax(-1)
    for i in largest.argsort(descending=True, stable=True)[:n].tolist():
        timeline = replay.timeline
        means = (float(kl[i].nanmean()), float(largest[i]))
        table.add_row(str(timeline.index[i]), str(timeline.block[i]), *(f"{x:.4f}" for x in means))
    return table


def mediation_table(mediation: Mediation) -> Table:
    """Return a table of an edit's effect on later blocks and its parts, by row, in nats."""
    rows = [f"row {row}" for row in range(len(mediation.base.ends))]
    title = f"log-probability of the tokens after block {mediation.block}, edited less base, nats"
    table = new_table(title, ("effect", *rows, "mean"), ("effect",), "")
    for name in ("total", "through_tokens", "through_cache", "interaction"):
        by_row = getattr(mediation, name).nansum(-1)
        values = [*by_row.tolist(), float(by_row.mean())]
        table.add_row(name.replace("_", " "), *(f"{x:+.4f}" for x in values))
    return table


def _cells(run: Run, row: int) -> tuple[Text, str, str, str, str]:
    """Return a row's text, how many tokens were written in how many steps, and how surely."""
    steps = run.commit_step[row][run.commit_step[row] >= 0]
    leads = run.lead[row][~run.lead[row].isnan()]
    return (
        _text(run, row),
        str(len(steps)),
        str(len(steps.unique())),
        f"{float(run.log_p[row].nanmean()):.3f}",
        f"{float(leads.min()):.3f}" if len(leads) else "–",
    )


def _text(run: Run, row: int, marked: list[bool] | None = None, style: str = "bold") -> Text:
    """Return a row's text, what was written in bold, or the marked positions in a style."""
    text, tokenizer = Text(), run.bridge.tokenizer
    ids = run.final[row, : int(run.ends[row])].tolist()
    marked = (run.commit_step[row] >= 0).tolist() if marked is None else marked
    for i, token in enumerate(ids):
        # Decoded with what is before it, since some tokenizers put spaces between tokens.
        word = f"{token} " if tokenizer is None else tokenizer.decode(ids[: i + 1])[len(text) :]
        text.append(word, style if marked[i] else "")
    return text
