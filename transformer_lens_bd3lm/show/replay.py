"""A replay beside its base run, as a table."""

from rich.table import Table
from rich.text import Text

from transformer_lens_bd3lm.denoising.replay import Replay
from transformer_lens_bd3lm.show.tables import new_table


def replay_table(replay: Replay, row: int = 0) -> Table:
    """Lay out both texts of one row, with the tokens that differ in color.

    Args:
        replay: a replay.
        row: number of the row.
    """
    base = replay.base
    differ, written = int((~replay.agreement).sum()), int((base.commit_step >= 0).sum())
    first = int(replay.first_divergence[row])
    parting = "no token changed" if first < 0 else f"they part at step {first}"
    caption = f"{differ} of {written} written tokens differ; {parting}."
    title = "what the hook changed, under the same noise"
    table = new_table(title, ("run", "text"), ("run", "text"), caption)
    table.show_lines = True
    for name, run, style in (("base", base, "green"), ("edited", replay, "red")):
        text, tokens = Text(), run.final[row, : int(run.ends[row])].tolist()
        for token, agrees in zip(tokens, replay.agreement[row].tolist(), strict=False):
            word = replay.bridge.tokenizer.decode([token])
            text.append(word, style="" if agrees else f"bold {style}")
        table.add_row(name, text)
    return table
