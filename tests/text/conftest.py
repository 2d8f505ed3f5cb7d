"""What tests of text share."""

import datasets
import pytest

from scorelm.text.corpus import load_corpus


@pytest.fixture(scope="session")
def kjv(tmp_path_factory):
    """The embedded corpus, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("kjv"))
        return load_corpus("kjv")
