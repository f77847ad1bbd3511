"""Speed of a bridge on a machine, as a table."""

from rich.table import Table

from transformer_lens_bd3lm.analysis.speed import BASE, Speed
from transformer_lens_bd3lm.show.tables import Tables, new_table


def speed_tables(speed: Speed) -> Tables:
    """Lay out the ways to write a text, and the kernels for few rows if any were chosen."""
    return Tables(_ways_table(speed), *([_kernel_table(speed)] if speed.kernels else []))


def _kernel_table(speed: Speed) -> Table:
    """Lay out the kernel of each number of rows, a line each."""
    columns = ("rows\nup to", "kernel", "GB/s", "F.linear\nGB/s")
    caption = "Measured once per process: F.linear, unless another kernel is clearly faster."
    table = new_table("kernels of large linear layers", columns, ("kernel",), caption)
    for kernel in speed.kernels:
        rates = (kernel.bytes_per_second, kernel.plain_bytes_per_second)
        table.add_row(str(kernel.rows), kernel.name, *(f"{rate / 1e9:.1f}" for rate in rates))
    return table


def _ways_table(speed: Speed) -> Table:
    """Lay out each way to write, a line each: tokens, passes, and how near the memory bound."""
    machine = f"{speed.device}, {speed.dtype}"
    if speed.instructions:
        machine += f", {speed.instructions}, {speed.threads} threads"
    caption = (
        f"{machine}. A pass reads {speed.weight_bytes / 1e6:,.0f} MB of weights, which takes "
        f"{speed.bound * 1e3:.1f} ms at the {speed.bytes_per_second / 1e9:.1f} GB/s that this "
        f"memory gives: the memory bound. 'bound' is its share of the time of a pass. Ratios are "
        f"of tokens/s, to {BASE!r}."
    )
    columns = ("way", "block\nsize", "tokens/s", "ratio", "tokens\na pass", "ms\na pass", "bound")
    table = new_table(f"{speed.model}: writing", columns, ("way",), caption)
    for name, line in speed.lines.items():
        table.add_row(
            name,
            str(line.block_size),
            f"{line.tokens_per_second:.1f}",
            f"{speed.ratio(name):.2f}",
            f"{line.tokens_per_pass:.2f}",
            f"{line.pass_seconds * 1e3:.1f}",
            f"{speed.bound / line.pass_seconds:.0%}",
        )
    return table
