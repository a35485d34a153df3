"""Django's settings, with zreconnect's backend."""

from suites.through.django_settings import *  # noqa: F403
from suites.through.django_settings import DATABASES
from zreconnect import FAIL_FAST

for database in DATABASES.values():
    database["ENGINE"] = "zreconnect.integrations.django"
    database["OPTIONS"] = {"policy": FAIL_FAST}
