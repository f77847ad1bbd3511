import io

from rich.console import Console

from transformer_lens_bd3lm.progress import progress_bar


def drawn(**options) -> str:
    console = Console(file=io.StringIO(), **options)
    with progress_bar("reading", lambda: 3, console=console) as update:
        update(advance=1)
        update(completed=3)
    return console.file.getvalue()


def test_a_bar_is_drawn_on_a_terminal_alone():
    shown = drawn(force_terminal=True, force_interactive=True, width=80)
    assert "reading" in shown and "3/3" in shown
    assert drawn(force_terminal=False) == ""


def test_the_total_is_counted_only_for_a_bar_that_is_shown():
    with progress_bar("reading", lambda: 1 // 0, wanted=False) as update:
        update(advance=1, total=3)
