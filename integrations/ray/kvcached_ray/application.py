"""The application: what `serve run kvcached_ray:app models=models.yaml` deploys."""

from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from kvcached_gateway.settings.config_file import absolute
from kvcached_gateway.settings.files import read_own
from kvcached_ray.cluster import Cluster
from kvcached_ray.door import Door
from kvcached_ray.fit import check_ray
from kvcached_ray.node import Node

__all__ = ["Arguments", "app"]

MANY = 100_000  # of replicas, and of requests at once: our own lines are what limits them
HEAD = {"node:__internal_head__": 0.001}  # Ray gives its head node one of these
END_SECONDS = 60.0  # requests have half of it, and engines the rest
# One loop for all of a replica, instead of a thread each for Serve's and for ours: a request that
# passes from one to the other waits for the interpreter's lock each time.
ONE_LOOP = {
    "env_vars": {
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    }
}
QUIET = {"enable_access_log": False}  # the gateway counts requests, and nodes report all the time


class Arguments(BaseModel):
    """What the application is told.

    Attributes:
        models: The file of models; its text goes to all nodes, and paths in it are each node's own.
            `kvcached reload` reads it again, on the head node.
        gpus: How many GPUs the gateway of a node has; without it all of the node that has most.
        resource: A resource of Ray's of which the gateway of a node takes one; only nodes that have
            it get a gateway.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: Path
    gpus: float | None = Field(default=None, ge=0)
    resource: str | None = None


def app(arguments: Arguments) -> serve.Application:
    """Return the application, to be run by Serve.

    Raises:
        ConfigError: If the file of models cannot be read, or Ray is no release that we know.
    """
    check_ray()
    path = absolute(arguments.models, Path.cwd())
    text = read_own(path)
    gpus = _most_gpus() if arguments.gpus is None else arguments.gpus
    own = {} if arguments.resource is None else {arguments.resource: 1.0}
    cluster = serve.deployment(
        Cluster,
        num_replicas=1,
        max_ongoing_requests=MANY,
        logging_config=QUIET,
        user_config={},
        ray_actor_options={"num_cpus": 0, "resources": HEAD, "runtime_env": ONE_LOOP},
    )
    node = serve.deployment(
        Node,
        autoscaling_config=_one_each({"GPU": gpus, **own}),
        max_replicas_per_node=1,
        max_ongoing_requests=MANY,
        logging_config=QUIET,
        user_config={},
        graceful_shutdown_timeout_s=END_SECONDS,
        ray_actor_options={
            "num_cpus": 0,
            "num_gpus": gpus,
            "resources": own,
            "runtime_env": ONE_LOOP,
        },
    )
    door = serve.deployment(
        serve.ingress()(Door),
        name="Door",
        autoscaling_config=_one_each({}),
        max_replicas_per_node=1,
        max_ongoing_requests=MANY,
        logging_config=QUIET,
        user_config={},
        ray_actor_options={"num_cpus": 0, "runtime_env": ONE_LOOP},
    )
    handle = cluster.bind(str(path), text)
    return door.bind(handle, node.bind(handle))


def _one_each(takes: dict[str, float]) -> AutoscalingConfig:
    policy: dict[str, Any] = {
        "policy_function": "kvcached_ray.counting:OneEachNode",
        "policy_kwargs": {"takes": {name: num for name, num in takes.items() if num}},
    }
    return AutoscalingConfig(
        min_replicas=1,
        max_replicas=MANY,
        upscale_delay_s=0,
        downscale_delay_s=0,
        policy=AutoscalingPolicy(**policy),
    )


def _most_gpus() -> float:
    if not ray.is_initialized():  # `serve run` connects behind this, and only where nobody did
        ray.init(namespace="serve")
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return max((resources.get("GPU", 0.0) for resources in alive), default=0.0)
