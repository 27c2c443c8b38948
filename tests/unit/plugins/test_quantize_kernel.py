"""The Triton kernel, in its interpreter here and on the GPU in tests/gpu, against the reference in float64."""

import pytest
from kernel_cases import CASES, check


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_the_reference(name):
    check(CASES[name], "cpu")
