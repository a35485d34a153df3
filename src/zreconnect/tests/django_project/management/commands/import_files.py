import ast
from pathlib import Path

from django.core.management.base import BaseCommand
from django.db import transaction

from zreconnect import retry_on_disconnect
from zreconnect.tests.django_project.models import Definition, File


class Command(BaseCommand):
    help = "Record what the Python files in a directory define."

    def add_arguments(self, parser):
        parser.add_argument("directory", type=Path)

    def handle(self, directory, **options):
        for path in sorted(directory.glob("*.py")):
            names = [node.name for node in ast.parse(path.read_text()).body]
            record(path.name, names)
            self.stdout.write(f"{path.name}: {len(names)}")


@retry_on_disconnect(timeout=600)
@transaction.atomic
def record(path, names):
    file = File.objects.create(path=path)
    for name in names:
        Definition.objects.create(file=file, name=name)
