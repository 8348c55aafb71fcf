"""What tests on nodes of Ray share: two nodes that serve models with real engines."""

from collections.abc import Iterator

import pytest
from helpers.gateway_life import short_folder
from helpers.ray_models import FEW, MANY
from helpers.ray_nodes import RayCluster, ray_cluster


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(FEW, id="few", marks=pytest.mark.every_release),
        pytest.param(MANY, id="many", marks=pytest.mark.every_release),
    ],
)
def cluster(request: pytest.FixtureRequest) -> Iterator[RayCluster]:
    """Serve from two nodes; what kills one (`test_ray_survival`) runs last."""
    with short_folder() as folder, ray_cluster(folder, request.param) as served:
        yield served
