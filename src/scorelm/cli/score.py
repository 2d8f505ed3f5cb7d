"""``scorelm score``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import arg

from scorelm.cli.listing import pricing_help
from scorelm.cli.model import Device, Model, open_model
from scorelm.cli.printing import show, tell
from scorelm.cli.texts import Texts, load_texts
from scorelm.cli.verb import Verb
from scorelm.config.generation import Pricing

if TYPE_CHECKING:
    from scorelm.evaluation.price import Price


class ScoreVerb(Verb):
    """Options of ``scorelm score``.

    Prints what the texts cost, in nats per token and in bits per character (the less, the better they are predicted),
    and whether that is exact or an upper bound. A model has a price for each path on which it can write a text.
    """

    less_memory: ClassVar[str] = "use a smaller model, or --device cpu if that was a GPU's"

    model: Model = None
    texts: Annotated[Texts, arg(name="")] = Texts()
    device: Device = "auto"
    pricing: Annotated[Pricing, arg(name="")] = Pricing()
    plot: Path | None = None
    """Draw which noise levels the nats come from: a .png, .svg or .pdf file (needs the extra viz)."""
    as_json: Annotated[bool, arg(name="json")] = False
    """Print JSON: path, exact, kind (the same in words), nats_per_token, bits_per_char (null where a text does not come
    back from the tokenizer, unless --lossy, and where there is no character), stderr_nats_per_token, tokens, nfe (mean
    number of evaluations of the network for a text), unknown_characters (those that don't come back), terms (the parts
    of nats_per_token), data (what was measured) and held_out (true: training saw none of it; false: it saw some; null:
    it is another text)."""

    def run(self) -> int:
        """Price the texts and print the price."""
        from scorelm.evaluation.price import check_pricing, price
        from scorelm.parallel import launched
        from scorelm.viz.plots import check_plot, plot_integrand
        from scorelm.viz.progress import progress

        check_pricing(self.pricing)
        check_plot(self.plot)
        with launched() as ranks:
            lm = open_model(self.model, self.device)
            measured = load_texts(lm.provenance, self.texts)
            with progress("pricing", ranks.main) as watch:
                found = price(lm, measured.texts, watch=watch, ranks=ranks, **self.pricing.model_dump())
        if not ranks.main:
            return 0
        if self.plot is not None:
            plot_integrand(found, lm.norm, self.plot)
        tell(measured.what)
        if self.as_json:
            facts = {"data": measured.what, "held_out": measured.held_out}
            show(json.dumps(found.to_json() | facts, indent=2))
        else:
            print_price(found, self.pricing.lossy)
        return 0

    @classmethod
    def more_help(cls) -> str:
        """The paths that there are."""
        return pricing_help()


def print_price(found: Price, lossy: bool) -> None:
    """The price, its terms and what it leaves out; on stderr, how much was measured."""
    bits = "" if found.bits_per_char is None else f", {found.bits_per_char:.3f} bits/character"
    lines = [
        f"{found.path}: {found.nats_per_token:.3f} +- {found.stderr_nats_per_token:.3f} nats/token{bits}, {found.kind}",
        "  " + "  ".join(f"{name} {value:.3f}" for name, value in found.terms.items()),
    ]
    if found.unknown_characters:
        so = "what comes back is what is priced" if lossy else "so there are no bits/character without --lossy"
        lines.append(f"  characters that do not come back from the tokenizer: {found.unknown_characters:,}, {so}")
    show("\n".join(lines))
    tell(f"  {found.tokens:,} tokens, {found.nfe:,.1f} evaluations of the network for a text")
