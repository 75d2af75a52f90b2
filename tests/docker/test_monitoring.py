"""Prometheus and Grafana beside the server: what they read exists, and every file refers to the others as they are."""

import inspect
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from vllm.v1.metrics import loggers

from vllm_kvtuner import __version__
from vllm_kvtuner.engine import metrics

DOCKER = Path(__file__).parent.parent.parent / "docker"
GRAFANA = DOCKER / "grafana"
OURS = "vllm:kvtuner_"
PROMTOOL = shutil.which("promtool")


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def services() -> dict:
    return read(DOCKER / "compose.monitoring.yaml")["services"]


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads((GRAFANA / "dashboards" / "kvtuner.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rule() -> dict:
    (group,) = read(DOCKER / "alerts.yaml")["groups"]
    (only,) = group["rules"]
    return only


def expressions(dashboard: dict) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def known_metrics() -> set[str]:
    ours = re.findall(r'"([a-z_]+)": \(|_gauge\(\s*gauge,\s*"([a-z_]+)"', inspect.getsource(metrics.publish))
    vllms = re.findall(r'"(vllm:[a-z_]+)"', inspect.getsource(loggers))
    return {OURS + "".join(names) for names in ours} | set(vllms)


def test_prometheus_scrapes_the_server_of_the_other_file(services):
    vllm = read(DOCKER / "compose.yaml")["services"]["vllm"]
    prometheus = services["prometheus"]
    assert prometheus["depends_on"] == ["vllm"]
    config = read(DOCKER / "prometheus.yaml")
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"vllm:{vllm['ports'][0].split(':')[-1]}"]}]
    assert "metrics_path" not in job  # /metrics, where vLLM's are
    mounts = dict(volume.split(":")[:2] for volume in prometheus["volumes"])
    assert mounts["./prometheus.yaml"] == "/etc/prometheus/prometheus.yml"
    assert [mounts["./alerts.yaml"]] == [f"/etc/prometheus/{name}" for name in config["rule_files"]]


def test_volumes_are_declared_and_ports_stay_on_the_host(services):
    volumes = read(DOCKER / "compose.monitoring.yaml")["volumes"]
    for service in services.values():
        named = {volume.split(":")[0] for volume in service["volumes"] if not volume.startswith(".")}
        assert named <= set(volumes)
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_grafana_is_built_with_this_data_source(services, dashboard):
    assert (DOCKER / services["grafana"]["build"]["context"]).resolve() == GRAFANA
    assert services["grafana"]["image"] == f"vllm-kvtuner-grafana:{__version__}"
    (source,) = read(GRAFANA / "provisioning" / "datasources" / "prometheus.yaml")["datasources"]
    port = services["prometheus"]["ports"][0].split(":")[-1]
    assert source["url"] == f"http://prometheus:{port}"
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == source["uid"]


def test_grafana_reads_the_folder_that_its_image_fills():
    (provider,) = read(GRAFANA / "provisioning" / "dashboards" / "dashboards.yaml")["providers"]
    folder = provider["options"]["path"]
    lines = (GRAFANA / "Dockerfile").read_text().splitlines()
    targets = [line.split()[-1] for line in lines if line.startswith(("ADD", "COPY dashboards"))]
    assert len(targets) == 3 and all(target.startswith(f"{folder}/") for target in targets)
    base = (DOCKER / "Dockerfile").read_text()
    (version,) = re.findall("^ARG VLLM_VERSION=(.+)$", "\n".join(lines), re.MULTILINE)
    assert f"FROM vllm/vllm-openai:{version}\n" in base


def test_dashboard_and_alert_read_metrics_that_exist(dashboard, rule):
    known = known_metrics()
    assert {f"{OURS}stored_bits", f"{OURS}layers", "vllm:kv_cache_usage_perc"} <= known
    queries = [variable["definition"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    for expression in (*expressions(dashboard), *queries, rule["expr"]):
        names = re.findall(r"vllm:[a-z_]+", expression)
        assert names and set(names) <= known, expression


def test_dashboard_has_the_row_and_its_panels(dashboard):
    row, *panels = dashboard["panels"]
    assert row["type"] == "row"
    assert all(panel["gridPos"]["y"] > row["gridPos"]["y"] for panel in panels)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    read = " ".join(expressions(dashboard))
    assert {f"{OURS}stored_bits", f"{OURS}kv_cache_tokens", "vllm:kv_cache_usage_perc", f"{OURS}layers"} <= set(
        re.findall(r"vllm:[a-z_]+", read)
    )
    assert "vllm" in dashboard["tags"]  # by which vLLM's dashboards link to it


def test_dashboards_variables_are_defined(dashboard):
    defined = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(dashboard))) == defined


def test_alert_asks_for_a_kernel_that_the_gauge_can_name(rule):
    from vllm_kvtuner.kernels import choice

    assert re.findall('decode_kernel="(.+?)"', rule["expr"]) == [choice.TRITON]
    labels = set(re.search(r"by \((.+?)\)", rule["expr"])[1].split(", "))
    assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) <= labels


@pytest.mark.skipif(PROMTOOL is None, reason="promtool comes with Prometheus")
def test_the_alert_fires_where_triton_decodes_and_nowhere_else():
    result = subprocess.run([PROMTOOL, "test", "rules", str(DOCKER / "alerts_test.yaml")], capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_the_alert_must_do_is_of_this_rule(rule):
    (case,) = read(DOCKER / "alerts_test.yaml")["tests"]
    assert {check["alertname"] for check in case["alert_rule_test"]} == {rule["alert"]}
    assert [bool(check["exp_alerts"]) for check in case["alert_rule_test"]] == [False, True]
