"""What deploy/ ships is right as far as that can be seen without a container engine, a cluster or a running systemd."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from harness import ROOT, WEIR, tool

DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
UNITS = DEPLOY / "systemd"

# Those who wait when weir ends get a second to read why; and nobody measures to the second.
MARGIN = 5


# --- the configurations


@dataclass
class Config:
    """A configuration as it stands somewhere, and where that is."""

    place: str
    text: str

    def checked(self, directory: Path) -> dict[str, Any]:
        """What `weir check` says is in force. Keys that the configuration takes from elsewhere have a stand-in."""
        key = directory / "key"
        key.write_text("stand-in", encoding="utf-8")
        text = re.sub(r'"file:[^"]+"', f'"file:{key}"', self.text)
        for file, place in re.findall(r'\b(cert|key) = "(/[^"]+)"', self.text):
            text = text.replace(place, str(identity(directory)[file]))
        # Each a key of its own.
        environment = {name: f"stand-in-{name}" for name in re.findall(r'"env:(\w+)"', text)}
        file = directory / "weir.toml"
        file.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [WEIR, "check", "--config", file],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, f"{self.place}: {done.stderr}"
        return tomllib.loads(done.stdout)


def identity(directory: Path) -> dict[str, Path]:
    """A certificate and its key, for those that a configuration names."""
    files = {"cert": directory / "cert.pem", "key": directory / "key.pem"}
    if not files["cert"].exists():
        request = ["req", "-x509", "-newkey", "rsa:2048", "-noenc", "-subj", "/CN=stand-in"]
        subprocess.run(
            [tool("openssl"), *request, "-out", files["cert"], "-keyout", files["key"]], check=True, capture_output=True
        )
    return files


def documents(manifest: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(manifest.read_text(encoding="utf-8")))


def of_kind(manifest: Path, kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents(manifest) if document["kind"] == kind]
    return found


def in_config_map(manifest: Path) -> Config:
    return Config(manifest.name, of_kind(manifest, "ConfigMap")["data"]["config.toml"])


def in_text(path: Path) -> list[Config]:
    """The TOML of a document."""
    blocks = re.findall(r"^```toml\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Config(f"{path.name}, {number}", block) for number, block in enumerate(blocks, 1)]


FILES = [Config(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in sorted(DEPLOY.rglob("*.toml"))]
CONFIGS = [
    *FILES,
    *map(in_config_map, MANIFESTS),
    *in_text(ROOT / "README.md"),
    *in_text(ROOT / "docs/operations.md"),
    *in_text(ROOT / "docs/access-log.md"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.place)
def test_weir_takes_every_configuration_that_is_shown(config, tmp_path):
    config.checked(tmp_path)


def seconds(duration: str) -> float:
    """`"2min"`, `"1min30s"`, `"5s"`, `"150ms"`, as configurations, Compose and systemd write them."""
    units = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600}
    parts = re.findall(r"(\d+)(ms|min|s|m|h)", duration)
    assert parts and "".join(number + unit for number, unit in parts) == duration, duration
    return sum(int(number) * units[unit] for number, unit in parts)


def time_to_stop(config: dict[str, Any]) -> float:
    """From SIGTERM to the end, at most."""
    server = config["server"]
    return seconds(server.get("lame_duck", "0s")) + seconds(server["drain"])


def test_the_access_logs_document_shows_the_rotation_that_is_shipped():
    shipped = (DEPLOY / "logrotate/weir").read_text(encoding="utf-8")
    assert f"```text\n{shipped}```" in (ROOT / "docs/access-log.md").read_text(encoding="utf-8")


# --- Kubernetes


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_what_kubernetes_takes(manifest, version):
    for document in documents(manifest):
        kubernetes_validate.validate(document, version, strict=True)


def weir_container(manifest: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod's specification, and weir's part of it."""
    pod = of_kind(manifest, "Deployment")["spec"]["template"]["spec"]
    containers = pod.get("initContainers", []) + pod["containers"]
    (weir,) = [container for container in containers if container["name"] == "weir"]
    return pod, weir


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_a_pod_gives_weir_the_time_to_stop(manifest, tmp_path):
    pod, weir = weir_container(manifest)
    needed = time_to_stop(in_config_map(manifest).checked(tmp_path)) + MARGIN
    needed += weir.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    # A sidecar is told to stop when the application has ended, which takes its time too.
    needed += 30 if weir in pod.get("initContainers", []) else 0
    assert pod["terminationGracePeriodSeconds"] >= needed


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_agrees_with_its_configuration(manifest, tmp_path):
    text = in_config_map(manifest)
    config = text.checked(tmp_path)
    _, weir = weir_container(manifest)
    ports = {port["name"]: port["containerPort"] for port in weir["ports"]}
    assert config["server"]["admin_listen"] == f"0.0.0.0:{ports['admin']}"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert weir[probe]["httpGet"]["port"] == "admin", probe
    assert set(re.findall(r'"env:(\w+)"', text.text)) == {variable["name"] for variable in weir["env"]}
    assert config["limits"]["replicas"] == of_kind(manifest, "Deployment")["spec"]["replicas"]
    assert bytes_of(weir["resources"]["limits"]["memory"]) > bytes_of(config["queue"]["max_bytes"])


def bytes_of(size: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMG])iB?", size).groups()
    return int(number) << {"K": 10, "M": 20, "G": 30}[unit]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_weir_has_no_rights_in_a_pod(manifest):
    security = weir_container(manifest)[1]["securityContext"]
    assert security["runAsNonRoot"] and security["runAsUser"] > 0
    assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}


def test_the_service_leads_clients_to_weir_and_nobody_to_its_admin_listener():
    manifest = DEPLOY / "kubernetes/deployment.yaml"
    pod_labels = of_kind(manifest, "Deployment")["spec"]["template"]["metadata"]["labels"]
    for selector in (
        of_kind(manifest, "Service")["spec"]["selector"],
        of_kind(manifest, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        of_kind(manifest, "Deployment")["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= pod_labels.items()
    assert [port["targetPort"] for port in of_kind(manifest, "Service")["spec"]["ports"]] == ["http"]


# --- Compose


def test_compose_yaml_is_what_compose_takes():
    schema = ROOT / "tests/clients/node/node_modules/dclint/schemas/compose.schema.json"
    jsonschema.Draft7Validator(json.loads(schema.read_text(encoding="utf-8"))).validate(COMPOSE)


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_is_pinned_and_has_no_rights(name):
    service = COMPOSE["services"][name]
    assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"])
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    for port in service["ports"]:
        assert port.startswith("127.0.0.1:"), f"{port} is published to everyone"


def test_what_compose_yaml_names_is_there():
    for name, service in COMPOSE["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DEPLOY / source).is_dir() if source.startswith(".") else source in COMPOSE["volumes"], source
        assert set(service["networks"]) <= set(COMPOSE["networks"]), name
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"]), name
    assert (DEPLOY / COMPOSE["configs"]["weir"]["file"]).is_file()
    build = COMPOSE["services"]["weir"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    # Not to be committed.
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    for secret in COMPOSE["secrets"].values():
        assert f"/deploy/{secret['file'].removeprefix('./')}" in ignored


def test_the_parts_of_compose_yaml_find_each_other(tmp_path):
    config = Config("compose.toml", (DEPLOY / "compose.toml").read_text(encoding="utf-8"))
    checked = config.checked(tmp_path)
    port = checked["server"]["admin_listen"].rsplit(":", 1)[1]
    (job,) = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert job["job_name"] == "weir"
    assert job["static_configs"] == [{"targets": [f"weir:{port}"]}]
    assert seconds(COMPOSE["services"]["weir"]["stop_grace_period"]) >= time_to_stop(checked) + MARGIN
    # The secret is where the configuration looks for it.
    (secret,) = COMPOSE["services"]["weir"]["secrets"]
    assert f'"file:/run/secrets/{secret}"' in config.text
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text(encoding="utf-8"))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards/weir.yaml").read_text(encoding="utf-8"))["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in COMPOSE["services"]["grafana"]["volumes"]


# --- the image


def dockerfile() -> list[str]:
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_image_runs_as_nobody_and_is_built_by_a_rust_that_is_new_enough():
    *_, last_user = [line for line in dockerfile() if line.startswith("USER")]
    assert int(last_user.split()[1].split(":")[0]) > 0
    builder, runtime = [line for line in dockerfile() if line.startswith("FROM")]
    version = re.search(r"rust:(\d+)\.(\d+)-slim-bookworm AS build", builder)
    needed = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["package"]["rust-version"]
    assert version and (int(version[1]), int(version[2])) >= tuple(map(int, needed.split(".")))
    # The same Debian in both: the binary needs a C library that is as new as the one it was linked with.
    assert "debian12:nonroot" in runtime


@pytest.mark.timeout(600)
def test_what_the_image_is_built_from_is_enough(tmp_path):
    """Type-checked, from the files alone that the Dockerfile copies of those that .dockerignore lets through."""
    rules = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert rules[0] == "*"
    seen = {rule.removeprefix("!") for rule in rules[1:]}
    for line in dockerfile():
        if line.startswith("COPY") and "--from" not in line:
            *sources, target = line.split()[1:]
            for source in sources:
                assert source in seen, f"Dockerfile.dockerignore hides {source}"
                if target.startswith("/"):
                    continue
                place = tmp_path / target / ("" if (ROOT / source).is_dir() else source)
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, place)
    done = subprocess.run(
        [tool("cargo"), "check", "--locked", "--bin", "weir"],
        cwd=tmp_path,
        # With what `tests/run rust` has checked already.
        env={**os.environ, "CARGO_TARGET_DIR": str(ROOT / "target")},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr


# --- systemd


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with a program that is there: `verify` looks."""
    for unit in [*UNITS.glob("*.service"), *UNITS.glob("*.socket")]:
        text = unit.read_text(encoding="utf-8")
        (tmp_path / unit.name).write_text(text.replace("/usr/local/bin/weir", str(WEIR)), encoding="utf-8")
    return tmp_path


def test_systemd_finds_nothing_wrong_with_the_units(units):
    names = sorted(path.name for path in units.iterdir())
    done = systemd_analyze("verify", *names, directory=units)
    # It says nothing of units that are right, and ends with 0 after some that are not. What it says of the machine's own
    # units is none of our business.
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "weir" in line], done.stderr


def test_the_unit_is_hardened(units):
    # In tenths, and the less the better: 1.5 is "OK", and what has no directive at all is at 9.6.
    done = systemd_analyze("security", "--offline=true", "--threshold=15", "weir.service", directory=units)
    assert done.returncode == 0, done.stdout + done.stderr


def systemd_analyze(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("systemd-analyze"), "--no-pager", *arguments],
        cwd=directory,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{directory}:"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def setting(unit: str, name: str) -> str:
    (value,) = re.findall(rf"^{name}=(.*)$", (UNITS / unit).read_text(encoding="utf-8"), re.MULTILINE)
    return value


def test_the_units_agree_with_the_configuration(tmp_path):
    config = Config("systemd", (UNITS / "config.toml").read_text(encoding="utf-8"))
    checked = config.checked(tmp_path)
    assert seconds(setting("weir.service", "TimeoutStopSec")) >= time_to_stop(checked) + MARGIN
    # A connection from a client and one to the gateway, for each.
    assert int(setting("weir.service", "LimitNOFILE")) > 2 * checked["server"]["max_connections"]
    assert setting("weir.service", "LimitCORE") == "0"
    # The sockets stand in place of what the configuration says.
    for unit, option, name in [("weir.socket", "listen", "listen"), ("weir-admin.socket", "admin_listen", "admin")]:
        address = checked["server"][option]
        assert setting(unit, "ListenStream") in address
        assert setting(unit, "FileDescriptorName") == name
        assert setting(unit, "Service") == "weir.service"
    credential = setting("weir.service", "LoadCredential").split(":")[0]
    assert f'"file:/run/credentials/weir.service/{credential}"' in config.text
