"""The images and the compose file: linted, and in step with the package."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from vllm_kvtuner import __version__

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = ROOT / "docker" / "compose.yaml"
USER, HOME = "2000:0", "/home/vllm"
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
@pytest.mark.parametrize("dockerfile", sorted((ROOT / "docker").rglob("Dockerfile")), ids=lambda path: path.parent.name)
def test_dockerfile_passes_hadolint(dockerfile):
    result = subprocess.run([HADOLINT, str(dockerfile)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_base_image_is_the_vllm_version_of_the_gpu_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    version = extras["gpu"][0].removeprefix("vllm==")
    assert instructions()[0] == ["FROM", f"vllm/vllm-openai:v{version}"]


def test_entrypoint_stays_the_base_images():
    assert {words[0] for words in instructions()} == {"FROM", "ARG", "LABEL", "COPY", "RUN", "ENV", "USER"}


def test_labels_have_the_packages_licence():
    licence = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert f'org.opencontainers.image.licenses="{licence}"' in DOCKERFILE.read_text()


def test_image_and_label_have_the_packages_version(service):
    assert ["ARG", f"VERSION={__version__}"] in instructions()
    (labels,) = (words for words in instructions() if words[0] == "LABEL")
    assert 'org.opencontainers.image.version="${VERSION}"' in labels
    assert service["image"] == f"vllm-kvtuner:{__version__}"
    base = instructions()[0][1]
    assert f'org.opencontainers.image.base.name="docker.io/{base}"' in labels


def test_image_runs_without_root():
    users = [words[1] for words in instructions() if words[0] == "USER"]
    assert users[-1] == USER
    (environment,) = (words[1:] for words in instructions() if words[0] == "ENV")
    assert f"HOME={HOME}" in environment


def test_extras_are_those_of_the_package_and_hold_the_base_images_versions(service):
    assert service["build"]["args"] == {"EXTRAS": "${EXTRAS:-}"}
    assert ["ARG", 'EXTRAS=""'] in instructions()
    (install,) = (" ".join(words) for words in instructions() if "uv" in words)
    without, _, with_extras = install.partition('if [ -n "${EXTRAS}" ]')
    assert "--no-deps" in without and "[${EXTRAS}]" not in without
    assert "--constraint" in with_extras and '"/opt/vllm-kvtuner[${EXTRAS}]"' in with_extras


def test_image_gets_what_the_wheel_is_built_from():
    kept = {
        line[1:] for line in (ROOT / "docker" / "Dockerfile.dockerignore").read_text().split() if line.startswith("!")
    }
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert kept == {"LICENSE", "README.md", "pyproject.toml", "setup.py", *setuptools["package-dir"].values()}


def test_compose_builds_this_dockerfile(service):
    context = (COMPOSE.parent / service["build"]["context"]).resolve()
    assert context == ROOT
    assert context / service["build"]["dockerfile"] == DOCKERFILE


def test_compose_takes_what_the_flag_takes(service):
    model, *arguments = service["command"].split()
    assert substituted(model).count("/") == 1
    assert "--kv-cache-dtype=kvtuner" in arguments
    assert "--kvtuner-profile=${PROFILE:-auto}" in arguments, "which fits every model"
    assert arguments[-1] == "${ARGS:-}", "vllm serve's other arguments"


def test_files_of_a_mounted_folder_can_be_served(service):
    source, target, mode = substituted(service["volumes"][0]).split(":")
    assert (target, mode) == ("/profiles", "ro")
    assert list((COMPOSE.parent / source).glob("*.yaml"))


def test_compose_runs_without_root_and_keeps_kernels_in_a_volume(service):
    assert substituted(service["user"]) == USER
    assert service["environment"]["HOME"] == HOME
    mounts = dict(reversed(substituted(volume).split(":")[:2]) for volume in service["volumes"])
    kernels = f"{HOME}/.cache/vllm_kvtuner/kernels"  # envs.kernel_cache, of that HOME
    volume = next(name for path, name in mounts.items() if kernels.startswith(f"{path}/"))
    named = yaml.safe_load(COMPOSE.read_text())["volumes"]
    assert volume in named
    assert mounts[f"{HOME}/.cache/huggingface"] in named  # no folder of the host, which this user could not write to


def test_compose_passes_the_hubs_variables_through(service):
    assert {"HF_TOKEN", "HF_HUB_OFFLINE"} <= set(service["environment"])
    assert substituted(service["environment"]["HF_HUB_OFFLINE"]) == "0"


def test_compose_reserves_a_gpu_and_checks_health(service):
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "${GPUS:-1}", "capabilities": ["gpu"]}
    assert service["healthcheck"]["test"][-1].endswith("/health")
    port = service["healthcheck"]["test"][-1].split(":")[2].split("/")[0]
    assert service["ports"][0].split(":")[-1] == port
