"""A real Prometheus for tests, that scrapes one program."""

from __future__ import annotations

import json
import signal
from urllib.parse import urlencode
from urllib.request import urlopen

from zreconnect.testing.embedded import (
    START_TIMEOUT,
    EmbeddedProgram,
    find_program,
    program_path,
)

_CONFIGURATION = """\
global:
  scrape_interval: 100ms
  scrape_timeout: 100ms
  evaluation_interval: 100ms
rule_files: ["{rules}"]
scrape_configs:
  - job_name: {job}
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""
JOB = "importer"


def promtool():
    """The path of the program that checks rules; None if it is not installed."""
    return find_program("promtool")


class EmbeddedPrometheus(EmbeddedProgram):
    """A Prometheus of one's own, from Debian's package prometheus or its like.

    See `EmbeddedProgram`. scraped: the port of the program. rules: the text of its alert rules.
    """

    _end_signal = signal.SIGKILL
    _environment_prefixes = ("GO",)

    def __init__(self, scraped, rules):
        super().__init__()
        self._scraped = scraped
        self._rules = rules

    @staticmethod
    def installed():
        return find_program("prometheus") is not None

    def query(self, expression):
        """The answer to a query, now: pairs of labels and a number.

        Raises urllib's HTTPError for a query that is wrong.
        """
        result = self._get("query", query=expression)["result"]
        return [(each["metric"], float(each["value"][1])) for each in result]

    def alerts(self):
        """The alert rules' names, and whether each is "firing", "pending" or "inactive"."""
        (group,) = self._get("rules")["groups"]
        return {rule["name"]: rule["state"] for rule in group["rules"]}

    def _get(self, what, timeout=START_TIMEOUT, **parameters):
        url = f"http://{self.host}:{self.port}/api/v1/{what}?{urlencode(parameters)}"
        with urlopen(url, timeout=timeout) as answer:
            return json.load(answer)["data"]

    def _refusal(self, timeout):
        try:
            self._get("query", timeout, query="1")
        except OSError as error:
            return error
        return None

    def _find_programs(self):
        if not self.installed():
            raise FileNotFoundError("prometheus is not installed: make services")

    def _initialise(self, base):
        super()._initialise(base)
        rules = self._secret_file("alerts.yml", self._rules)
        text = _CONFIGURATION.format(rules=rules, job=JOB, port=self._scraped)
        self._configuration = self._secret_file("prometheus.yml", text)

    def _command(self):
        return [
            program_path("prometheus"),
            f"--config.file={self._configuration}",
            f"--storage.tsdb.path={self._data}",
            f"--web.listen-address={self.host}:{self.port}",
            "--log.level=warn",
        ]
