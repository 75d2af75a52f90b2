"""The image and the compose file: linted, and in step with the package."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = ROOT / "docker" / "compose.yaml"
HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent)


def instructions() -> list[list[str]]:
    lines = re.sub(r"\\\n", " ", DOCKERFILE.read_text()).splitlines()
    return [line.split() for line in lines if line.strip() and not line.startswith("#")]


def substituted(value: str) -> str:
    """A compose value with the default of every variable."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


@pytest.fixture(scope="module")
def service() -> dict:
    return yaml.safe_load(COMPOSE.read_text())["services"]["vllm"]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint has no wheel for this platform")
def test_dockerfile_passes_hadolint():
    result = subprocess.run([HADOLINT, str(DOCKERFILE)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_base_image_is_the_vllm_version_of_the_gpu_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    version = extras["gpu"][0].removeprefix("vllm==")
    assert instructions()[0] == ["FROM", f"vllm/vllm-openai:v{version}"]


def test_entrypoint_stays_the_base_images():
    assert {words[0] for words in instructions()} == {"FROM", "COPY", "RUN"}


def test_image_gets_what_the_wheel_is_built_from():
    kept = {
        line[1:] for line in (ROOT / "docker" / "Dockerfile.dockerignore").read_text().split() if line.startswith("!")
    }
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert kept == {"LICENSE", "README.md", "pyproject.toml", *setuptools["package-dir"].values()}


def test_compose_builds_this_dockerfile(service):
    context = (COMPOSE.parent / service["build"]["context"]).resolve()
    assert context == ROOT
    assert context / service["build"]["dockerfile"] == DOCKERFILE


def test_compose_serves_a_profile_that_is_mounted(service):
    from vllm_kvtuner.profile.load import load_profile

    source, target, mode = substituted(service["volumes"][0]).split(":")
    command = [substituted(word) for word in service["command"]]
    profile = next(word for word in command if word.startswith("--kvtuner-profile=")).split("=")[1]
    assert "--kv-cache-dtype=kvtuner" in command
    assert mode == "ro"
    assert Path(profile).parent == Path(target)
    loaded = load_profile(str((COMPOSE.parent / source / Path(profile).name).resolve()))
    assert loaded.model.name == command[0]


def test_compose_reserves_a_gpu_and_checks_health(service):
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert service["healthcheck"]["test"][-1].endswith("/health")
    port = service["healthcheck"]["test"][-1].split(":")[2].split("/")[0]
    assert service["ports"][0].split(":")[-1] == port


def test_prometheus_scrapes_the_server_of_the_other_file(service):
    monitoring = yaml.safe_load((COMPOSE.parent / "compose.monitoring.yaml").read_text())
    prometheus = monitoring["services"]["prometheus"]
    (dependency,) = prometheus["depends_on"]
    assert yaml.safe_load(COMPOSE.read_text())["services"][dependency] == service
    source, target, mode = prometheus["volumes"][0].split(":")
    assert (target, mode) == ("/etc/prometheus/prometheus.yml", "ro")
    (job,) = yaml.safe_load((COMPOSE.parent / source).read_text())["scrape_configs"]
    port = service["ports"][0].split(":")[-1]
    assert job["static_configs"] == [{"targets": [f"{dependency}:{port}"]}]
    assert "metrics_path" not in job  # /metrics, where vLLM's are
    name, path = prometheus["volumes"][1].split(":")
    assert name in monitoring["volumes"] and path == "/prometheus"
