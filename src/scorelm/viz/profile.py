"""What a text is like, as a page of tables and small charts for a terminal."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from scorelm.errors import brief
from scorelm.text.profile import Statistics
from scorelm.text.statistics import Bin, Lengths, Packing

NARROWEST, WIDEST = 60, 100
"""Columns of the page."""
BAR = 14
"""Characters of the longest bar."""
EIGHTHS = " ▏▎▍▌▋▊▉"


def draw_profile(facts: dict[str, Any], found: Statistics, next_step: str) -> str:
    """The page as text, with colours where stdout is a terminal.

    Args:
        facts: ``name``, ``notes``, ``max_length`` and ``tokenizer``, as ``scorelm data --json`` has them.
        found: what the text is like.
        next_step: a command to name at the end.
    """
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    parts = [
        (facts["name"], count_examples(found, facts["notes"][1:])),
        ("Length of an example", show_lengths(found)),
        (f"Rows of {facts['max_length']:,} tokens", show_packing(found, facts["max_length"])),
        ("Tokens", show_tokens(found, facts["tokenizer"])),
        ("The longest examples", show_longest(found)),
    ]
    with console.capture() as page:
        for title, body in parts:
            console.print(Text(title, style="bold"))
            console.print(body)
            console.print()
        console.print(f"What a run on this text would be: {next_step}", soft_wrap=True)
    return "\n".join(line.rstrip() for line in page.get().splitlines())


def grid(rows: Sequence[tuple[str, RenderableType]]) -> Table:
    """Names and what is to be said of each, indented."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=1)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for name, said in rows:
        table.add_row("", name, said)
    return table


def figures(*names: str) -> Table:
    """A table without lines, of numbers, behind a narrow column for a mark."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("", width=1)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    return table


def number(count: int, one: str) -> str:
    """A count with its noun: 1 token, 2 tokens."""
    return f"{count:,} {one}{'s' * (count != 1)}"


def share(part: float) -> str:
    """A share in per cent, none of which is hidden by rounding."""
    return f"{part:.1%}" if part >= 0.001 or not part else "under 0.1%"


def count_examples(found: Statistics, notes: Sequence[str]) -> Table:
    """How many there are, what is left out and what repeats."""
    rows: list[tuple[str, RenderableType]] = []
    if found.records:
        rows.append(("records", f"{found.records:,}, {found.missing:,} without the field"))
        rows.append(("fields", brief(", ".join(found.fields))))
    rows += [
        ("examples", f"{found.examples:,}: {found.train:,} to train on, {found.heldout:,} held out"),
        ("blank", f"{found.blank:,}, left out" if found.blank else "none"),
        ("duplicates", f"{found.exact_duplicates:,} exact, {found.near_duplicates:,} more but for case and spaces"),
    ]
    for k, (times, text) in enumerate((one.times, one.text) for one in found.most_repeated):
        rows.append(
            ("most often" if not k else "", Text(f"{times:,} x ", no_wrap=True, overflow="ellipsis") + begins(text))
        )
    return grid([*rows, *(("note", note) for note in notes)])


def show_lengths(found: Statistics) -> Group:
    """Quantiles and histograms of lengths in characters and in tokens."""
    table = figures("", "min", "median", "mean", "90%", "99%", "max", "all")
    pair = {"characters": found.characters, "tokens": found.tokens}
    for name, one in pair.items():
        numbers = (one.min, one.median, f"{one.mean:,.1f}", one.p90, one.p99, one.max, one.total)
        table.add_row("", name, *(n if isinstance(n, str) else f"{n:,}" for n in numbers))
    charts = Table.grid(padding=(0, 4, 0, 0))
    charts.add_row(*(chart(name, one) for name, one in pair.items()))
    return Group(table, "", charts)


def chart(name: str, lengths: Lengths) -> Table:
    """A histogram with a bar for each bin."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=2)
    table.add_column(justify="right", no_wrap=True, style="cyan")
    table.add_column(no_wrap=True, style="green")
    table.add_column(justify="right", no_wrap=True)
    most = max(one.count for one in lengths.histogram)
    table.add_row("", Text(name, style="dim"), "", Text("examples", style="dim"))
    for k, one in enumerate(lengths.histogram):
        table.add_row("", span(one, k + 1 == len(lengths.histogram)), bar(one.count / most), f"{one.count:,}")
    return table


def span(one: Bin, last: bool) -> str:
    """The lengths of a bin in words; the last one is open."""
    if one.low == one.high:
        return f"{one.low:,}"
    return f"{one.low:,} or more" if last else f"{one.low:,} to {one.high:,}"


def bar(part: float) -> str:
    """A bar of that share of the longest one, in eighths of a character, and never nothing where there is something."""
    whole, rest = divmod(max(round(8 * BAR * part), int(part > 0)), 8)
    return ("█" * whole + EIGHTHS[rest]).strip().ljust(BAR)


def show_packing(found: Statistics, max_length: int) -> Group:
    """What rows of several widths make of the training side."""
    own = next(one for one in found.packing if one.width == max_length)
    cut = f"{own.longer:,} of {found.train:,} to train on, cut into {own.windows:,} windows" if own.longer else "none"
    table = figures("width", "too long", "windows", "rows an epoch", "filled")
    for one in found.packing:
        style = "bold" if one is own else None
        table.add_row(">" if one is own else "", *packed(one), style=style)
    lines: list[RenderableType] = [grid_line(f"Longer examples: {cut}."), "", table]
    whole = found.train_tokens
    if found.packed_tokens < whole:
        lines += [
            "",
            grid_line(f"Filled: as {found.packed_tokens:,} of the {whole:,} tokens pack, spread over the text."),
        ]
    return Group(*lines)


def packed(one: Packing) -> tuple[str, ...]:
    """The cells of a row width."""
    return f"{one.width:,}", f"{one.longer:,}", f"{one.windows:,}", f"{one.rows:,}", f"{one.efficiency:.1%}"


def grid_line(text: str) -> Table:
    """A paragraph, indented."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=1)
    table.add_row("", text)
    return table


def show_tokens(found: Statistics, tokenizer: str | None) -> Table:
    """Which tokens the text is made of."""
    words = found.vocabulary
    made = f"of {words.size:,} tokens, " + (f"from {brief(tokenizer)}" if tokenizer else "as training would make it")
    unused = f"{words.unused:,} tokens" + (f" and {words.unused_bytes:,} bytes" if words.unused_bytes else "")
    unused += f": {'  '.join(map(brief, words.unused_pieces))}" if words.unused_pieces else ""
    unknown = "none, and every character comes back"
    if words.unknown_share or found.lost_characters:
        lost = f"{number(found.lost_characters, 'character')} of the text come back otherwise, or not at all"
        unknown = f"{share(words.unknown_share)} of all tokens; {lost}"
    common = Columns([f"{brief(one.piece)} {share(one.share)}" for one in words.commonest], padding=(0, 2))
    return grid([
        ("tokenizer", made),
        ("used", f"{words.used:,} of {words.size:,}"),
        ("never used", unused),
        ("commonest", common),
        ("in bytes", f"{share(words.byte_share)} of all tokens" if words.byte_share else "none"),
        ("unknown", unknown),
        ("characters", f"{found.characters_per_token:.2f} in a token"),
        ("entropy", f"{words.entropy_nats:.3f} nats or {words.entropy_bits:.3f} bits a token, by frequency alone"),
    ])  # fmt: skip


def begins(text: str) -> Text:
    """The first words of a text, as many as fit in the line."""
    return Text(brief(" ".join(text.split())), no_wrap=True, overflow="ellipsis")


def show_longest(found: Statistics) -> Table:
    """The longest examples and how they begin."""
    table = figures("characters", "tokens", "begins")
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    for one in found.longest:
        table.add_row("", f"{one.characters:,}", f"{one.tokens:,}", begins(one.text))
    return table
