"""Plots: each kind of file is drawn, and a name or a price that has none is refused in one line."""

import sys
from types import SimpleNamespace

import pytest
import torch

from scorelm.errors import InputError
from scorelm.viz.plots import SUFFIXES, check_plot, plot_integrand

pytest.importorskip("matplotlib")
CURVE = torch.stack([torch.logspace(-1, 1.5, 20), torch.linspace(0, 1, 20)])


def priced(integrand=CURVE):
    return SimpleNamespace(path="uniform", nats_per_token=4.02, integrand=integrand)


def test_each_kind_of_file_is_drawn(tmp_path):
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    for suffix in SUFFIXES:
        plot_integrand(priced(), 4.0, tmp_path / f"curve{suffix.upper()}")
        assert (tmp_path / f"curve{suffix.upper()}").read_bytes().startswith(starts[suffix])
    assert len(list(tmp_path.iterdir())) == len(SUFFIXES)


def test_what_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="uniform has no integral to plot"):
        plot_integrand(priced(None), 4.0, tmp_path / "a.png")
    with pytest.raises(InputError, match=r"must end in \.png, \.svg, \.pdf, not '.*a\.doc'"):
        check_plot(tmp_path / "a.doc")
    with pytest.raises(InputError, match="nowhere is not a directory"):
        check_plot(tmp_path / "nowhere" / "a.png")
    (tmp_path / "taken.svg").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*taken\.svg: Is a directory"):
        plot_integrand(priced(), 4.0, tmp_path / "taken.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.svg"]
    check_plot(None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"matplotlib is not installed: pip install 'scorelm\[viz\]'"):
        check_plot(tmp_path / "a.png")
