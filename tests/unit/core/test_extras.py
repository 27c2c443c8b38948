"""The hint for a missing extra works where the program lies."""

from conftest import ROOT

from modiff_trt.core import extras
from modiff_trt.core.extras import install_command


def test_a_checkout_needs_no_index_and_an_installation_has_one(monkeypatch, tmp_path):
    assert install_command("rtx") == f"pip install -e '{ROOT}[rtx]'"
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "site-packages/modiff_trt/core/extras.py"))
    assert install_command("rtx") == "pip install 'modiff-trt[rtx]'"
