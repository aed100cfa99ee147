#!/usr/bin/env python3
"""Checks that the alert rules and the dashboard ask only for metrics that a node really exports.

    check_metrics.py http://127.0.0.1:6333/metrics [--api-key KEY] [--strict]
    check_metrics.py --self-test

A renamed metric breaks no build: the alert just never fires again. So every metric name in deploy/prometheus/rules.yml
and in deploy/grafana/dashboards/*.json must be in the node's answer, with every label that the expression selects or
groups by, or that a legend or an alert's text shows.

A metric that has no sample yet (nothing was embedded so far) can be known by its `# TYPE` line alone; its labels cannot be
checked then, which is reported, and is an error with --strict. Exit code 0: all there. 1: something is missing. 2: the
check itself could not be done.

Only the standard library is used, so that it runs wherever Python does. The reader of PromQL is a tokenizer with just
enough structure for names, label matchers and groupings; what it leaves out is the meaning of everything else.
"""

import argparse
import json
import pathlib
import re
import sys
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Prometheus makes these itself, for every target.
MADE_BY_PROMETHEUS = {"up", "ALERTS", "ALERTS_FOR_STATE"}
# Prometheus adds these labels to every sample when it scrapes.
TARGET_LABELS = {"job", "instance", "namespace", "pod", "service", "container", "endpoint"}
AGGREGATORS = {
    "sum", "min", "max", "avg", "group", "stddev", "stdvar", "count", "count_values", "bottomk", "topk", "quantile",
}
GROUPINGS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
OTHER_WORDS = {"and", "or", "unless", "bool", "offset", "atan2", "inf", "nan", "start", "end"}

TOKEN = re.compile(
    r"""
      (?P<space>\s+|\#[^\n]*)
    | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`[^`]*`)
    | (?P<range>\[[^\]]*\])
    | (?P<number>(?:0x[0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?:[a-z]+\d*)*)
    | (?P<variable>\$\{?[A-Za-z_][\w:.]*\}?)
    | (?P<name>[A-Za-z_:][\w:]*)
    | (?P<operator>=~|!~|!=|==|<=|>=|[-+*/%^<>=(){},@])
    """,
    re.VERBOSE,
)


class BadExpression(ValueError):
    """An expression that the tokenizer cannot read. It is an error in the rule, or a gap here; never ignored."""


def tokenize(expression):
    """Returns the (kind, text) pairs of an expression, without white space and comments."""
    tokens, position = [], 0
    while position < len(expression):
        match = TOKEN.match(expression, position)
        if not match:
            raise BadExpression(f"cannot read {expression[position:position + 20]!r} in {expression!r}")
        if match.lastgroup != "space":
            tokens.append((match.lastgroup, match.group()))
        position = match.end()
    return tokens


def closing(tokens, start):
    """Returns the index of the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(tokens)):
        if tokens[index][0] == "operator":
            depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(tokens[index][1], 0)
            if depth == 0:
                return index
    raise BadExpression(f"bracket {tokens[start][1]!r} is never closed")


def opening(tokens, end):
    """Returns the index of the bracket that opens the one at `end`."""
    depth = 0
    for index in range(end, -1, -1):
        if tokens[index][0] == "operator":
            depth += {")": 1, "}": 1, "(": -1, "{": -1}.get(tokens[index][1], 0)
            if depth == 0:
                return index
    raise BadExpression(f"bracket {tokens[end][1]!r} is never opened")


def is_at(tokens, index, text):
    return 0 <= index < len(tokens) and tokens[index] == ("operator", text)


def used_in(expression):
    """Returns {metric name: set of labels} for what an expression selects and groups by."""
    tokens = tokenize(expression)
    for index, token in enumerate(tokens):
        if token in {("operator", "("), ("operator", "{")}:
            closing(tokens, index)
    selectors = []  # (position, name, labels)
    groupings = []  # (first, last, labels): the labels must be on every metric between these positions
    index = 0
    while index < len(tokens):
        kind, text = tokens[index]
        if kind == "name" and text in GROUPINGS and is_at(tokens, index + 1, "("):
            end = closing(tokens, index + 1)
            labels = {word for word_kind, word in tokens[index + 1:end] if word_kind == "name"}
            if text == "by":
                groupings.append((*aggregated(tokens, index, end), labels))
            index = end + 1
        elif kind == "name" and text in GROUPINGS | OTHER_WORDS:
            index += 1
        elif kind == "name" and (is_at(tokens, index + 1, "(") or text in AGGREGATORS):
            index += 1  # A function or an aggregator.
        elif kind == "name":
            labels, end = set(), index
            if is_at(tokens, index + 1, "{"):
                end = closing(tokens, index + 1)
                labels = matcher_labels(tokens[index + 2:end])
            selectors.append((index, text, labels))
            index = end + 1
        elif (kind, text) == ("operator", "{"):
            raise BadExpression(f"a selector without a metric name in {expression!r}: write the name in front")
        else:
            index += 1
    used = {}
    for position, name, labels in selectors:
        grouped = [by for first, last, by in groupings if first < position < last]
        used.setdefault(name, set()).update(labels, *grouped)
    return used


def aggregated(tokens, by_index, list_end):
    """Returns the range that a `by (…)` groups: the brackets after it, or, if there are none, the ones before it."""
    if is_at(tokens, list_end + 1, "("):
        return list_end + 1, closing(tokens, list_end + 1)
    if is_at(tokens, by_index - 1, ")"):
        return opening(tokens, by_index - 1), by_index - 1
    raise BadExpression("a `by` that belongs to no aggregation")


def matcher_labels(tokens):
    """Returns the label names of `a="x",b=~"y"`."""
    return {
        text
        for index, (kind, text) in enumerate(tokens)
        if kind == "name" and index + 1 < len(tokens) and tokens[index + 1][1] in {"=", "!=", "=~", "!~"}
    }


def rule_expressions(text):
    """Yields (where, expression, shown labels) of a rules file.

    Python's standard library has no YAML, and a rule is plain enough to be read by line: `- alert: NAME`, then `expr:`
    with the expression on the line or in a `|` or `>` block below it, indented deeper.
    """
    where, recorded, found = "?", set(), []
    lines = text.splitlines()
    index = 0
    while index < len(lines):
        line = lines[index]
        index += 1
        if line.lstrip().startswith("#"):
            continue
        if match := re.match(r"\s*- (alert|record):\s*(\S+)", line):
            where = match.group(2)
            if match.group(1) == "record":
                recorded.add(where)
        if match := re.match(r"(\s*)(?:- )?expr:\s*(.*)$", line):
            indent, value = len(match.group(1)), match.group(2).strip()
            if value[:1] in {"|", ">"}:
                block = []
                while index < len(lines) and (not lines[index].strip() or indent_of(lines[index]) > indent):
                    block.append(lines[index])
                    index += 1
                value = "\n".join(block)
            elif value[:1] == value[-1:] and value[:1] in {"'", '"'}:
                value = json.loads(value) if value[0] == '"' else value[1:-1].replace("''", "'")
            found.append([where, value, set()])
        elif found and found[-1][0] == where:
            found[-1][2].update(re.findall(r"\$labels\.(\w+)", line))
    return [(where, expression, shown) for where, expression, shown in found], recorded


def indent_of(line):
    return len(line) - len(line.lstrip())


def dashboard_expressions(dashboard):
    """Returns (where, expression, shown labels) of a dashboard: panels, nested panels, annotations and variables."""
    found = []

    def walk(panels):
        for panel in panels:
            walk(panel.get("panels", []))
            for target in panel.get("targets", []):
                if target.get("expr"):
                    found.append((panel.get("title", "?"), target["expr"], braces(target.get("legendFormat", ""))))

    walk(dashboard.get("panels", []))
    for annotation in dashboard.get("annotations", {}).get("list", []):
        if annotation.get("expr"):
            shown = braces(annotation.get("titleFormat", "") + annotation.get("textFormat", ""))
            found.append((annotation.get("name", "?"), annotation["expr"], shown))
    for variable in dashboard.get("templating", {}).get("list", []):
        if variable.get("type") != "query":
            continue
        query = variable["query"]["query"] if isinstance(variable["query"], dict) else variable["query"]
        if match := re.fullmatch(r"label_values\((.*),\s*(\w+)\s*\)", query):
            found.append((f"variable {variable['name']}", match.group(1), {match.group(2)}))
        elif match := re.fullmatch(r"query_result\((.*)\)", query):
            found.append((f"variable {variable['name']}", match.group(1), set()))
        elif not re.fullmatch(r"label_values\(\w+\)", query):
            raise BadExpression(f"variable {variable['name']}: unknown query {query!r}")
    return found


def braces(legend):
    return set(re.findall(r"\{\{\s*(\w+)\s*\}\}", legend))


def exported_by(exposition):
    """Reads a Prometheus text answer. Returns ({sample name: [set of labels, …]}, {names declared by # TYPE})."""
    samples, declared = {}, set()
    for line in exposition.splitlines():
        if match := re.match(r"# TYPE (\S+) (\S+)", line):
            name, kind = match.groups()
            declared.add(name)
            if kind == "histogram":
                declared |= {name + suffix for suffix in ("_bucket", "_sum", "_count")}
            elif kind == "summary":
                declared |= {name + suffix for suffix in ("_sum", "_count")}
        elif match := re.match(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+\S+", line):
            labels = set(re.findall(r'(\w+)="(?:\\.|[^"\\])*"', match.group(2) or ""))
            samples.setdefault(match.group(1), []).append(labels)
    return samples, declared


def compare(wanted, samples, declared):
    """Returns (errors, warnings) for wanted = [(where, expression, shown labels)]."""
    errors, warnings = [], []
    for where, expression, shown in wanted:
        try:
            used = used_in(expression)
        except BadExpression as error:
            errors.append(f"{where}: {error}")
            continue
        on_any = set(TARGET_LABELS)
        complete = True
        for name, labels in sorted(used.items()):
            if name in MADE_BY_PROMETHEUS:
                continue
            if name in samples:
                seen = set().union(*samples[name])
                on_any |= seen
                for label in sorted(labels - seen - TARGET_LABELS):
                    errors.append(f"{where}: {name} has no label {label!r}, only {sorted(seen)}")
            elif name in declared:
                complete = False
                warnings.append(f"{where}: {name} has no sample yet, so its labels {sorted(labels)} are unchecked")
            else:
                complete = False
                errors.append(f"{where}: {name} is not exported")
        if complete:
            for label in sorted(shown - on_any):
                errors.append(f"{where}: shows label {label!r}, which none of its metrics has")
    return errors, warnings


def load_wanted(root):
    """Reads all expressions under deploy/. Recorded names count as exported, since Prometheus makes them."""
    wanted, recorded = [], set()
    rules, names = rule_expressions((root / "deploy/prometheus/rules.yml").read_text())
    recorded |= names
    wanted += [(f"rules.yml: {where}", expression, shown) for where, expression, shown in rules]
    for path in sorted((root / "deploy/grafana/dashboards").glob("*.json")):
        wanted += [
            (f"{path.name}: {where}", expression, shown)
            for where, expression, shown in dashboard_expressions(json.loads(path.read_text()))
        ]
    return wanted, recorded


def fetch(url, api_key):
    request = urllib.request.Request(url)
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


def self_test():
    """Proves the readers on small cases, and that a missing name or label is really found."""
    cases = {
        "up == 0": {"up": set()},
        'a{x="1",y=~"b{,c}"} / b': {"a": {"x", "y"}, "b": set()},
        "sum by (le, job) (rate(a_bucket[5m]))": {"a_bucket": {"le", "job"}},
        "sum(rate(a[$__rate_interval])) by (x) / sum(b)": {"a": {"x"}, "b": set()},
        "histogram_quantile(0.95, sum by (le) (rate(h_bucket{z!='q'}[5m]))) > 2.5e-3": {"h_bucket": {"le", "z"}},
        "a / on(x) group_left(y) b": {"a": set(), "b": set()},
        "sum without (x) (a) and b unless c offset 5m": {"a": set(), "b": set(), "c": set()},
        "predict_linear(a[6h:5m], 86400) < 0 # words here are a comment": {"a": set()},
        'topk(10, max by (x) (a{i=~"$instance"})) or vector(0)': {"a": {"x", "i"}},
        "job:a:rate5m > bool 1h30m": {"job:a:rate5m": set()},
        "time() - max_over_time(a[1h] @ end())": {"a": set()},
        "sum by (x) (a) + sum by (y) (b)": {"a": {"x"}, "b": {"y"}},
        "count_values without (z) (\"v\", a)": {"a": set()},
        "sum by (a) (sum by (a, b) (m))": {"m": {"a", "b"}},
    }
    for expression, expected in cases.items():
        assert used_in(expression) == expected, (expression, used_in(expression), expected)
    for broken in ("sum(a", "a ~ b", '{job="x"}', "a{x='1'"):
        try:
            used_in(broken)
        except BadExpression:
            continue
        raise AssertionError(f"{broken!r} was read without complaint")

    rules, recorded = rule_expressions(
        "groups:\n  - rules:\n      # expr: comment\n      - record: r:a\n        expr: sum(a)\n"
        "      - alert: B\n        expr: |\n          b\n            > 1\n\n        for: 1m\n"
        "        annotations: {summary: '{{ $labels.x }}'}\n      - expr: 'c'\n        alert: C\n"
        '      - alert: D\n        expr: "d{x=\\"1\\"}"\n'
    )
    assert [expression.split() for _, expression, _ in rules] == [["sum(a)"], ["b", ">", "1"], ["c"], ['d{x="1"}']], rules
    assert rules[1][0] == "B" and rules[1][2] == {"x"} and recorded == {"r:a"}, rules

    dashboard = {
        "panels": [{"title": "row", "panels": [{"title": "p", "targets": [{"expr": "a", "legendFormat": "{{ x }}"}]}]}],
        "annotations": {"list": [{"name": "n", "expr": "b", "textFormat": "{{y}}"}]},
        "templating": {"list": [{"name": "v", "type": "query", "query": {"query": 'label_values(c{k="1"}, z)'}}]},
    }
    expected = [("p", "a", {"x"}), ("n", "b", {"y"}), ("variable v", 'c{k="1"}', {"z"})]
    assert dashboard_expressions(dashboard) == expected, dashboard_expressions(dashboard)

    samples, declared = exported_by(
        "# HELP a words\n# TYPE a counter\n"
        'a{x="1",y="q\\"},z=\\"2"} 3\nb 1 1700000000\n# TYPE h histogram\n# TYPE s summary\n'
    )
    assert samples == {"a": [{"x", "y"}], "b": [set()]}, samples
    assert {"h_bucket", "h_sum", "s_count"} <= declared and "s_bucket" not in declared

    def judge(expression, shown=()):
        errors, warnings = compare([("t", expression, set(shown))], samples, declared)
        return len(errors), len(warnings)

    assert judge('a{x="1"} + b', {"y", "instance"}) == (0, 0)
    assert judge("rate(h_bucket[5m])") == (0, 1)
    assert judge("gone") == (1, 0)
    assert judge("rate(s_bucket[5m])") == (1, 0), "a summary has no buckets"
    assert judge('a{w="1"}') == (1, 0)
    assert judge("sum by (w) (a)") == (1, 0)
    assert judge("a", {"w"}) == (1, 0)
    assert judge("sum(a") == (1, 0)

    wanted, _ = load_wanted(ROOT)
    names = set().union(*(used_in(expression) for _, expression, _ in wanted))
    assert len(wanted) > 40 and {"http_requests_total", "shoal_groups_without_leader", "up"} <= names, names
    errors, _ = compare(wanted, {}, set())
    assert len(errors) >= len(wanted) - 2, "against an empty node nearly everything must be missing"
    print(f"self-test passed: {len(cases)} expressions, {len(wanted)} shipped ones use {len(names)} metrics")


def main():
    parser = argparse.ArgumentParser(description="Checks rules and dashboards against the metrics of a running node.")
    parser.add_argument("url", nargs="?", help="the address of /metrics")
    parser.add_argument("--api-key", help="sent as `Authorization: Bearer KEY`")
    parser.add_argument("--strict", action="store_true", help="a metric without a sample is an error")
    parser.add_argument("--self-test", action="store_true", help="test this program itself")
    options = parser.parse_args()
    if options.self_test:
        self_test()
        return 0
    if not options.url:
        parser.error("a URL is needed")
    try:
        samples, declared = exported_by(fetch(options.url, options.api_key))
        wanted, recorded = load_wanted(ROOT)
    except (urllib.error.URLError, OSError, ValueError) as error:
        print(f"cannot check: {error}", file=sys.stderr)
        return 2
    errors, warnings = compare(wanted, samples, declared | recorded)
    if options.strict:
        errors, warnings = errors + warnings, []
    for line in sorted(set(warnings)):
        print(f"warning: {line}")
    for line in sorted(set(errors)):
        print(f"ERROR: {line}")
    print(f"{len(wanted)} expressions, {len(samples)} exported names, {len(set(errors))} errors")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
