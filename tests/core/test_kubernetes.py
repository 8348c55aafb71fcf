"""The manifests agree with each other, with the gateway, and with what their README says.

`make check-manifests` validates the kinds that are Kubernetes' own.
"""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.documents import ROOT, blocks

from kvcached_gateway.settings.config_file import read_settings

FOLDER = ROOT / "examples" / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))
README = FOLDER / "README.md"
LINES = [line for block in blocks(README) for line in block]
# What asks the cluster for rights, or takes more of a node than a folder and its GPUs.
WITHOUT = {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding", "ServiceAccount"}
# The fields of an InferencePool of inference.networking.k8s.io/v1 in v1.0.0: (needed, allowed).
# A later release allows more: `appProtocol`, 8 target ports, a pool without an endpoint picker.
POOL = {
    "spec": ({"selector", "targetPorts", "endpointPickerRef"}, set()),
    "selector": ({"matchLabels"}, set()),
    "targetPorts": ({"number"}, set()),
    # `port` is needed where `kind` is Service, which it is when it is not there.
    "endpointPickerRef": ({"name", "port"}, {"group", "kind", "failureMode"}),
    "port": ({"number"}, set()),
}
LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9])?")


def objects(*names: str) -> list[dict[str, Any]]:
    files = [FOLDER / name for name in names] or FILES
    return [one for file in files for one in yaml.safe_load_all(file.read_text())]


def of_kind(kind: str, *names: str) -> list[dict[str, Any]]:
    return [one for one in objects(*names) if one["kind"] == kind]


WITH_PODS = [*of_kind("DaemonSet"), *of_kind("Deployment")]


def named(one: dict[str, Any]) -> str:
    return str(one["metadata"]["name"])


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (found,) = workload["spec"]["template"]["spec"]["containers"]
    return dict(found)


def environ(workload: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container(workload)["env"]}


def test_nothing_asks_the_cluster_for_rights() -> None:
    assert not WITHOUT & {one["kind"] for one in objects()}
    for workload in WITH_PODS:
        pod = workload["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostPID", "hostIPC", "hostNetwork", "serviceAccountName"} & set(pod)
        assert container(workload)["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in container(workload)["securityContext"]


def test_all_are_in_the_namespace_that_allows_a_folder_of_the_node() -> None:
    (namespace,) = of_kind("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"
    others = [one for one in objects() if one is not namespace and one["kind"] != "Namespace"]
    assert {one["metadata"]["namespace"] for one in others} == {named(namespace)}


@pytest.mark.parametrize("workload", WITH_PODS, ids=named)
def test_the_ledger_lies_in_the_nodes_folder_and_is_made_by_its_engines(
    workload: dict[str, Any],
) -> None:
    """Kubernetes makes a folder that others may read, and a ledger's folder must not be one."""
    mounts = {one["name"]: one["mountPath"] for one in container(workload)["volumeMounts"]}
    volumes = {one["name"]: one for one in workload["spec"]["template"]["spec"]["volumes"]}
    assert set(mounts) == set(volumes)
    assert volumes["ledgers"]["hostPath"] == {
        "path": "/dev/shm/kvcached",  # noqa: S108  the node's
        "type": "DirectoryOrCreate",
    }
    assert Path(environ(workload)["KVCACHED_DIR"]).parent == Path(mounts["ledgers"])
    assert container(workload)["securityContext"]["runAsUser"] == 0, "it owns that folder"


@pytest.mark.parametrize("workload", WITH_PODS, ids=named)
def test_labels_ports_and_services_agree(workload: dict[str, Any]) -> None:
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"] == labels
    (service,) = (one for one in of_kind("Service") if named(one) == named(workload))
    assert service["spec"]["selector"] == labels
    ports = {one["name"] for one in container(workload)["ports"]}
    assert {one["targetPort"] for one in service["spec"]["ports"]} <= ports
    assert container(workload)["readinessProbe"]["httpGet"]["port"] in ports


def test_engines_of_their_own_have_names_of_their_own_and_are_never_two() -> None:
    engines = of_kind("Deployment", "engines.yaml")
    assert [environ(one)["KVCACHED_NAME"] for one in engines] == [named(one) for one in engines]
    assert {environ(one)["KVCACHED_DIR"] for one in WITH_PODS} == {"/var/lib/kvcached/ledgers"}
    for one in engines:
        assert one["spec"]["strategy"] == {"type": "Recreate"}
        assert one["spec"]["replicas"] == 1


def test_the_gateway_reads_its_models_and_its_keys_as_a_pod_has_them(tmp_path: Path) -> None:
    (mapped,) = of_kind("ConfigMap")
    (gateway,) = of_kind("DaemonSet")
    for name, text in mapped["data"].items():  # files of a volume are links to links
        (tmp_path / "..2026").mkdir(exist_ok=True)
        (tmp_path / "..2026" / name).write_text(text)
        os.chmod(tmp_path / "..2026" / name, 0o444)  # noqa: PTH101  as `defaultMode` says
        (tmp_path / "..data").symlink_to("..2026")
        (tmp_path / name).symlink_to(f"..data/{name}")
    *_, path = container(gateway)["command"]
    mounts = {one["name"]: one["mountPath"] for one in container(gateway)["volumeMounts"]}
    assert Path(path).parent == Path(mounts["models"])
    settings = read_settings(tmp_path / Path(path).name)
    assert settings.keys_file
    assert settings.keys_file.parent == Path(mounts["keys"])
    (port,) = (one["containerPort"] for one in container(gateway)["ports"])
    assert settings.listen == f"0.0.0.0:{port}"
    volumes = {one["name"]: one for one in gateway["spec"]["template"]["spec"]["volumes"]}
    assert volumes["models"]["configMap"]["name"] == named(mapped)
    assert volumes["keys"]["secret"]["defaultMode"] & 0o077 == 0, "they are secrets"


def mistakes_of_pool(spec: dict[str, Any]) -> list[str]:
    """Return what a cluster would refuse of an InferencePool, as the release above would."""
    picker = spec.get("endpointPickerRef", {})
    ports = spec.get("targetPorts", [])
    parts = [
        ("spec", spec),
        ("selector", spec.get("selector", {})),
        *(("targetPorts", port) for port in ports),
        ("endpointPickerRef", picker),
        ("port", picker.get("port", {})),
    ]
    found = []
    for name, part in parts:
        needed, allowed = POOL[name]
        found += [f"{name} needs {key}" for key in sorted(needed - set(part))]
        found += [f"{name} has no {key}" for key in sorted(set(part) - needed - allowed)]
    numbers = [port.get("number") for port in (*ports, picker.get("port", {}))]
    found += [f"{number} is no port" for number in numbers if number not in range(1, 65536)]
    if len(ports) != 1:
        found.append(f"{len(ports)} target ports, where v1.0.0 has one")
    if picker.get("failureMode", "FailClose") not in {"FailOpen", "FailClose"}:
        found.append(f"failureMode is {picker['failureMode']}")
    labels = spec.get("selector", {}).get("matchLabels", {})
    found += [
        f"{value} is no label" for value in labels.values() if not LABEL_VALUE.fullmatch(value)
    ]
    return found


def test_the_pool_has_what_its_release_needs_and_nothing_else() -> None:
    (pool,) = of_kind("InferencePool")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert mistakes_of_pool(pool["spec"]) == []


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        ({"targetPortNumber": 8080}, "spec has no targetPortNumber"),  # v1alpha2's
        ({"extensionRef": {"name": "picker"}}, "spec has no extensionRef"),  # v1alpha2's
        ({"selector": {"app": "kvcached"}}, "selector needs matchLabels"),  # v1alpha2's
        ({"targetPorts": []}, "0 target ports, where v1.0.0 has one"),
        ({"targetPorts": [{"number": 0}]}, "0 is no port"),
        ({"endpointPickerRef": {"name": "p"}}, "endpointPickerRef needs port"),
        ({"endpointPickerRef": {"port": {"number": 1}}}, "endpointPickerRef needs name"),
        (
            {"endpointPickerRef": {"name": "p", "portNumber": 1}},  # a candidate of v1.0.0 had it
            "endpointPickerRef has no portNumber",
        ),
        (
            {"endpointPickerRef": {"name": "p", "port": {"number": 1}, "failureMode": "Open"}},
            "failureMode is Open",
        ),
        ({"selector": {"matchLabels": {"app": "a b"}}}, "a b is no label"),
    ],
)
def test_a_pool_of_another_release_or_with_a_mistake_is_seen(
    change: dict[str, Any], mistake: str
) -> None:
    (pool,) = of_kind("InferencePool")
    assert mistake in mistakes_of_pool({**pool["spec"], **change})


def test_the_pool_holds_the_gateways_and_the_route_leads_to_it() -> None:
    (pool,) = of_kind("InferencePool")
    (gateway,) = of_kind("DaemonSet")
    spec = pool["spec"]
    assert spec["selector"]["matchLabels"] == gateway["spec"]["selector"]["matchLabels"]
    (port,) = (one["containerPort"] for one in container(gateway)["ports"])
    assert spec["targetPorts"] == [{"number": port}]
    (route,) = of_kind("HTTPRoute")
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    (reference,) = route["spec"]["rules"][0]["backendRefs"]
    group, _ = pool["apiVersion"].split("/")
    assert reference == {"group": group, "kind": "InferencePool", "name": named(pool)}


@pytest.mark.parametrize(
    ("page", "ran", "did_not"),
    [
        (
            README,
            "In CI: `make check-manifests` validates all objects",
            "No cluster, no container engine and no inference gateway was there.",
        ),
        (
            ROOT / "docs" / "scaling.md",
            "What runs in CI: these two commands",
            "A container engine, its networks and the image were not run.",
        ),
    ],
)
def test_a_page_about_containers_says_what_ran_and_what_did_not(
    page: Path, ran: str, did_not: str
) -> None:
    text = " ".join(page.read_text().split())
    assert ran in text
    assert did_not in text


def test_the_readme_names_the_apis_and_each_file() -> None:
    text = README.read_text()
    assert "`inference.networking.k8s.io/v1`" in text
    assert "`gateway.networking.k8s.io/v1`" in text
    assert all(f"`{file.name}`" in text for file in [*FILES, FOLDER / "Dockerfile"])


@pytest.mark.parametrize("line", LINES)
def test_what_a_command_of_the_readme_names_is_there(line: str) -> None:
    words = shlex.split(line)
    assert words[0] in {"kubectl", "docker"}
    assert all((ROOT / word).is_file() for word in words if word.startswith("examples/"))
    if words[0] == "docker":
        assert "examples/kubernetes/Dockerfile" in words
        return
    for kind, name in re.findall(r"(daemonset|service)/(\S+)", line):
        assert name in {named(one) for one in objects() if one["kind"].lower() == kind}
    if "--namespace" in words:
        assert words[words.index("--namespace") + 1] == named(of_kind("Namespace")[0])


def test_the_secret_that_the_readme_makes_is_the_one_that_is_mounted() -> None:
    (gateway,) = of_kind("DaemonSet")
    volumes = {one["name"]: one for one in gateway["spec"]["template"]["spec"]["volumes"]}
    (line,) = (line for line in LINES if "create secret" in line)
    words = shlex.split(line)
    assert words[4] == volumes["keys"]["secret"]["secretName"]
    assert words[words.index("--from-file") + 1] == "keys.yaml"


def test_the_image_has_what_the_gateway_imports() -> None:
    extras = re.search(r"/src\[(.*?)\]", (FOLDER / "Dockerfile").read_text())
    assert extras
    assert {"cuda", "gateway"} <= set(extras.group(1).split(","))
