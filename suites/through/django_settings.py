"""Django's settings for its own suite."""

import os
import sys
from typing import Any

from django.test.runner import DiscoverRunner

from suites.recording import RecordingResult

if os.environ["SUITE_DRIVER"] == "psycopg2":
    # Django takes it if psycopg is not installed.
    sys.modules["psycopg"] = None  # type: ignore[assignment]
# The embedded server is built without OpenSSL and without a library for UUIDs.
MISSING = ("pgcrypto", "uuid-ossp")


class RecordingRunner(DiscoverRunner):
    def get_resultclass(self) -> Any:
        return RecordingResult

    def setup_databases(self, **options: Any) -> Any:
        from django.contrib.postgres.operations import CreateExtension

        forwards = CreateExtension.database_forwards

        def create_if_there(operation: Any, *arguments: Any) -> None:
            if operation.name not in MISSING:
                forwards(operation, *arguments)

        CreateExtension.database_forwards = create_if_there
        return super().setup_databases(**options)


TEST_RUNNER = "suites.through.django_settings.RecordingRunner"
SERVER = {
    "ENGINE": "django.db.backends.postgresql",
    "HOST": os.environ["SUITE_HOST"],
    "PORT": os.environ["SUITE_PORT"],
    "USER": os.environ["SUITE_USER"],
    "PASSWORD": os.environ["SUITE_PASSWORD"],
}
DATABASES = {"default": {**SERVER, "NAME": "django"}, "other": {**SERVER, "NAME": "django2"}}
SECRET_KEY = "that of the tests"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
USE_TZ = False
