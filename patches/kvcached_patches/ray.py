"""What the application for many machines leans on of Ray; nothing of it is hooked."""

from kvcached_patches.hook import members, uses

PACKAGE = "ray"
OLDEST_RELEASES = {"ray": "2.60.0"}

_SERVE = "ray.serve"
_PRIVATE = "ray.serve._private"

LOCKED = (
    *uses(
        "the application is made of it",
        f"{_SERVE}.api:deployment",
        f"{_SERVE}.api:ingress",
        f"{_SERVE}.deployment:Deployment.bind",
        f"{_SERVE}.deployment:Application",
    ),
    *uses(
        "a policy of ours says how many replicas there are: it is called with a context, and "
        "returns a number and a state",
        *members(
            f"{_SERVE}.config:AutoscalingConfig",
            "min_replicas max_replicas upscale_delay_s downscale_delay_s policy",
        ),
        *members(f"{_SERVE}.config:AutoscalingPolicy", "policy_function policy_kwargs"),
        f"{_PRIVATE}.autoscaling_state:_resolve_policy_callable",
        f"{_PRIVATE}.autoscaling_state:DeploymentAutoscalingState.get_decision_num_replicas",
    ),
    *uses(
        "Serve begins and ends a replica with it, and asks an ingress for its ASGI application",
        f"{_PRIVATE}.replica:SERVE_BUILD_ASGI_APP_METHOD",
        f"{_PRIVATE}.http_util:ASGIAppReplicaWrapper._set_asgi_app",
        *members(f"{_PRIVATE}.replica:UserCallableWrapper", "call_reconfigure call_destructor"),
    ),
    *uses(
        "one loop serves all of a replica, and the proxy asks the door of its own node first",
        f"{_PRIVATE}.constants:RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD",
        f"{_PRIVATE}.constants:RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP",
        f"{_PRIVATE}.constants:RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING",
    ),
    *uses(
        "nodes report by it, and doors ask",
        f"{_SERVE}.handle:DeploymentHandle.remote",
        f"{_SERVE}.handle:DeploymentResponse.__await__",
    ),
    *uses(
        "it says which nodes there are, and which one this is",
        "ray._private.state:nodes",
        "ray.runtime_context:RuntimeContext.get_node_id",
    ),
)
