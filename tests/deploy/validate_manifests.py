#!/usr/bin/env python3
"""Checks that the files we ship for running Shoal agree with each other and with the node.

    validate_manifests.py [--self-test]

A selector that matches no label, a probe of a path that is not served, a port that is named differently in two files: each
tool accepts its own file, and nothing works. So this reads docker-compose.yml, .env.example, deploy/ and k8s/ together.

Needs only the standard library; the checks that read YAML need PyYAML, those against the schemas of Kubernetes need
kubernetes-validate (tests/python/kubernetes.txt has both), and are reported as skipped without them. Where kubectl,
promtool or Compose are installed, they are asked too. Exit code 0: all agree. 1: something does not.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

try:
    import yaml
except ImportError:
    yaml = None
try:
    import kubernetes_validate
except ImportError:
    kubernetes_validate = None

ROOT = pathlib.Path(__file__).resolve().parents[2]

PORTS = {"http": 6333, "grpc": 6334, "mesh": 6335}
PROBE_PATHS = {"/health/live", "/health/ready"}
SERVED_PATHS = PROBE_PATHS | {"/metrics"}
# What the node reads from its environment, taken from the source. A misspelt name would be ignored without a word.
SETTINGS = set(re.findall(r'env = "(SHOAL_\w+)"', (ROOT / "node/src/config.rs").read_text()))
# What the downward API has of a pod for its environment.
POD_FIELD = re.compile(r"metadata\.(name|namespace|uid|(labels|annotations)\['[^']+'\])|spec\.(nodeName|serviceAccountName)|"
                       r"status\.(hostIPs?|podIPs?)")
# What the commands read, beside the node's settings.
CLIENT_SETTINGS = set(re.findall(r'env = "(SHOAL_\w+)"', (ROOT / "node/src/cli/client.rs").read_text()))
# The oldest Kubernetes that the manifests are for, and what of it has no schema here: the Prometheus Operator's own kinds.
KUBERNETES = "1.31"
CUSTOM_KINDS = {"PrometheusRule", "ServiceMonitor"}
# How long a node that stops may go on draining.
DRAIN_SECONDS = int(re.search(r"drain_seconds: (\d+)", (ROOT / "node/src/config.rs").read_text())[1])
# What only docker-compose.yml reads, from .env.
COMPOSE_ONLY = {
    "SHOAL_" + name
    for name in "IMAGE BUILD_TARGET BUILD_BASE PUBLISH GRPC_PORT MEMORY OPEN_FILES".split()
} | {f"SHOAL_NODE_{number}_PORT" for number in range(1, 6)}
USER = 10001


class Report:
    """Collects what is wrong, what was skipped, and how much was looked at."""

    def __init__(self):
        self.errors, self.skipped, self.checks = [], [], 0

    def expect(self, holds, message):
        self.checks += 1
        if not holds:
            self.errors.append(message)
        return holds


# ---- reading ---------------------------------------------------------------------------------------------------------


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def image_problem(image):
    """Says what is wrong with an image name. A variable with a default is judged by its default."""
    image = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", image)
    name, _, tag = image.rpartition(":")
    if not name or "/" in tag:
        return "has no tag"
    return "moves under the tag `latest`" if tag == "latest" else None


def shipped(root):
    """Every text file that this program is about."""
    single = [root / name for name in ("docker-compose.yml", ".env.example", ".dockerignore")]
    return single + sorted(path for top in ("deploy", "k8s") for path in (root / top).rglob("*") if path.is_file())


# ---- plain text: no YAML needed --------------------------------------------------------------------------------------


def check_text(root, report):
    for path in shipped(root):
        where, text = path.relative_to(root), path.read_text()
        report.expect(":latest" not in text, f"{where}: the tag `latest` changes under a running cluster")
        if path.suffix in {".yml", ".yaml", ".json"}:
            report.expect("\t" not in text, f"{where}: a tab")
        if path.suffix in {".sh", ".toml"}:
            continue  # Scripts have variables of their own, and a test of the node loads the reference configuration.
        code = "\n".join(line.split(" #")[0] for line in text.splitlines())
        for name in sorted(set(re.findall(r"\bSHOAL_[A-Z][A-Z_0-9]*\b", code)) - SETTINGS - CLIENT_SETTINGS - COMPOSE_ONLY):
            report.expect(False, f"{where}: {name} is no setting of the node")


def check_dockerfile(root, report):
    text = (root / "deploy/Dockerfile").read_text()
    where = "deploy/Dockerfile"
    stages = re.findall(r"^FROM (\S+) AS (\w+)$", text, re.MULTILINE)
    names = [name for _, name in stages]
    report.expect(names == ["runtime", "prebuilt", "builder", "final"], f"{where}: stages are {names}")
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    for source, name in stages:
        image = arguments.get(source.strip("${}"), source)
        if image not in names:
            problem = image_problem(image)
            report.expect(problem is None, f"{where}: the base {image} of {name} {problem}")
    runtime = text.split(" AS runtime")[1].split("\nFROM ")[0]
    report.expect(f"\nUSER {USER}:{USER}\n" in runtime, f"{where}: the image does not run as user {USER}")
    report.expect("\nUSER" not in text.split(" AS prebuilt")[1], f"{where}: a later stage changes the user")
    exposed = re.findall(r"^EXPOSE (.*)$", runtime, re.MULTILINE)
    report.expect([int(port) for port in " ".join(exposed).split()] == list(PORTS.values()), f"{where}: EXPOSE {exposed}")
    for name, port in PORTS.items():
        report.expect(f"SHOAL_{name.upper()}=0.0.0.0:{port}" in runtime, f"{where}: {name} does not listen on {port}")
    report.expect(re.search(r"HEALTHCHECK.*\\\n.*\"health\"", runtime), f"{where}: no HEALTHCHECK by `shoal health`")
    report.expect("SHOAL_INSECURE" not in re.sub(r"^#.*$", "", text, flags=re.MULTILINE), f"{where}: weakens the defaults")
    report.expect("--mount=" not in text and "--chmod=" not in text, f"{where}: needs BuildKit")

    allowed = [line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in re.findall(r"^COPY (?!--from)(\S+)", text, re.MULTILINE):
        source = source.rstrip("/")
        report.expect(source == "." or source in allowed, f".dockerignore: keeps {source} from the build")


def check_environment(root, report):
    example = (root / ".env.example").read_text()
    given = dict(re.findall(r"^(\w+)=(.*)$", example, re.MULTILINE))
    used = set(re.findall(r"\$\{(\w+)", (root / "docker-compose.yml").read_text()))
    report.expect(used == set(given), f".env.example: differs from docker-compose.yml in {sorted(used ^ set(given))}")
    for name in ("SHOAL_API_KEY", "SHOAL_CLUSTER_SECRET"):
        report.expect(given.get(name) == "", f".env.example: {name} must be empty, so that nobody runs with a public key")
    unit_example = (root / "deploy/systemd/shoal.env.example").read_text()
    for name, value in re.findall(r"^(\w*(?:KEY|SECRET))=(.*)$", unit_example, re.MULTILINE):
        report.expect(value == "", f"deploy/systemd/shoal.env.example: {name} must be empty")


def check_unit(root, report):
    text = (root / "deploy/systemd/shoal.service").read_text()
    where = "deploy/systemd/shoal.service"
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "User=shoal", "ExecStart=/usr/local/bin/shoal serve"):
        report.expect(f"\n{line}\n" in text, f"{where}: lacks {line}")
    data = re.search(r"SHOAL_DATA=/var/lib/(\S+)", text)
    state = re.search(r"StateDirectory=(\S+)", text)
    report.expect(data and state and data[1] == state[1], f"{where}: the data directory is not the writable one")
    users = (root / "deploy/systemd/shoal.sysusers").read_text()
    report.expect(re.search(r"^u shoal ", users, re.MULTILINE), "deploy/systemd/shoal.sysusers: does not make the user")


def check_nginx(root, report):
    text = (root / "deploy/nginx.conf").read_text()
    where = "deploy/nginx.conf"
    report.expect(text.count("{") == text.count("}"), f"{where}: brackets do not match")
    upstreams = dict(re.findall(r"upstream (\w+) \{(.*?)\}", text, re.DOTALL))
    for name, body in upstreams.items():
        port = PORTS["grpc" if "grpc" in name else "http"]
        report.expect(set(re.findall(r"server \S+:(\d+)", body)) == {str(port)}, f"{where}: {name} is not on port {port}")
    for target in re.findall(r"(?:proxy|grpc)_pass \w+://(\w+);", text):
        report.expect(target in upstreams, f"{where}: passes to {target}, which is no upstream")
    report.expect(re.search(r"location = /metrics \{[^}]*deny\s+all", text), f"{where}: metrics are open to everybody")
    report.expect(re.search(r"location /admin/ \{[^}]*deny\s+all", text), f"{where}: administration is open to everybody")


def check_dashboards(root, report):
    for path in sorted((root / "deploy/grafana/dashboards").glob("*.json")):
        where = path.relative_to(root)
        dashboard = json.loads(path.read_text())
        panels = dashboard["panels"]
        identifiers = [panel["id"] for panel in panels]
        report.expect(len(set(identifiers)) == len(identifiers), f"{where}: two panels with one id")
        report.expect(dashboard.get("uid") and dashboard.get("title"), f"{where}: no uid or title")
        variables = {variable["name"] for variable in dashboard["templating"]["list"]}
        taken = {}
        for panel in panels:
            title, grid = panel["title"], panel["gridPos"]
            for cell in ((x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])):
                if cell in taken or cell[0] >= 24:
                    report.expect(False, f"{where}: {title!r} overlaps {taken.get(cell, 'the edge')!r}")
                    break
                taken[cell] = title
            if panel["type"] == "row":
                continue
            report.expect(panel.get("description"), f"{where}: {title!r} does not say what it shows")
            report.expect(panel.get("datasource", {}).get("uid") == "${datasource}", f"{where}: {title!r} has a fixed source")
            report.expect(panel.get("targets"), f"{where}: {title!r} asks for nothing")
            for target in panel.get("targets", []):
                unknown = set(re.findall(r"\$\{?(\w+)", target["expr"])) - variables - {"__rate_interval", "__range"}
                report.expect(not unknown, f"{where}: {title!r} uses unknown variables {sorted(unknown)}")


# ---- Compose and monitoring ------------------------------------------------------------------------------------------


def check_compose(root, report):
    compose = yaml.safe_load((root / "docker-compose.yml").read_text())
    where = "docker-compose.yml"
    services = compose["services"]
    nodes = {name: service for name, service in services.items() if "SHOAL_NAME" in (service.get("environment") or {})}
    declared = set(compose.get("volumes", {}))
    published = []
    for name, service in services.items():
        problem = image_problem(service["image"])
        report.expect(problem is None, f"{where}: the image of {name} {problem}")
        report.expect(service.get("healthcheck", {}).get("test"), f"{where}: {name} has no healthcheck")
        report.expect(service.get("restart"), f"{where}: {name} stays down after a reboot")
        published += [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", port) for port in service.get("ports", [])]
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                report.expect((root / source).exists(), f"{where}: {name} mounts {source}, which is not there")
            else:
                report.expect(source in declared, f"{where}: {name} uses the undeclared volume {source}")
        for network in service.get("networks", []):
            report.expect(network in compose.get("networks", {}), f"{where}: {name} uses the undeclared network {network}")
        for other in service.get("depends_on", []):
            report.expect(other in services, f"{where}: {name} depends on {other}, which is no service")
    report.expect(len(set(published)) == len(published), f"{where}: two services publish one port: {published}")
    for port in published:
        report.expect(port.startswith("127.0.0.1:"), f"{where}: {port} is published to every network by default")

    founders = [name for name, service in nodes.items() if "profiles" not in service]
    report.expect(len(founders) == 3, f"{where}: {len(founders)} nodes found the cluster")
    for name, service in nodes.items():
        environment = service["environment"]
        report.expect(environment["SHOAL_NAME"] == name == environment["SHOAL_ADVERTISE"], f"{where}: {name} has another name")
        report.expect(environment["SHOAL_EXPECT"] == str(len(founders)), f"{where}: {name} expects another number of nodes")
        peers = sorted(environment["SHOAL_JOIN"].split(","))
        report.expect(peers == sorted(f"{node}:{PORTS['grpc']}" for node in founders), f"{where}: {name} joins {peers}")
        report.expect(service.get("profiles", ["more"]) == ["more"], f"{where}: {name} is in the profiles {service.get('profiles')}")
        data = [volume for volume in service["volumes"] if volume.endswith(":/var/lib/shoal")]
        report.expect(data == [f"{name}:/var/lib/shoal"], f"{where}: {name} does not keep its data in a volume of its own")
        report.expect(service.get("read_only") and service.get("tmpfs"), f"{where}: {name} can write outside its volume")
        report.expect("depends_on" not in service, f"{where}: {name} waits for a node that waits for it")
        test = service["healthcheck"]["test"]
        report.expect(test[0] == "CMD" and test[2:5] == ["health", "--url", f"http://127.0.0.1:{PORTS['http']}"],
                      f"{where}: {name} is probed by {test}")
        for port in service.get("ports", []):
            report.expect(int(port.rsplit(":", 1)[1]) in PORTS.values(), f"{where}: {name} has no port {port}")
        for setting in environment:
            report.expect(setting in SETTINGS, f"{where}: {setting} is no setting of the node")
    monitoring = {name for name, service in services.items() if service.get("profiles") == ["monitoring"]}
    report.expect(monitoring == {"prometheus", "grafana"}, f"{where}: the monitoring profile has {sorted(monitoring)}")
    check_monitoring(root, report, services, nodes)


def check_monitoring(root, report, services, nodes):
    config = yaml.safe_load((root / "deploy/prometheus/prometheus.yml").read_text())
    where = "deploy/prometheus/prometheus.yml"
    for rules in config["rule_files"]:
        report.expect((root / "deploy/prometheus" / rules).exists(), f"{where}: no rules file {rules}")
    job = config["scrape_configs"][0]
    targets = [target for group in job["static_configs"] for target in group["targets"]]
    report.expect(set(targets) == {f"{node}:{PORTS['http']}" for node in nodes if "profiles" not in nodes[node]},
                  f"{where}: scrapes {targets}")
    looked_up = [(name, group["port"]) for group in job["dns_sd_configs"] for name in group["names"]]
    report.expect(set(looked_up) == {(node, PORTS["http"]) for node in nodes if "profiles" in nodes[node]},
                  f"{where}: looks up {looked_up}")
    report.expect(job["metrics_path"] in SERVED_PATHS, f"{where}: {job['metrics_path']} is not served")
    closed = [name for name, node in nodes.items() if node["environment"].get("SHOAL_METRICS_OPEN") != "true"]
    report.expect("authorization" in job or not closed, f"{where}: has no key for {closed}")

    rules = yaml.safe_load((root / "deploy/prometheus/rules.yml").read_text())
    tested = set(re.findall(r"alertname: (\w+)", (ROOT / "tests/deploy/rules_test.yml").read_text()))
    names = []
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        name = rule["alert"]
        names.append((name, rule["labels"]["severity"]))
        report.expect(rule["labels"]["severity"] in {"critical", "warning", "info"}, f"rules.yml: severity of {name}")
        report.expect({"summary", "description"} <= set(rule["annotations"]), f"rules.yml: {name} does not explain itself")
        selected = re.findall(r'job="(\w+)"', rule["expr"])
        report.expect(selected and set(selected) == {job["job_name"]}, f"rules.yml: {name} selects the jobs {selected}")
        report.expect(name in tested, f"rules.yml: {name} has no test")
    report.expect(len(set(names)) == len(names), "rules.yml: one name for two alerts of one severity")

    for source in yaml.safe_load((root / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]:
        host = re.fullmatch(r"http://(\w+):9090", source["url"])
        report.expect(host and host[1] in services, f"grafana: the data source {source['url']} is no service")
    mounts = {volume.split(":")[1] for volume in services["grafana"]["volumes"]}
    for provider in yaml.safe_load((root / "deploy/grafana/provisioning/dashboards/shoal.yml").read_text())["providers"]:
        report.expect(provider["options"]["path"] in mounts, f"grafana: nothing is mounted at {provider['options']['path']}")


# ---- Kubernetes ------------------------------------------------------------------------------------------------------


def check_kustomizations(root, report):
    """Every file is listed, every listed file exists: a forgotten one is simply never applied."""
    for path in sorted((root / "k8s").rglob("kustomization.yaml")):
        where, directory = path.relative_to(root), path.parent
        kustomization = yaml.safe_load(path.read_text())
        listed = kustomization.get("resources", []) + kustomization.get("components", [])
        for entry in listed:
            report.expect((directory / entry).exists(), f"{where}: {entry} is not there")
        found = {file.name for file in directory.glob("*.yaml")} - {"kustomization.yaml"}
        forgotten = {name for name in found if not name.endswith(".example.yaml")} - set(listed)
        report.expect(not forgotten, f"{where}: does not list {sorted(forgotten)}")
        examples = [entry for entry in listed if entry.endswith(".example.yaml")]
        report.expect(not examples, f"{where}: would apply the example {examples}")


def check_objects(root, objects, secret_keys, where, report):
    """Checks one set of Kubernetes objects as it would be applied."""
    by_kind = {}
    for item in objects:
        by_kind.setdefault(item["kind"], {})[item["metadata"]["name"]] = item
        check_schema(item, where, report)
    stateful_set = by_kind["StatefulSet"]["shoal"]
    spec, template = stateful_set["spec"], stateful_set["spec"]["template"]
    pod, labels = template["spec"], template["metadata"]["labels"]
    container = pod["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}

    def selects(selector, what):
        report.expect(selector and selector.items() <= labels.items(), f"{where}: {what} selects {selector}, no pod has that")

    report.expect(ports == PORTS, f"{where}: the container's ports are {ports}")
    selects(spec["selector"]["matchLabels"], "the StatefulSet")
    report.expect(spec["podManagementPolicy"] == "Parallel", f"{where}: the first start would wait for itself")
    peers = by_kind["Service"].get(spec["serviceName"])
    if report.expect(peers is not None, f"{where}: no Service {spec['serviceName']} for the StatefulSet"):
        report.expect(peers["spec"].get("clusterIP") == "None", f"{where}: the Service for nodes is not headless")
        report.expect(peers["spec"].get("publishNotReadyAddresses"), f"{where}: nodes cannot find each other at first start")
    for name, service in by_kind["Service"].items():
        selects(service["spec"]["selector"], f"Service {name}")
        for port in service["spec"]["ports"]:
            report.expect(port["targetPort"] in ports, f"{where}: Service {name} leads to the unknown port {port['targetPort']}")
            report.expect(port["port"] == PORTS.get(port["name"]), f"{where}: Service {name} has {port['name']} on {port['port']}")
    check_pod(pod, container, ports, where, report)
    check_settings(by_kind, spec, container, secret_keys, where, report)

    claims = {claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]}
    volumes = claims | {volume["name"] for volume in pod.get("volumes", [])}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    report.expect(set(mounts) == volumes, f"{where}: volumes {sorted(volumes)} are not the mounts {sorted(mounts)}")
    report.expect(mounts.get("data") == "/var/lib/shoal" and "data" in claims, f"{where}: the data is not on a claimed volume")

    for name, budget in by_kind.get("PodDisruptionBudget", {}).items():
        selects(budget["spec"]["selector"]["matchLabels"], f"PodDisruptionBudget {name}")
        report.expect(budget["spec"].get("maxUnavailable") == 1, f"{where}: PodDisruptionBudget {name} can cost a majority")
    for name, policy in by_kind.get("NetworkPolicy", {}).items():
        selects(policy["spec"]["podSelector"]["matchLabels"], f"NetworkPolicy {name}")
        for rule in policy["spec"].get("ingress", []):
            report.expect(rule.get("from"), f"{where}: NetworkPolicy {name} lets everybody in")
            for port in rule.get("ports", []):
                report.expect(port["port"] in ports, f"{where}: NetworkPolicy {name} names the unknown port {port['port']}")
            outside = any("namespaceSelector" in source for source in rule.get("from", []))
            inner = any(port["port"] == "mesh" for port in rule.get("ports", []))
            report.expect(not (outside and inner), f"{where}: NetworkPolicy {name} opens the mesh to other namespaces")
    for name, ingress in by_kind.get("Ingress", {}).items():
        for path in (path for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]):
            backend = path["backend"]["service"]
            service = by_kind["Service"].get(backend["name"], {"spec": {"ports": []}})
            known = {port["name"] for port in service["spec"]["ports"]}
            report.expect(backend["port"]["name"] in known, f"{where}: Ingress {name} leads to {backend}")
            report.expect(not path["path"].startswith(("/admin", "/metrics")), f"{where}: Ingress {name} opens {path['path']}")
    for name, scaler in by_kind.get("HorizontalPodAutoscaler", {}).items():
        check_autoscaler(name, scaler["spec"], by_kind, where, report)
    for name, job in by_kind.get("CronJob", {}).items():
        check_job(name, job, by_kind, secret_keys, where, report)
    for name, rule in by_kind.get("PrometheusRule", {}).items():
        rules = yaml.safe_load((root / "deploy/prometheus/rules.yml").read_text())
        report.expect(rule["spec"] == rules, f"{where}: PrometheusRule {name} is not deploy/prometheus/rules.yml")
    for name, monitor in by_kind.get("ServiceMonitor", {}).items():
        wanted = monitor["spec"]["selector"]["matchLabels"]
        chosen = [item for item in by_kind["Service"].values() if wanted.items() <= item["metadata"]["labels"].items()]
        report.expect(len(chosen) == 1, f"{where}: ServiceMonitor {name} chooses {len(chosen)} services, so pods count so often")
        for endpoint in monitor["spec"]["endpoints"]:
            known = {port["name"] for service in chosen for port in service["spec"]["ports"]}
            report.expect(endpoint["port"] in known, f"{where}: ServiceMonitor {name} scrapes port {endpoint['port']}")
            report.expect(endpoint["path"] in SERVED_PATHS, f"{where}: ServiceMonitor {name} scrapes {endpoint['path']}")
            key = endpoint["authorization"]["credentials"]
            report.expect(key["key"] in secret_keys.get(key["name"], ()), f"{where}: ServiceMonitor {name} has no key")


def check_schema(item, where, report):
    """Whether Kubernetes would take an object as it is. A misspelt field is otherwise dropped with a warning at best."""
    if kubernetes_validate is None or item["kind"] in CUSTOM_KINDS:
        return
    for version in (KUBERNETES, kubernetes_validate.latest_version()):
        try:
            kubernetes_validate.validate(item, version, strict=True)
            problem = None
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            problem = getattr(error, "message", None) or str(error)
        name = f"{item['kind']} {item['metadata']['name']}"
        report.expect(problem is None, f"{where}: {name} does not fit the schema of Kubernetes {version}: {problem}")


def check_autoscaler(name, spec, by_kind, where, report):
    """What changes the number of nodes by itself: it may add some, and must not take any away."""
    target, behavior = spec["scaleTargetRef"], spec.get("behavior", {})
    report.expect(target["kind"] == "StatefulSet" and target["name"] in by_kind["StatefulSet"],
                  f"{where}: HorizontalPodAutoscaler {name} scales {target['kind']} {target['name']}, which is not there")
    report.expect(spec.get("minReplicas", 1) >= 3, f"{where}: HorizontalPodAutoscaler {name} allows fewer nodes than replicas")
    report.expect(spec["maxReplicas"] > spec.get("minReplicas", 1), f"{where}: HorizontalPodAutoscaler {name} never adds a node")
    report.expect(behavior.get("scaleDown", {}).get("selectPolicy") == "Disabled",
                  f"{where}: HorizontalPodAutoscaler {name} takes nodes away that are not drained")
    resources = [metric.get("resource", {}).get("name") for metric in spec["metrics"]]
    report.expect(resources == ["cpu"], f"{where}: HorizontalPodAutoscaler {name} follows {resources}, and memory is page cache")


def check_job(name, job, by_kind, secret_keys, where, report):
    """A job that asks the nodes for something by a command."""
    spec = job["spec"]["jobTemplate"]["spec"]
    pod, container = spec["template"]["spec"], spec["template"]["spec"]["containers"][0]
    problem = image_problem(container["image"])
    report.expect(problem is None, f"{where}: CronJob {name}: the image {container['image']} {problem}")
    report.expect(job["spec"].get("concurrencyPolicy") == "Forbid", f"{where}: CronJob {name} can overtake itself")
    report.expect(spec.get("activeDeadlineSeconds"), f"{where}: CronJob {name} can hang for ever")
    report.expect(spec["template"]["metadata"]["labels"].get("shoal-client") == "true",
                  f"{where}: CronJob {name} is kept out by the network policy")
    security, own = pod["securityContext"], container["securityContext"]
    report.expect(security.get("runAsNonRoot") and own.get("readOnlyRootFilesystem")
                  and own.get("capabilities", {}).get("drop") == ["ALL"], f"{where}: CronJob {name} keeps privileges")
    commands = (ROOT / f"node/src/cli/{container['args'][0]}.rs").read_text()
    report.expect(re.search(rf"^    {container['args'][1].capitalize()}\b", commands, re.MULTILINE),
                  f"{where}: CronJob {name} runs the unknown command {container['args']}")
    for variable in container["env"]:
        report.expect(variable["name"] in CLIENT_SETTINGS, f"{where}: CronJob {name} sets {variable['name']}, which no command reads")
        if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
            known = secret_keys.get(reference["name"], ())
            report.expect(reference["key"] in known, f"{where}: CronJob {name} wants {reference}, not in the example")
        elif variable["name"] == "SHOAL_URL":
            host, port = variable["value"].removeprefix("http://").split(":")
            service = by_kind["Service"].get(host, {"spec": {"ports": []}})
            known = {port["port"] for port in service["spec"]["ports"]}
            report.expect(int(port) in known, f"{where}: CronJob {name} asks {variable['value']}, where nobody is")


def check_pod(pod, container, ports, where, report):
    problem = image_problem(container["image"])
    report.expect(problem is None, f"{where}: the image {container['image']} {problem}")
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        probe = container.get(kind, {}).get("httpGet")
        if report.expect(probe, f"{where}: no {kind}"):
            report.expect(probe["path"] in PROBE_PATHS, f"{where}: {kind} asks for {probe['path']}, which is not served")
            report.expect(probe["port"] in ports, f"{where}: {kind} asks the unknown port {probe['port']}")
    liveness = container.get("livenessProbe", {}).get("httpGet", {})
    report.expect(liveness.get("path") == "/health/live", f"{where}: a lost quorum would restart every pod")
    report.expect(container.get("lifecycle", {}).get("preStop"), f"{where}: no pause before SIGTERM")
    report.expect(pod.get("terminationGracePeriodSeconds", 0) >= 30, f"{where}: no time to hand over leadership")
    security, own = pod["securityContext"], container["securityContext"]
    report.expect(security.get("runAsNonRoot") and security.get("runAsUser") == USER == security.get("fsGroup"),
                  f"{where}: the pod does not run as user {USER}")
    report.expect(security.get("seccompProfile", {}).get("type") == "RuntimeDefault", f"{where}: no seccomp profile")
    report.expect(own.get("readOnlyRootFilesystem") and own.get("allowPrivilegeEscalation") is False
                  and own.get("capabilities", {}).get("drop") == ["ALL"], f"{where}: the container keeps privileges")
    resources = container["resources"]
    report.expect("memory" in resources.get("limits", {}) and {"cpu", "memory"} <= set(resources.get("requests", {})),
                  f"{where}: resources are not bounded")
    report.expect("cpu" not in resources.get("limits", {}), f"{where}: a throttled node misses heartbeats")


def check_settings(by_kind, spec, container, secret_keys, where, report):
    settings = {}
    for source in container.get("envFrom", []):
        if "secretRef" in source:
            name = source["secretRef"]["name"]
            report.expect(name in secret_keys, f"{where}: no example of the secret {name}")
            continue
        name = source["configMapRef"]["name"]
        if report.expect(name in by_kind.get("ConfigMap", {}), f"{where}: no ConfigMap {name}"):
            settings.update(by_kind["ConfigMap"][name]["data"])
    defined, fields = set(), {}
    for variable in container["env"]:
        settings[variable["name"]] = variable.get("value")
        for used in re.findall(r"\$\((\w+)\)", variable.get("value") or ""):
            report.expect(used in defined, f"{where}: {variable['name']} uses {used} before it is defined")
        defined.add(variable["name"])
        if field := variable.get("valueFrom", {}).get("fieldRef"):
            fields[variable["name"]] = field["fieldPath"]
            report.expect(POD_FIELD.fullmatch(field["fieldPath"]),
                          f"{where}: {variable['name']} wants {field['fieldPath']}, which a pod does not tell")
        if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
            known = secret_keys.get(reference["name"], ())
            report.expect(reference["key"] in known, f"{where}: {variable['name']} wants {reference}, not in the example")
    for name in settings:
        report.expect(name in SETTINGS or not name.startswith("SHOAL_"), f"{where}: {name} is no setting of the node")
    report.expect(fields.get("SHOAL_ZONE") == "metadata.labels['topology.kubernetes.io/zone']",
                  f"{where}: pods do not learn which zone they are in")
    expected = int(settings["SHOAL_EXPECT"])
    pods = [f"shoal-{index}.{spec['serviceName']}:{PORTS['grpc']}" for index in range(expected)]
    report.expect(settings["SHOAL_JOIN"].split(",") == pods, f"{where}: SHOAL_JOIN is not {pods}")
    # Where an autoscaler decides on the number, its least one counts.
    least = [scaler["spec"].get("minReplicas", 1) for scaler in by_kind.get("HorizontalPodAutoscaler", {}).values()]
    replicas = spec.get("replicas", min(least, default=1))
    report.expect(replicas >= expected, f"{where}: {replicas} pods can never be the {expected} expected")
    report.expect(f".{spec['serviceName']}." in settings["SHOAL_ADVERTISE"], f"{where}: pods advertise a name of another Service")
    report.expect({"SHOAL_API_KEY", "SHOAL_CLUSTER_SECRET"} <= set(settings), f"{where}: pods get no secrets")
    grace = spec["template"]["spec"]["terminationGracePeriodSeconds"]
    drains = settings.get("SHOAL_DRAIN_ON_STOP") == "true"
    report.expect(not drains or grace > DRAIN_SECONDS, f"{where}: pods drain when they stop, and have {grace} s for it")


def check_kubernetes(root, report, tools):
    check_kustomizations(root, report)
    secret_keys = {}
    for path in sorted((root / "k8s").rglob("*.example.yaml")):
        for secret in documents(path):
            secret_keys[secret["metadata"]["name"]] = set(secret["stringData"])
            holds = set(secret["stringData"].values()) != {"replace-me"}
            report.expect(not holds, f"{path.relative_to(root)}: holds a secret")
    base = [item for name in yaml.safe_load((root / "k8s/base/kustomization.yaml").read_text())["resources"]
            for item in documents(root / "k8s/base" / name)]
    check_objects(root, base, secret_keys, "k8s/base", report)
    components = [item for path in sorted((root / "k8s/components").rglob("*.yaml"))
                  if path.name != "kustomization.yaml" and not path.name.endswith(".example.yaml")
                  for item in documents(path)]
    check_objects(root, base + components, secret_keys, "k8s/components", report)

    if not tools:
        return
    if not shutil.which("kubectl"):
        report.skipped.append("overlays as built: no kubectl")
        return
    overlays = sorted(path for path in (root / "k8s/overlays").iterdir())
    report.expect([path.name for path in overlays] == ["dev", "prod"], f"k8s/overlays: has {[path.name for path in overlays]}")
    for path in overlays:
        check_built(root, path, str(path.relative_to(root)), secret_keys, report)
    # Each component by itself on the base, whether or not an overlay takes it.
    for path in sorted((root / "k8s/components").iterdir()):
        with tempfile.TemporaryDirectory() as directory:
            kustomization = {"namespace": "shoal", "resources": [os.path.relpath(root / "k8s/base", directory)],
                             "components": [os.path.relpath(path, directory)]}
            (pathlib.Path(directory) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
            check_built(root, directory, str(path.relative_to(root)), secret_keys, report)


def check_built(root, path, where, secret_keys, report):
    """Checks what kustomize makes of a directory."""
    built = subprocess.run(["kubectl", "kustomize", path], capture_output=True, text=True)
    if report.expect(built.returncode == 0, f"{where}: {built.stderr.strip()}"):
        objects = list(yaml.safe_load_all(built.stdout))
        check_objects(root, objects, secret_keys, where, report)
        outside = [item["metadata"]["name"] for item in objects
                   if item["kind"] != "Namespace" and item["metadata"].get("namespace") != "shoal"]
        report.expect(not outside, f"{where}: outside the namespace: {outside}")


# ---- the tools themselves --------------------------------------------------------------------------------------------


def check_with_tools(root, report):
    """Asks the programs that will read these files, where they are installed."""
    def ask(what, command, **more):
        done = subprocess.run(command, capture_output=True, text=True, **more)
        report.expect(done.returncode == 0, f"{what}: {(done.stdout + done.stderr).strip()}")

    if shutil.which("promtool"):
        ask("prometheus.yml", ["promtool", "check", "config", root / "deploy/prometheus/prometheus.yml"])
        ask("rules_test.yml", ["promtool", "test", "rules", root / "tests/deploy/rules_test.yml"])
    else:
        report.skipped.append("rules as Prometheus reads them: no promtool")

    compose = None
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        compose = ["docker", "compose"]
    elif shutil.which("docker-compose"):
        compose = ["docker-compose"]
    if compose:
        # The directory may hold a .env with real secrets; what is in the environment goes before it.
        secrets = {"SHOAL_API_KEY": "x", "SHOAL_CLUSTER_SECRET": "x"}
        ask("docker-compose.yml", [*compose, "--profile", "monitoring", "--profile", "more", "config", "--quiet"], cwd=root,
            env={**os.environ, **secrets})
    else:
        report.skipped.append("docker-compose.yml as Compose reads it: no Compose")


def validate(root, tools=True):
    report = Report()
    for check in (check_text, check_dockerfile, check_environment, check_unit, check_nginx, check_dashboards):
        check(root, report)
    if yaml is None:
        report.skipped.append("everything that reads YAML: no PyYAML")
    else:
        check_compose(root, report)
        check_kubernetes(root, report, tools)
        if kubernetes_validate is None:
            report.skipped.append("the schemas of Kubernetes: no kubernetes-validate")
    if tools:
        check_with_tools(root, report)
    return report


# ---- proof that the checks can fail ----------------------------------------------------------------------------------

# (file, what to replace, by what, words of the message that must come)
MISTAKES = [
    ("deploy/Dockerfile", "USER 10001:10001", "USER root", "does not run as user"),
    ("deploy/Dockerfile", "debian:bookworm-slim", "debian", "has no tag"),
    ("deploy/Dockerfile", "SHOAL_MESH=0.0.0.0:6335", "SHOAL_MESH=0.0.0.0:6336", "mesh does not listen"),
    (".dockerignore", "!dist/shoal\n", "", "keeps dist/shoal from the build"),
    (".env.example", "SHOAL_MEMORY=4g\n", "", "differs from docker-compose.yml"),
    (".env.example", "SHOAL_API_KEY=\n", "SHOAL_API_KEY=secret\n", "must be empty"),
    ("deploy/systemd/shoal.service", "StateDirectory=shoal", "StateDirectory=other", "not the writable one"),
    ("deploy/systemd/shoal.env.example", "SHOAL_EXPECT", "SHOAL_EXPECTED", "no setting"),
    ("deploy/nginx.conf", "node-2.example.com:6333", "node-2.example.com:6335", "not on port 6333"),
    ("deploy/grafana/dashboards/shoal.json", "$instance", "$node", "unknown variables"),
]
YAML_MISTAKES = [
    ("docker-compose.yml", "grafana/grafana:11.5.2", "grafana/grafana:latest", "latest"),
    ("docker-compose.yml", "SHOAL_EXPECT: \"3\"", "SHOAL_EXPECT: \"2\"", "expects another number"),
    ("docker-compose.yml", "node-2:6334,", "", "joins"),
    ("docker-compose.yml", "    profiles: [more]\n", "", "5 nodes found the cluster"),
    ("docker-compose.yml", "      - node-3:/var/lib/shoal", "      - node-2:/var/lib/shoal", "volume of its own"),
    ("docker-compose.yml", "SHOAL_PUBLISH:-127.0.0.1", "SHOAL_PUBLISH:-0.0.0.0", "every network"),
    ("docker-compose.yml", "\"health\", \"--url\"", "\"status\", \"--url\"", "is probed by"),
    ("deploy/prometheus/prometheus.yml", "node-3:6333", "node-4:6333", "scrapes"),
    ("deploy/prometheus/prometheus.yml", "names: [node-4, node-5]", "names: [node-4]", "looks up"),
    ("deploy/prometheus/rules.yml", "up{job=\"shoal\"} == 0", "up{job=\"other\"} == 0", "selects the jobs"),
    ("deploy/prometheus/rules.yml", "alert: ShoalReplicaLag", "alert: ShoalReplicaBehind", "has no test"),
    ("deploy/prometheus/rules.yml", "{severity: info}", "{severity: low}", "severity of"),
    ("k8s/components/monitoring/prometheusrule.yaml", "> 10000", "> 100000", "is not deploy/prometheus/rules.yml"),
    ("k8s/base/services.yaml", "targetPort: mesh", "targetPort: actors", "unknown port actors"),
    ("k8s/base/services.yaml", "  selector:\n    app.kubernetes.io/name: shoal", "  selector:\n    app: shoal", "no pod has that"),
    ("k8s/base/statefulset.yaml", "path: /health/ready", "path: /ready", "which is not served"),
    ("k8s/base/statefulset.yaml", "serviceName: shoal-peers", "serviceName: shoal-headless", "no Service shoal-headless"),
    ("k8s/base/statefulset.yaml", "metadata.labels['topology.kubernetes.io/zone']",
     "metadata.labels['topology.kubernetes.io/region']", "which zone"),
    ("k8s/base/statefulset.yaml", "fieldPath: metadata.namespace", "fieldPath: spec.schedulerName", "does not tell"),
    ("k8s/base/statefulset.yaml", "key: api-key", "key: apikey", "not in the example"),
    ("k8s/base/statefulset.yaml", "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "keeps privileges"),
    ("k8s/base/configmap.yaml", "SHOAL_EXPECT: \"3\"", "SHOAL_EXPECT: \"5\"", "SHOAL_JOIN is not"),
    ("k8s/base/configmap.yaml", "SHOAL_LOG_FORMAT: json", "SHOAL_DRAIN_ON_STOP: \"true\"", "drain when they stop"),
    ("k8s/base/poddisruptionbudget.yaml", "maxUnavailable: 1", "maxUnavailable: 2", "cost a majority"),
    ("k8s/base/kustomization.yaml", "  - networkpolicy.yaml\n", "", "does not list"),
    ("k8s/components/autoscaling/horizontalpodautoscaler.yaml", "    kind: StatefulSet", "    kind: Deployment", "which is not there"),
    ("k8s/components/autoscaling/horizontalpodautoscaler.yaml", "minReplicas: 3", "minReplicas: 1", "fewer nodes than replicas"),
    ("k8s/components/autoscaling/horizontalpodautoscaler.yaml", "maxReplicas: 9", "maxReplicas: 3", "never adds a node"),
    ("k8s/components/autoscaling/horizontalpodautoscaler.yaml", "selectPolicy: Disabled", "selectPolicy: Max", "not drained"),
    ("k8s/components/autoscaling/horizontalpodautoscaler.yaml", "name: cpu", "name: memory", "memory is page cache"),
    ("k8s/components/backup/cronjob.yaml", "args: [backup, create]", "args: [backup, make]", "unknown command"),
    ("k8s/components/backup/cronjob.yaml", "http://shoal:6333", "http://shoal:8080", "where nobody is"),
    ("k8s/components/backup/cronjob.yaml", "            shoal-client: \"true\"\n", "", "kept out by the network policy"),
    ("k8s/components/monitoring/servicemonitor.yaml", "      app.kubernetes.io/component: clients\n", "", "chooses 2 services"),
]

SCHEMA_MISTAKES = [
    ("k8s/base/statefulset.yaml", "minReadySeconds: 15", "minReadySecond: 15", "minReadySecond"),
    ("k8s/components/autoscaling/horizontalpodautoscaler.yaml", "apiVersion: autoscaling/v2", "apiVersion: autoscaling/v2beta2",
     "does not fit the schema"),
]


def self_test():
    """Puts one mistake at a time into a copy, and expects to be told of it."""
    mistakes = MISTAKES + (YAML_MISTAKES if yaml else []) + (SCHEMA_MISTAKES if yaml and kubernetes_validate else [])
    with tempfile.TemporaryDirectory() as directory:
        copy = pathlib.Path(directory)
        for path in shipped(ROOT):
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        clean = validate(copy, tools=False)
        assert not clean.errors, clean.errors
        for name, right, wrong, message in mistakes:
            path = copy / name
            text = path.read_text()
            assert right in text, f"{name} no longer has {right!r}: update this test"
            path.write_text(text.replace(right, wrong))
            errors = validate(copy, tools=False).errors
            assert any(message in error for error in errors), f"{name}: {wrong!r} was not found: {errors}"
            path.write_text(text)
    print(f"self-test passed: {len(mistakes)} mistakes found")


def main():
    if sys.argv[1:] == ["--self-test"]:
        self_test()
        return 0
    if sys.argv[1:]:
        print(__doc__, file=sys.stderr)
        return 2
    report = validate(ROOT)
    for line in report.skipped:
        print(f"skipped: {line}")
    for line in report.errors:
        print(f"ERROR: {line}")
    print(f"{report.checks} checks, {len(report.errors)} errors")
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
