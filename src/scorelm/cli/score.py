"""``scorelm score``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import arg

from scorelm.cli.listing import pricing_help
from scorelm.cli.model import DEFAULT_MODEL, Device, Model, open_model
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

    model: Model = DEFAULT_MODEL
    texts: Annotated[Texts, arg(name="")] = Texts()
    device: Device = "auto"
    pricing: Annotated[Pricing, arg(name="")] = Pricing()
    plot: Path | None = None
    """Draw which noise levels the nats come from: a .png, .svg or .pdf file (needs the extra viz)."""
    as_json: Annotated[bool, arg(name="json")] = False
    """Print JSON: path, exact, nats_per_token, bits_per_char, stderr_nats_per_token, tokens, nfe (mean number of
    evaluations of the network for a text) and terms (the parts of nats_per_token)."""

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
            texts, what = load_texts(lm, self.texts)
            with progress(f"pricing {what}", ranks.main) as watch:
                found = price(lm, texts, watch=watch, ranks=ranks, **self.pricing.model_dump())
        if not ranks.main:
            return 0
        if self.plot is not None:
            plot_integrand(found, lm.norm, self.plot)
        if self.as_json:
            show(json.dumps(found.to_json(), indent=2))
        else:
            print_price(found)
        return 0

    @classmethod
    def more_help(cls) -> str:
        """The paths that there are."""
        return pricing_help()


def print_price(found: Price) -> None:
    """The price and its terms; on stderr, how much was measured."""
    kind = "exact" if found.exact else "upper bound"
    show(
        f"{found.path} ({kind}): {found.nats_per_token:.3f} +- {found.stderr_nats_per_token:.3f} nats/token, "
        f"{found.bits_per_char:.3f} bits/character\n"
        "  " + "  ".join(f"{name} {value:.3f}" for name, value in found.terms.items())
    )
    tell(f"  {found.tokens:,} tokens, {found.nfe:,.1f} evaluations of the network for a text")
