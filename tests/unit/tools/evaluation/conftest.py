"""Random weights of the Inception network: the published ones are a download."""

import pytest
import torch

from modiff_trt.tools.evaluation import inception


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    network = inception.build_network()
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            spread = torch.rand_like(value) + 0.5 if name.endswith(("running_var", "bn.weight")) else torch.randn_like(value)
            value.copy_(spread if value.ndim < 2 else spread * (2 / value[0].numel()) ** 0.5)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path
