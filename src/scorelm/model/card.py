"""The model card: what a model is, what it was trained on, what text costs it, and how to use it."""

from __future__ import annotations

from huggingface_hub import EvalResult, ModelCardData

from scorelm.model.directory import Manifest, Provenance


def model_card(manifest: Manifest, title: str, parameters: int, recipe: str, name: str, licence: str | None) -> str:
    """The card of a model, in Markdown, with the hub's fields above it.

    Args:
        manifest: what config.json says.
        title: the kind of model, in words.
        parameters: number of learned parameters.
        recipe: the options of its training, as TOML; "" where they are not known.
        name: what the model is loaded by.
        licence: identifier of its licence, as the hub has them; None for none.
    """
    made, size = manifest.provenance, manifest.model.size
    data = ModelCardData(
        library_name="scorelm", pipeline_tag="text-generation", tags=["diffusion", "score-based"], license=licence,
        model_name=name, eval_results=measured(made) or None,
    )  # fmt: skip
    heldout = "" if made.heldout_loss is None else f", loss of training on held-out text {made.heldout_loss:.3f} nats"
    parts = [
        f"---\n{data.to_yaml()}\n---\n# {title} language model\n",
        f"Trained with scorelm on `{made.data}`: {made.steps:,} steps, {made.tokens:,} tokens{heldout}.",
        *([f"It started from {started(made)}."] if made.init_from else []),
        *([f"Held-out text costs it, in nats per token by path: {prices(made)}."] if made.prices else []),
        f"{parameters:,} parameters: width {size.dim}, {size.layers} layers, {size.heads} heads, "
        f"embeddings of size {manifest.model.embedding_dim}, vocabulary {manifest.vocab_size:,}, "
        f"length up to {len(manifest.lengths) - 1}.",
        *([f"Fingerprint of the text: `{made.fingerprint}`{held_out(made)}."] if made.fingerprint else []),
        *([f"Licence: {licence}."] if licence else []),
        '\n```python\nfrom scorelm import ScoreLM\n\n'
        f'lm = ScoreLM.from_pretrained("{name}")\nfor sample in lm.generate(n=4):\n    print(sample.text)\n```\n',
        *([f"The recipe, for `scorelm train --recipe recipe.toml`:\n\n```toml\n{recipe}```\n"] if recipe else []),
    ]  # fmt: skip
    return "\n".join(parts)


def started(made: Provenance) -> str:
    """What training started from, and what that was trained on, where it is known."""
    return f"`{made.init_from}`" + (f", trained on `{made.before.data}`" if made.before else "")


def prices(made: Provenance) -> str:
    """What held-out text costs, by path, in words."""
    figures = ", ".join(f"{path} {nats:.3f}" for path, nats in made.prices.items() if path != "stderr")
    return f"{figures} (±{made.prices['stderr']:.3f})" if "stderr" in made.prices else figures


def held_out(made: Provenance) -> str:
    """Which share of the text training never saw, where that is known."""
    return "" if made.holdout is None else f", of which {made.holdout:.1%} was held out"


def measured(made: Provenance) -> list[EvalResult]:
    """The prices as the hub shows results."""
    return [
        EvalResult("text-generation", "text", f"{made.data}, held out", "nats_per_token", nats, metric_name=path)
        for path, nats in made.prices.items()
        if path != "stderr"
    ]
