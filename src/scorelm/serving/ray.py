"""Replicas of the server on a Ray cluster: ``serve run scorelm.serving.ray:build model=/shared/model replicas=4``."""

from __future__ import annotations

import os

from fastapi import FastAPI
from ray import serve

from scorelm.config.serving import Serving
from scorelm.device import pick_device
from scorelm.lm import ScoreLM
from scorelm.serving.app import make_app


def build(options: dict[str, str]) -> serve.Application:
    """The application that ``serve run`` deploys.

    Args:
        options: ``model`` (a directory that every machine has, or a name on the hub; by default the model that comes
            along), ``replicas`` (2, or a range to scale within, such as 1-8), ``gpus`` of each replica (0), ``name``,
            and the limits of `Serving`. The token comes from SCORELM_TOKEN.
    """
    options = dict(options)
    model, name, gpus = options.pop("model", None), options.pop("name", "scorelm"), float(options.pop("gpus", 0))
    low, _, high = options.pop("replicas", "2").partition("-")
    limits = Serving.of(**{"host": "0.0.0.0", "token": os.environ.get("SCORELM_TOKEN"), **options})
    limits.check()

    def replica() -> FastAPI:
        return make_app(ScoreLM.from_pretrained(model).to(pick_device("auto")), limits, name)

    return serve.deployment(
        serve.ingress(replica)(), name="scorelm", max_ongoing_requests=limits.queue,
        ray_actor_options={"num_gpus": gpus}, num_replicas=None if high else int(low),
        autoscaling_config={"min_replicas": int(low), "max_replicas": int(high)} if high else None,
    ).bind()  # fmt: skip
