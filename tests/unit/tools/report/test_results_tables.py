import pytest
from conftest import ROOT

from modiff_trt.core.errors import InputError
from modiff_trt.tools.report.results_tables import render


@pytest.mark.parametrize("document", ["README.md", "docs/results.md", "docs/robustness.md", "docs/lab/studies.md"])
def test_tables_are_those_of_the_results(document):
    text = (ROOT / document).read_text()
    assert "<!-- table: " in text
    assert render(text, ROOT / "results") == text


def test_unknown_table_is_refused(tmp_path):
    with pytest.raises(InputError, match="unknown table"):
        render("<!-- table: nothing -->\n<!-- end -->", tmp_path)
